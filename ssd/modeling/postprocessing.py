"""From predictions to detections: decode, select candidates, batched NMS.

Pure functions on a whole batch. N images, R default boxes, K classes, C candidate (box, class)
pairs per image; boxes are XYXY in pixels of the network's input.
"""

import math
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import batched_nms, nms

__all__ = [
    "best_detections",
    "class_scores",
    "decode_boxes",
    "detect",
    "never_waits",
    "output_transform",
    "rank_in_group",
    "select_candidates",
]

_MAX_LOG_SCALE = math.log(1000.0 / 16)  # of the decoded dw, dh (Fast R-CNN)
_FAR = 1e6  # pixels: bounds what an unclamped decoding can give
_GPU_PAIRS = 2048  # an image's candidates up to which NMS compares all with all on GPUs
_NMS_PASSES = 16  # of the rule, there


def class_scores(logits: Tensor, score_function: str) -> Tensor:
    """Logits (…, K + 1), the background last, to foreground probabilities (…, K), at least in
    float32. ``score_function``: ``"softmax"`` or ``"sigmoid"``."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if score_function == "softmax":
        return logits.softmax(dim=-1, dtype=dtype)[..., :-1]
    return logits[..., :-1].to(dtype).sigmoid()


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
        Box and class indices (N, C), scores (N, C), which are candidates (N, C), and whether an
        image has no further pairs over the threshold (N,).
    """
    num_boxes, num_classes = scores.shape[1:]
    image = torch.arange(len(scores), device=scores.device)[:, None]
    # the best pairs are among those of the best boxes
    number = torch.arange(num_boxes * num_classes, device=scores.device).view(-1, num_classes)
    near = _best(scores.amax(dim=-1), number[:, 0], score_thresh, count, sorted=False)
    scores, number = scores[image, near].flatten(1), number[near].flatten(1)
    best = _best(scores, number, score_thresh, count)
    scores, number = scores[image, best], number[image, best]
    box, cls = number // num_classes, number % num_classes
    over = scores > score_thresh
    complete = over.sum(dim=1) < count
    if box.shape[1] > topk:
        over &= rank_in_group(group.expand(num_boxes, num_classes)[box, cls]) < topk
    return box, cls, scores, over, complete


def _best(
    scores: Tensor, number: Tensor, score_thresh: float, count: int, sorted: bool = True
) -> Tensor:
    """(N, C) indices of the ``count`` best of (N, P) scores, by falling score, then by ``number``;
    those not over the threshold come last, and on a CPU only if another row has more over it."""
    over = scores > score_thresh
    # a GPU would have to be waited for
    most = over.shape[1] if over.is_cuda else int(over.sum(dim=1).max())
    # A float32's bits are in the order of the numbers. With lower digits that differ no two keys
    # are equal: topk doesn't keep the order of equal ones.
    bits = torch.where(over, scores.float(), -1).view(torch.int32)
    return ((bits.long() << 32) - number).topk(min(count, most), sorted=sorted)[1]


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


