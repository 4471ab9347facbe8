"""The models that are compared: one definition on every side, with the same weights."""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.modeling import build_model
from lineages.rows import randomise
from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.models.detection import ssd300_vgg16, ssdlite320_mobilenet_v3_large
from torchvision.models.detection._utils import retrieve_out_channels
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead, _extra_block

from ssd.checkpoint import mmdet as mmdet_names
from ssd.checkpoint import torchvision as torchvision_names
from ssd.checkpoint.lineage import Lineage
from ssd.checkpoint.mobilenet import BACKBONES
from ssd.checkpoint.published import lab_folder
from ssd.checkpoint.recognition import recognise
from ssd.config import load_config

PAIRS = 2000  # (box, class) pairs of an image that pass the score threshold


@dataclass(frozen=True)
class Definition:
    """A model and its counterparts.

    Attributes:
        lab: ours.
        opts: KEY, VALUE pairs where the lab's detection differs from torchvision's.
        torchvision: from the config, torchvision's model of random weights; None: it has none.
        mmdet: name of a config of MMDetection's in configs/ssd; "": it has none.
        mmdet_lab: the lab of MMDetection's definition, if it is another one.
        preset: "ssd" or "ssdlite", the augmentation in torchvision's references/detection.
    """

    lab: str
    opts: Tuple = ()
    torchvision: Optional[Callable] = None
    mmdet: str = ""
    mmdet_lab: str = ""
    preset: str = "ssd"


class MobileNetV2Features(nn.Module):
    """torchvision's MobileNetV2 and extra blocks, as its SSDLite has them on MobileNetV3."""

    def __init__(self, features: nn.Sequential, extra: Sequence[nn.Module], outputs=(13, 18)):
        super().__init__()
        self.features, self.extra, self.outputs = features, nn.ModuleList(extra), outputs

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        maps = []
        for index, block in enumerate(self.features):
            x = block(x)
            if index in self.outputs:
                maps.append(x)
        for block in self.extra:
            x = block(x)
            maps.append(x)
        return OrderedDict((str(level), x) for level, x in enumerate(maps))


def ssdlite_mobilenetv2(cfg) -> nn.Module:
    """MMDetection's SSDLite-MobileNetV2 of torchvision's parts; torchvision lists no such model."""
    model = cfg.MODEL.SSD
    norm = partial(
        nn.BatchNorm2d, eps=cfg.MODEL.BATCH_NORM.EPS, momentum=cfg.MODEL.BATCH_NORM.MOMENTUM
    )
    body = mobilenet_v2(weights=None, width_mult=cfg.MODEL.MOBILENET.WIDTH_MULT, norm_layer=norm)
    channels = [body.last_channel, *(row[1] for row in model.EXTRA_LAYERS)]
    extra = [_extra_block(a, b, norm) for a, b in zip(channels, channels[1:])]
    height, width = model.INPUT_SIZE
    backbone = MobileNetV2Features(body.features, extra)
    boxes = model.DEFAULT_BOXES
    generator = DefaultBoxGenerator(
        [[int(ratio) for ratio in ratios] for ratios in boxes.ASPECT_RATIOS],
        scales=[size / width for size in (*boxes.MIN_SIZES, boxes.MAX_SIZE)],
        steps=boxes.STEPS,
        clip=False,
    )
    num_classes = model.NUM_CLASSES + 1
    channels = retrieve_out_channels(backbone, (width, height))
    head = SSDLiteHead(channels, generator.num_anchors_per_location(), num_classes, norm)
    return SSD(
        backbone,
        generator,
        (width, height),
        num_classes,
        head=head,
        image_mean=[value / 255 for value in cfg.MODEL.PIXEL_MEAN],
        image_std=[value / 255 for value in cfg.MODEL.PIXEL_STD],
        score_thresh=model.SCORE_THRESH_TEST,
        nms_thresh=model.NMS_THRESH_TEST,
        detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        topk_candidates=model.TOPK_CANDIDATES_TEST,
    )


def _torchvisions(make: Callable) -> Callable:
    return lambda cfg: make(weights=None, weights_backbone=None)


# torchvision knows candidates per class only; about 2000 pairs of 80 classes don't reach 400 of one
_PER_CLASS = ("MODEL.SSD.TOPK_PER", "class", "MODEL.SSD.TOPK_CANDIDATES_TEST", 400)
DEFINITIONS = {
    "ssd300": Definition(
        "ssd_vgg16_size300_torchvision",
        torchvision=_torchvisions(ssd300_vgg16),
        mmdet="ssd300_coco",
        mmdet_lab="ssd_vgg16_size300_120e",
    ),
    "ssdlite_mobilenetv3": Definition(
        "ssdlite_mobilenetv3_size320",
        torchvision=_torchvisions(ssdlite320_mobilenet_v3_large),
        preset="ssdlite",
    ),
    "ssdlite_mobilenetv2": Definition(
        "ssdlite_mobilenetv2_size320_600e",
        opts=_PER_CLASS,
        torchvision=ssdlite_mobilenetv2,
        mmdet="ssdlite_mobilenetv2-scratch_8xb24-600e_coco",
    ),
    "ssd512": Definition("ssd_vgg16_size512_120e", mmdet="ssd512_coco"),
    # for tests: all detections are kept, so that a difference shows
    "tiny": Definition(
        "ssdlite_mobilenetv2_size320_600e",
        opts=(
            *_PER_CLASS, "MODEL.SSD.INPUT_SIZE", [96, 96], "MODEL.SSD.NUM_CLASSES", 5,
            "MODEL.MOBILENET.WIDTH_MULT", 0.25, "TEST.DETECTIONS_PER_IMAGE", 1000,
            "MODEL.SSD.DEFAULT_BOXES.MIN_SIZES", [8.0, 12.0, 20.0, 30.0, 40.0, 60.0],
            "MODEL.SSD.DEFAULT_BOXES.MAX_SIZE", 80.0,
            "MODEL.SSD.DEFAULT_BOXES.STEPS", [16.0, 32.0, 48.0, 96.0, 96.0, 96.0],
        ),
        torchvision=ssdlite_mobilenetv2,
    ),
}  # fmt: skip


