"""MMDetection's SSD and SSDLite: the names since 2.14, and those before."""

from typing import Any, Dict, Iterator, Tuple

from ssd.checkpoint.lineage import (
    BODY,
    MAX_LEVELS,
    Lineage,
    State,
    extras,
    flat_extras,
    heads,
    lite_heads,
)
from ssd.checkpoint.mobilenet import block_names
from ssd.checkpoint.vgg import vgg_layers

__all__ = ["LINEAGES", "OLD", "VGG"]

_L2_NORM = "backbone.l2_norm.conv4_3"
_ROLES = {"expand_conv": "expand", "depthwise_conv": "depthwise", "linear_conv": "project"}


def _mobilenet() -> Iterator[Tuple[str, str]]:
    for name in block_names("v2"):
        if name.startswith("conv"):
            roles = {f"backbone.{name}": name}
        else:
            layer = name.replace("stage", "backbone.layer")
            roles = {f"{layer}.{theirs}": f"{name}.{ours}" for theirs, ours in _ROLES.items()}
        for theirs, ours in roles.items():
            yield f"{theirs}.conv", BODY + ours
            yield f"{theirs}.bn", f"{BODY}{ours}.norm"
    for ours, theirs in zip("012", ("0", "1.depthwise_conv", "1.pointwise_conv")):
        layers = {f"{theirs}.conv": ours, f"{theirs}.bn": f"{ours}.norm"}
        yield from extras("neck.extra_layers.{}.", layers)
    cls, box = "bbox_head.cls_convs.{}.", "bbox_head.reg_convs.{}."
    yield from lite_heads(cls, box, "0.conv", "0.bn", "1")


VGG = Lineage(
    "mmdet_vgg",
    "MMDetection's SSD",
    ("bbox_head.cls_convs.0.0.weight", "backbone.features.0.weight"),
    {
        **dict(vgg_layers("backbone.features.")),
        **dict(extras("neck.extra_layers.{}.", {"0.conv": "0", "1.conv": "1"})),
        **dict(heads("bbox_head.cls_convs.{}.0", "bbox_head.reg_convs.{}.0")),
        "neck.l2_norm": _L2_NORM,
    },
)
MOBILENETV2 = Lineage(
    "mmdet_mobilenetv2",
    "MMDetection's SSDLite",
    ("bbox_head.cls_convs.0.0.conv.weight", "backbone.layer1.0.depthwise_conv.conv.weight"),
    dict(_mobilenet()),
)

_OLD_NAMES = {
    **dict(vgg_layers("backbone.features.")),
    **dict(flat_extras("backbone.extra.")),
    **dict(heads("bbox_head.cls_convs.{}", "bbox_head.reg_convs.{}")),
    "backbone.l2_norm": _L2_NORM,
}
_IN_OLD = ("bbox_head.cls_convs.0.weight", "backbone.extra.0.weight")


def _background_is_first(state: State, meta: Dict[str, Any]) -> bool:
    """Whether a file is of MMDetection 1.x, by its version or else by its biases.

    Most default boxes are background, so after training its biases are the highest.
    """
    if version := str(meta.get("mmdet_version", "")):
        return version.startswith(("0.", "1."))
    first, last = [], []
    for level in range(MAX_LEVELS):
        if (name := f"bbox_head.cls_convs.{level}.bias") in state:
            num_anchors = len(state[f"bbox_head.reg_convs.{level}.bias"]) // 4
            bias = state[name].view(num_anchors, -1)
            first.append(float(bias[:, 0].mean()))
            last.append(float(bias[:, -1].mean()))
    return sum(first) > sum(last)


OLD = Lineage("mmdet_old", "MMDetection's SSD before 2.14", _IN_OLD, _OLD_NAMES)
FIRST = Lineage(
    "mmdet_old",
    "MMDetection 1.x's SSD",
    _IN_OLD,
    _OLD_NAMES,
    background_first=True,
    condition=_background_is_first,
)

LINEAGES = [VGG, MOBILENETV2, FIRST, OLD]
