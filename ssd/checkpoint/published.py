"""The published weights: where they are, whose they are, and which lab has their definition."""

import shlex
from pathlib import Path
from typing import Dict, NamedTuple, Optional, Tuple
from urllib.parse import urlparse

__all__ = ["BACKBONE_URLS", "PUBLISHED", "Weights", "lab_folder"]


class Weights(NamedTuple):
    """Published weights of a detector."""

    lineage: str  # :attr:`Lineage.key` of their file
    lab: str
    url: str
    result: str  # as published
    sha256: Optional[str] = None  # its first digits, or all; None: unknown
    opts: Tuple = ()  # KEY, VALUE, …: where their definition differs from the lab's
    file: str = ""  # its name, where the address is that of a page or of an archive

    @property
    def options(self) -> str:
        """``opts`` as on a command line."""
        return " ".join(shlex.quote(str(x).replace(" ", "")) for x in self.opts)

    @property
    def file_name(self) -> str:
        return self.file or Path(urlparse(self.url).path).name


# An installed wheel has the labs within the package (setup.py), a checkout beside it.
_PACKAGE = Path(__file__).resolve().parents[1]


def lab_folder() -> Path:
    """The folder of all labs."""
    return _PACKAGE / "labs" if (_PACKAGE / "labs").is_dir() else _PACKAGE.parent / "labs"


_MMDET = "https://download.openmmlab.com/mmdetection/v2.0/"
_MMDET_1 = "https://s3.ap-northeast-2.amazonaws.com/open-mmlab/mmdetection/models/"
_TORCHVISION = "https://download.pytorch.org/models/"
_LUFFICC = "https://github.com/lufficc/SSD/releases/download/1.2/"
_QFGAOHAO = "https://storage.googleapis.com/models-hao/"
_NVIDIA = "https://api.ngc.nvidia.com/v2/models/nvidia/ssd_pyt_ckpt_amp/versions/"
_AMDEGROOT = "https://s3.amazonaws.com/amdegroot-models/"
_CAFFE = "https://drive.google.com/open?id=0BzKzrI_SkD1_"

_ON_VOC = (
    "MODEL.SSD.NUM_CLASSES", 20,
    "DATASETS.TRAIN", ("voc_2007_trainval", "voc_2012_trainval"),
    "DATASETS.TEST", ("voc_2007_test",),
    "TEST.EVALUATORS", ["voc"],
)  # fmt: skip
_VOC300 = (*_ON_VOC, "MODEL.SSD.DEFAULT_BOXES.MIN_SIZES", [30.0, 60.0, 111.0, 162.0, 213.0, 264.0])
_VOC512 = (
    *_ON_VOC,
    "MODEL.SSD.DEFAULT_BOXES.MIN_SIZES", [35.0, 76.0, 153.0, 230.0, 307.0, 384.0, 460.0],
    "MODEL.SSD.DEFAULT_BOXES.MAX_SIZE", 537.0,
)  # fmt: skip
_CLAMPED = ("MODEL.SSD.DEFAULT_BOXES.CLIP", "cxcywh")
_AMDEGROOT_TEST = (
    *_CLAMPED, "MODEL.SSD.TOPK_CANDIDATES_TEST", 200, "TEST.DETECTIONS_PER_IMAGE", 4000,
)  # fmt: skip
# the last key's value is the number of default boxes: all are candidates
_LUFFICC_TEST = (*_CLAMPED, "TEST.DETECTIONS_PER_IMAGE", 100, "MODEL.SSD.TOPK_CANDIDATES_TEST")
_COCO512_SIZES = [20.48, 51.2, 133.12, 215.04, 296.96, 378.88, 460.8]

