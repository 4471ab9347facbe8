"""tools/reports/analysis.py against cases worked out by hand, and AP50 against BoxEval."""

import numpy as np
import pytest
from pycocotools.coco import COCO
from reports import analysis
from reports.analysis import HIT, IGNORED, KINDS

from ssd.evaluation import BoxEval

CAT, DOG = 0, 1
# (image, class, box): far from one another in an image
OBJECTS = [
    (0, CAT, (0, 0, 10, 10)),
    (0, DOG, (100, 0, 10, 10)),
    (0, CAT, (200, 0, 10, 10)),
    (0, DOG, (300, 0, 10, 10)),
    (1, CAT, (0, 0, 10, 10)),
]
# The same with a score, and what it is: for each object a detection, but none for the last one
DETECTIONS = [
    (0, CAT, (0, 0, 10, 10), 0.9, "hit"),
    (0, CAT, (0, 0, 10, 10), 0.8, "duplicate"),
    (0, CAT, (100, 0, 10, 10), 0.7, "class"),
    (0, CAT, (205, 0, 10, 10), 0.6, "localisation"),  # IoU 1/3
    (0, CAT, (305, 0, 10, 10), 0.5, "both"),
    (0, DOG, (0, 200, 10, 10), 0.4, "background"),
    (2, DOG, (0, 0, 10, 10), 0.3, "background"),  # an image without objects
]


def boxes(rows, crowds=()):
    """Objects, or of rows with a score detections, for rows that are already in their order."""
    annotations = [
        {"image_id": row[0], "category_id": row[1], "bbox": row[2], "iscrowd": int(i in crowds)}
        | ({"score": row[3]} if len(row) > 3 else {})
        for i, row in enumerate(rows)
    ]
    scored = any(len(row) > 3 for row in rows)
    convert = analysis.detections_of if scored else analysis.objects_of
    return convert(annotations, [0, 1, 2], [CAT, DOG])


def test_objects_with_scores_are_all_kept():
    """As tools write them that let a model label images."""
    labels = [
        {"image_id": 0, "category_id": CAT, "bbox": [i, 0, 5, 5], "score": i / 200}
        for i in range(150)
    ]
    objects = analysis.objects_of(labels, [0, 1, 2], [CAT, DOG])
    assert objects.box[:, 0].tolist() == list(range(150)) and (objects.score == 1).all()
    found = analysis.detections_of(labels, [0, 1, 2], [CAT, DOG])
    assert found.box[:, 0].tolist() == list(range(149, 49, -1))


def mistakes(detections, objects):
    return analysis.find_mistakes(detections, objects, analysis.overlaps(detections, objects))


def names(kinds):
    special = {HIT: "hit", IGNORED: "ignored"}
    return [special[kind] if kind < 0 else KINDS[kind] for kind in kinds.tolist()]


@pytest.fixture
def case():
    detections, objects = boxes(DETECTIONS), boxes(OBJECTS)
    return detections, objects, mistakes(detections, objects)


def test_each_kind(case):
    detections, objects, found = case
    assert names(found.kind) == [row[4] for row in DETECTIONS]
    assert found.target.tolist() == [0, 0, 1, 2, 3, -1, -1]
    assert found.iou == pytest.approx([1, 1, 1, 1 / 3, 1 / 3, 0, 0])
    kept = np.ones(7, bool)
    # that of "both" and that of the image without detections
    assert analysis.missed_objects(objects, found, kept).tolist() == [0, 0, 0, 1, 1]
    assert analysis.count_kinds(objects, found, kept).tolist() == [1, 1, 1, 1, 2, 2]


def test_a_threshold_leaves_objects_missed(case):
    detections, objects, found = case
    counts = analysis.count_kinds(objects, found, detections.score >= 0.65)
    assert counts.tolist() == [1, 0, 0, 1, 0, 3]