def definition(name: str) -> Definition:
    """One of DEFINITIONS, or a lab's model, which only this project has."""
    return DEFINITIONS.get(name) or Definition(name)


def config(name: str, device: str, *opts, lab: str = ""):
    """Our config of a model, with further KEY, VALUE pairs."""
    one = definition(name)
    own = [] if lab else one.opts  # another lab has its own detection
    path = lab_folder() / (lab or one.lab) / "config.yaml"  # of the checkout that ssd is of
    return load_config(str(path), ["MODEL.DEVICE", device, "MODEL.WEIGHTS", "", *own, *opts])


def write_weights(name: str, image: Tensor, folder: Path, for_mmdet: bool) -> float:
    """Random weights of a model for all contenders: FOLDER/MODEL_{ours,torchvision,mmdet}.pth.

    About 2000 (box, class) pairs of the image pass the score threshold (a quarter of all, if the
    model has few): the background's bias is shifted, the same on every side.

    Args:
        image: (3, H, W) uint8.

    Returns:
        how many pairs of it do.
    """
    one = definition(name)
    cfg = config(name, "cpu")
    torch.manual_seed(0)
    if one.torchvision:
        theirs = one.torchvision(cfg)
        pairs = _calibrate(*_torchvision_head(theirs, image), theirs.score_thresh)
        torch.save(theirs.state_dict(), folder / f"{name}_torchvision.pth")
        state = _lineage(theirs.state_dict()).to_ours(theirs.state_dict())
    else:
        state, pairs = _calibrated(cfg, image)
    torch.save(state, folder / f"{name}_ours.pth")
    if for_mmdet and one.mmdet:
        if one.mmdet_lab:
            state, _ = _calibrated(config(name, "cpu", lab=one.mmdet_lab), image)
        mobilenet, vgg = mmdet_names.MOBILENETV2, mmdet_names.VGG
        names = mobilenet if "backbone.bottom_up.conv2.weight" in state else vgg
        torch.save(names.from_ours(state), folder / f"{name}_mmdet.pth")
    return pairs


def _lineage(state: Dict[str, Tensor]) -> Lineage:
    """torchvision's names to ours; those of SSDLite-MobileNetV2 are put together of two."""
    if found := recognise(state):
        return found
    body = next(x for x in BACKBONES if x.key == "torchvision_mobilenetv2")
    ssdlite = next(x for x in torchvision_names.LINEAGES if x.key == "torchvision_mobilenetv3")
    names = {f"backbone.{theirs}": ours for theirs, ours in body.names.items()}
    prefixes = ("backbone.extra.", "head.")
    names |= {a: b for a, b in ssdlite.names.items() if a.startswith(prefixes)}
    return Lineage("", "SSDLite-MobileNetV2", (), names, background_first=True)


def _calibrated(cfg, image: Tensor) -> Tuple[Dict[str, Tensor], float]:
    model = build_model(cfg)

    def forward():
        batch = model.preprocess_image([{"image": image}]).tensor
        features = list(model.backbone(batch).values())
        return model.head.flatten(*model.head(features))[0]

    threshold = cfg.MODEL.SSD.SCORE_THRESH_TEST
    return model.state_dict(), _calibrate(model, forward, model.head.cls_predictors, -1, threshold)


def _torchvision_head(model: nn.Module, image: Tensor) -> tuple:
    def forward():
        transformed, _ = model.transform([image / 255])
        return model.head(list(model.backbone(transformed.tensors).values()))["cls_logits"]

    return model, forward, model.head.classification_head.module_list, 0


@torch.no_grad()
def _calibrate(
    model: nn.Module,
    forward: Callable[[], Tensor],
    predictors: Sequence[nn.Module],
    background: int,
    score_thresh: float,
) -> float:
    """Random weights, then a bisection on the bias of the background. Returns the pairs.

    Args:
        forward: one image's logits (1, R, K + 1).
        predictors: of the classes, one per level.
        background: which of the K + 1 outputs it is.
    """
    randomise(model, forward)
    convs: List[nn.Conv2d] = [p[-1] if isinstance(p, nn.Sequential) else p for p in predictors]
    for conv in convs:  # confident, as a trained model is
        conv.weight.mul_(2)
        conv.bias.mul_(2)
    logits = forward()
    num_outputs = logits.shape[-1]
    wanted = min(PAIRS, logits.shape[1] * (num_outputs - 1) // 4)

    def pairs(shift: float) -> int:
        shifted = logits.clone()
        shifted[..., background] += shift
        passing = shifted.softmax(dim=-1) > score_thresh
        passing[..., background] = False
        return int(passing.sum())

    low, high = -30.0, 50.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if pairs(middle) > wanted else (low, middle)
    for conv in convs:
        conv.bias.view(-1, num_outputs)[:, background] += high
    return pairs(high)
