from ssd.modeling.default_boxes import DefaultBoxGenerator
from ssd.modeling.extra_layers import L2Norm, SSDBackbone, build_ssd_backbone
from ssd.modeling.head import SSDHead, SSDLiteHead
from ssd.modeling.mobilenet import (
    MobileNet,
    build_mobilenetv1_backbone,
    build_mobilenetv2_backbone,
    build_mobilenetv3_backbone,
)
from ssd.modeling.resnet import build_regnet_backbone, build_ssd_resnet_backbone
from ssd.modeling.ssd import SSD
from ssd.modeling.vgg import VGG16, build_vgg16_backbone

__all__ = [
    "DefaultBoxGenerator",
    "L2Norm",
    "MobileNet",
    "SSD",
    "SSDBackbone",
    "SSDHead",
    "SSDLiteHead",
    "VGG16",
    "build_mobilenetv1_backbone",
    "build_mobilenetv2_backbone",
    "build_mobilenetv3_backbone",
    "build_regnet_backbone",
    "build_ssd_backbone",
    "build_ssd_resnet_backbone",
    "build_vgg16_backbone",
]