def test_costs(case):
    detections, objects, found = case
    # cats: a hit of 3 at rank 1, then four false ones; dogs: no hit of 2
    before = analysis.average_precision(np.array([0.9]), np.array([True]), 3)
    assert before == pytest.approx(34 / 101)  # recalls 0.00 to 0.33
    costs = dict(zip(KINDS, analysis.costs(detections, objects, found, 2)))
    # a dog found at rank 1 of 3, at recalls 0.00 to 0.50
    assert costs["class"] == pytest.approx(100 * (51 / 101) / 2)
    # the fourth cat detection becomes a hit: precision 2/4 at recalls 0.34 to 0.66
    assert costs["localisation"] == pytest.approx(100 * (33 / 101 / 2) / 2)
    assert costs["both"] == costs["duplicate"] == costs["background"] == 0  # after the last hit
    # one cat and one dog less: one of 2 cats found, recalls 0.00 to 0.50
    assert costs["missed"] == pytest.approx(100 * (51 - 34) / 101 / 2)


def test_of_two_mistakes_about_an_object_only_the_higher_score_becomes_a_hit():
    objects = boxes([(0, CAT, (0, 0, 10, 10))])
    rows = [(0, DOG, (0, 0, 10, 10), 0.9), (0, CAT, (5, 0, 10, 10), 0.8)]
    detections = boxes(rows)
    found = mistakes(detections, objects)
    assert names(found.kind) == ["class", "localisation"]
    assert analysis.costs(detections, objects, found, 2).tolist() == [100, 0, 0, 0, 0, 0]


def test_a_crowd_is_neither_missed_nor_a_mistake():
    objects = boxes([(0, CAT, (0, 0, 100, 100)), (0, CAT, (200, 0, 10, 10))], crowds=[0])
    rows = [(0, CAT, (0, 0, 10, 10), 0.9), (0, CAT, (50, 0, 10, 10), 0.8)]
    detections = boxes([*rows, (0, CAT, (200, 0, 10, 10), 0.7)])
    found = mistakes(detections, objects)
    assert names(found.kind) == ["ignored", "ignored", "hit"]
    assert not analysis.count_kinds(objects, found, np.ones(3, bool)).any()
    assert not analysis.costs(detections, objects, found, 2).any()


def test_a_class_that_is_never_found_costs_its_whole_ap():
    objects = boxes([(0, CAT, (0, 0, 10, 10)), (0, DOG, (100, 0, 10, 10))])
    detections = boxes([(0, CAT, (0, 0, 10, 10), 0.9)])
    found = mistakes(detections, objects)
    assert analysis.costs(detections, objects, found, 2).tolist() == [0, 0, 0, 0, 0, 50]


@pytest.mark.parametrize("rows", [[], DETECTIONS])
def test_without_objects(rows):
    detections, objects = boxes(rows), boxes([])
    found = mistakes(detections, objects)
    kept = np.ones(len(rows), bool)
    counts = analysis.count_kinds(objects, found, kept)
    assert counts.tolist() == [0, 0, 0, 0, len(rows), 0]
    assert np.isnan(analysis.costs(detections, objects, found, 2)).all()
    pairs = analysis.overlaps(detections, objects)
    matrix = analysis.confusion_matrix(detections, objects, pairs, found, kept, 2)
    assert matrix.sum() == matrix[2].sum() == len(rows)


