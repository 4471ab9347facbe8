"""The authors' own SSD300 and SSD512 (weiliu89/caffe), and VGG16 as Caffe has it."""

from typing import Iterator, Tuple

from ssd.checkpoint.lineage import BODY, MAX_LEVELS, Lineage, heads
from ssd.checkpoint.vgg import CONV_NAMES, subsample_fc

__all__ = ["BACKBONES", "LINEAGES"]

_VGG = {name: BODY + name for name in CONV_NAMES.values()}


def _detector() -> Iterator[Tuple[str, str]]:
    yield from _VGG.items()
    yield "conv4_3_norm", "backbone.l2_norm.conv4_3"
    sources = ["conv4_3_norm", "fc7"]
    for level in range(MAX_LEVELS):
        for half in (0, 1):
            theirs = f"conv{6 + level}_{1 + half}"
            yield theirs, f"backbone.extra_layers.{level}.{half}"
        sources.append(theirs)
    ours = (name for _, name in heads("{}", "{}"))
    for kind in ("conf", "loc"):
        for source in sources[:MAX_LEVELS]:
            yield f"{source}_mbox_{kind}", next(ours)


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
