"""From predictions to detections: decode, select candidates, batched NMS.

Pure functions on a whole batch. N images, R default boxes, K classes, P candidate (box, class)
pairs of all images; boxes are XYXY in pixels of the network's input.
"""

import math
from typing import List, Sequence, Tuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import batched_nms

__all__ = ["decode_boxes", "detect", "rank_in_group", "select_candidates"]

_MAX_LOG_SCALE = math.log(1000.0 / 16)  # of the decoded dw, dh (Fast R-CNN)
_FAR = 1e6  # pixels: bounds what an unclamped decoding can give


def decode_boxes(
    deltas: Tensor, default_boxes: Tensor, weights: Sequence[float], clamp: str = "both"
) -> Tensor:
    """Inverse of ``encode_boxes``: offsets and default boxes, both (…, 4), to boxes (…, 4).

    ``clamp`` bounds the log scales at ±ln(1000/16): ``"both"`` ends (MMDetection), the
    ``"upper"`` one (torchvision), or ``"none"`` (Caffe). Boxes are not clipped to the image.
    """
    deltas = deltas / deltas.new_tensor(weights)
    shift, log_scale = deltas[..., :2], deltas[..., 2:]
    if clamp == "both":
        log_scale = log_scale.clamp(-_MAX_LOG_SCALE, _MAX_LOG_SCALE)
    elif clamp == "upper":
        log_scale = log_scale.clamp(max=_MAX_LOG_SCALE)
    elif clamp != "none":
        raise ValueError(f"MODEL.SSD.BBOX_REG_CLAMP: 'both', 'upper' or 'none', got {clamp!r}")
    default_center = (default_boxes[..., :2] + default_boxes[..., 2:]) / 2
    default_size = default_boxes[..., 2:] - default_boxes[..., :2]
    center = default_center + shift * default_size
    half = default_size * log_scale.exp() / 2
    return torch.cat([center - half, center + half], dim=-1)


def rank_in_group(scores: Tensor, group: Tensor) -> Tensor:
    """(P,) the rank of each element among those of its group, 0 for the highest score."""
    order = scores.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]  # by group, then by score
    sorted_group = group[order]
    start = torch.searchsorted(sorted_group, sorted_group)
    position = torch.arange(len(order), device=scores.device)
    return torch.empty_like(order).scatter_(0, order, position - start)


def select_candidates(
    scores: Tensor, score_thresh: float, topk: int, group: Tensor, num_groups: int
) -> Tuple[Tensor, Tensor, Tensor]:
    """The (box, class) pairs over the threshold, at most ``topk`` for each group of an image.

    Args:
        scores: (N, R, K).
        score_thresh: exclusive.
        topk: per image and group.
        group: broadcastable to (R, K), int64 in [0, num_groups): the level of a default box
            (MMDetection), or the class (Caffe, torchvision).

    Returns:
        image, box and class indices, (P,) each.
    """
    image, box, cls = torch.nonzero(scores > score_thresh, as_tuple=True)
    pair_group = image * num_groups + group.expand(scores.shape[1:])[box, cls]
    keep = rank_in_group(scores[image, box, cls], pair_group) < topk
    return image[keep], box[keep], cls[keep]


def detect(
    scores: Tensor,
    deltas: Tensor,
    default_boxes: Tensor,
    image_size: Tuple[int, int],
    *,
    group: Tensor,
    num_groups: int,
    score_thresh: float,
    topk_candidates: int,
    nms_thresh: float,
    detections_per_image: int,
    bbox_reg_weights: Sequence[float],
    bbox_reg_clamp: str,
    clip: str = "before_nms",
) -> List[Instances]:
    """Detections of N images.

    Args:
        scores: (N, R, K) foreground probabilities.
        deltas: (N, R, 4) predicted offsets.
        default_boxes: (R, 4).
        image_size: (height, width) of the network's input: boxes are clipped to it.
        clip: ``"before_nms"``, where boxes outside the image are dropped too (MMDetection,
            torchvision), or ``"after_nms"`` (Caffe).
        group, num_groups: see :func:`select_candidates`.

    Returns:
        N ``Instances`` with ``pred_boxes``, ``scores``, ``pred_classes``, highest score first;
        of length 0 where nothing passes.
    """
    num_images, _, num_classes = scores.shape
    image, box, cls = select_candidates(scores, score_thresh, topk_candidates, group, num_groups)
    boxes = decode_boxes(deltas[image, box], default_boxes[box], bbox_reg_weights, bbox_reg_clamp)
    # not Boxes.clip: it refuses the infinite sizes that an unclamped decoding can give
    limit = boxes.new_tensor([image_size[1], image_size[0]] * 2)
    clipped = Boxes(boxes.clamp(min=0).minimum(limit))
    scores = scores[image, box, cls]

    if clip == "before_nms":
        boxes, keep = clipped.tensor, torch.nonzero(clipped.nonempty()).squeeze(1)
    elif clip == "after_nms":
        boxes = boxes.double().clamp(-_FAR, _FAR) + _FAR
        keep = torch.arange(len(boxes), device=boxes.device)
    else:
        raise ValueError(f"MODEL.SSD.CLIP_TEST: 'before_nms' or 'after_nms', got {clip!r}")
    # batched_nms moves the groups apart by offsets: it needs coordinates from 0, and float64, as
    # they would cost a float32 its last digits
    kept = batched_nms(
        boxes[keep].double(),
        scores[keep].double(),
        (image * num_classes + cls)[keep],
        nms_thresh,
    )
    keep = keep[kept]  # by descending score
    keep = keep[rank_in_group(scores[keep], image[keep]) < detections_per_image]
    keep = keep[image[keep].argsort(stable=True)]  # by image, then by descending score
    results = []
    for of_image in keep.split(torch.bincount(image[keep], minlength=num_images).tolist()):
        result = Instances(image_size)
        result.pred_boxes = clipped[of_image]
        result.scores = scores[of_image]
        result.pred_classes = cls[of_image]
        results.append(result)
    return results