@pytest.mark.parametrize("seed", range(4))
def test_hits_and_ap50_are_those_of_boxeval(seed):
    """With crowds, equal scores and IoUs, and more detections than count."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 40, (60, 2))
    truth = [
        {"id": i + 1, "image_id": int(rng.integers(6)), "category_id": int(rng.integers(3)),
         "bbox": [*map(float, centre), 20.0, 20.0], "area": 400.0,
         "iscrowd": int(rng.random() < 0.1)}
        for i, centre in enumerate(centres)
    ]  # fmt: skip
    results = []
    for i in range(1500):
        of = truth[int(rng.integers(60))]
        box = [of["bbox"][0] + rng.integers(-8, 9), of["bbox"][1] + rng.integers(-8, 9), 20.0, 20.0]
        label = of["category_id"] if rng.random() < 0.7 else int(rng.integers(3))
        results.append(
            {"id": i + 1, "image_id": of["image_id"], "category_id": label, "area": 400.0,
             "bbox": list(map(float, box)), "score": float(rng.integers(1, 60)) / 60}
        )  # fmt: skip
    coco, found = COCO(), COCO()
    images = [{"id": i} for i in range(6)]
    categories = [{"id": i, "name": str(i)} for i in range(3)]
    coco.dataset = {"images": images, "annotations": truth, "categories": categories}
    coco.createIndex()
    found.dataset = {"annotations": results}
    expected = BoxEval(coco, found, "bbox")
    expected.evaluate()
    expected.accumulate()

    objects = analysis.objects_of(truth, range(6), range(3))
    detections = analysis.detections_of(results, range(6), range(3))
    assert len(detections.score) < len(results)
    kind = mistakes(detections, objects).kind
    for k in range(3):
        of = (detections.label == k) & (kind != IGNORED)
        positives = ((objects.label == k) & ~objects.crowd).sum()
        ap = analysis.average_precision(detections.score[of], kind[of] == HIT, positives)
        precision = expected.eval["precision"][0, :, k, 0, -1]
        assert ap == pytest.approx(precision.mean(), abs=1e-12) and 0 < ap < 1
        recall = (kind[of] == HIT).sum() / positives
        assert recall == pytest.approx(expected.eval["recall"][0, k, 0, -1])


def test_confusion_matrix(case):
    detections, objects, found = case
    pairs = analysis.overlaps(detections, objects)
    kept = np.ones(7, bool)
    matrix = analysis.confusion_matrix(detections, objects, pairs, found, kept, 2)
    # a cat found, two not; a dog taken for a cat, one not found; no object: 3 cats, 2 dogs
    assert matrix.tolist() == [[1, 0, 2], [1, 0, 1], [3, 2, 0]]
    kept = detections.score >= 0.75
    matrix = analysis.confusion_matrix(detections, objects, pairs, found, kept, 2)
    assert matrix.tolist() == [[1, 0, 2], [0, 0, 2], [1, 0, 0]]


def test_a_hit_keeps_its_object_from_a_wrong_class_of_a_higher_score():
    objects = boxes([(0, CAT, (0, 0, 10, 10))])
    detections = boxes([(0, DOG, (0, 0, 10, 10), 0.9), (0, CAT, (0, 0, 10, 10), 0.5)])
    pairs = analysis.overlaps(detections, objects)
    found = analysis.find_mistakes(detections, objects, pairs)
    matrix = analysis.confusion_matrix(detections, objects, pairs, found, np.ones(2, bool), 2)
    assert matrix.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_best_f1():
    score = np.array([0.9, 0.8, 0.4, 0.2])
    hit = np.array([True, True, False, True])
    points = analysis.operating_points(score, hit, positives=4)
    assert points.f1[[0, 19, 20, 89, 90]] == pytest.approx([6 / 8, 6 / 8, 4 / 7, 2 / 5, 0])
    best = analysis.best_point(points)  # from 0.01 to 0.20, all detections count
    assert best == pytest.approx((0.11, 3 / 4, 3 / 4, 3 / 4))
    none = analysis.best_point(analysis.operating_points(np.zeros(0), np.zeros(0, bool), 4))
    assert none[1:] == (0, 0, 0)


def test_calibration():
    score = np.array([0.15, 0.15, 0.95, 1.0])
    result = analysis.calibration(score, np.array([True, False, True, True]))
    assert result.count.tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    assert result.precision[[1, 9]].tolist() == [0.5, 1] and np.isnan(result.precision[0])
    assert result.error == pytest.approx(0.5 * 0.35 + 0.5 * 0.025)
    assert np.isnan(analysis.calibration(np.zeros(0), np.zeros(0, bool)).error)


def test_worst():
    objects = boxes([(0, CAT, (0, 0, side, side)) for side in (10, 30, 20)] + OBJECTS[4:])
    detections = boxes([(i // 3, DOG, (500, 0, 9, 9), 0.9 - i / 10) for i in range(5)])
    found = mistakes(detections, objects)
    everything = (detections, objects, found, detections.score > 0.55)
    # of the first image's three only two; the last one has too low a score
    background = KINDS.index("background")
    assert analysis.worst(*everything, background, 9).tolist() == [0, 1, 3]
    assert analysis.worst(*everything, background, 1).tolist() == [0]
    assert analysis.worst(*everything, KINDS.index("missed"), 9).tolist() == [1, 2, 3]
