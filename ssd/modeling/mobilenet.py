"""MobileNetV1 (arXiv 1704.04861), V2 (1801.04381) and V3-Large (1905.02244)."""

from typing import Callable, Dict, Iterable, Sequence

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ssd.modeling.blocks import (
    InvertedResidual,
    check_out_features,
    conv_block,
    init_convolutions,
    round_to_8,
    set_batch_norm,
)

__all__ = [
    "MobileNet",
    "build_mobilenetv1_backbone",
    "build_mobilenetv2_backbone",
    "build_mobilenetv3_backbone",
]

# V1, table 1: output channels, blocks and stride of each stage.
_V1_STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))
# V2, table 2: expansion, output channels, blocks and stride of each stage.
_V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# V3, table 1: kernel, output channels, squeeze-and-excitation, activation and stride of each
# stage, and the depthwise convolution's channels in each of its blocks.
_V3_STAGES = (
    (3, 16, False, "ReLU", 1, (16,)),
    (3, 24, False, "ReLU", 2, (64, 72)),
    (5, 40, True, "ReLU", 2, (72, 120, 120)),
    (3, 80, False, "Hardswish", 2, (240, 200, 184, 184)),
    (3, 112, True, "Hardswish", 1, (480, 672)),
    (5, 160, True, "Hardswish", 2, (672, 960, 960)),
)


