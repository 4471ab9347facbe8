"""From predictions to detections: decode, select candidates, batched NMS.

Pure functions on a whole batch. N images, R default boxes, K classes, C candidate (box, class)
pairs per image; boxes are XYXY in pixels of the network's input.
"""

import math
from typing import List, Sequence, Tuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import batched_nms, nms

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
    deltas = deltas / torch.as_tensor(weights, dtype=deltas.dtype, device=deltas.device)
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


def rank_in_group(group: Tensor) -> Tensor:
    """(N, C) for each element of a row, how many before it are of its group."""
    order = group.argsort(dim=-1, stable=True)
    sorted_group = group.gather(-1, order)
    start = torch.searchsorted(sorted_group, sorted_group)
    position = torch.arange(group.shape[-1], device=group.device)
    return torch.empty_like(order).scatter_(-1, order, position - start)


def select_candidates(
    scores: Tensor, score_thresh: float, topk: int, group: Tensor, count: int
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Candidates among the ``count`` best (box, class) pairs of each image.

    Pairs come by falling score; equal scores by box, then by class. C is ``count`` or less.

    Args:
        scores: (N, R, K), N at least 1.
        score_thresh: exclusive.
        topk: candidates per image and group.
        group: broadcastable to (R, K), int64: the level of a default box (MMDetection), or the
            class (Caffe, torchvision).

    Returns:
        Box and class indices (N, C), scores (N, C), which are candidates (N, C), and for which
        images that's all of them (N,).
    """
    num_boxes, num_classes = scores.shape[1:]
    image = torch.arange(len(scores), device=scores.device)[:, None]
    # the best pairs are among those of the best boxes
    best = scores.amax(dim=-1)
    near = _best(best, score_thresh, count).sort()[0]
    scores = scores[image, near].flatten(1)
    pair = _best(scores, score_thresh, count)
    box, cls, scores = near.gather(1, pair // num_classes), pair % num_classes, scores[image, pair]
    over = scores > score_thresh
    complete = over.sum(dim=1) < count
    if pair.shape[1] > topk:
        over &= rank_in_group(group.expand(num_boxes, num_classes)[box, cls]) < topk
    return box, cls, scores, over, complete


def _best(scores: Tensor, score_thresh: float, count: int) -> Tensor:
    """(N, C) indices of the ``count`` best of (N, P) scores, by falling score, then by index; those
    not over the threshold come last, and on a CPU only if another row has more over it."""
    over = scores > score_thresh
    # a GPU would have to be waited for
    most = over.shape[1] if over.is_cuda else int(over.sum(dim=1).max())
    # A float32's bits are in the order of the numbers. With the index as lower digits no two keys
    # are equal: topk doesn't keep the order of equal ones.
    bits = torch.where(over, scores.float(), -1).view(torch.int32)
    keys = (bits.long() << 32) - torch.arange(scores.shape[1], device=scores.device)
    return keys.topk(min(count, most))[1]


def _nms_per_class(
    boxes: Tensor, cls: Tensor, valid: Tensor, num_classes: int, nms_thresh: float
) -> Tensor:
    """(N, C) which of the valid ones of (N, C, 4) boxes, by falling score, NMS keeps."""
    num_images, count = cls.shape
    if count == 0:
        return valid
    # Images and classes are moved apart: from coordinates of 0 on, and in float64, as offsets would
    # cost a float32 its last digits. A box without area suppresses none, nor is it suppressed.
    boxes = boxes.double().nan_to_num(nan=0.0).clamp(-_FAR, _FAR)
    boxes = torch.where(valid[..., None], boxes, 0)
    boxes = boxes - boxes.min().floor()
    # A call's time and memory grow with the square of its boxes; on a GPU each call is a wait, too.
    together, most = (16384, 16384) if boxes.is_cuda else (256, 2500)
    step = max(1, together // count)
    group = cls + num_classes * (torch.arange(num_images, device=cls.device) % step)[:, None]
    apart = boxes + (group * (boxes.max().ceil() + 1))[..., None]
    rank = torch.arange(count, 0, -1, dtype=boxes.dtype, device=boxes.device).repeat(step)
    kept = torch.zeros_like(valid)
    for first in range(0, num_images, step):
        part = slice(first, first + step)
        if count <= most:
            some = apart[part].flatten(0, 1)
            index = nms(some, rank[: len(some)], nms_thresh)
        else:  # step 1; for so many class by class
            index = batched_nms(boxes[first], rank, cls[first], nms_thresh)
        kept[part].view(-1)[index] = True
    return kept & valid


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

    NMS takes boxes by falling score, so that the best pairs alone give the first detections: only
    if they don't give enough of them, four times as many are tried. Among equal scores lower boxes
    and then lower classes come first.

    Args:
        scores: (N, R, K) foreground probabilities.
        deltas: (N, R, 4) predicted offsets.
        default_boxes: (R, 4).
        image_size: (height, width) of the network's input: boxes are clipped to it.
        clip: ``"before_nms"``, where boxes outside the image are dropped too (MMDetection;
            torchvision keeps them, without area), or ``"after_nms"`` (Caffe).
        group: see :func:`select_candidates`; one of ``num_groups``.

    Returns:
        N ``Instances`` with ``pred_boxes``, ``scores``, ``pred_classes``, highest score first;
        of length 0 where nothing passes.
    """
    num_classes = scores.shape[2]
    if clip not in ("before_nms", "after_nms"):
        raise ValueError(f"MODEL.SSD.CLIP_TEST: 'before_nms' or 'after_nms', got {clip!r}")
    height, width = image_size
    results = [Instances(image_size) for _ in scores]
    todo, count = results, 4 * max(1, detections_per_image)
    while todo:
        box, cls, score, valid, complete = select_candidates(
            scores, score_thresh, topk_candidates, group, count
        )
        complete |= valid.sum(dim=1) == num_groups * topk_candidates
        image = torch.arange(len(todo), device=scores.device)[:, None]
        boxes = decode_boxes(
            deltas[image, box], default_boxes[box], bbox_reg_weights, bbox_reg_clamp
        )
        # not Boxes.clip: it refuses the infinite sizes that an unclamped decoding can give
        x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
        clipped = torch.stack([x, y], dim=-1).flatten(2)
        if clip == "before_nms":
            boxes = clipped
            valid &= (clipped[..., 2:] > clipped[..., :2]).all(dim=-1)
        kept = _nms_per_class(boxes, cls, valid, num_classes, nms_thresh)
        length = kept.sum(dim=1)
        complete |= length >= detections_per_image

        best = (~kept).byte().argsort(dim=1, stable=True)[:, : max(0, detections_per_image)]
        clipped, score, cls = clipped[image, best], score[image, best], cls[image, best]
        unfinished = []
        for i, (n, done) in enumerate(torch.stack([length, complete], dim=1).tolist()):
            if done:
                todo[i].pred_boxes = Boxes(clipped[i, :n])
                todo[i].scores = score[i, :n]
                todo[i].pred_classes = cls[i, :n]
            else:
                unfinished.append(i)
        if unfinished:
            scores, deltas, count = scores[unfinished], deltas[unfinished], 4 * count
        todo = [todo[i] for i in unfinished]
    return results
