"""Which mistakes a detector makes, and what each kind costs: numpy arrays in, arrays out.

Letters: D detections, M objects, K classes. A detection finds an object as in COCO's AP50; the
kinds of errors are those of TIDE (Bolya et al. 2020, arXiv 2008.08115, section 2.2). Detections
that find a crowd are neither hits nor mistakes, and a crowd is never missed.
"""

from typing import NamedTuple, Sequence

import numpy as np
from pycocotools import mask

FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU: TIDE's t_f and t_b
PER_CLASS_AND_IMAGE = 100  # detections that count, as in COCO's AP
THRESHOLDS = np.arange(1, 100) / 100

KINDS = ("class", "localisation", "both", "duplicate", "background", "missed")
CLASS, LOCALISATION, BOTH, DUPLICATE, BACKGROUND_ERROR, MISSED = range(6)
HIT, IGNORED = -1, -2  # what else a detection may be


class Boxes(NamedTuple):
    """N objects or detections, by image, those of an image by falling score."""

    image: np.ndarray  # (N,) number of the image
    label: np.ndarray  # (N,) number of the class
    box: np.ndarray  # (N, 4) XYWH in pixels, as in COCO's files
    score: np.ndarray  # (N,), 1 for objects
    crowd: np.ndarray  # (N,) bool, False for detections


class Overlaps(NamedTuple):
    """The P pairs of a detection and an object of its image whose IoU is at least BACKGROUND."""

    detection: np.ndarray  # (P,)
    object: np.ndarray  # (P,)
    iou: np.ndarray  # (P,); for a crowd the intersection over the detection's area


class Mistakes(NamedTuple):
    """What each detection is."""

    kind: np.ndarray  # (D,) number in KINDS, HIT or IGNORED
    target: np.ndarray  # (D,) the object that it finds or errs about; -1 for a background error
    iou: np.ndarray  # (D,) with the target; 0 without


class Calibration(NamedTuple):
    count: np.ndarray  # (bins,) detections
    confidence: np.ndarray  # (bins,) mean score; NaN where there are none
    precision: np.ndarray  # (bins,) share of hits; NaN where there are none
    error: float  # expected calibration error, 0 to 1; NaN without detections


class OperatingPoint(NamedTuple):
    """What a score threshold gives: detections with at least this score count."""

    threshold: float
    precision: float
    recall: float
    f1: float


def objects_of(annotations: Sequence[dict], image_ids: Sequence, category_ids: Sequence) -> Boxes:
    """COCO's annotations as arrays, without those of other images or categories."""
    # a score of theirs (labels that a model made) means nothing here
    return _boxes([{**x, "score": 1.0} for x in annotations], image_ids, category_ids)


def detections_of(results: Sequence[dict], image_ids: Sequence, category_ids: Sequence) -> Boxes:
    """COCO's results as arrays, as :func:`objects_of`, and of an image's detections of a class the
    first PER_CLASS_AND_IMAGE."""
    boxes = _boxes(results, image_ids, category_ids)
    first = _rank(boxes.image * len(category_ids) + boxes.label) < PER_CLASS_AND_IMAGE
    return Boxes(*(x[first] for x in boxes))


def _boxes(annotations: Sequence[dict], image_ids: Sequence, category_ids: Sequence) -> Boxes:
    images = {key: i for i, key in enumerate(image_ids)}
    labels = {key: i for i, key in enumerate(category_ids)}
    rows = [
        (
            images[a["image_id"]],
            labels[a["category_id"]],
            a["score"],
            a.get("iscrowd", 0),
            *a["bbox"],
        )
        for a in annotations
        if a["image_id"] in images and a["category_id"] in labels
    ]
    table = np.array(rows, float).reshape(-1, 8)
    table = table[np.lexsort((-table[:, 2], table[:, 0]))]
    image, label = table[:, :2].T.astype(int)
    return Boxes(image, label, table[:, 4:], table[:, 2], table[:, 3] == 1)


def overlaps(detections: Boxes, objects: Boxes) -> Overlaps:
    columns = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    for image in np.intersect1d(detections.image, objects.image):
        det = slice(*np.searchsorted(detections.image, [image, image + 1]))
        obj = slice(*np.searchsorted(objects.image, [image, image + 1]))
        iou = mask.iou(detections.box[det], objects.box[obj], objects.crowd[obj].astype(np.uint8))
        d, o = np.nonzero(iou >= BACKGROUND)
        columns.append((d + det.start, o + obj.start, iou[d, o]))
    return Overlaps(*map(np.concatenate, zip(*columns)))


