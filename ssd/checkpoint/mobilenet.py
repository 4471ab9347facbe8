"""Parameter names of the MobileNets that the light models of lufficc and qfgaohao start from.

Those are d-li14/mobilenetv3.pytorch's MobileNetV3-Large and qfgaohao/pytorch-ssd's MobileNetV1,
both trained on ImageNet.
"""

import re
from typing import Dict, List, Tuple

from torch import Tensor

from ssd.checkpoint.layers import IMAGENET_STD, adapt_first_layer

__all__ = ["block_names", "convert", "recognises"]

# Blocks in each stage of our backbones.
STAGES = {"v1": (1, 2, 2, 6, 2), "v2": (1, 2, 3, 4, 3, 3, 1), "v3": (1, 2, 3, 4, 2, 3)}
_PREFIX = "backbone.bottom_up."
# Position in a block to our layer.
_V1_LAYERS = {"0": "0", "1": "0.norm", "3": "1", "4": "1.norm"}
_V3_FIRST = {"0": "depthwise", "1": "depthwise.norm", "4": "project", "5": "project.norm"}
_V3_LAYERS = {
    "0": "expand", "1": "expand.norm", "3": "depthwise", "4": "depthwise.norm",
    "5.fc.0": "squeeze.0.fc1", "5.fc.2": "squeeze.0.fc2", "7": "project", "8": "project.norm",
}  # fmt: skip


def block_names(version: str) -> List[str]:
    """Names of our layers in their order: "conv1", "stage1.0", …, "conv2"."""
    blocks = [f"stage{s}.{b}" for s, n in enumerate(STAGES[version], 1) for b in range(n)]
    return ["conv1", *blocks, "conv2"]


def recognises(state: Dict[str, Tensor]) -> str:
    """``"MobileNetV1"`` (qfgaohao), ``"MobileNetV3"`` (d-li14), or ``""``."""
    if "0.0.weight" in state and "13.3.weight" in state:
        return "MobileNetV1"
    return "MobileNetV3" if "features.4.conv.5.fc.0.weight" in state else ""


def convert(
    state: Dict[str, Tensor], pixel_std: Tuple[float, ...], input_format: str
) -> Dict[str, Tensor]:
    """The classifier's parameters as those of our backbone; its own last layers keep their names.

    The V3's first layer is adapted to the config's images (see :func:`adapt_first_layer`); the
    V1's only to their channels' order: its lab has the inputs that it was trained with.
    """
    kind = recognises(state)
    result = {}
    for name, value in state.items():
        result[_v1_name(name) if kind == "MobileNetV1" else _v3_name(name)] = (
            value[:, :, None, None] if ".fc." in name and value.dim() == 2 else value
        )
    std = pixel_std if kind == "MobileNetV1" else [255 * std for std in IMAGENET_STD]
    adapt_first_layer(result, _PREFIX + "conv1", std, pixel_std, input_format)
    return result


def _v1_name(name: str) -> str:
    if not (match := re.fullmatch(r"(\d+)\.(\d)\.(\w+)", name)):
        return name
    index, position, leaf = int(match[1]), match[2], match[3]
    layer = {"0": "", "1": "norm."}[position] if index == 0 else f"{_V1_LAYERS[position]}."
    return f"{_PREFIX}{block_names('v1')[index]}.{layer}{leaf}"


def _v3_name(name: str) -> str:
    if match := re.fullmatch(r"(features\.0|features\.16|conv)\.([01])\.(\w+)", name):
        layer = "conv1" if match[1] == "features.0" else "conv2"
        return f"{_PREFIX}{layer}.{'norm.' if match[2] == '1' else ''}{match[3]}"
    if match := re.fullmatch(r"features\.(\d+)\.conv\.(.+)\.(\w+)", name):
        index, position, leaf = int(match[1]), match[2], match[3]
        layer = (_V3_FIRST if index == 1 else _V3_LAYERS)[position]
        return f"{_PREFIX}{block_names('v3')[index]}.{layer}.{leaf}"
    return name