# Sources: the READMEs of MMDetection (configs/ssd, configs/pascal_voc), weiliu89/caffe,
# amdegroot/ssd.pytorch, lufficc/SSD, qfgaohao/pytorch-ssd, Chen-Jianhu/detectron2 (projects/SSD),
# the metadata in torchvision's code, and NVIDIA/DeepLearningExamples.
PUBLISHED: Dict[str, Weights] = {
    "ssd300_coco_mmdet": Weights(
        "mmdet_vgg", "ssd_vgg16_size300_120e",
        _MMDET + "ssd/ssd300_coco/ssd300_coco_20210803_015428-d231a06e.pth",
        "25.5 AP, COCO val2017", "d231a06e",
    ),
    "ssd512_coco_mmdet": Weights(
        "mmdet_vgg", "ssd_vgg16_size512_120e",
        _MMDET + "ssd/ssd512_coco/ssd512_coco_20210803_022849-0a47a1ca.pth",
        "29.5 AP, COCO val2017", "0a47a1ca",
    ),
    "ssd300_voc0712_mmdet": Weights(
        "mmdet_vgg", "ssd_vgg16_size300_120e",
        _MMDET + "pascal_voc/ssd300_voc0712/ssd300_voc0712_20220320_194658-17edda1b.pth",
        "76.5 mAP, VOC2007 test", "17edda1b", _VOC300,
    ),
    "ssd512_voc0712_mmdet": Weights(
        "mmdet_vgg", "ssd_vgg16_size512_120e",
        _MMDET + "pascal_voc/ssd512_voc0712/ssd512_voc0712_20220320_194717-03cefefe.pth",
        "79.5 mAP, VOC2007 test", "03cefefe", _VOC512,
    ),
    "ssdlite_mobilenetv2_coco_mmdet": Weights(
        "mmdet_mobilenetv2", "ssdlite_mobilenetv2_size320_600e",
        _MMDET + "ssd/ssdlite_mobilenetv2_scratch_600e_coco/"
        "ssdlite_mobilenetv2_scratch_600e_coco_20210629_110627-974d9307.pth",
        "21.3 AP, COCO val2017", "974d9307",
    ),
    "ssd300_coco_mmdet2": Weights(
        "mmdet_old", "ssd_vgg16_size300_120e",
        _MMDET + "ssd/ssd300_coco/ssd300_coco_20200307-a92d2092.pth",
        "25.6 AP, COCO val2017", "a92d2092",
    ),
    "ssd512_coco_mmdet2": Weights(
        "mmdet_old", "ssd_vgg16_size512_120e",
        _MMDET + "ssd/ssd512_coco/ssd512_coco_20200308-038c5591.pth",
        "29.4 AP, COCO val2017", "038c5591",
    ),
    "ssd300_coco_mmdet1": Weights(
        "mmdet_old", "ssd_vgg16_size300_120e",
        _MMDET_1 + "ssd300_coco_vgg16_caffe_120e_20181221-84d7110b.pth",
        "25.7 AP, COCO val2017", "84d7110b",
    ),
    "ssd300_voc0712_mmdet1": Weights(
        "mmdet_old", "ssd_vgg16_size300_120e",
        _MMDET_1 + "ssd300_voc_vgg16_caffe_240e_20181221-2f05dd40.pth",
        "77.8 mAP, VOC2007 test", "2f05dd40", _VOC300,
    ),
    "ssd512_voc0712_mmdet1": Weights(
        "mmdet_old", "ssd_vgg16_size512_120e",
        _MMDET_1 + "ssd512_voc_vgg16_caffe_240e_20181221-7652ee18.pth",
        "80.4 mAP, VOC2007 test", "7652ee18", _VOC512,
    ),
    "ssd300_coco_torchvision": Weights(
        "torchvision_vgg", "ssd_vgg16_size300_torchvision",
        _TORCHVISION + "ssd300_vgg16_coco-b556d3b4.pth",
        "25.1 AP, COCO val2017",
        "b556d3b43ab6c3f63d81bfb8835fe8756ac22da664357da100dccf96b6a6b42d",
    ),
    "ssdlite_mobilenetv3_coco_torchvision": Weights(
        "torchvision_mobilenetv3", "ssdlite_mobilenetv3_size320",
        _TORCHVISION + "ssdlite320_mobilenet_v3_large_coco-a79551df.pth",
        "21.3 AP, COCO val2017",
        "a79551df90c79834bcd3bb3845ef9d966b5449a3a9b2833ae8404778ca5d65d2",
    ),
    "ssd300_coco_caffe": Weights(
        "caffe", "ssd_vgg16_size300_expand_aug", _CAFFE + "dUY1Ml9GRTFpUWc",
        "25.1 AP, COCO test-dev", file="VGG_coco_SSD_300x300_iter_400000.caffemodel",
    ),
    "ssd512_coco_caffe": Weights(
        "caffe", "ssd_vgg16_size512_expand_aug", _CAFFE + "dlJpZHJzOXd3MTg",
        "28.8 AP, COCO test-dev", file="VGG_coco_SSD_512x512_iter_360000.caffemodel",
    ),
    "ssd300_voc0712_caffe": Weights(
        "caffe", "ssd_vgg16_size300_voc0712", _CAFFE + "WVVTSmQxU0dVRzA",
        "77.2 mAP, VOC2007 test", file="VGG_VOC0712_SSD_300x300_iter_120000.caffemodel",
    ),
    "ssd512_voc0712_caffe": Weights(
        "caffe", "ssd_vgg16_size512_voc0712", _CAFFE + "ZDIxVHBEcUNBb2s",
        "79.8 mAP, VOC2007 test", file="VGG_VOC0712_SSD_512x512_iter_120000.caffemodel",
    ),
    "ssd300_voc0712_lufficc": Weights(
        "lufficc_vgg", "ssd_vgg16_size300_voc0712", _LUFFICC + "vgg_ssd300_voc0712.pth",
        "77.7 mAP, VOC2007 test", opts=(*_LUFFICC_TEST, 8732),
    ),
    "ssd512_voc0712_lufficc": Weights(
        "lufficc_vgg", "ssd_vgg16_size512_voc0712", _LUFFICC + "vgg_ssd512_voc0712.pth",
        "80.7 mAP, VOC2007 test",
        opts=(
            *_LUFFICC_TEST, 24564,
            "MODEL.SSD.DEFAULT_BOXES.MIN_SIZES", [35.84, 76.8, 153.6, 230.4, 307.2, 384.0, 460.8],
            "MODEL.SSD.DEFAULT_BOXES.MAX_SIZE", 537.65,
        ),
    ),
    "ssd300_coco_lufficc": Weights(
        "lufficc_vgg", "ssd_vgg16_size300_expand_aug", _LUFFICC + "vgg_ssd300_coco_trainval35k.pth",
        "25.2 AP, COCO minival2014", opts=(*_LUFFICC_TEST, 8732),
    ),
    "ssd512_coco_lufficc": Weights(
        "lufficc_vgg", "ssd_vgg16_size512_expand_aug", _LUFFICC + "vgg_ssd512_coco_trainval35k.pth",
        "29.0 AP, COCO minival2014",
        opts=(
            *_LUFFICC_TEST, 24564,
            "MODEL.SSD.DEFAULT_BOXES.MIN_SIZES", _COCO512_SIZES,
            "MODEL.SSD.DEFAULT_BOXES.MAX_SIZE", 542.72,
        ),
    ),
    "ssdlite_mobilenetv2_voc0712_lufficc": Weights(
        "lufficc_mobilenetv2", "ssdlite_mobilenetv2_size320_voc0712",
        _LUFFICC + "mobilenet_v2_ssd320_voc0712_v2.pth", "68.9 mAP, VOC2007 test",
    ),
    "ssdlite_mobilenetv3_voc0712_lufficc": Weights(
        "lufficc_mobilenetv3", "ssdlite_mobilenetv3_size320_voc0712",
        _LUFFICC + "mobilenet_v3_ssd320_voc0712.pth", "69.5 mAP, VOC2007 test",
    ),
    "ssd300_voc0712_amdegroot": Weights(
        "amdegroot", "ssd_vgg16_size300_voc0712", _AMDEGROOT + "ssd300_mAP_77.43_v2.pth",
        "77.43 mAP, VOC2007 test", opts=_AMDEGROOT_TEST,
    ),
    "ssd300_voc0712_qfgaohao": Weights(
        "qfgaohao_vgg", "ssd_vgg16_size300_qfgaohao", _QFGAOHAO + "vgg16-ssd-mp-0_7726.pth",
        "77.26 mAP, VOC2007 test",
    ),
    "ssd_mobilenetv1_voc0712_qfgaohao": Weights(
        "qfgaohao_mobilenetv1", "ssd_mobilenetv1_size300_voc0712",
        _QFGAOHAO + "mobilenet-v1-ssd-mp-0_675.pth", "67.5 mAP, VOC2007 test",
    ),
    "ssdlite_mobilenetv2_voc0712_qfgaohao": Weights(
        "qfgaohao_mobilenetv2", "ssdlite_mobilenetv2_size300_voc0712",
        _QFGAOHAO + "mb2-ssd-lite-mp-0_686.pth", "68.6 mAP, VOC2007 test",
    ),
    # No result is published for this very file; the README of its time says 25.0.
    "ssd300_resnet50_coco_nvidia": Weights(
        "nvidia", "ssd_resnet50_size300",
        _NVIDIA + "20.06.0/files/nvidia_ssdpyt_amp_200703.pt", "about 25 AP, COCO val2017",
    ),
    "ssd512_coco_detectron2_fork": Weights(
        "detectron2_fork", "ssd_vgg16_size512",
        "http://det.cjh.zone/detectron2/projects/SSD/labs/ssd_vgg16_size512/output/model_final.pkl",
        "27.2 AP, COCO val2017",
        opts=(
            "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53],
            "MODEL.VGG.LATE_POOL", True,
            "MODEL.SSD.DEFAULT_BOXES.MIN_SIZES", _COCO512_SIZES,
            "MODEL.SSD.DEFAULT_BOXES.MAX_SIZE", 537.6,
            "MODEL.SSD.BBOX_REG_CLAMP", "upper",
            "MODEL.SSD.SCORE_THRESH_TEST", 0.02,
            "MODEL.SSD.TOPK_CANDIDATES_TEST", 24564,  # all
            "TEST.DETECTIONS_PER_IMAGE", 100,
            "DATASETS.TEST", ("coco_2017_val",),
        ),
    ),
}  # fmt: skip

# File name to address of the backbones that the labs start from.
BACKBONE_URLS: Dict[str, str] = {
    Path(urlparse(url).path).name: url
    for url in (
        _AMDEGROOT + "vgg16_reducedfc.pth",
        _TORCHVISION + "vgg16-397923af.pth",
        _TORCHVISION + "vgg16_features-amdegroot-88682ab5.pth",
        _TORCHVISION + "mobilenet_v2-b0353104.pth",
        _TORCHVISION + "resnet50-0676ba61.pth",
        _QFGAOHAO + "mobilenet_v1_with_relu_69_5.pth",
        _QFGAOHAO + "mb2-imagenet-71_8.pth",
        "https://github.com/d-li14/mobilenetv3.pytorch/raw/master/pretrained/"
        "mobilenetv3-large-1cd25616.pth",
    )
}
