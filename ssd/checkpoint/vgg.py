"""VGG16 classification weights: reduced-fc (DeepLab's, for SSD) and torchvision's two files."""

from typing import Dict, Iterable, Tuple

from torch import Tensor

from ssd.checkpoint.layers import IMAGENET_STD, adapt_first_layer

__all__ = ["CONV_NAMES", "convert", "recognises"]

# Position in the public models' ``nn.Sequential`` (with ReLUs and pools between) to our name.
CONV_NAMES = {
    0: "conv1_1", 2: "conv1_2",
    5: "conv2_1", 7: "conv2_2",
    10: "conv3_1", 12: "conv3_2", 14: "conv3_3",
    17: "conv4_1", 19: "conv4_2", 21: "conv4_3",
    24: "conv5_1", 26: "conv5_2", 28: "conv5_3",
    31: "fc6", 33: "fc7",
}  # fmt: skip
_PREFIXES = ("features.", "vgg.", "")


def recognises(state: Dict[str, Tensor]) -> bool:
    """Whether these are VGG16's weights alone: reduced-fc (with conv 31) or torchvision's."""
    return _prefix(state) is not None


def convert(
    state: Dict[str, Tensor], pixel_std: Tuple[float, ...], input_format: str
) -> Tuple[Dict[str, Tensor], str]:
    """Weights of a public VGG16 file as those of our backbone.

    Of torchvision's ``vgg16``, fc6 (512×7×7 inputs) and fc7 are subsampled to the dilated 3×3
    and the 1×1 convolution of 1024 channels: every fourth output, every third row and column
    (as the SSD authors made their reduced-fc file), and the first layer is rescaled from inputs
    in [0, 1] / std to the config's. torchvision's ``IMAGENET1K_FEATURES``, with which its SSD300
    starts, have NaN for a classifier and are made for 0-255 inputs, as reduced-fc is: here fc6 and
    fc7 are left out, and stay fresh. The first layer is reversed if the config's images are BGR;
    all files are made for RGB.

    Args:
        state: the file's parameters.
        pixel_std, input_format: ``MODEL.PIXEL_STD`` and ``INPUT.FORMAT``.

    Returns:
        parameters by our names, and one line that says what was found.
    """
    prefix = _prefix(state)
    result = {}
    rest = dict(state)  # not ours: fvcore names them in the log
    for index, name in CONV_NAMES.items():
        for leaf in ("weight", "bias"):
            if (key := f"{prefix}{index}.{leaf}") in state:
                result[f"backbone.bottom_up.{name}.{leaf}"] = rest.pop(key).clone()
    found = "VGG16 reduced-fc"
    input_std = (1.0, 1.0, 1.0)
    if "classifier.0.weight" in state and state["classifier.0.weight"].isnan().any():
        found = "torchvision VGG16 features for SSD, without a classifier: fc6 and fc7 stay fresh"
    elif "classifier.0.weight" in state:
        found = "torchvision VGG16, fc6 and fc7 subsampled"
        fc6, fc6_bias = rest.pop("classifier.0.weight"), rest.pop("classifier.0.bias")
        fc7, fc7_bias = rest.pop("classifier.3.weight"), rest.pop("classifier.3.bias")
        fc6 = fc6.view(4096, 512, 7, 7)
        prefix = "backbone.bottom_up."
        result[prefix + "fc6.weight"] = fc6[::4, :, ::3, ::3].clone()
        result[prefix + "fc6.bias"] = fc6_bias[::4].clone()
        result[prefix + "fc7.weight"] = fc7.view(4096, 4096, 1, 1)[::4, ::4].clone()
        result[prefix + "fc7.bias"] = fc7_bias[::4].clone()
        input_std = [255 * std for std in IMAGENET_STD]
    if input_format == "BGR":
        found += ", first layer reversed to BGR"
    name = "backbone.bottom_up.conv1_1"
    adapt_first_layer(result, name, input_std, pixel_std, input_format)
    return {**result, **rest}, found


def _prefix(names: Iterable[str]):
    for prefix in _PREFIXES:
        if f"{prefix}0.weight" in names and f"{prefix}28.weight" in names:
            return prefix
    return None
