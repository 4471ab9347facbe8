"""What weights of several lineages need done to them."""

from typing import Dict, Sequence

import torch
from torch import Tensor

__all__ = ["IMAGENET_STD", "adapt_first_layer", "background_last"]

# By which torchvision's classifiers expect RGB in [0, 1] to be divided.
IMAGENET_STD = (0.229, 0.224, 0.225)


def adapt_first_layer(
    state: Dict[str, Tensor],
    name: str,
    input_std: Sequence[float],
    pixel_std: Sequence[float],
    input_format: str,
) -> None:
    """Adapts a first convolution made for RGB / ``input_std`` to the config's images, in ``state``.

    Where BatchNorm follows, the common part of the scale goes into its statistics: in the weights
    it would change the size of a training step relative to theirs.

    Args:
        name: of the convolution, without ".weight".
        input_std: what the weights expect 0-255 values to be divided by.
        pixel_std, input_format: ``MODEL.PIXEL_STD`` and ``INPUT.FORMAT``.
    """
    weight, scale = state[f"{name}.weight"], torch.tensor(pixel_std) / torch.tensor(input_std)
    if input_format == "BGR":
        weight, scale = weight.flip(1), torch.tensor(pixel_std) / torch.tensor(input_std).flip(0)
    if f"{name}.norm.running_var" in state:
        common = scale.mean()
        scale = scale / common
        state[f"{name}.norm.running_mean"] = state[f"{name}.norm.running_mean"] / common
        state[f"{name}.norm.running_var"] = state[f"{name}.norm.running_var"] / common**2
    state[f"{name}.weight"] = weight * scale[None, :, None, None]


def background_last(value: Tensor, num_anchors: int) -> Tensor:
    """(A * (K + 1), …) weights or biases with the background first to the same with it last."""
    return value.unflatten(0, (num_anchors, -1)).roll(-1, dims=1).flatten(0, 1)
