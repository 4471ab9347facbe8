"""MobileNets: where the public models have the layers of our blocks."""

from typing import Dict, Iterator, List, Sequence, Tuple

from ssd.checkpoint.lineage import BODY, IMAGENET_STD, Lineage, State

__all__ = [
    "BACKBONES", "FLAT_V2", "FLAT_V3", "NESTED_V2", "NESTED_V3", "V1", "block_names",
    "conv_to_linear", "linear_to_conv", "mobilenet",
]  # fmt: skip

# Blocks in each stage of our backbones.
STAGES = {"v1": (1, 2, 2, 6, 2), "v2": (1, 2, 3, 4, 3, 3, 1), "v3": (1, 2, 3, 4, 2, 3)}
_WITH_SQUEEZE = (4, 5, 6, 11, 12, 13, 14, 15)  # of MobileNetV3-Large's 15 blocks

# Position in the first block and in the others to our layer. Flat: qfgaohao's and d-li14's; nested:
# torchvision's.
FLAT_V2 = (
    {"0": "depthwise", "1": "depthwise.norm", "3": "project", "4": "project.norm"},
    {
        "0": "expand", "1": "expand.norm", "3": "depthwise", "4": "depthwise.norm",
        "6": "project", "7": "project.norm",
    },
)  # fmt: skip
FLAT_V3 = (
    {"0": "depthwise", "1": "depthwise.norm", "4": "project", "5": "project.norm"},
    {
        "0": "expand", "1": "expand.norm", "3": "depthwise", "4": "depthwise.norm",
        "5.fc.0": "squeeze.fc1", "5.fc.2": "squeeze.fc2", "7": "project", "8": "project.norm",
    },
)  # fmt: skip
NESTED_V2 = (
    {"0.0": "depthwise", "0.1": "depthwise.norm", "1": "project", "2": "project.norm"},
    {
        "0.0": "expand", "0.1": "expand.norm", "1.0": "depthwise", "1.1": "depthwise.norm",
        "2": "project", "3": "project.norm",
    },
)  # fmt: skip
V1 = ({"0": "0", "1": "0.norm", "3": "1", "4": "1.norm"},)


def block_names(version: str) -> List[str]:
    """Names of our layers in their order: "conv1", "stage1.0", …, "conv2"."""
    blocks = [f"stage{s}.{b}" for s, n in enumerate(STAGES[version], 1) for b in range(n)]
    return ["conv1", *blocks, *(["conv2"] if version != "v1" else [])]


def mobilenet(
    version: str, prefix: str, blocks: Sequence[Dict[str, str]], inside: str = ""
) -> Iterator[Tuple[str, str]]:
    """A sequence of convolution, blocks, convolution.

    Args:
        prefix: in front of a layer's number.
        blocks: positions within each block to our layers; the last are those of all further ones.
        inside: between the number and the position.
    """
    for index, name in enumerate(block_names(version)):
        if name in ("conv1", "conv2"):
            positions = {"0": "", "1": ".norm"}
        else:
            block = blocks[min(index, len(blocks)) - 1]
            positions = {f"{inside}{theirs}": f".{ours}" for theirs, ours in block.items()}
        for theirs, ours in positions.items():
            yield f"{prefix}{index}.{theirs}", f"{BODY}{name}{ours}"


def _nested_v3(index: int) -> Dict[str, str]:
    roles = (["expand"] if index > 1 else []) + ["depthwise"]
    roles += (["squeeze"] if index in _WITH_SQUEEZE else []) + ["project"]
    layers = {}
    for position, role in enumerate(roles):
        parts = {"fc1": ".fc1", "fc2": ".fc2"} if role == "squeeze" else {"0": "", "1": ".norm"}
        layers.update((f"{position}.{theirs}", role + ours) for theirs, ours in parts.items())
    return layers


NESTED_V3 = [_nested_v3(index) for index in range(1, 16)]


