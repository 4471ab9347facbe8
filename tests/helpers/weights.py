"""Names in MMDetection's files, and files that tests write."""

import io
import os
import re
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).resolve().parents[1] / "data/golden"
OLD = {"_use_new_zipfile_serialization": False}  # torch's format before 1.6


def mmdet_shapes(name):
    """{parameter: its shape} of MMDetection 3.3.0, in its order, as the golden file has them."""
    data = np.load(GOLDEN / f"golden_mmdet_{name}.npz")
    shapes = [tuple(int(size) for size in str(x).split("x") if size) for x in data["shapes"]]
    return dict(zip(map(str, data["names"]), shapes))


def mmdet_old_name(name):
    """Of MMDetection 2.12, against whose names it was checked."""
    pair = r"neck\.extra_layers\.(\d)\.(\d)\.conv"
    name = re.sub(pair, lambda m: f"backbone.extra.{2 * int(m[1]) + int(m[2])}", name)
    return re.sub(r"(_convs\.\d)\.0", r"\1", name.replace("neck.l2_norm", "backbone.l2_norm"))


def saved(data, **kwargs):
    """The bytes of a torch file."""
    buffer = io.BytesIO()
    torch.save(data, buffer, **kwargs)
    return buffer.getvalue()


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)
