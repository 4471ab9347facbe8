"""MobileNetV2 (arXiv 1801.04381, table 2)."""

from typing import Dict, Sequence

from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ssd.modeling.vgg import check_out_features

__all__ = ["MobileNetV2", "build_mobilenetv2_backbone"]

# Expansion, output channels, blocks and stride of each stage.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise, linear 1×1 projection; a shortcut where shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, norm: str):
        super().__init__()
        hidden = in_channels * expansion
        self.expand = (
            conv_norm_relu6(in_channels, hidden, 1, norm=norm) if expansion > 1 else nn.Identity()
        )
        self.depthwise = conv_norm_relu6(hidden, hidden, 3, stride=stride, groups=hidden, norm=norm)
        self.project = Conv2d(
            hidden, out_channels, 1, bias=not norm, norm=get_norm(norm, out_channels)
        )
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class MobileNetV2(Backbone):
    """MobileNetV2 without its classifier.

    Outputs: ``stage1`` to ``stage7`` (linear bottlenecks of 16, 24, 32, 64, 96, 160, 320 channels
    and stride 2, 4, 8, 16, 16, 32, 32) and ``conv2`` (the last 1×1 convolution, 1280 channels).
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_features: Sequence[str] = ("stage5", "conv2"),
        width_mult: float = 1.0,
        norm: str = "BN",
    ):
        super().__init__()
        if not width_mult > 0:
            raise ValueError(f"MODEL.MOBILENET.WIDTH_MULT must be positive, got {width_mult}")
        channels = _round_to_8(32 * width_mult)
        self.conv1 = conv_norm_relu6(in_channels, channels, 3, stride=2, norm=norm)
        self._out_feature_channels = {}
        self._out_feature_strides = {}
        stride = 2
        for number, (expansion, width, blocks, stage_stride) in enumerate(_STAGES, 1):
            name, width = f"stage{number}", _round_to_8(width * width_mult)
            stage = nn.Sequential()
            for block in range(blocks):
                block_stride = stage_stride if block == 0 else 1
                stage.append(InvertedResidual(channels, width, block_stride, expansion, norm))
                channels = width
            self.add_module(name, stage)
            stride *= stage_stride
            self._out_feature_channels[name] = channels
            self._out_feature_strides[name] = stride
        width = _round_to_8(1280 * max(1.0, width_mult))
        self.conv2 = conv_norm_relu6(channels, width, 1, norm=norm)
        self._out_feature_channels["conv2"] = width
        self._out_feature_strides["conv2"] = stride
        self._out_features = check_out_features(
            out_features, self._out_feature_channels, "MODEL.SSD.IN_FEATURES"
        )
        # Layers that no output needs would be parameters without a gradient.
        names = list(self._out_feature_channels)
        last = max(names.index(name) for name in self._out_features)
        self._names, unused = names[: last + 1], names[last + 1 :]
        for name in unused:
            delattr(self, name)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """(N, 3, H, W) to the named feature maps."""
        outputs = {}
        x = self.conv1(x)
        for name in self._names:
            x = outputs[name] = getattr(self, name)(x)
        return {name: outputs[name] for name in self._out_features}


def conv_norm_relu6(
    in_channels: int, out_channels: int, kernel: int, *, norm: str, stride: int = 1, groups: int = 1
) -> Conv2d:
    return Conv2d(
        in_channels,
        out_channels,
        kernel,
        stride=stride,
        padding=kernel // 2,
        groups=groups,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=nn.ReLU6(inplace=True),
    )


def _round_to_8(channels: float) -> int:
    """The nearest multiple of 8, at least 8 and not below 90 % of ``channels``."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_backbone(cfg, input_shape: ShapeSpec) -> MobileNetV2:
    """MobileNetV2 as ``MODEL.MOBILENET`` says, with the outputs ``MODEL.SSD.IN_FEATURES``."""
    keys = cfg.MODEL.MOBILENET
    names = cfg.MODEL.SSD.IN_FEATURES
    return MobileNetV2(input_shape.channels, names, keys.WIDTH_MULT, keys.NORM)
