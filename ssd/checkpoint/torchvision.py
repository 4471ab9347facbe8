"""torchvision's ``ssd300_vgg16`` and ``ssdlite320_mobilenet_v3_large``."""

from typing import Iterator, Tuple

from ssd.checkpoint.lineage import BODY, Lineage, extras, heads, lite_heads
from ssd.checkpoint.mobilenet import NESTED_V3, mobilenet
from ssd.checkpoint.vgg import CONV_NAMES

__all__ = ["LINEAGES"]

_CLS = "head.classification_head.module_list.{}"
_BOX = "head.regression_head.module_list.{}"


def _vgg() -> Iterator[Tuple[str, str]]:
    layers = {"1": "conv5_1", "3": "conv5_2", "5": "conv5_3", "7.1": "fc6", "7.3": "fc7"}
    for index, name in CONV_NAMES.items():
        if name not in layers.values():
            yield f"backbone.features.{index}", BODY + name
    for position, name in layers.items():
        yield f"backbone.extra.0.{position}", BODY + name
    yield "backbone.scale_weight", "backbone.l2_norm.conv4_3.weight"
    # the first of theirs is the rest of VGG16
    yield from extras("backbone.extra.{}.", {"0": "0", "2": "1"}, first=1)
    yield from heads(_CLS, _BOX)


def _mobilenetv3() -> Iterator[Tuple[str, str]]:
    for theirs, ours in mobilenet("v3", "", NESTED_V3, "block."):
        # cut inside block 13: "0.13" is its expansion, "1.0" the rest of it
        index, rest = theirs.split(".", 1)
        if int(index) < 13:
            part = f"0.{index}.{rest}"
        elif index == "13" and rest.startswith("block.0."):
            part = f"0.13.{rest.removeprefix('block.0.')}"
        else:
            part = f"1.{int(index) - 13}.{rest.removeprefix('block.') if index == '13' else rest}"
        yield f"backbone.features.{part}", ours
    for index in "012":
        layers = {f"{index}.0": index, f"{index}.1": f"{index}.norm"}
        yield from extras("backbone.extra.{}.", layers)
    yield from lite_heads(_CLS, _BOX, ".0.0", ".0.1", ".1")


LINEAGES = [
    Lineage(
        "torchvision_vgg",
        "torchvision's SSD300",
        ("head.classification_head.module_list.0.weight", "backbone.features.0.weight"),
        dict(_vgg()),
        background_first=True,
    ),
    Lineage(
        "torchvision_mobilenetv3",
        "torchvision's SSDLite320",
        ("head.classification_head.module_list.0.1.weight", "backbone.features.0.0.0.weight"),
        dict(_mobilenetv3()),
        background_first=True,
    ),
]
