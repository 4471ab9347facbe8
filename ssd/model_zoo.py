"""Names of labs to configs and published weights: the functions of ``detectron2.model_zoo``.

A name is a lab's, such as "ssd_vgg16_size300"; "ssd_vgg16_size300/config.yaml" is the same. Only
``get(name, trained=True)`` downloads. A published file that is already there, under the last part
of its address, is used instead: from the current folder, or from Detectron2's cache
(``$FVCORE_CACHE``, by default ``~/.torch/iopath_cache``), where downloads also go.
"""

import difflib
import hashlib
import logging
import os
from pathlib import Path
from typing import List, NamedTuple, Optional, Tuple
from urllib.parse import urlparse

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import get_cache_dir
from torch import nn

from ssd.checkpoint import SSDCheckpointer
from ssd.config import load_config

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file", "names"]

logger = logging.getLogger(__name__)


class _Weights(NamedTuple):
    """Published weights of a lab."""

    url: str
    sha256: Optional[str]  # its first digits, which the file's name carries; None: unknown
    lineage: str  # whose code trained them
    result: str  # as published
    opts: Tuple = ()  # KEY, VALUE, …: where their definition differs from the lab's


_MMDET = "https://download.openmmlab.com/mmdetection/v2.0/ssd/"
_TORCHVISION = "https://download.pytorch.org/models/"
_LUFFICC = "https://github.com/lufficc/SSD/releases/download/1.2/"
_QFGAOHAO = "https://storage.googleapis.com/models-hao/"
_NVIDIA = "https://api.ngc.nvidia.com/v2/models/nvidia/"

# Lab to weights: MMDetection's configs/ssd/README.md, the metadata in torchvision's code, the
# READMEs of lufficc/SSD and qfgaohao/pytorch-ssd, and NVIDIA/DeepLearningExamples.
_PUBLISHED = {
    "ssd_vgg16_size300_120e": _Weights(
        _MMDET + "ssd300_coco/ssd300_coco_20210803_015428-d231a06e.pth",
        "d231a06e", "mmdet", "25.5 AP, COCO val2017",
    ),
    "ssd_vgg16_size512_120e": _Weights(
        _MMDET + "ssd512_coco/ssd512_coco_20210803_022849-0a47a1ca.pth",
        "0a47a1ca", "mmdet", "29.5 AP, COCO val2017",
    ),
    "ssdlite_mobilenetv2_size320_600e": _Weights(
        _MMDET + "ssdlite_mobilenetv2_scratch_600e_coco/"
        "ssdlite_mobilenetv2_scratch_600e_coco_20210629_110627-974d9307.pth",
        "974d9307", "mmdet", "21.3 AP, COCO val2017",
    ),
    "ssd_vgg16_size300_torchvision": _Weights(
        _TORCHVISION + "ssd300_vgg16_coco-b556d3b4.pth",
        "b556d3b4", "torchvision", "25.1 AP, COCO val2017",
    ),
    "ssdlite_mobilenetv3_size320": _Weights(
        _TORCHVISION + "ssdlite320_mobilenet_v3_large_coco-a79551df.pth",
        "a79551df", "torchvision", "21.3 AP, COCO val2017",
    ),
    "ssd_vgg16_size300_voc0712": _Weights(
        _LUFFICC + "vgg_ssd300_voc0712.pth", None, "lufficc", "77.7 mAP, VOC2007 test",
        ("MODEL.SSD.DEFAULT_BOXES.CLIP", "cxcywh", "TEST.DETECTIONS_PER_IMAGE", 100),
    ),
    "ssd_vgg16_size512_voc0712": _Weights(
        _LUFFICC + "vgg_ssd512_voc0712.pth", None, "lufficc", "80.7 mAP, VOC2007 test",
        ("MODEL.SSD.DEFAULT_BOXES.CLIP", "cxcywh", "TEST.DETECTIONS_PER_IMAGE", 100,
         "MODEL.SSD.DEFAULT_BOXES.MIN_SIZES", [35.84, 76.8, 153.6, 230.4, 307.2, 384.0, 460.8],
         "MODEL.SSD.DEFAULT_BOXES.MAX_SIZE", 537.65),
    ),
    "ssdlite_mobilenetv2_size320_voc0712": _Weights(
        _LUFFICC + "mobilenet_v2_ssd320_voc0712_v2.pth", None, "lufficc", "68.9 mAP, VOC2007 test",
    ),
    "ssdlite_mobilenetv3_size320_voc0712": _Weights(
        _LUFFICC + "mobilenet_v3_ssd320_voc0712.pth", None, "lufficc", "69.5 mAP, VOC2007 test",
    ),
    "ssd_mobilenetv1_size300_voc0712": _Weights(
        _QFGAOHAO + "mobilenet-v1-ssd-mp-0_675.pth", None, "qfgaohao", "67.5 mAP, VOC2007 test",
    ),
    # No result is published for this very file; the README of its time says 25.0.
    "ssd_resnet50_size300": _Weights(
        _NVIDIA + "ssd_pyt_ckpt_amp/versions/20.06.0/files/nvidia_ssdpyt_amp_200703.pt",
        None, "nvidia", "about 25 AP, COCO val2017",
    ),
}  # fmt: skip