class MobileNet(Backbone):
    """A MobileNet without its classifier.

    Outputs: ``stage1``, ``stage2``, …, of a stage's last block; ``stage2_expand``, …, of the
    expansion inside a strided stage's first block, with that stage's input size; and ``conv2``,
    the last 1×1 convolution, if there is one.
    """

    def __init__(
        self,
        conv1: nn.Module,
        stages: Iterable[Sequence[nn.Module]],
        conv2: nn.Module = None,
        *,
        out_features: Sequence[str],
    ):
        """
        Args:
            conv1: of stride 2.
            stages: the blocks of each; the first block may be strided.
            out_features: which outputs; layers after the last of them are left out.
        """
        super().__init__()
        self.conv1 = conv1
        layers, stride = {}, 2
        self._out_feature_channels, self._out_feature_strides = {}, {}
        for number, blocks in enumerate(stages, 1):
            name, first = f"stage{number}", blocks[0]
            if isinstance(first, InvertedResidual) and first.depthwise.stride != (1, 1):
                self._out_feature_channels[f"{name}_expand"] = first.depthwise.in_channels
                self._out_feature_strides[f"{name}_expand"] = stride
            stride *= max(layer.stride[0] for layer in first.modules() if hasattr(layer, "stride"))
            layers[name] = nn.Sequential(*blocks)
            last = [layer for layer in blocks[-1].modules() if isinstance(layer, nn.Conv2d)][-1]
            self._out_feature_channels[name] = last.out_channels
            self._out_feature_strides[name] = stride
        if conv2 is not None:
            layers["conv2"] = conv2
            self._out_feature_channels["conv2"] = conv2.out_channels
            self._out_feature_strides["conv2"] = stride
        self._out_features = check_out_features(out_features, self._out_feature_channels)
        # Layers that no output needs would be parameters without a gradient.
        names = list(layers)
        last = max(names.index(name.removesuffix("_expand")) for name in out_features)
        if names[last] not in out_features:
            raise ValueError(
                f"MODEL.SSD.IN_FEATURES: {names[last]}_expand must be followed by a later feature "
                f"such as {names[last]}, got {list(out_features)}"
            )
        self._names = names[: last + 1]
        for name in self._names:
            self.add_module(name, layers[name])
        init_convolutions(self, nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """(N, 3, H, W) to the named feature maps."""
        outputs = {}
        x = self.conv1(x)
        for name in self._names:
            stage = getattr(self, name)
            if f"{name}_expand" in self._out_features:
                x = outputs[f"{name}_expand"] = stage[0].expand(x)
                x = stage[1:](stage[0].after_expansion(x))
            else:
                x = stage(x)
            outputs[name] = x
        return {name: outputs[name] for name in self._out_features}


def _widths(cfg) -> Callable[[float], int]:
    mult = cfg.MODEL.MOBILENET.WIDTH_MULT
    if not mult > 0:
        raise ValueError(f"MODEL.MOBILENET.WIDTH_MULT must be positive, got {mult}")
    return lambda channels: round_to_8(channels * mult)


@BACKBONE_REGISTRY.register()
def build_mobilenetv1_backbone(cfg, input_shape: ShapeSpec) -> MobileNet:
    """MobileNetV1: ``stage1`` to ``stage5`` of 64, 128, 256, 512, 1024 channels and stride 2, 4,
    8, 16, 32."""
    norm, width = cfg.MODEL.MOBILENET.NORM, _widths(cfg)
    kwargs = {"norm": norm, "activation": "ReLU"}
    channels = width(32)
    conv1 = conv_block(input_shape.channels, channels, 3, stride=2, **kwargs)
    stages = []
    for out_channels, count, stage_stride in _V1_STAGES:
        blocks, out_channels = [], width(out_channels)
        for stride in [stage_stride] + [1] * (count - 1):
            depthwise = conv_block(channels, channels, 3, stride=stride, groups=channels, **kwargs)
            blocks.append(nn.Sequential(depthwise, conv_block(channels, out_channels, **kwargs)))
            channels = out_channels
        stages.append(blocks)
    backbone = MobileNet(conv1, stages, out_features=cfg.MODEL.SSD.IN_FEATURES)
    return set_batch_norm(backbone, cfg)


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_backbone(cfg, input_shape: ShapeSpec) -> MobileNet:
    """MobileNetV2: linear bottlenecks ``stage1`` to ``stage7`` of 16, 24, 32, 64, 96, 160, 320
    channels and stride 2, 4, 8, 16, 16, 32, 32, and ``conv2`` of 1280."""
    norm, width = cfg.MODEL.MOBILENET.NORM, _widths(cfg)
    kwargs = {"norm": norm, "activation": "ReLU6"}
    channels = width(32)
    conv1 = conv_block(input_shape.channels, channels, 3, stride=2, **kwargs)
    stages = []
    for expansion, out_channels, count, stage_stride in _V2_STAGES:
        blocks, out_channels = [], width(out_channels)
        for stride in [stage_stride] + [1] * (count - 1):
            hidden = channels * expansion
            blocks.append(InvertedResidual(channels, hidden, out_channels, stride=stride, **kwargs))
            channels = out_channels
        stages.append(blocks)
    conv2 = conv_block(channels, max(1280, width(1280)), **kwargs)  # never narrower
    backbone = MobileNet(conv1, stages, conv2, out_features=cfg.MODEL.SSD.IN_FEATURES)
    return set_batch_norm(backbone, cfg)


@BACKBONE_REGISTRY.register()
def build_mobilenetv3_backbone(cfg, input_shape: ShapeSpec) -> MobileNet:
    """MobileNetV3-Large: ``stage1`` to ``stage6`` of 16, 24, 40, 80, 112, 160 channels and stride
    2, 4, 8, 16, 16, 32, and ``conv2`` of 960; half as many in stage6 (but for its expansion) and
    conv2 with ``MODEL.MOBILENET.REDUCED_TAIL`` (table 6)."""
    keys, width = cfg.MODEL.MOBILENET, _widths(cfg)
    channels = width(16)
    conv1 = conv_block(
        input_shape.channels, channels, 3, stride=2, norm=keys.NORM, activation="Hardswish"
    )
    stages = []
    for kernel, out_channels, squeeze, activation, stage_stride, hidden_channels in _V3_STAGES:
        divisor = 2 if keys.REDUCED_TAIL and out_channels == 160 else 1
        blocks, out_channels = [], width(out_channels // divisor)
        for index, hidden in enumerate(hidden_channels):
            first = index == 0
            blocks.append(
                InvertedResidual(
                    channels,
                    width(hidden if first else hidden // divisor),
                    out_channels,
                    kernel,
                    stride=stage_stride if first else 1,
                    norm=keys.NORM,
                    activation=activation,
                    squeeze=squeeze,
                    squeeze_first=keys.SQUEEZE_FIRST,
                )
            )
            channels = out_channels
        stages.append(blocks)
    conv2 = conv_block(channels, 6 * channels, norm=keys.NORM, activation="Hardswish")
    backbone = MobileNet(conv1, stages, conv2, out_features=cfg.MODEL.SSD.IN_FEATURES)
    return set_batch_norm(backbone, cfg)
