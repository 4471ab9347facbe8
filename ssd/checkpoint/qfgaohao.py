"""qfgaohao/pytorch-ssd: on VGG16, MobileNetV1 and MobileNetV2."""

import re
from typing import Iterator, Tuple

from ssd.checkpoint.lineage import Lineage, State, extras, heads, lite_heads
from ssd.checkpoint.mobilenet import FLAT_V2, V1, mobilenet
from ssd.checkpoint.vgg import vgg_layers

__all__ = ["LINEAGES"]

_CLS, _BOX = "classification_headers.{}", "regression_headers.{}"
_EXTRAS_AND_HEADS = {
    **dict(extras("extras.{}.", {"0": "0", "2": "1"})),
    **dict(heads(_CLS, _BOX)),
}
_VGG = {**dict(vgg_layers("base_net.")), **_EXTRAS_AND_HEADS}


def _mobilenetv2() -> Iterator[Tuple[str, str]]:
    yield from mobilenet("v2", "base_net.", FLAT_V2, "conv.")
    yield from extras("extras.{}.conv.", FLAT_V2[-1])
    yield from lite_heads(_CLS, _BOX, ".0", ".1", ".3", last_1x1=True)


def _with_depthwise_bias(state: State) -> State:
    """Their predictors' depthwise convolutions have a bias in front of BatchNorm; ours don't."""
    result = dict(state)
    for name, value in state.items():
        if re.fullmatch(r"(classification|regression)_headers\.\d\.0\.weight", name):
            result[f"{name[:-6]}bias"] = value.new_zeros(len(value))
    return result


LINEAGES = [
    Lineage(
        "qfgaohao_mobilenetv2",
        "qfgaohao's MobileNetV2 SSDLite",
        ("classification_headers.0.3.weight", "base_net.1.conv.3.weight"),
        dict(_mobilenetv2()),
        background_first=True,
        restore=_with_depthwise_bias,
    ),
    Lineage(
        "qfgaohao_mobilenetv1",
        "qfgaohao's MobileNetV1 SSD",
        ("classification_headers.0.weight", "base_net.1.3.weight"),
        {**dict(mobilenet("v1", "base_net.", V1)), **_EXTRAS_AND_HEADS},
        background_first=True,
    ),
    Lineage(
        "qfgaohao_vgg_l2norm",
        "qfgaohao's VGG16 SSD of 2018, with L2Norm",
        ("classification_headers.0.weight", "source_layer_add_ons.0.scale"),
        {**_VGG, "source_layer_add_ons.0.scale": "backbone.l2_norm.conv4_3.weight"},
        background_first=True,
    ),
    Lineage(
        "qfgaohao_vgg",
        "qfgaohao's VGG16 SSD",
        ("classification_headers.0.weight", "source_layer_add_ons.0.running_mean"),
        {**_VGG, "source_layer_add_ons.0": "backbone.l2_norm.conv4_3"},
        background_first=True,
    ),
]
