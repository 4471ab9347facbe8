"""Rows of the table of differences, what they are measured with, and our side of them."""

import math
import os
import tempfile
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from ssd.checkpoint import SSDCheckpointer
from ssd.config import load_config
from ssd.data.mapper import read_image
from ssd.data.shapes import render_shapes
from ssd.modeling.multibox import encode_boxes, match_default_boxes

ROOT = Path(__file__).resolve().parents[2]


class Row(NamedTuple):
    """One line of the table: how far a quantity of a lab's model is from its source's."""

    lab: str
    source: str
    quantity: str
    difference: Optional[float]  # None: not a number; the note says where the proof is
    tolerance: float
    unit: str
    note: str

    @property
    def key(self) -> Tuple[str, str, str]:
        return (self.lab, self.source, self.quantity)

    @property
    def is_equal(self) -> bool:
        """Whether the difference is within the tolerance; not if it is NaN."""
        return self.difference is None or self.difference <= self.tolerance


# --- Differences -------------------------------------------------------------------------------


def worst(*values: float) -> float:
    """The largest value; NaN if one is, which max() may overlook."""
    return float(np.max(values))


def largest(expected: Tensor, actual: Tensor) -> float:
    """Largest absolute difference of two arrays of one shape; 0 if they are empty."""
    if expected.shape != actual.shape:
        raise ValueError(f"shapes {tuple(expected.shape)} and {tuple(actual.shape)} differ")
    if not expected.numel():
        return 0.0
    return float((expected.double() - actual.double()).abs().max())


def of_mean(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """The worst level's largest difference, in units of the level's mean absolute value."""
    if len(expected) != len(actual):
        raise ValueError(f"{len(expected)} levels, but {len(actual)} of ours")
    return worst(*(largest(a, b) / float(a.abs().mean()) for a, b in zip(expected, actual)))


def relative(expected: Sequence[float], actual: Sequence[float]) -> float:
    """The worst relative difference; of values below 1e-4, the difference over 1e-4."""
    if len(expected) != len(actual):
        raise ValueError(f"{len(expected)} values, but {len(actual)} of ours")
    return worst(*(abs(a - b) / max(abs(a), 1e-4) for a, b in zip(expected, actual)))


def unequal(expected: Tensor, actual: Tensor) -> int:
    """How many elements differ."""
    if expected.shape != actual.shape:
        raise ValueError(f"shapes {tuple(expected.shape)} and {tuple(actual.shape)} differ")
    return int((expected != actual).sum())


def compare_detections(expected: Sequence[Dict], actual: Sequence[Instances]) -> Dict[str, float]:
    """Detections of several images, each ``boxes``, ``scores`` and ``labels`` by score.

    Returns:
        ``alone``: those of either side without a partner of the same label, IoU > 0.99 and a
        score within 1e-4; the largest difference in ``scores`` by rank and in the partners'
        ``boxes``, in pixels; and their ``count``.
    """
    alone = count = 0
    scores = boxes = 0.0
    for theirs, ours in zip(expected, actual, strict=True):
        count += len(theirs["scores"])
        partner = pairwise_iou(Boxes(theirs["boxes"]), ours.pred_boxes) > 0.99
        partner &= theirs["labels"][:, None] == ours.pred_classes[None]
        partner &= (theirs["scores"][:, None] - ours.scores[None]).abs() < 1e-4
        alone += int((~partner.any(dim=1)).sum() + (~partner.any(dim=0)).sum())
        alone += abs(len(theirs["scores"]) - len(ours))
        ranks = min(len(theirs["scores"]), len(ours))
        scores = worst(scores, largest(theirs["scores"][:ranks], ours.scores[:ranks]))
        distance = torch.cdist(theirs["boxes"], ours.pred_boxes.tensor, p=math.inf)
        for i in torch.nonzero(partner.any(dim=1)).flatten():
            boxes = worst(boxes, float(distance[i][partner[i]].min()))
    return {"alone": alone, "scores": scores, "boxes": boxes, "count": count}


def detection_rows(row: Callable, result: Dict[str, float], note: str) -> List[Row]:
    note = f"{result['count']} detections: {note}"
    same = "partner: same label, IoU > 0.99, score within 1e-4"
    return [
        row("detections without a partner", result["alone"], 0, "", f"{note}; {same}"),
        row("scores of detections", result["scores"], 1e-4, "", "by rank"),
        row("boxes of detections", result["boxes"], 0.1, "px", "between partners"),
    ]


# --- Our side ----------------------------------------------------------------------------------


def lab_config(lab: str, *opts: str):
    """A lab's own config, on the CPU."""
    return load_config(str(ROOT / "labs" / lab / "config.yaml"), ["MODEL.DEVICE", "cpu", *opts])


def load_lab(lab: str, state: Optional[Dict[str, Tensor]] = None) -> nn.Module:
    """A lab's model, with weights that are written to a file and read from it."""
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "weights.pth") if state else ""
        cfg = lab_config(lab, "MODEL.WEIGHTS", weights)
        model = build_model(cfg)
        if state:
            torch.save(state, weights)
            SSDCheckpointer(model, cfg=cfg, strict=True).load(weights)
            if len(state) != len(model.state_dict()):
                raise ValueError(f"{len(state)} arrays, but {len(model.state_dict())} of ours")
    return model.eval()


