"""NVIDIA DeepLearningExamples' SSD300 on ResNet-50."""

import re
from typing import Iterator, Tuple

from ssd.checkpoint.lineage import Lineage, State, extras, heads
from ssd.checkpoint.resnet import torchvision_resnet

__all__ = ["LINEAGES"]


def _names() -> Iterator[Tuple[str, str]]:
    prefix = "feature_extractor.feature_extractor."
    for theirs, ours in torchvision_resnet(("0", "1")):
        if not theirs.startswith("layer4"):  # after ReLU and pool, 2 and 3, come layer1 to layer3
            yield prefix + re.sub(r"^layer(\d)", lambda x: str(3 + int(x[1])), theirs), ours
    layers = {"0": "0", "1": "0.norm", "3": "1", "4": "1.norm"}
    yield from extras("additional_blocks.{}.", layers)
    yield from heads("conf.{}", "loc.{}")


def _reorder(state: State, boxes_first: bool) -> State:
    """Outputs of a level ordered by class or coordinate, then default box, to box, then class.

    Or back, with ``boxes_first`` False.
    """
    result = dict(state)
    for name, value in state.items():
        if level := re.fullmatch(r"(?:conf|loc)\.(\d)\.(?:weight|bias)", name):
            num_anchors = len(state[f"loc.{level[1]}.bias"]) // 4
            sizes = (-1, num_anchors) if boxes_first else (num_anchors, -1)
            result[name] = value.unflatten(0, sizes).transpose(0, 1).flatten(0, 1)
    return result


LINEAGES = [
    Lineage(
        "nvidia",
        "NVIDIA's SSD300",
        ("feature_extractor.feature_extractor.0.weight", "conf.0.weight"),
        dict(_names()),
        background_first=True,
        prepare=lambda state: _reorder(state, boxes_first=True),
        restore=lambda state: _reorder(state, boxes_first=False),
    )
]