def find_mistakes(detections: Boxes, objects: Boxes, pairs: Overlaps) -> Mistakes:
    """The kind of each detection. In TIDE's order, the first that holds:

    * hit: it finds an object of its class (IoU >= FOREGROUND; by falling score, each object once)
    * localisation: its best IoU with its class is between BACKGROUND and FOREGROUND
    * class: the best one with another class is at least FOREGROUND
    * duplicate: the best one with its class is at least FOREGROUND, and that object is found
    * background: no IoU reaches BACKGROUND
    * both: the rest
    """
    count = len(detections.score)
    same = detections.label[pairs.detection] == objects.label[pairs.object]
    hit = _hits(pairs, same & (pairs.iou >= FOREGROUND), objects.crowd, count)
    real = ~objects.crowd[pairs.object]
    same_object, same_iou = _best(pairs, same & real, count)
    other_object, other_iou = _best(pairs, ~same & real, count)
    kind = np.select(
        [
            hit >= 0,
            (same_iou >= BACKGROUND) & (same_iou < FOREGROUND),
            other_iou >= FOREGROUND,
            same_iou >= FOREGROUND,
            other_iou < BACKGROUND,
        ],
        [HIT, LOCALISATION, CLASS, DUPLICATE, BACKGROUND_ERROR],
        BOTH,
    )
    of_other = (kind == CLASS) | (kind == BOTH)
    target = np.where(of_other, other_object, same_object)
    iou = np.where(of_other, other_iou, same_iou)
    found = kind == HIT
    target[found] = hit[found]
    is_hit_pair = hit[pairs.detection] == pairs.object
    iou[pairs.detection[is_hit_pair]] = pairs.iou[is_hit_pair]
    kind[np.append(objects.crowd, False)[hit]] = IGNORED  # the last one stands for no object
    return Mistakes(kind, target, iou)


def missed_objects(objects: Boxes, mistakes: Mistakes, kept: np.ndarray) -> np.ndarray:
    """(M,) bool: no detection among the ``kept`` (D,) finds the object, nor would one if its class
    or its box were right."""
    covered = np.zeros(len(objects.score), bool)
    about = np.isin(mistakes.kind, (HIT, CLASS, LOCALISATION)) & kept
    covered[mistakes.target[about]] = True
    return ~covered & ~objects.crowd


def count_kinds(objects: Boxes, mistakes: Mistakes, kept: np.ndarray) -> np.ndarray:
    """(6,) how many mistakes of each kind there are with the ``kept`` (D,) detections alone."""
    kinds = mistakes.kind[kept]
    counts = np.bincount(kinds[kinds >= 0], minlength=len(KINDS))
    counts[MISSED] = missed_objects(objects, mistakes, kept).sum()
    return counts


def costs(detections: Boxes, objects: Boxes, mistakes: Mistakes, classes: int) -> np.ndarray:
    """(6,) by how many points AP50 would rise if this kind of mistake alone were put right.

    As in TIDE (section 2.3): a detection of wrong class or place becomes a hit if its object isn't
    found and no such detection of a higher score is about it, and vanishes otherwise. The other
    kinds vanish. A missed object is taken from the number to find; a class with none left counts
    as 100, unlike in TIDE's code, where it counts as 0.
    """
    kind, target = mistakes.kind, mistakes.target
    positives = np.bincount(objects.label[~objects.crowd], minlength=classes)
    hit, counted = kind == HIT, kind != IGNORED
    found = np.zeros(len(objects.score) + 1, bool)  # the last one stands for no target
    found[target[hit]] = True
    fixable = np.isin(kind, (CLASS, LOCALISATION)) & ~found[target]
    by_score = np.flatnonzero(fixable)[np.argsort(-detections.score[fixable], kind="stable")]
    fixed = np.zeros(len(kind), bool)
    fixed[by_score[np.unique(target[by_score], return_index=True)[1]]] = True

    def mean_ap(label, hit, counted, positives):
        ap = [
            average_precision(detections.score[of], hit[of], positives[k])
            for k, of in ((k, counted & (label == k)) for k in classes_with_objects)
        ]
        return 100 * float(np.mean(ap)) if ap else float("nan")

    classes_with_objects = np.flatnonzero(positives)
    base = mean_ap(detections.label, hit, counted, positives)
    result = []
    for number in range(MISSED):
        becomes = fixed & (kind == number)
        label = detections.label.copy()
        label[becomes] = objects.label[target[becomes]]
        stays = counted & ((kind != number) | becomes)
        result.append(mean_ap(label, hit | becomes, stays, positives) - base)
    missed = objects.label[missed_objects(objects, mistakes, np.ones(len(kind), bool))]
    rest = positives - np.bincount(missed, minlength=classes)
    return np.array([*result, mean_ap(detections.label, hit, counted, rest) - base])


