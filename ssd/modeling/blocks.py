"""Blocks that backbones, extra layers and heads share."""

from typing import Iterable, List, Optional, Sequence

import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

__all__ = [
    "BatchNorm2d",
    "InvertedResidual",
    "check_out_features",
    "conv_block",
    "pad_as_tensorflow",
    "round_to_8",
]


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that also trains where a channel has a single value: one image and a 1×1 map.

    Such a channel has no variance, and torch refuses it. Here it's normalised by the running
    statistics, which it leaves as they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(x)


def conv_block(
    in_channels: int,
    out_channels: int,
    kernel: int = 1,
    *,
    norm: str,
    activation: str = "",
    stride: int = 1,
    padding: int = -1,
    groups: int = 1,
) -> Conv2d:
    """Convolution, normalisation and activation, in this order.

    Args:
        norm: "" for none (then the convolution has a bias), "BN", or another name of
            ``detectron2.layers.get_norm``: "SyncBN", "FrozenBN", "GN", ….
        activation: a class in torch.nn that works in place, or "".
        padding: -1: half the kernel.
    """
    return Conv2d(
        in_channels,
        out_channels,
        kernel,
        stride=stride,
        padding=kernel // 2 if padding < 0 else padding,
        groups=groups,
        bias=not norm,
        norm=_norm(norm, out_channels),
        activation=_activation(activation) if activation else None,
    )


def _norm(name: str, channels: int) -> Optional[nn.Module]:
    if name == "BN":
        return BatchNorm2d(channels)
    try:
        return get_norm(name, channels)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"MODEL.SSD.NORM or MODEL.MOBILENET.NORM: no {name!r} for {channels} channels: {error}"
        ) from error


def _activation(name: str) -> nn.Module:
    try:
        return getattr(nn, name)(inplace=True)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            "MODEL.SSD.EXTRA_ACTIVATION: an activation in torch.nn that works in place, such as "
            f"'ReLU6', got {name!r}"
        ) from error


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise convolution, linear 1×1 projection (MobileNetV2, section 3.3).

    With squeeze-and-excitation after the depthwise convolution it's MobileNetV3's; a shortcut
    where input and output have the same shape.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        padding: int = -1,
        norm: str,
        activation: str = "ReLU6",
        squeeze: bool = False,
        squeeze_first: bool = False,
    ):
        """
        Args:
            hidden: channels of the depthwise convolution; there is no expansion if it's
                ``in_channels``.
            squeeze: whether there is squeeze-and-excitation, of a quarter of the channels.
            squeeze_first: before the depthwise convolution's activation (lufficc) instead of
                after it (torchvision).
        """
        super().__init__()
        kwargs = {"norm": norm, "activation": activation}
        self.expand = (
            conv_block(in_channels, hidden, **kwargs) if hidden != in_channels else nn.Identity()
        )
        self.depthwise = conv_block(
            hidden, hidden, kernel, stride=stride, padding=padding, groups=hidden, **kwargs
        )
        self.squeeze = self.activate = nn.Identity()
        if squeeze:
            width = round_to_8(hidden // 4)
            self.squeeze = SqueezeExcitation(hidden, width, scale_activation=nn.Hardsigmoid)
            if squeeze_first:
                self.activate, self.depthwise.activation = self.depthwise.activation, None
        self.project = conv_block(hidden, out_channels, norm=norm)
        keeps_size = stride == 1 and 2 * self.depthwise.padding[0] == kernel - 1
        self.shortcut = keeps_size and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.after_expansion(self.expand(x))
        return x + y if self.shortcut else y

    def after_expansion(self, x: Tensor) -> Tensor:
        """The rest of the block, (N, hidden, H, W) to (N, out_channels, H', W'); no shortcut."""
        return self.project(self.activate(self.squeeze(self.depthwise(x))))


def round_to_8(channels: float) -> int:
    """The nearest multiple of 8, at least 8 and not below 90 % of ``channels``."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def check_out_features(names: Sequence[str], available: Iterable[str]) -> List[str]:
    """``names`` as a list; a ValueError that names the config key if one of them doesn't exist."""
    if not names or any(name not in available for name in names):
        raise ValueError(f"MODEL.SSD.IN_FEATURES: {list(names)}; choose from {list(available)}")
    return list(names)


def pad_as_tensorflow(module: nn.Module) -> None:
    """Makes strided convolutions pad like TensorFlow's "SAME".

    There the output has ceil(size / stride) rows, and the padding that this needs goes below and
    to the right first. torch's goes to all sides, which shifts each map of an even size by half
    a pixel of the finer one.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.padding != (0, 0) and layer.stride != (1, 1):
            layer.padding = (0, 0)
            layer.register_forward_pre_hook(_pad_same)


def _pad_same(conv: nn.Conv2d, args: tuple) -> Tensor:
    (x,) = args
    pads = []
    for axis in (1, 0):  # F.pad begins with the last dimension
        size, kernel, stride = x.shape[2 + axis], conv.kernel_size[axis], conv.stride[axis]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)
