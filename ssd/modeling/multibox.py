"""Matching, hard negative mining and the multibox loss (SSD paper, section 2.2).

Pure functions on a whole batch: no loop over images, no host–device synchronisation. N images,
R default boxes, M ground truths (padded to the most in the batch), K classes; boxes are XYXY in
pixels of the network's input; class K is the background.
"""

from typing import Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "box_iou",
    "encode_boxes",
    "loss_divisor",
    "match_default_boxes",
    "mine_hard_negatives",
    "multibox_loss",
]


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoUs (…, M, R) of boxes (…, M, 4) with boxes (…, R, 4), NaN for two without area.

    torchvision's ``box_iou`` to the last bit (float32 and float64), for batches, and three times as
    fast on a CPU: it takes contiguous coordinates one by one.
    """
    a_x1, a_y1, a_x2, a_y2 = boxes1[..., None, :].unbind(-1)
    b_x1, b_y1, b_x2, b_y2 = boxes2[..., None, :, :].movedim(-1, 0).contiguous()
    width = torch.minimum(a_x2, b_x2).sub_(torch.maximum(a_x1, b_x1)).clamp_(min=0)
    height = torch.minimum(a_y2, b_y2).sub_(torch.maximum(a_y1, b_y1)).clamp_(min=0)
    both = width.mul_(height)
    areas = (a_x2 - a_x1) * (a_y2 - a_y1) + (b_x2 - b_x1) * (b_y2 - b_y1)
    return both / areas.sub_(both)


def match_default_boxes(
    gt_boxes: Tensor,
    gt_valid: Tensor,
    default_boxes: Tensor,
    iou_threshold: float = 0.5,
    best: str = "argmax",
) -> Tensor:
    """Matches default boxes to ground truths.

    First every ground truth takes a best default box for its own, whatever their IoU; then each
    other default box takes the ground truth of its highest IoU if that reaches the threshold.

    Args:
        gt_boxes: (N, M, 4), M >= 1.
        gt_valid: (N, M) bool, False for padding.
        default_boxes: (R, 4).
        iou_threshold: of the second part, inclusive.
        best: ``"argmax"``: in order, each takes its argmax and a later one overwrites
            (MMDetection, torchvision); ``"bipartite"``: greedily by IoU over all pairs, distinct
            default boxes, IoU > 1e-6 (Caffe).

    Returns:
        (N, R) int64: the index of the ground truth, or -1 for background.
    """
    iou = box_iou(gt_boxes, default_boxes).masked_fill_(~gt_valid[:, :, None], -1.0)  # (N, M, R)
    best_iou, best_gt = iou.max(dim=1)  # (N, R)
    by_threshold = torch.where(best_iou >= iou_threshold, best_gt, -1)

    order = torch.arange(gt_boxes.shape[1], device=gt_boxes.device).expand_as(gt_valid)
    if best == "argmax":
        taken, taker = iou.argmax(dim=2), order
    elif best == "bipartite":
        taken = _bipartite(iou)
        taken, taker = taken.clamp(min=0), torch.where(taken >= 0, order, -1)
    else:
        raise ValueError(f"MODEL.SSD.MATCHING.BEST: 'argmax' or 'bipartite', got {best!r}")
    taker = torch.where(gt_valid, taker, -1)
    # amax: of several takers the last ground truth wins, deterministically on every device.
    forced = torch.full_like(by_threshold, -1).scatter_reduce_(1, taken, taker, "amax")
    return torch.where(forced >= 0, forced, by_threshold)


def _bipartite(iou: Tensor) -> Tensor:
    """Greedy one-to-one matching by (N, M, R) IoUs: each ground truth's default box (N, M), or -1.

    Of the R default boxes only a ground truth's M best can matter, as the other M - 1 ground
    truths take one each.
    """
    num_gt = iou.shape[1]
    # Of equal IoUs the first default box wins, as in Caffe. topk promises no order, but float64
    # has room for one below float32's last digit.
    rank = torch.arange(iou.shape[2], dtype=torch.float64, device=iou.device)
    iou, candidates = (iou * (1 - rank * 2.0**-50)).topk(min(num_gt, iou.shape[2]), dim=2)
    taken = torch.full_like(candidates[:, :, 0], -1)
    images = torch.arange(len(iou), device=iou.device)
    for _ in range(num_gt):
        value, index = iou.flatten(1).max(dim=1)
        gt, candidate = index // iou.shape[2], index % iou.shape[2]
        box = candidates[images, gt, candidate]
        free = value > 1e-6
        taken[images, gt] = torch.where(free, box, taken[images, gt])
        used = (candidates == box[:, None, None]) & free[:, None, None]
        iou = iou.masked_fill(used, -1.0)
        iou[images, gt] = iou.new_full((), -1.0)
    return taken


def encode_boxes(boxes: Tensor, default_boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """(…, R, 4) boxes as offsets (dx, dy, dw, dh) from default boxes (R, 4), times the weights.

    Eq. 2 of the paper; the weights are the inverse of Caffe's variances. Boxes need an area.
    """
    x, y, w, h = _center_size(boxes)
    default_x, default_y, default_w, default_h = _center_size(default_boxes)
    shift = (x - default_x) / default_w, (y - default_y) / default_h
    scale = torch.log(w / default_w), torch.log(h / default_h)
    weights = torch.as_tensor(weights, dtype=shift[0].dtype, device=boxes.device)
    return torch.stack([*shift, *scale], dim=-1) * weights


def _center_size(boxes: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


def mine_hard_negatives(
    loss: Tensor, positive: Tensor, ratio: float = 3.0, without_positives: int = 0
) -> Tensor:
    """Chooses the negatives of highest confidence loss, ``ratio`` per positive of the image; of
    equal losses that of the lower default box.

    Args:
        loss: (N, R) confidence losses, none negative.
        positive: (N, R) bool.
        ratio: negatives per positive; rounded down per image.
        without_positives: negatives of an image that has no positive.

    Returns:
        (N, R) bool, never a positive; at most as many as there are negatives.
    """
    positives = positive.sum(dim=1, keepdim=True)
    count = torch.where(positives > 0, (positives * ratio).long(), without_positives)
    loss = loss.detach().abs().masked_fill_(positive, -1.0)  # abs: a loss can be -0.0
    order = _hardest_first(loss, count)
    rank = torch.arange(order.shape[1], device=loss.device)
    hardest = torch.zeros_like(positive).scatter_(1, order, rank < count)
    return hardest & ~positive


def _hardest_first(loss: Tensor, count: Tensor) -> Tensor:
    """(N, C) indices by falling loss, of equal losses by place; each row's ``count`` at least."""
    if loss.device.type != "cpu" or loss.dtype != torch.float32 or torch.compiler.is_compiling():
        # the count would have to be waited for, or a compiled function would end here
        return loss.argsort(dim=1, descending=True, stable=True)
    # topk keeps no order of equals; no two keys are equal: a float's bits, and below them its place
    most = min(max([0, *count.flatten().tolist()]), loss.shape[1])
    place = torch.arange(loss.shape[1])
    return ((loss.view(torch.int32).long() << 32) - place).topk(most, dim=1)[1]


