"""ResNets: torchvision's (timm's has the same names), and those of Detectron2's model zoo."""

from typing import Any, Dict, Iterator, Tuple

from ssd.checkpoint.lineage import BODY, IMAGENET_STD, Lineage, State

__all__ = ["BACKBONES", "torchvision_resnet"]

BLOCKS = {2: 3, 3: 8, 4: 36, 5: 3}  # at most, of ResNet-152


def torchvision_resnet(stem: Tuple[str, str] = ("conv1", "bn1")) -> Iterator[Tuple[str, str]]:
    """``stem``: names of the first convolution and its BatchNorm."""
    yield stem[0], f"{BODY}stem.conv1"
    yield stem[1], f"{BODY}stem.conv1.norm"
    for number, blocks in BLOCKS.items():
        for block in range(blocks):
            theirs, ours = f"layer{number - 1}.{block}.", f"{BODY}res{number}.{block}."
            for index in (1, 2, 3):
                yield f"{theirs}conv{index}", f"{ours}conv{index}"
                yield f"{theirs}bn{index}", f"{ours}conv{index}.norm"
            yield f"{theirs}downsample.0", f"{ours}shortcut"
            yield f"{theirs}downsample.1", f"{ours}shortcut.norm"


def _detectron2(prefix: str = "") -> Iterator[Tuple[str, str]]:
    for _, ours in torchvision_resnet():
        yield prefix + ours.removeprefix(BODY), ours


def _has_groups(state: State, meta: Dict[str, Any]) -> bool:
    weights = [x for name, x in state.items() if name.endswith("res2.0.conv2.weight")]
    return any(x.shape[0] > x.shape[1] for x in weights)


# By which ResNeXt-101 32x8d of Detectron2's model zoo expects BGR to be divided.
_RESNEXT_STD = (57.375, 57.12, 58.395)


def _of_caffe2(key: str, title: str, signature: Tuple[str, ...], prefix: str) -> Iterator[Lineage]:
    """Detectron2's own: ResNets of MSRA, and ResNeXts."""
    given = {"names": dict(_detectron2(prefix)), "input_format": "BGR"}
    yield Lineage(
        f"{key}_resnext", f"{title} (ResNeXt)", signature, input_std=_RESNEXT_STD,
        condition=_has_groups, config={"MODEL.RESNETS.STRIDE_IN_1X1": False}, **given,
    )  # fmt: skip
    yield Lineage(
        f"{key}_msra", f"{title} of MSRA", signature, input_std=(1.0, 1.0, 1.0),
        config={"MODEL.RESNETS.STRIDE_IN_1X1": True}, **given,
    )  # fmt: skip


BACKBONES = [
    Lineage(
        "torchvision_resnet",
        "torchvision's resnet",
        ("conv1.weight", "layer1.0.conv1.weight"),
        dict(torchvision_resnet()),
        input_std=IMAGENET_STD,
        config={"MODEL.RESNETS.STRIDE_IN_1X1": False},
    ),
    Lineage(
        "detectron2_resnet",
        "Detectron2's ResNet, as torchvision's",
        ("stem.conv1.weight", "res2.0.conv1.weight"),
        dict(_detectron2()),
        input_std=IMAGENET_STD,
        condition=lambda state, meta: meta.get("__author__") != "Caffe2",
        config={"MODEL.RESNETS.STRIDE_IN_1X1": False},
    ),
    *_of_caffe2(
        "detectron2_resnet", "Detectron2's ResNet", ("stem.conv1.weight", "res2.0.conv1.weight"), ""
    ),
    *_of_caffe2(
        "detectron2_fpn_resnet",
        "a Detectron2 detector's ResNet (behind an FPN)",
        (f"{BODY}stem.conv1.weight", "backbone.fpn_lateral4.weight"),
        BODY,
    ),
    *_of_caffe2(
        "detectron2_c4_resnet",
        "a Detectron2 detector's ResNet",
        ("backbone.stem.conv1.weight", "backbone.res2.0.conv1.weight"),
        "backbone.",
    ),
]
