"""Parameter names of MMDetection 3.x's SSD and SSDLite."""

import re
from typing import Dict, Iterable

from ssd.checkpoint.vgg import CONV_NAMES

__all__ = ["map_name", "recognises"]

_RULES = [
    (r"^backbone\.features\.(\d+)\.", lambda m: f"backbone.bottom_up.{CONV_NAMES[int(m[1])]}."),
    (r"^backbone\.layer(\d+)\.", r"backbone.bottom_up.stage\1."),
    (r"^backbone\.(conv[12])\.", r"backbone.bottom_up.\1."),
    (r"\.expand_conv\.", ".expand."),
    (r"\.linear_conv\.", ".project."),
    (r"^neck\.l2_norm\.", "backbone.l2_norm.conv4_3."),
    (r"^neck\.extra_layers\.(\d+)\.1\.depthwise_conv\.", r"backbone.extra_layers.\1.1."),
    (r"^neck\.extra_layers\.(\d+)\.1\.pointwise_conv\.", r"backbone.extra_layers.\1.2."),
    (r"^neck\.extra_layers\.", "backbone.extra_layers."),
    (r"^bbox_head\.cls_convs\.(\d+)\.0\.(weight|bias)$", r"head.cls_predictors.\1.\2"),
    (r"^bbox_head\.reg_convs\.(\d+)\.0\.(weight|bias)$", r"head.box_predictors.\1.\2"),
    (r"^bbox_head\.cls_convs\.", "head.cls_predictors."),
    (r"^bbox_head\.reg_convs\.", "head.box_predictors."),
    (r"\.depthwise_conv\.", ".depthwise."),
    (r"\.conv\.(weight|bias)$", r".\1"),
    (r"\.bn\.", ".norm."),
]


def recognises(names: Iterable[str]) -> bool:
    """Whether these are the parameter names of an MMDetection SSD."""
    return any(name.startswith("bbox_head.cls_convs.") for name in names)


def map_name(name: str) -> str:
    """MMDetection's parameter name to ours. Classes are in the same order, background last."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def convert(state: Dict) -> Dict:
    return {map_name(name): value for name, value in state.items()}