def without_channels_last(model: nn.Module) -> None:
    """Sets MODEL.SSD.CHANNELS_LAST False: torch's CPU sums are more exact then."""
    model.channels_last = False
    model.to(memory_format=torch.contiguous_format)


def in_float64(model: nn.Module, lab: str) -> None:
    """Network and normalisation; logits and offsets are cast to float32 for the losses.

    Random weights amplify float32's rounding, so float64 tells more.
    """
    model.backbone.double(), model.head.double()
    cfg = lab_config(lab).MODEL
    model.pixel_mean, model.pixel_std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None]
        for values in (cfg.PIXEL_MEAN, cfg.PIXEL_STD)
    )


def watch(module: nn.Module) -> Dict:
    """``args`` and ``output`` of the module's last call, from now on."""
    kept = {}
    module.register_forward_hook(lambda _, args, output: kept.update(args=args, output=output))
    return kept


def outputs(model: nn.Module, inputs: Sequence[Dict]):
    """The network's input, and each level's features, logits and offsets."""
    batch = model.preprocess_image(inputs).tensor
    features = model.backbone(batch)
    features = [features[name] for name in model.head_in_features]
    return (batch, features, *model.head(features))


def by_level(model: nn.Module, features, logits, offsets) -> List[List[Tensor]]:
    """The features, and maps as (N, boxes of the level, K + 1) and (N, boxes of the level, 4)."""
    sizes = (model.num_classes + 1, 4)
    flat = [
        [x.permute(0, 2, 3, 1).reshape(len(x), -1, size) for x in maps]
        for maps, size in zip((logits, offsets), sizes)
    ]
    return [features, *flat]


def output_rows(row: Callable, expected, actual, note: str = "") -> List[Row]:
    """Features, logits and offsets of each level, computed in float64."""
    return [
        row(name, of_mean(a, b), 1e-8, "of mean", f"float64, {len(a)} levels{note}")
        for name, a, b in zip(("features", "logits", "offsets"), expected, actual)
    ]


def make_instances(model: nn.Module, boxes: Sequence[Tensor], classes: Sequence[Tensor]):
    """Ground truths in pixels of the network's input."""
    return [
        Instances(model.input_size, gt_boxes=Boxes(b.reshape(-1, 4).float()), gt_classes=c)
        for b, c in zip(boxes, classes)
    ]


def targets_of(model: nn.Module, instances: Sequence[Instances]):
    """Index of the ground truth (-1: none), label, encoded offsets of each default box."""
    boxes, classes, valid = model._pad_ground_truth(instances)
    matched = match_default_boxes(boxes, valid, model.default_boxes, **model.matching)
    index = matched.clamp(min=0)
    labels = torch.where(matched >= 0, classes.gather(1, index), model.num_classes)
    boxes = boxes.gather(1, index[:, :, None].expand(-1, -1, 4))
    return matched, labels, encode_boxes(boxes, model.default_boxes, model.bbox_reg_weights)


def images(size: Tuple[int, int], count: int = 2) -> np.ndarray:
    """(count, H, W, 3) uint8 of 8×8 random colours and noise (GOLDEN.md, section 2)."""
    random = np.random.RandomState(2026)
    coarse = random.randint(0, 256, (count, 8, 8, 3))
    big = coarse.repeat(-(-size[0] // 8), axis=1).repeat(-(-size[1] // 8), axis=2)
    big = big[:, : size[0], : size[1]]
    return np.clip(big + random.randint(-40, 41, big.shape), 0, 255).astype(np.uint8)


def photographs(count: int = 2) -> Tuple[List[Tensor], str]:
    """(3, H, W) uint8 RGB images, and what they are: BCCD's photographs, else rendered shapes."""
    for folder in (os.environ.get("DETECTRON2_DATASETS", "."), ROOT.parent / "shared/data"):
        files = sorted(Path(folder).glob("bccd/JPEGImages/*.jpg"))[:count]
        if files:
            read = [read_image(str(file), "RGB") for file in files]
            what = f"{count} photographs of BCCD, 480×640"
            break
    else:
        with tempfile.TemporaryDirectory() as folder:
            render_shapes(folder, "val", count)
            files = sorted(Path(folder).rglob("*.jpg"))[:count]
            read = [read_image(str(file), "RGB") for file in files]
        what = f"{count} rendered images (no BCCD photographs there)"
    return [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in read], what


@torch.no_grad()
def randomise(network: nn.Module, forward: Callable[[], object], seed: int = 0) -> None:
    """Random weights, biases and BatchNorm statistics that keep every layer's output alive.

    Each convolution is scaled to outputs of standard deviation 1 while ``forward`` runs.
    """
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor, mean: float, std: float) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    def scale(layer: nn.Module, args: Tuple, output: Tensor) -> Tensor:
        std = output.std()
        layer.weight.div_(std)
        if layer.bias is not None:
            layer.bias.div_(std)
        return output / std

    hooks = []
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fill(module.weight, 0, module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                fill(module.bias, 0, 0.2)
            hooks.append(module.register_forward_hook(scale))
        elif isinstance(module, nn.BatchNorm2d):
            fill(module.weight, 1, 0.1)
            fill(module.bias, 0, 0.1)
            fill(module.running_mean, 0, 0.1)
            fill(module.running_var, 1, 0.1)
        elif hasattr(module, "scale_weight"):  # torchvision's L2Norm
            fill(module.scale_weight, 20, 1)
    network.eval()
    forward()
    for hook in hooks:
        hook.remove()
