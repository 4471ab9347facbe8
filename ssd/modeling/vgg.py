"""VGG16 with reduced fully connected layers, the backbone of the SSD paper (section 2.1)."""

from typing import Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ssd.modeling.blocks import check_out_features, init_convolutions

__all__ = ["VGG16", "build_vgg16_backbone"]

# Output channels of the convolutions of each stage.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(Backbone):
    """VGG16 up to fc7, fully convolutional, without normalisation.

    The pools after stages 1 to 4 halve the map, rounding up; the one after stage 5 keeps it (with
    ``late_pool`` the last two are the other way round, and conv5_3 has stride 8); fc6 is a 3×3
    convolution of dilation 6 and fc7 a 1×1 one (DeepLab's reduced fully connected layers). Layers
    have their Caffe names. Outputs, after ReLU: ``conv1_2``, ``conv2_2``, ``conv3_3``,
    ``conv4_3``, ``conv5_3`` and ``fc7``, of stride 1, 2, 4, 8, 16, 16.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_features: Sequence[str] = ("conv4_3", "fc7"),
        late_pool: bool = False,
    ):
        super().__init__()
        self.late_pool = late_pool
        self._out_feature_channels = {}
        self._out_feature_strides = {}
        for stage, widths in enumerate(_STAGES, 1):
            for index, width in enumerate(widths, 1):
                name = f"conv{stage}_{index}"
                self.add_module(name, _conv(in_channels, width, 3, padding=1))
                in_channels = width
            self._out_feature_channels[name] = width
            self._out_feature_strides[name] = 2 ** (stage - 1 - (late_pool and stage == 5))
        self.fc6 = _conv(512, 1024, 3, padding=6, dilation=6)
        self.fc7 = _conv(1024, 1024, 1)
        for layer in (self.fc6, self.fc7):  # as torchvision, whose VGG16 lacks them
            nn.init.xavier_uniform_(layer.weight)
        self._out_feature_channels["fc7"] = 1024
        self._out_feature_strides["fc7"] = 16
        self._out_features = check_out_features(out_features, self._out_feature_channels)
        # Layers that no output needs would be parameters without a gradient.
        names = [name for name, _ in self.named_children()]
        last = max(names.index(name) for name in self._out_features)
        self._layers, unused = names[: last + 1], names[last + 1 :]
        for name in unused:
            delattr(self, name)

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """(N, 3, H, W) to the named feature maps."""
        outputs = {}
        for name in self._layers:
            if name == ("conv5_1" if self.late_pool else "fc6"):
                x = self._max_pool(x, 3, 1, 1)
            elif name in ("conv2_1", "conv3_1", "conv4_1", "conv5_1", "fc6"):
                x = self._max_pool(x, 2, 2, 0, 1, True)
            x = outputs[name] = getattr(self, name)(x)
        return {name: outputs[name] for name in self._out_features}

    def _max_pool(self, x: Tensor, *args) -> Tensor:
        if self.training and x.is_cuda and x.requires_grad and not torch.compiler.is_compiling():
            return _MaxPool.apply(x, *args)
        return F.max_pool2d(x, *args)


class _MaxPool(torch.autograd.Function):
    """Max pooling that keeps its input, as the ReLU in front of it does anyway, and not 8 bytes per
    output for where each came from: they are a fifth of what a training step of SSD300 keeps. On
    CPUs the process wouldn't become smaller: its memory is in pieces."""

    @staticmethod
    def forward(ctx, x: Tensor, *args) -> Tensor:
        ctx.save_for_backward(x)
        ctx.args = args
        return F.max_pool2d(x, *args)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tuple[Optional[Tensor], ...]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = F.max_pool2d(x, *ctx.args)
        again = torch.is_grad_enabled()
        (gradient,) = torch.autograd.grad(y, x, gradient, create_graph=again)
        return (gradient, *[None] * len(ctx.args))


def _conv(in_channels: int, out_channels: int, kernel: int, **kwargs) -> Conv2d:
    conv = Conv2d(in_channels, out_channels, kernel, activation=nn.ReLU(inplace=True), **kwargs)
    init_convolutions(conv, nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
    return conv


@BACKBONE_REGISTRY.register()
def build_vgg16_backbone(cfg, input_shape: ShapeSpec) -> VGG16:
    """VGG16 with the outputs ``MODEL.SSD.IN_FEATURES``."""
    return VGG16(input_shape.channels, cfg.MODEL.SSD.IN_FEATURES, cfg.MODEL.VGG.LATE_POOL)