def _nms_without_waiting(
    boxes: Tensor, cls: Tensor, valid: Tensor, nms_thresh: float
) -> Tuple[Tensor, Tensor]:
    """As :func:`_nms_per_class`, in a fixed number of operations and without synchronisation.

    The rule: a box is kept if no kept one before it overlaps it. Starting with all kept, each pass
    of the rule settles at least one more box of every chain of overlapping boxes.

    Returns:
        which are kept (N, C), and for which images that is settled (N,).
    """
    boxes = torch.where(valid[..., None], boxes, 0).nan_to_num(nan=0.0).clamp(-_FAR, _FAR)
    step = max(1, 2**27 // max(1, cls.shape[1]) ** 2)  # bounds the memory
    parts = zip(boxes.split(step), cls.split(step))
    place = torch.arange(8, dtype=torch.uint8, device=cls.device)
    bits = torch.ones_like(place) << place
    suppressors = torch.cat([_as_bits(_suppresses(*part, nms_thresh), bits) for part in parts])
    kept = valid
    for _ in range(_NMS_PASSES):
        before = kept
        kept = valid & ~(suppressors & _as_bits(before, bits)[:, None]).any(dim=-1)
    return kept, (kept == before).all(dim=1)


def _as_bits(mask: Tensor, bits: Tensor) -> Tensor:
    """(…, C) true or false in (…, ⌈C / 64⌉) int64, by the ``bits`` of a byte: 1, 2, 4, …, 128."""
    mask = F.pad(mask, (0, -mask.shape[-1] % 64)).unflatten(-1, (-1, 8))
    return (mask * bits).sum(dim=-1, dtype=torch.uint8).view(torch.int64)


def _suppresses(boxes: Tensor, cls: Tensor, nms_thresh: float) -> Tensor:
    """(N, C, C), true where box j comes before box i, is of its class, and overlaps it."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width = torch.minimum(x2[:, :, None], x2[:, None])
    width.sub_(torch.maximum(x1[:, :, None], x1[:, None])).clamp_(min=0)
    height = torch.minimum(y2[:, :, None], y2[:, None])
    height.sub_(torch.maximum(y1[:, :, None], y1[:, None])).clamp_(min=0)
    both, area = width.mul_(height), (x2 - x1) * (y2 - y1)
    found = (both / (area[:, :, None] + area[:, None]).sub_(both) > nms_thresh).tril_(-1)
    return found & (cls[:, :, None] == cls[:, None])


def best_detections(
    logits: Tensor,
    deltas: Tensor,
    default_boxes: Tensor,
    image_size: Tuple[int, int],
    output: Optional[Tensor] = None,
    *,
    attempt: int = 0,
    score_function: str,
    group: Tensor,
    num_groups: int,
    score_thresh: float,
    topk_candidates: int,
    nms_thresh: float,
    detections_per_image: int,
    bbox_reg_weights: Sequence[float],
    bbox_reg_clamp: str,
    clip: str = "before_nms",
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`detect` finds among the best pairs only, padded to D rows per image.

    On GPUs the first attempt doesn't wait for the device, so that a CUDA graph can hold it, but
    for very many candidates (:func:`never_waits`).

    Args:
        output: of :func:`output_transform`.
        score_function: see :func:`class_scores`.
        attempt: the best 4 · ``detections_per_image`` pairs are tried, then 4 times as many, ….
        clip: ``"before_nms"``, where boxes outside the image are dropped too (MMDetection;
            torchvision keeps them, without area), or ``"after_nms"`` (Caffe).
        group: see :func:`select_candidates`; one of ``num_groups``.

    Returns:
        boxes (N, D, 4), scores (N, D), classes (N, D), and (N, 2): how many rows are detections,
        and whether all have been found.
    """
    if clip not in ("before_nms", "after_nms"):
        raise ValueError(f"MODEL.SSD.CLIP_TEST: 'before_nms' or 'after_nms', got {clip!r}")
    height, width = image_size
    scores = class_scores(logits, score_function)
    num_classes, count = scores.shape[2], _num_candidates(detections_per_image, attempt)
    box, cls, score, valid, complete = select_candidates(
        scores, score_thresh, topk_candidates, group, count
    )
    complete |= valid.sum(dim=1) == num_groups * topk_candidates
    image = torch.arange(len(scores), device=scores.device)[:, None]
    deltas = deltas[image, box].to(scores.dtype)
    boxes = decode_boxes(deltas, default_boxes[box], bbox_reg_weights, bbox_reg_clamp)
    # not Boxes.clip: it refuses the infinite sizes that an unclamped decoding can give
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    clipped = torch.stack([x, y], dim=-1).flatten(2)
    if clip == "before_nms":
        boxes = clipped
        valid &= _has_area(clipped)
    # not again in a further attempt, which may have no more pairs than the first
    if boxes.is_cuda and attempt == 0 and cls.shape[1] <= _GPU_PAIRS:
        kept, settled = _nms_without_waiting(boxes, cls, valid, nms_thresh)
    else:
        kept, settled = _nms_per_class(boxes, cls, valid, num_classes, nms_thresh), True
    complete = (complete | (kept.sum(dim=1) >= detections_per_image)) & settled

    best = _true_first(kept)[:, :detections_per_image]
    boxes, score, cls = clipped[image, best], score[image, best], cls[image, best]
    kept = kept[image, best]
    if output is not None:
        scale, limit = output.to(boxes.dtype)[:, None, None].chunk(2, dim=-1)
        corners = boxes.unflatten(-1, (2, 2)) * scale
        boxes = torch.minimum(corners.clamp(min=0), limit).flatten(-2)
        kept &= _has_area(boxes)
        best = _true_first(kept)
        boxes, score, cls = boxes[image, best], score[image, best], cls[image, best]
    return boxes, score, cls, torch.stack([kept.sum(dim=1), complete], dim=1)


def _num_candidates(detections_per_image: int, attempt: int = 0) -> int:
    return 4 ** (1 + attempt) * detections_per_image


def never_waits(num_pairs: int, detections_per_image: int) -> bool:
    """Whether on a GPU the first attempt of :func:`best_detections` is without a wait for it, if
    ``num_pairs`` are an image's default boxes times classes."""
    return min(num_pairs, _num_candidates(detections_per_image)) <= _GPU_PAIRS


def output_transform(sizes: Sequence[Tuple[int, int]], image_size: Tuple[int, int]) -> Tensor:
    """(N, 4) float64: what boxes in x and y are multiplied by and clipped to, if images of (height,
    width) ``sizes`` were resized to ``image_size`` for the network."""
    height, width = image_size
    return torch.tensor([(w / width, h / height, w, h) for h, w in sizes], dtype=torch.float64)


def _has_area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)  # False for NaN


