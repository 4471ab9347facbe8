"""Blocks that backbones, extra layers and heads share."""

from typing import Callable, Iterable, List, Optional, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

__all__ = [
    "BATCH_NORMS",
    "BatchNorm2d",
    "InvertedResidual",
    "ReLU6",
    "StridedConv2d",
    "check_out_features",
    "conv_block",
    "init_convolutions",
    "pad_as_tensorflow",
    "round_to_8",
    "set_batch_norm",
]

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)  # with SyncBatchNorm


def set_batch_norm(module: nn.Module, cfg: CfgNode) -> nn.Module:
    """Gives each BatchNorm in a module ``MODEL.BATCH_NORM.EPS`` and ``MOMENTUM``, in place."""
    for layer in module.modules():
        if isinstance(layer, BATCH_NORMS):
            layer.eps, layer.momentum = cfg.MODEL.BATCH_NORM.EPS, cfg.MODEL.BATCH_NORM.MOMENTUM
    return module


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


class ReLU6(nn.ReLU6):
    """torch's, but in place also while it trains.

    torch's takes the gradient's mask from the input, of which it keeps a copy. The output has the
    same mask.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.inplace and x.requires_grad and not torch.jit.is_tracing():
            return _ReLU6.apply(x)
        return super().forward(x)


class _ReLU6(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = F.relu6(x, inplace=True)
        ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.ops.aten.hardtanh_backward(grad, *ctx.saved_tensors, 0, 6)


class StridedConv2d(Conv2d):
    """Detectron2's Conv2d with a stride, trained fast and rightly also in bfloat16 on CPUs.

    There oneDNN takes the gradient of a depthwise convolution's input by a kernel for dense ones, 8
    to 50 times slower than in float32. So it's taken in float32, without a bias.

    And it leaves a part of the weight's gradient unset if the map is narrower than the stride. So
    under autocast such a map, of a few pixels, is convolved in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        on_cpu = x.device.type == "cpu"
        # autocast may make bfloat16 of a float32 x, too
        if on_cpu and self.weight.dtype == torch.float32 and x.shape[-1] < self.stride[1]:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float()).to(x.dtype)
        in_bfloat16 = on_cpu and x.dtype == torch.bfloat16
        if not (in_bfloat16 and x.requires_grad and self.groups > 1 and self.bias is None):
            return super().forward(x)
        y = _StridedDepthwise.apply(
            x, self.weight.to(x.dtype), self.stride, self.padding, self.dilation, self.groups
        )
        y = y if self.norm is None else self.norm(y)
        return y if self.activation is None else self.activation(y)


class _StridedDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, *args) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.args = args
        return F.conv2d(x, weight, None, *args)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.args

        def gradients(grad: Tensor, x: Tensor, weight: Tensor, *mask: bool):
            return torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
            )

        _, grad_weight, _ = gradients(grad, x, weight, False, True, False)
        shape = torch.empty_like(x, dtype=torch.float32)  # nothing else of x is needed
        grad_x, _, _ = gradients(grad.float(), shape, weight.float(), True, False, False)
        return grad_x.to(x.dtype), grad_weight, None, None, None, None


def conv_block(
    in_channels: int,
    out_channels: int,
    kernel: int = 1,
    *,
    norm: str,
    activation: str = "",
    stride: int = 1,
    padding: Optional[int] = None,
    groups: int = 1,
) -> Conv2d:
    """Convolution, normalisation and activation, in this order.

    Args:
        norm: "" for none (then the convolution has a bias), "BN", or another name of
            ``detectron2.layers.get_norm``: "SyncBN", "FrozenBN", "GN", ….
        activation: a class in torch.nn that works in place, or "".
        padding: None: half the kernel.
    """
    return (StridedConv2d if stride > 1 else Conv2d)(
        in_channels,
        out_channels,
        kernel,
        stride=stride,
        padding=kernel // 2 if padding is None else padding,
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
        return (ReLU6 if name == "ReLU6" else getattr(nn, name))(inplace=True)
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
        padding: Optional[int] = None,
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


def init_convolutions(module: nn.Module, init: Callable, **kwargs) -> None:
    """All weights in ``module`` by this function of :mod:`torch.nn.init`; biases are 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            init(layer.weight, **kwargs)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


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
