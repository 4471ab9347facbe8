"""Detectron2's ResNet as NVIDIA's SSD cuts it, and Detectron2's RegNet."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from torch import nn

from ssd.modeling.blocks import check_out_features, set_batch_norm

__all__ = ["build_regnet_backbone", "build_ssd_resnet_backbone"]


@BACKBONE_REGISTRY.register()
def build_ssd_resnet_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's ResNet of ``MODEL.RESNETS``, with ``RES4_STRIDE``.

    Of stride 1, as in NVIDIA's DeepLearningExamples, ``res4`` has stride 8: 38×38 at 300×300.
    """
    backbone = build_resnet_backbone(cfg, input_shape)
    stride = cfg.MODEL.RESNETS.RES4_STRIDE
    if stride not in (1, 2):
        raise ValueError(f"MODEL.RESNETS.RES4_STRIDE: 1 or 2, got {stride}")
    if stride == 1 and hasattr(backbone, "res4"):
        for layer in backbone.res4[0].modules():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)
        for name in backbone._out_feature_strides:
            if name in ("res4", "res5"):
                backbone._out_feature_strides[name] //= 2
    return set_batch_norm(backbone, cfg)


@BACKBONE_REGISTRY.register()
def build_regnet_backbone(cfg, input_shape: ShapeSpec) -> RegNet:
    """RegNet as ``MODEL.REGNET`` says, with the outputs ``MODEL.SSD.IN_FEATURES`` (s1 … s4)."""
    keys = cfg.MODEL.REGNET
    backbone = RegNet(
        stem_class=SimpleStem,
        stem_width=32,
        block_class=ResBottleneckBlock,
        depth=keys.DEPTH,
        w_a=keys.W_A,
        w_0=keys.W_0,
        w_m=keys.W_M,
        group_width=keys.GROUP_WIDTH,
        se_ratio=keys.SE_RATIO,
        norm=keys.NORM,
    )
    names = check_out_features(cfg.MODEL.SSD.IN_FEATURES, backbone._out_feature_channels)
    backbone._out_features = names
    # Layers that no output needs would be parameters without a gradient.
    stages = backbone.stages_and_names
    while stages and stages[-1][1] not in names:
        delattr(backbone, stages.pop()[1])
    return set_batch_norm(backbone, cfg)