# An installed wheel has the labs within the package (setup.py), a checkout beside it.
_PACKAGE = Path(__file__).resolve().parent
_LABS = _PACKAGE / "labs" if (_PACKAGE / "labs").is_dir() else _PACKAGE.parent / "labs"


def names() -> List[str]:
    """Names of all labs."""
    return sorted(path.parent.name for path in _LABS.glob("*/config.yaml"))


def get_config_file(name: str) -> str:
    """Path of a lab's ``config.yaml``.

    Raises:
        RuntimeError: there is no such lab; the nearest names and all of them are given.
    """
    return str(_LABS / _lab(name) / "config.yaml")


def get_checkpoint_url(name: str) -> str:
    """Address of the published weights that a lab reproduces.

    Raises:
        RuntimeError: there is no such lab, or nothing is published for it.
    """
    return _published(name).url


def get_config(name: str, trained: bool = False) -> CfgNode:
    """A lab's config, not frozen; see also :func:`ssd.load_config`.

    Args:
        trained: ``MODEL.WEIGHTS`` becomes the published file if it is already there, otherwise its
            address, and keys in which the file's definition differs from the lab's are set to it.
            If False, it stays the config's own, usually a backbone's weights.

    Raises:
        RuntimeError: there is no such lab, or ``trained`` and nothing is published for it.
        ValueError: the file that is there isn't the published one.
    """
    config_file = get_config_file(name)
    opts = []
    if trained:
        opts = ["MODEL.WEIGHTS", _local_file(name) or get_checkpoint_url(name)]
        opts += _published(name).opts
    cfg = load_config(config_file, opts)
    cfg.defrost()
    return cfg


def get(name: str, trained: bool = False, device: Optional[str] = None) -> nn.Module:
    """A lab's model in training mode, with its weights.

    Args:
        trained: the published weights, which must fill the model. If False, those of the config's
            ``MODEL.WEIGHTS``, as far as they fit, as when training starts.
        device: instead of the config's ``MODEL.DEVICE``.

    Raises:
        FileNotFoundError: the config's weights aren't there.
        OSError: the download fails.
        ValueError: the published weights can't be read, don't fit, or aren't the published ones.
        See also :func:`get_config`.
    """
    cfg = get_config(name, trained)
    if device is not None:
        cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    if trained:
        weights = _published(name)
        if cfg.MODEL.WEIGHTS == weights.url:
            cfg.MODEL.WEIGHTS = _check_hash(PathManager.get_local_path(weights.url), weights)
        logger.info("%s: weights of %s, %s", name, weights.lineage, weights.result)
    SSDCheckpointer(model, cfg=cfg, strict=trained).load(cfg.MODEL.WEIGHTS)
    return model


def _lab(name: str) -> str:
    lab, labs = name.removesuffix("/config.yaml"), names()
    if lab not in labs:
        near = difflib.get_close_matches(lab, labs, n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise RuntimeError(f"no lab is named {name!r}{hint} The labs are {', '.join(labs)}")
    return lab


def _published(name: str) -> _Weights:
    lab = _lab(name)
    if lab not in _PUBLISHED:
        raise RuntimeError(
            f"no weights are published for {lab!r}; expected one of {', '.join(_PUBLISHED)}. "
            "Train it, or set MODEL.WEIGHTS to a file of yours"
        )
    return _PUBLISHED[lab]


def _local_file(name: str) -> Optional[str]:
    """Path of the published file if it is in the current folder or in Detectron2's cache."""
    weights = _published(name)
    address = urlparse(weights.url).path.lstrip("/")
    # the place in the cache where iopath's HTTPURLHandler puts a download
    for path in (os.path.basename(address), os.path.join(get_cache_dir(), address)):
        if os.path.isfile(path):
            return _check_hash(path, weights)
    return None


def _check_hash(path: str, weights: _Weights) -> str:
    if weights.sha256 is not None:
        found = hashlib.sha256(Path(path).read_bytes()).hexdigest()[: len(weights.sha256)]
        if found != weights.sha256:
            raise ValueError(
                f"{os.path.abspath(path)} is not the published {weights.url}: its SHA-256 starts "
                f"with {found}, expected {weights.sha256}. It may be a broken download: delete it "
                "and try again. Weights of your own: rename the file, set MODEL.WEIGHTS to it"
            )
    return path
