"""ResNets: torchvision's (timm's has the same names), and those of Detectron2's model zoo."""

from typing import Iterator, Tuple

from ssd.checkpoint.lineage import BODY, IMAGENET_STD, Lineage

__all__ = ["BACKBONES", "torchvision_resnet"]

BLOCKS = {2: 3, 3: 8, 4: 36, 5: 3}  # at most, of ResNet-152


def torchvision_resnet(
    stem: Tuple[str, str] = ("conv1", "bn1"), stage: str = "layer{}."
) -> Iterator[Tuple[str, str]]:
    """
    Args:
        stem: names of the first convolution and its BatchNorm.
        stage: of the stage, with "{}" for its number from 1.
    """
    yield stem[0], f"{BODY}stem.conv1"
    yield stem[1], f"{BODY}stem.conv1.norm"
    for number, blocks in BLOCKS.items():
        for block in range(blocks):
            theirs, ours = f"{stage.format(number - 1)}{block}.", f"{BODY}res{number}.{block}."
            for index in (1, 2, 3):
                yield f"{theirs}conv{index}", f"{ours}conv{index}"
                yield f"{theirs}bn{index}", f"{ours}conv{index}.norm"
            yield f"{theirs}downsample.0", f"{ours}shortcut"
            yield f"{theirs}downsample.1", f"{ours}shortcut.norm"


def _detectron2() -> Iterator[Tuple[str, str]]:
    for _, ours in torchvision_resnet():
        yield ours.removeprefix(BODY), ours


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
    # MSRA's, from Caffe2
    Lineage(
        "detectron2_resnet_msra",
        "Detectron2's ResNet of MSRA",
        ("stem.conv1.weight", "res2.0.conv1.weight"),
        dict(_detectron2()),
        input_format="BGR",
        input_std=(1.0, 1.0, 1.0),
        config={"MODEL.RESNETS.STRIDE_IN_1X1": True},
    ),
]