def _timm(version: str, last: Dict[str, str]) -> Iterator[Tuple[str, str]]:
    stem = {"conv_stem": "conv1", "bn1": "conv1.norm", **last}
    yield from ((theirs, BODY + ours) for theirs, ours in stem.items())
    for name in block_names(version)[1:-1]:
        stage, number = name.removeprefix("stage").split(".")
        block = f"blocks.{int(stage) - 1}.{number}."
        roles = {"conv_pw": "expand", "conv_dw": "depthwise", "conv_pwl": "project"}
        if name == "stage1.0":
            roles = {"conv_dw": "depthwise", "conv_pw": "project"}
        for position, (conv, role) in enumerate(roles.items(), 1):
            yield f"{block}{conv}", f"{BODY}{name}.{role}"
            yield f"{block}bn{position}", f"{BODY}{name}.{role}.norm"
        yield f"{block}se.conv_reduce", f"{BODY}{name}.squeeze.fc1"
        yield f"{block}se.conv_expand", f"{BODY}{name}.squeeze.fc2"


def linear_to_conv(state: State) -> State:
    """Squeeze-and-excitation's fully connected layers as 1×1 convolutions."""
    return {
        name: x[:, :, None, None] if ".fc." in name and x.dim() == 2 else x
        for name, x in state.items()
    }


def conv_to_linear(state: State) -> State:
    """The inverse of :func:`linear_to_conv`."""
    return {
        name: x.flatten(1) if ".fc." in name and x.dim() == 4 else x for name, x in state.items()
    }


BACKBONES = [
    Lineage(
        "torchvision_mobilenetv2",
        "torchvision's mobilenet_v2",
        ("features.18.0.weight", "features.1.conv.0.0.weight"),
        dict(mobilenet("v2", "features.", NESTED_V2, "conv.")),
        input_std=IMAGENET_STD,
        config={"MODEL.BATCH_NORM.EPS": 1e-5},
    ),
    Lineage(
        "torchvision_mobilenetv3_classifier",
        "torchvision's mobilenet_v3",
        ("features.16.0.weight", "features.1.block.0.0.weight"),
        dict(mobilenet("v3", "features.", NESTED_V3, "block.")),
        input_std=IMAGENET_STD,
        config={"MODEL.BATCH_NORM.EPS": 1e-3, "MODEL.MOBILENET.SQUEEZE_FIRST": False},
    ),
    Lineage(
        "timm_mobilenetv2",
        "timm's MobileNetV2",
        ("conv_stem.weight", "blocks.6.0.conv_pwl.weight"),
        dict(_timm("v2", {"conv_head": "conv2", "bn2": "conv2.norm"})),
        input_std=IMAGENET_STD,
        config={"MODEL.BATCH_NORM.EPS": 1e-5},
    ),
    Lineage(
        "timm_mobilenetv3",
        "timm's MobileNetV3",
        ("conv_stem.weight", "blocks.6.0.conv.weight"),
        dict(_timm("v3", {"blocks.6.0.conv": "conv2", "blocks.6.0.bn1": "conv2.norm"})),
        input_std=IMAGENET_STD,
        config={"MODEL.BATCH_NORM.EPS": 1e-5, "MODEL.MOBILENET.SQUEEZE_FIRST": False},
    ),
    Lineage(
        "d-li14_mobilenetv3",
        "a MobileNetV3 classifier (d-li14)",
        ("features.4.conv.5.fc.0.weight", "conv.0.weight"),
        {
            **dict(mobilenet("v3", "features.", FLAT_V3, "conv.")),
            "conv.0": f"{BODY}conv2",
            "conv.1": f"{BODY}conv2.norm",
        },
        input_std=IMAGENET_STD,
        config={"MODEL.BATCH_NORM.EPS": 1e-5, "MODEL.MOBILENET.SQUEEZE_FIRST": True},
        prepare=linear_to_conv,
    ),
    # qfgaohao's own labs have the inputs that these were trained with
    Lineage(
        "qfgaohao_mobilenetv1_classifier",
        "a MobileNetV1 classifier (qfgaohao)",
        ("0.0.weight", "13.3.weight"),
        dict(mobilenet("v1", "", V1)),
        config={"MODEL.BATCH_NORM.EPS": 1e-5},
    ),
    *(
        Lineage(
            "qfgaohao_mobilenetv2_classifier",
            "a MobileNetV2 classifier (qfgaohao)",
            (f"{prefix}1.conv.3.weight", f"{prefix}18.0.weight"),
            dict(mobilenet("v2", prefix, FLAT_V2, "conv.")),
            config={"MODEL.BATCH_NORM.EPS": 1e-5},
        )
        for prefix in ("", "features.")
    ),
]
