"""What weights of several lineages need done to them."""

from typing import Sequence

import torch
from torch import Tensor

__all__ = ["IMAGENET_STD", "adapt_first_layer", "background_last"]

# By which torchvision's classifiers expect RGB in [0, 1] to be divided.
IMAGENET_STD = (0.229, 0.224, 0.225)


def adapt_first_layer(
    weight: Tensor, input_std: Sequence[float], pixel_std: Sequence[float], input_format: str
) -> Tensor:
    """A first convolution made for RGB / ``input_std`` to one for the config's images.

    Args:
        weight: (C, 3, H, W).
        input_std: what the weights expect 0-255 values to be divided by.
        pixel_std, input_format: ``MODEL.PIXEL_STD`` and ``INPUT.FORMAT``.
    """
    scale = torch.tensor(input_std)
    if input_format == "BGR":
        weight, scale = weight.flip(1), scale.flip(0)
    return weight * (torch.tensor(pixel_std) / scale)[None, :, None, None]


def background_last(value: Tensor, num_anchors: int) -> Tensor:
    """(A * (K + 1), …) weights or biases with the background first to the same with it last."""
    return value.unflatten(0, (num_anchors, -1)).roll(-1, dims=1).flatten(0, 1)
