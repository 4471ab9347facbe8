"""VGG16: its layers' positions in the public models, and its classification weights."""

from typing import Iterator, Tuple

from ssd.checkpoint.lineage import BODY, IMAGENET_STD, Lineage, State

__all__ = ["BACKBONES", "CONV_NAMES", "subsample_fc", "vgg_layers"]

# Position in the public models' ``nn.Sequential`` (with ReLUs and pools between) to our name.
CONV_NAMES = {
    0: "conv1_1", 2: "conv1_2",
    5: "conv2_1", 7: "conv2_2",
    10: "conv3_1", 12: "conv3_2", 14: "conv3_3",
    17: "conv4_1", 19: "conv4_2", 21: "conv4_3",
    24: "conv5_1", 26: "conv5_2", 28: "conv5_3",
    31: "fc6", 33: "fc7",
}  # fmt: skip


def vgg_layers(prefix: str) -> Iterator[Tuple[str, str]]:
    for index, name in CONV_NAMES.items():
        yield f"{prefix}{index}", BODY + name


def subsample_fc(state: State, fc6: str, fc7: str) -> State:
    """fc6 (4096 of 512×7×7 inputs) and fc7 as the dilated 3×3 and the 1×1 of 1024 channels.

    Every fourth output, every third row and column, as the SSD authors made their reduced-fc file.
    """
    result = dict(state)
    result[f"{fc6}.weight"] = state[f"{fc6}.weight"].view(4096, 512, 7, 7)[::4, :, ::3, ::3]
    result[f"{fc7}.weight"] = state[f"{fc7}.weight"].view(4096, 4096, 1, 1)[::4, ::4]
    for layer in (fc6, fc7):
        result[f"{layer}.bias"] = state[f"{layer}.bias"][::4]
    return result


# Only VGG16 without BatchNorm has layers with weights at both 26 and 28.
_IN_TORCHVISION = (
    "features.0.weight",
    "features.26.weight",
    "features.28.weight",
    "classifier.0.weight",
)
_SSD_INPUT = (1.0, 1.0, 1.0)

BACKBONES = [
    Lineage(
        "torchvision_vgg16",
        "torchvision's VGG16, fc6 and fc7 subsampled",
        _IN_TORCHVISION,
        {
            **dict(vgg_layers("features.")),
            "classifier.0": f"{BODY}fc6",
            "classifier.3": f"{BODY}fc7",
        },
        input_std=IMAGENET_STD,
        condition=lambda state, meta: not state["classifier.0.weight"].isnan().any(),
        prepare=lambda state: subsample_fc(state, "classifier.0", "classifier.3"),
    ),
    # IMAGENET1K_FEATURES, with which torchvision's SSD300 starts, has NaN for a classifier.
    Lineage(
        "torchvision_vgg16_features",
        "torchvision's VGG16 features for SSD, without a classifier: fc6 and fc7 stay fresh",
        _IN_TORCHVISION,
        dict(vgg_layers("features.")),
        input_std=_SSD_INPUT,
    ),
    *(
        Lineage(
            "vgg16_reducedfc",
            "VGG16 reduced-fc",
            (f"{prefix}0.weight", f"{prefix}26.weight", f"{prefix}31.weight"),
            dict(vgg_layers(prefix)),
            input_std=_SSD_INPUT,
        )
        for prefix in ("vgg.", "features.", "")
    ),
    # torchvision's ``vgg16().features``; timm's, whose classifier has other names
    *(
        Lineage(
            "vgg16_features",
            "VGG16 features of a classifier on ImageNet: fc6 and fc7 stay fresh",
            (f"{prefix}0.weight", f"{prefix}26.weight", f"{prefix}28.weight"),
            dict(vgg_layers(prefix)),
            input_std=IMAGENET_STD,
        )
        for prefix in ("features.", "")
    ),
]
