"""lufficc/SSD: on VGG16, MobileNetV2 and MobileNetV3."""

from typing import Dict, Iterator, Sequence, Tuple

from ssd.checkpoint.lineage import Lineage, extras, flat_extras, heads, lite_heads
from ssd.checkpoint.mobilenet import FLAT_V3, NESTED_V2, conv_to_linear, linear_to_conv, mobilenet
from ssd.checkpoint.vgg import vgg_layers

__all__ = ["LINEAGES"]

_CLS = "box_head.predictor.cls_headers.{}"
_BOX = "box_head.predictor.reg_headers.{}"
_HEAD = "box_head.predictor.cls_headers.0"


def _mobilenet(version: str, blocks: Sequence[Dict[str, str]]) -> Iterator[Tuple[str, str]]:
    yield from mobilenet(version, "backbone.features.", blocks, "conv.")
    yield from extras("backbone.extras.{}.conv.", blocks[-1])
    # the last level's are bare; the others' layers lie in "conv"
    yield from lite_heads(_CLS, _BOX, ".conv.0", ".conv.1", ".conv.3", last_1x1=True)


LINEAGES = [
    Lineage(
        "lufficc_vgg",
        "lufficc's SSD",
        (f"{_HEAD}.weight", "backbone.vgg.0.weight"),
        {
            **dict(vgg_layers("backbone.vgg.")),
            **dict(flat_extras("backbone.extras.")),
            **dict(heads(_CLS, _BOX)),
            "backbone.l2_norm": "backbone.l2_norm.conv4_3",
        },
        background_first=True,
    ),
    Lineage(
        "lufficc_mobilenetv2",
        "lufficc's MobileNetV2 SSDLite",
        (f"{_HEAD}.conv.0.weight", "backbone.features.1.conv.0.0.weight"),
        dict(_mobilenet("v2", NESTED_V2)),
        background_first=True,
    ),
    Lineage(
        "lufficc_mobilenetv3",
        "lufficc's MobileNetV3 SSDLite",
        (f"{_HEAD}.conv.0.weight", "backbone.features.4.conv.5.fc.0.weight"),
        dict(_mobilenet("v3", FLAT_V3)),
        background_first=True,
        prepare=linear_to_conv,
        restore=conv_to_linear,
    ),
]
