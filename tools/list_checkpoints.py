#!/usr/bin/env python
"""Prints the tables of docs/checkpoints.md: list_checkpoints.py [--check docs/checkpoints.md]"""

import argparse
import re
import sys
from pathlib import Path
from typing import Iterable, Sequence

from ssd.checkpoint.lineage import Lineage
from ssd.checkpoint.published import PUBLISHED
from ssd.checkpoint.recognition import BACKBONES, DETECTORS

# What reading changes besides names, the background's place and the channels' order.
_CHANGES = {
    "lufficc_mobilenetv2": "biases before BatchNorm go into its means",
    "lufficc_mobilenetv3": "biases before BatchNorm go into its means; squeeze layers to 1×1 "
    "convolutions",
    "qfgaohao_mobilenetv2": "biases before BatchNorm go into its means",
    "nvidia": "outputs from class-major to box-major",
    "detectron2_fork": "a `.pkl` may name its channels' order",
    "torchvision_vgg16": "fc6, fc7 subsampled, scale",
    "torchvision_vgg16_features": "no fc6, fc7",
    "caffe_vgg16": "fc6, fc7 subsampled",
    "detectron2_resnet_resnext": "Caffe2's names; scale",
    "detectron2_resnet_msra": "Caffe2's names; scale",
    "vgg16_features": "no fc6, fc7; scale",
}
_LINEAGES = "tests/checkpoint/test_lineages.py: plain evaluation"
# What its output was compared with, and where.
_TESTED = {
    "mmdet_vgg": f"{_LINEAGES}; golden file of MMDetection",
    "mmdet_mobilenetv2": "tests/test_golden.py: golden file of MMDetection",
    "torchvision_vgg": "docs/fidelity.md: torchvision, side by side",
    "torchvision_mobilenetv3": "docs/fidelity.md: torchvision, side by side",
    "qfgaohao_vgg_l2norm": "names and values",
}
_TESTED_BACKBONES = {
    "vgg": "tests/checkpoint/test_vgg.py",
    "mobilenet": "tests/checkpoint/test_mobilenet.py, test_torchvision.py",
    "resnet": "tests/checkpoint/test_resnet.py, test_torchvision.py",
}


def changes(lineage: Lineage) -> str:
    """What reading does to the parameters, besides their names."""
    found = ["background to the last place"] if lineage.background_first else []
    if lineage.input_format == "BGR":
        found.append("BGR to RGB")
    if lineage.input_std and lineage.key not in _CHANGES:
        found.append("scale of the input")
    found += [_CHANGES[lineage.key]] if lineage.key in _CHANGES else []
    return "; ".join(found) or "nothing"


def _signature(lineage: Lineage) -> str:
    return ", ".join(f"`{name}`" for name in lineage.signature)


def _table(header: str, rows: Iterable[Sequence[str]]) -> str:
    lines = [header, re.sub("[^|]+", "---", header), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def detectors() -> str:
    rows = []
    for x in DETECTORS:
        labs = dict.fromkeys(f"`{w.lab}`" for w in PUBLISHED.values() if w.lineage == x.key)
        tested = _TESTED.get(x.key, _LINEAGES)
        rows.append((x.title, _signature(x), changes(x), ", ".join(labs) or "–", tested))
    return _table("| file of | recognised by | what changes | labs | tested by |", rows)


def backbones() -> str:
    rows = []
    for x in {x.key: x for x in BACKBONES}.values():
        signatures = " or ".join(_signature(other) for other in BACKBONES if other.key == x.key)
        tested = next(test for kind, test in _TESTED_BACKBONES.items() if kind in x.key)
        rows.append((x.title, signatures, changes(x), tested))
    return _table("| file of | recognised by | what changes | tested by |", rows)


def published() -> str:
    rows = []
    for name, x in PUBLISHED.items():
        address = f"[{x.result}]({x.url})" + (f" `{x.file}`" if x.file else "")
        lab = f"`{x.lab}`" + (f" with `{x.options}`" if x.opts else "")
        rows.append((f"`{name}`", address, lab, x.sha256[:8] if x.sha256 else "–"))
    return _table("| name | published | lab | SHA-256 |", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", metavar="FILE", help="fail unless the file holds the tables")
    args = parser.parse_args()
    tables = [detectors(), backbones(), published()]
    print("\n".join(tables), end="")
    if args.check:
        text = Path(args.check).read_text(encoding="utf-8")
        if missing := [table for table in tables if table not in text]:
            sys.exit(f"{args.check} doesn't hold {len(missing)} of these tables")