def loss_divisor(matched: Tensor, normalizer: str) -> Tensor:
    """What the losses are divided by, before it is summed over processes.

    Args:
        matched: (N, R), see :func:`match_default_boxes`.
        normalizer: ``"batch"``: the positives of the batch (Caffe, torchvision, lufficc);
            ``"image"``: Σ max(1, positives of the image) (MMDetection); ``"each"``: each image's
            losses by its own max(1, positives), then the mean over images (NVIDIA).

    Returns:
        a scalar, or for ``"each"`` (N,).
    """
    positives = (matched >= 0).sum(dim=1)
    if normalizer == "batch":
        return positives.sum()
    if normalizer == "image":
        return positives.clamp(min=1).sum()
    if normalizer == "each":
        return positives.clamp(min=1) * len(positives)
    raise ValueError(f"MODEL.SSD.LOSS.NORMALIZER: 'image', 'batch' or 'each', got {normalizer!r}")


def multibox_loss(
    logits: Tensor,
    deltas: Tensor,
    labels: Tensor,
    targets: Tensor,
    *,
    neg_pos_ratio: float = 3.0,
    negatives_without_positives: int = 0,
    smooth_l1_beta: float = 1.0,
    score_function: str = "softmax",
) -> Tuple[Tensor, Tensor]:
    """Confidence and localization loss (eq. 1 of the paper) of each image, not yet divided.

    Args:
        logits: (N, R, K + 1).
        deltas: (N, R, 4) predicted offsets.
        labels: (N, R) int64, the background is K.
        targets: (N, R, 4) encoded ground truths; only those of positives count, all are finite.
        score_function: ``"softmax"``: cross entropy; ``"sigmoid"``: binary cross entropy, summed
            over all K + 1 outputs (TensorFlow).

    Returns:
        confidence loss over positives and mined negatives, smooth L1 over positives: (N,) each.
        Both are 0 for an image without objects (unless ``negatives_without_positives``).
    """
    positive = labels < logits.shape[-1] - 1
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits, deltas = logits.to(dtype), deltas.to(dtype)
    if score_function == "softmax":
        cls_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        cls_loss = cls_loss.view_as(labels)
    elif score_function == "sigmoid":
        one_hot = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
        cls_loss = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").sum(-1)
    else:
        raise ValueError(
            f"MODEL.SSD.SCORE_FUNCTION: 'softmax' or 'sigmoid', got {score_function!r}"
        )
    negative = mine_hard_negatives(cls_loss, positive, neg_pos_ratio, negatives_without_positives)
    box_loss = F.smooth_l1_loss(deltas, targets, beta=smooth_l1_beta, reduction="none").sum(dim=-1)
    # where, not a product: the loss of a box that doesn't count may be infinite
    loss_cls = torch.where(positive | negative, cls_loss, 0.0).sum(dim=1)
    loss_box_reg = torch.where(positive, box_loss, 0.0).sum(dim=1)
    return loss_cls, loss_box_reg
