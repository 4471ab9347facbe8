"""The authors' own SSD300 and SSD512 (weiliu89/caffe), and VGG16 as Caffe has it."""

from typing import Iterator, Tuple

from ssd.checkpoint.lineage import BODY, MAX_LEVELS, Lineage, extras
from ssd.checkpoint.vgg import CONV_NAMES, subsample_fc

__all__ = ["BACKBONES", "LINEAGES"]

_VGG = {name: BODY + name for name in CONV_NAMES.values()}


def _detector() -> Iterator[Tuple[str, str]]:
    yield from _VGG.items()
    yield "conv4_3_norm", "backbone.l2_norm.conv4_3"
    yield from extras("conv{}_", {"1": "0", "2": "1"}, first=6)
    sources = ["conv4_3_norm", "fc7", *(f"conv{number}_2" for number in range(6, 4 + MAX_LEVELS))]
    for level, source in enumerate(sources):
        yield f"{source}_mbox_conf", f"head.cls_predictors.{level}"
        yield f"{source}_mbox_loc", f"head.box_predictors.{level}"


LINEAGES = [
    Lineage(
        "caffe",
        "the SSD authors' Caffe model",
        ("conv1_1.weight", "fc7_mbox_conf.weight"),
        dict(_detector()),
        background_first=True,
        input_format="BGR",
    )
]
BACKBONES = [
    Lineage(
        "caffe_vgg16",
        "Caffe's VGG16, fc6 and fc7 subsampled",
        ("conv1_1.weight", "fc6.weight"),
        _VGG,
        input_format="BGR",
        input_std=(1.0, 1.0, 1.0),
        condition=lambda state, meta: state["fc6.weight"].numel() == 4096 * 512 * 7 * 7,
        prepare=lambda state: subsample_fc(state, "fc6", "fc7"),
    ),
    Lineage(
        "caffe_vgg16_reducedfc",
        "Caffe's VGG16 reduced-fc",
        ("conv1_1.weight", "fc6.weight"),
        _VGG,
        input_format="BGR",
        input_std=(1.0, 1.0, 1.0),
    ),
]