def average_precision(score: np.ndarray, hit: np.ndarray, positives: int) -> float:
    """COCO's AP at one IoU, 0 to 1, of (D,) detections of a class with this many objects to find:
    the mean over 101 recalls of the best precision at this recall or a higher one. 1 if there is
    nothing to find."""
    if positives == 0:
        return 1.0
    found = hit[np.argsort(-score, kind="stable")].cumsum()
    precision = found / np.arange(1, len(found) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(found / positives, np.linspace(0, 1, 101), side="left")
    return float(precision[at[at < len(found)]].sum() / 101)


def confusion_matrix(
    detections: Boxes, objects: Boxes, pairs: Overlaps, mistakes: Mistakes,
    kept: np.ndarray, classes: int,
) -> np.ndarray:  # fmt: skip
    """(K + 1, K + 1) pairs of an object's class (row) and the class of the ``kept`` (D,) detection
    that belongs to it (column); the last row is for detections without an object, the last column
    for objects without a detection.

    Hits belong to the object that they find. Then the others, by falling score, take the object
    with the highest IoU >= FOREGROUND, of any class, that is left.
    """
    hit = kept & (mistakes.kind == HIT)
    partner = np.where(hit, mistakes.target, -1)
    taken = objects.crowd.copy()
    taken[partner[hit]] = True
    wrong = kept & (mistakes.kind >= 0)
    able = np.flatnonzero(wrong[pairs.detection] & (pairs.iou >= FOREGROUND))
    score = detections.score[pairs.detection[able]]
    able = able[np.lexsort((-pairs.iou[able], pairs.detection[able], -score))]
    for d, o in zip(pairs.detection[able].tolist(), pairs.object[able].tolist()):
        if partner[d] < 0 and not taken[o]:
            partner[d], taken[o] = o, True
    matrix = np.zeros((classes + 1, classes + 1), int)
    counts = hit | wrong
    truth = np.append(objects.label, classes)[partner[counts]]
    np.add.at(matrix, (truth, detections.label[counts]), 1)
    np.add.at(matrix, (objects.label[~taken], classes), 1)
    return matrix


def operating_points(score: np.ndarray, hit: np.ndarray, positives: int) -> OperatingPoint:
    """Precision, recall and F1 (99,) of (D,) detections at each of THRESHOLDS, 0 where there are no
    detections or no objects."""
    order = np.argsort(score)
    at = np.searchsorted(score[order], THRESHOLDS, side="left")
    found = np.append(hit[order][::-1].cumsum()[::-1], 0)[at].astype(float)
    kept = len(score) - at
    precision = np.divide(found, kept, out=np.zeros_like(found), where=kept > 0)
    recall = found / max(positives, 1)
    f1 = 2 * found / np.maximum(kept + positives, 1)
    return OperatingPoint(THRESHOLDS, precision, recall, f1)


def best_point(points: OperatingPoint) -> OperatingPoint:
    """That of the highest F1, of equal ones the middle."""
    best = np.flatnonzero(points.f1 == points.f1.max())
    return OperatingPoint(*(float(x[best[len(best) // 2]]) for x in points))


def calibration(score: np.ndarray, hit: np.ndarray, bins: int = 10) -> Calibration:
    """Whether of the detections with score 0.7 seven in ten are hits: by bins of equal width, and
    the expected calibration error (Guo et al. 2017, equation 3) of detections (D,)."""
    at = np.minimum((score * bins).astype(int), bins - 1)
    count = np.bincount(at, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence, precision = (np.bincount(at, x, bins) / count for x in (score, hit))
    if not len(score):
        return Calibration(count, confidence, precision, float("nan"))
    error = np.nansum(count * np.abs(confidence - precision)) / len(score)
    return Calibration(count, confidence, precision, float(error))


def worst(
    detections: Boxes, objects: Boxes, mistakes: Mistakes, kept: np.ndarray, kind: int, count: int
) -> np.ndarray:
    """The numbers of up to ``count`` detections of a kind by falling score, or of missed objects by
    falling area, among the ``kept`` (D,) detections; at most two of an image."""
    if kind == MISSED:
        chosen = np.flatnonzero(missed_objects(objects, mistakes, kept))
        value, image = objects.box[chosen, 2:].prod(1), objects.image
    else:
        chosen = np.flatnonzero(kept & (mistakes.kind == kind))
        value, image = detections.score[chosen], detections.image
    chosen = chosen[np.argsort(-value, kind="stable")]
    return chosen[_rank(image[chosen]) < 2][:count]


def _hits(pairs: Overlaps, able: np.ndarray, crowd: np.ndarray, count: int) -> np.ndarray:
    """(D,) the object that each detection finds, or -1: the best one that is left, a crowd (which
    is never used up) only if there is no other; of equal IoUs the later object, as pycocotools."""
    able = np.flatnonzero(able)
    d, o = pairs.detection[able], pairs.object[able]
    order = np.lexsort((-o, -pairs.iou[able], crowd[o], d))  # detections go by falling score
    hit, used = [-1] * count, set()
    for i, j in zip(d[order].tolist(), o[order].tolist()):
        if hit[i] < 0 and j not in used:
            hit[i] = j
            if not crowd[j]:
                used.add(j)
    return np.array(hit, int)


def _best(pairs: Overlaps, able: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(D,) the object of the highest IoU among the ``able`` (P,) pairs, or -1; that IoU, or 0."""
    able = np.flatnonzero(able)
    able = able[np.lexsort((pairs.object[able], -pairs.iou[able], pairs.detection[able]))]
    d, first = np.unique(pairs.detection[able], return_index=True)
    best, iou = np.full(count, -1), np.zeros(count)
    best[d], iou[d] = pairs.object[able[first]], pairs.iou[able[first]]
    return best, iou


def _rank(group: np.ndarray) -> np.ndarray:
    """(N,) how many entries of the same group come before each."""
    order = np.argsort(group, kind="stable")
    rank = np.empty(len(group), int)
    rank[order] = np.arange(len(group)) - np.searchsorted(group[order], group[order], "left")
    return rank