def _true_first(mask: Tensor) -> Tensor:
    """(N, C) indices of a mask's true elements, in order, then of the others."""
    return (~mask).byte().argsort(dim=1, stable=True)


def detect(
    logits: Tensor,
    deltas: Tensor,
    default_boxes: Tensor,
    image_size: Tuple[int, int],
    output_sizes: Optional[Sequence[Tuple[int, int]]] = None,
    *,
    first: Optional[Tuple[Tensor, ...]] = None,
    **settings,
) -> List[Instances]:
    """Detections of N images.

    NMS takes boxes by falling score, so that the best pairs alone give the first detections: only
    if they don't give enough of them, four times as many are tried. Among equal scores lower boxes
    and then lower classes come first.

    Args:
        logits: (N, R, K + 1), the background last.
        deltas: (N, R, 4) predicted offsets.
        default_boxes: (R, 4).
        image_size: (height, width) of the network's input: boxes are clipped to it.
        output_sizes: (height, width) that each image's boxes are scaled and clipped to; those that
            have no area there are dropped. Default: ``image_size``, and none is.
        first: the result of :func:`best_detections`, if it's there already.
        settings: keyword arguments of :func:`best_detections`.

    Returns:
        N ``Instances`` with ``pred_boxes``, ``scores``, ``pred_classes``, highest score first;
        of length 0 where nothing passes.
    """
    results, todo, attempt = [None] * len(logits), list(range(len(logits))), 0
    while todo:
        if attempt or first is None:
            output = None
            if output_sizes is not None:
                output = output_transform([output_sizes[i] for i in todo], image_size)
                output = output.to(logits.device)
            first = best_detections(
                logits, deltas, default_boxes, image_size, output, attempt=attempt, **settings
            )
        *found, status = first
        # views by themselves if gradients are wanted: unbind's can't be scaled in place
        found = [[*x] if not x.requires_grad else [x[i] for i in range(len(x))] for x in found]
        for i, boxes, score, cls in zip(todo, *found):
            results[i] = Instances(tuple(image_size if output_sizes is None else output_sizes[i]))
            # all of one length: checking each field takes longer than all the rest here
            results[i].get_fields().update(pred_boxes=Boxes(boxes), scores=score, pred_classes=cls)
        status = status.tolist()  # here the host waits for a GPU
        for i, (n, _) in zip(todo, status):
            fields = results[i].get_fields()
            if n < len(fields["scores"]):
                fields.update({name: x[:n] for name, x in fields.items()})
        unfinished = [row for row, (_, complete) in enumerate(status) if not complete]
        todo, attempt = [todo[row] for row in unfinished], attempt + 1
        if unfinished:
            logits, deltas = logits[unfinished], deltas[unfinished]
    return results
