"""Parameter names of torchvision's SSD300, SSDLite320, and of its classifiers' backbones."""

import re
from typing import Dict, Tuple

from torch import Tensor

from ssd.checkpoint.layers import IMAGENET_STD, adapt_first_layer, background_last
from ssd.checkpoint.mobilenet import block_names
from ssd.checkpoint.vgg import CONV_NAMES

__all__ = ["convert", "convert_backbone", "recognises", "recognises_backbone"]

_HEAD = re.compile(r"head\.(classification|regression)_head\.module_list\.(\d+)\.(.+)")
_PREFIX = "backbone.bottom_up."


def recognises(state: Dict[str, Tensor]) -> bool:
    """Whether these are the parameters of ``torchvision.models.detection``'s SSD or SSDLite."""
    return any(_HEAD.match(name) for name in state)


def convert(state: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """A torchvision SSD's parameters by our names; the background class goes from first to last.

    A parameter that we don't know keeps its name.
    """
    result, features = {}, {}
    for name, value in state.items():
        if match := _HEAD.match(name):
            kind, level, rest = match.groups()
            # in SSDLite the last 1×1 convolution predicts, in SSD300 the only one
            predicts = re.fullmatch(r"(1\.)?(weight|bias)", rest)
            if kind == "classification" and predicts:
                boxes = state[name.replace("classification", "regression")]
                value = background_last(value, len(boxes) // 4)
            list_name = "cls_predictors" if kind == "classification" else "box_predictors"
            result[f"head.{list_name}.{level}.{_conv_norm(rest)}"] = value
        elif name == "backbone.scale_weight":
            result["backbone.l2_norm.conv4_3.weight"] = value
        elif match := re.match(r"backbone\.features\.([01])\.(\d+)\.(.+)", name):
            # SSDLite's are cut inside block 13: "0.13" is its expansion, "1.0" the rest of it
            part, index, rest = int(match[1]), int(match[2]), match[3]
            if (part, index) == (0, 13):
                rest = f"block.0.{rest}"
            elif (part, index) == (1, 0):
                rest = f"block.{rest}"
            features[f"{index + 13 * part}.{rest}"] = value
        elif match := re.match(r"backbone\.features\.(\d+)\.(weight|bias)$", name):
            result[f"{_PREFIX}{CONV_NAMES[int(match[1])]}.{match[2]}"] = value
        elif match := re.match(r"backbone\.extra\.(\d+)\.(.+)", name):
            result[_extra_name(int(match[1]), match[2], "backbone.scale_weight" in state)] = value
        else:
            result[name] = value
    return {**result, **_mobilenet(features, "v3")}


def recognises_backbone(state: Dict[str, Tensor]) -> str:
    """``"mobilenet_v2"``, "mobilenet_v3" or "resnet" of ``torchvision.models``, or ""."""
    if "features.18.0.weight" in state and "features.1.conv.0.0.weight" in state:
        return "mobilenet_v2"
    if "features.16.0.weight" in state and "features.1.block.0.0.weight" in state:
        return "mobilenet_v3"
    if "layer1.0.conv1.weight" in state and "conv1.weight" in state:
        return "resnet"
    return ""


def convert_backbone(
    state: Dict[str, Tensor], pixel_std: Tuple[float, ...], input_format: str
) -> Dict[str, Tensor]:
    """A torchvision classifier's parameters as those of our backbone.

    The first convolution is rescaled from inputs in [0, 1] / std to the config's, and reversed if
    the config's images are BGR. The classifier's own parameters keep their names.
    """
    kind = recognises_backbone(state)
    features = {
        name.removeprefix("features."): value
        for name, value in state.items()
        if kind != "resnet" and name.startswith("features.")
    }
    if kind == "resnet":
        result = {_resnet_name(name): value for name, value in state.items()}
    else:
        result = _mobilenet(features, kind.removeprefix("mobilenet_"))
        result.update({k: v for k, v in state.items() if not k.startswith("features.")})
    first = _PREFIX + ("stem.conv1" if kind == "resnet" else "conv1")
    adapt_first_layer(result, first, [255 * x for x in IMAGENET_STD], pixel_std, input_format)
    return result


def _conv_norm(rest: str) -> str:
    """From "0.0.weight" to "0.weight", "0.1.running_mean" → "0.norm.running_mean"; others stay."""
    rest = re.sub(r"^(\d+)\.0\.(weight|bias)$", r"\1.\2", rest)
    return re.sub(r"^(\d+)\.1\.(\w+)$", r"\1.norm.\2", rest)


def _extra_name(index: int, rest: str, is_vgg: bool) -> str:
    if not is_vgg:
        return f"backbone.extra_layers.{index}.{_conv_norm(rest)}"
    position, leaf = rest.rsplit(".", 1)
    if index == 0:  # the rest of VGG16, behind conv4_3
        layers = {"1": "conv5_1", "3": "conv5_2", "5": "conv5_3", "7.1": "fc6", "7.3": "fc7"}
        return f"{_PREFIX}{layers[position]}.{leaf}"
    return f"backbone.extra_layers.{index - 1}.{int(position) // 2}.{leaf}"


def _mobilenet(features: Dict[str, Tensor], version: str) -> Dict[str, Tensor]:
    """Parameters of a ``features`` sequence: first convolution, blocks, last convolution."""
    names = block_names(version)
    result = {}
    for key, value in features.items():
        index, rest = key.split(".", 1)
        name = names[int(index)]
        if name in ("conv1", "conv2"):
            rest = _conv_norm(f"0.{rest}").removeprefix("0.")
        else:
            inside = [k.split(".")[2] for k in features if k.startswith(f"{index}.")]
            rest = _block_name(rest, len(set(inside)), version)
        result[f"{_PREFIX}{name}.{rest}"] = value
    return result


def _block_name(rest: str, count: int, version: str) -> str:
    """Within an inverted residual block of ``count`` layers: "block.1.0.weight" → …"""
    _, position, leaf = rest.split(".", 2)
    if version == "v2":  # (expansion,) depthwise, 1×1 convolution, its BatchNorm
        roles = ["expand"] * (count == 4) + ["depthwise", "project", "project.norm"]
        role = roles[int(position)]
        if role.startswith("project"):
            return f"{role}.{leaf}"
    else:
        roles = ["expand"] * (count > 2) + ["depthwise"] + ["squeeze"] * (count == 4) + ["project"]
        role = roles[int(position)]
        if role == "squeeze":
            return f"{role}.{leaf}"
    return _conv_norm(f"0.{leaf}").replace("0.", f"{role}.", 1)


def _resnet_name(name: str) -> str:
    """As Detectron2's ResNet names its layers."""
    if name.startswith("fc."):
        return name
    if match := re.match(r"(conv1|bn1)\.(.+)", name):
        rest = match[2] if match[1] == "conv1" else f"norm.{match[2]}"
        return f"{_PREFIX}stem.conv1.{rest}"
    name = re.sub(r"^layer(\d)\.", lambda m: f"{_PREFIX}res{int(m[1]) + 1}.", name)
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return re.sub(r"\.bn(\d)\.", r".conv\1.norm.", name)
