import json
import os

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from trainers import in_two_processes

from ssd import evaluation
from ssd.config import add_ssd_config
from ssd.data.datasets import register_datasets
from ssd.engine import Trainer
from ssd.evaluation import (
    BoxEval,
    COCOBoxEvaluator,
    VOCEvaluator,
    build_evaluator,
    metric_names,
)

NAME = "t_evaluation"


@pytest.fixture(autouse=True)
def clean_catalog():
    yield
    DatasetCatalog.pop(NAME, None)
    MetadataCatalog.pop(NAME, None)


def register(images, classes):
    """``images``: per image a list of (box, class) or (box, class, difficult)."""
    DatasetCatalog.pop(NAME, None)
    MetadataCatalog.pop(NAME, None)
    records = []
    for index, objects in enumerate(images):
        annotations = [
            {"bbox": o[0], "category_id": o[1], "iscrowd": int(len(o) > 2 and o[2])}
            for o in objects
        ]
        for annotation in annotations:
            annotation["bbox_mode"] = BoxMode.XYXY_ABS
        record = {"file_name": f"{index}.jpg", "image_id": f"id{index}", "height": 100}
        records.append({**record, "width": 100, "annotations": annotations})
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).thing_classes = classes


def detect(evaluator, images, **kwargs):
    """``images``: per image a list of (box, class, score); feeds them and evaluates."""
    evaluator.reset()
    for index, found in enumerate(images):
        instances = Instances((100, 100))
        instances.pred_boxes = Boxes(torch.tensor([f[0] for f in found]).reshape(-1, 4).float())
        instances.pred_classes = torch.tensor([f[1] for f in found], dtype=torch.int64)
        instances.scores = torch.tensor([f[2] for f in found], dtype=torch.float32)
        evaluator.process([{"image_id": f"id{index}"}], [{"instances": instances}])
    return evaluator.evaluate(**kwargs)


A, B, C, FAR = [0, 0, 10, 10], [20, 20, 40, 40], [5, 5, 25, 25], [60, 60, 80, 80]


def test_voc_by_hand():
    # Three objects: A and B in image 0, C in image 1. Detections by score:
    #   0.9 A        hit            precision 1/1  recall 1/3
    #   0.8 A again  false positive           1/2         1/3
    #   0.7 C        hit                      2/3         2/3
    #   0.6 FAR      false positive           2/4         2/3
    #   0.5 B        hit                      3/5         1
    # Envelope: 1 up to recall 1/3, 2/3 up to 2/3, 3/5 up to 1.
    # Area: (1 + 2/3 + 3/5) / 3 = 34/45.
    # 11 points: recall 0 … 0.3 (4) at 1, 0.4 … 0.6 (3) at 2/3, 0.7 … 1 (4) at 3/5: 8.4/11.
    register([[(A, 0), (B, 0)], [(C, 0)]], ["cat"])
    shifted = [0, 0, 10, 9]  # IoU 0.9
    detections = [[(shifted, 0, 0.8), (A, 0, 0.9), (B, 0, 0.5)], [(FAR, 0, 0.6), (C, 0, 0.7)]]
    results = detect(VOCEvaluator(NAME), detections)["voc"]
    assert results["mAP"] == pytest.approx(100 * 34 / 45)
    assert results["AP-cat"] == results["mAP"]
    assert results["mAP_11point"] == pytest.approx(100 * 8.4 / 11)


def test_voc_recall_points_are_exact():
    # Ten objects, the three best found: recall 3/10 reaches the point 0.3, 4 of 11 points.
    boxes = [[10 * i, 0, 10 * i + 8, 8] for i in range(10)]
    register([[(box, 0) for box in boxes]], ["cat"])
    results = detect(VOCEvaluator(NAME), [[(box, 0, 0.5) for box in boxes[:3]]])["voc"]
    assert results["mAP_11point"] == pytest.approx(100 * 4 / 11)
    assert results["mAP"] == pytest.approx(30)


def test_voc_difficult_is_neither_hit_nor_miss():
    # B is difficult: both detections of it vanish. A is found after one false positive: 1/2.
    register([[(A, 0), (B, 0, 1)]], ["cat"])
    detections = [[(B, 0, 0.9), (B, 0, 0.8), (FAR, 0, 0.7), (A, 0, 0.6)]]
    assert detect(VOCEvaluator(NAME), detections)["voc"]["mAP"] == pytest.approx(50)
    assert detect(VOCEvaluator(NAME), [[(A, 0, 0.6)]])["voc"]["mAP"] == pytest.approx(100)


def test_voc_equal_scores_keep_their_order():
    register([[(A, 0)]], ["cat"])
    for higher in (0, 30):  # of few numpy's unstable sort keeps the order, too
        far = [(FAR, 0, 0.5), *[(FAR, 0, 0.9), (FAR, 0, 0.5)] * higher]
        first = detect(VOCEvaluator(NAME), [[(A, 0, 0.5), *far]])["voc"]["mAP"]
        last = detect(VOCEvaluator(NAME), [[*far, (A, 0, 0.5)]])["voc"]["mAP"]
        assert (first, last) == pytest.approx((100 / (higher + 1), 100 / (2 * higher + 2)))
    # Unrounded: the third decimal would make these equal.
    close = [[(FAR, 0, 0.50001), (A, 0, 0.50002)]]
    assert detect(VOCEvaluator(NAME), close)["voc"]["mAP"] == pytest.approx(100)


def test_voc_iou_threshold():
    register([[(A, 0)]], ["cat"])
    for height, expected in ((5.0, 100), (4.99, 0)):  # IoU 0.5 is enough
        results = detect(VOCEvaluator(NAME), [[([0, 0, 10, height], 0, 0.5)]])["voc"]
        assert results["mAP"] == pytest.approx(expected)


def test_voc_classes_and_empty_cases():
    register([[(A, 0), (B, 1)], []], ["cat", "dog", "cow"])
    evaluator = VOCEvaluator(NAME)
    # A box of the wrong class is a false positive, also for one without objects.
    results = detect(evaluator, [[(A, 0, 0.5), (B, 0, 0.9)], [(A, 2, 0.5)]])["voc"]
    assert results["AP-cat"] == pytest.approx(50) and results["AP-dog"] == 0
    assert np.isnan(results["AP-cow"]) and results["mAP"] == pytest.approx(25)
    for found in ([], [[], []]):  # no image, no detection
        results = detect(evaluator, found)["voc"]
        assert results["mAP"] == 0 and results["mAP_11point"] == 0
    register([[], []], ["cat"])
    assert np.isnan(detect(VOCEvaluator(NAME), [[(A, 0, 0.5)], []])["voc"]["mAP"])
    register([[([5, 5, 5, 9], 0), ([float("nan")] * 4, 0), (A, 0)]], ["cat"])  # two of no use
    results = detect(VOCEvaluator(NAME), [[(A, 0, 0.5), ([5, 5, 5, 9], 0, 0.4)]])["voc"]
    assert results["mAP"] == pytest.approx(100 / 3)


def random_case(seed):
    """Objects and detections, half of them near an object, of three classes in 40 images."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(40):
        corners = rng.uniform(0, 60, (rng.integers(0, 6), 2))
        boxes = np.concatenate([corners, corners + rng.uniform(10, 40, corners.shape)], 1)
        labels = rng.integers(0, 3, len(boxes))
        truth.append([(b.tolist(), int(k)) for b, k in zip(boxes, labels)])
        near = [(b + rng.normal(0, 3, 4), k) for b, k in zip(boxes, labels) for _ in range(2)]
        other = rng.uniform(0, 50, (4, 2))
        near += [(np.append(c, c + 20), rng.integers(0, 3)) for c in other]
        found.append([(b.tolist(), int(k), float(rng.random())) for b, k in near])
    return truth, found


def slow_average_precision(truth, found, label, eleven):
    """The definition, one detection at a time, precision maxima by search."""
    ordered = [(-f[2], i, f[0]) for i, image in enumerate(found) for f in image if f[1] == label]
    taken, curve, hits = set(), [], 0
    count = sum(o[1] == label for image in truth for o in image)
    for number, (_, image, box) in enumerate(sorted(ordered), 1):
        best, best_iou = None, 0.0
        for index, (other, k) in enumerate(truth[image]):
            w = min(box[2], other[2]) - max(box[0], other[0])
            h = min(box[3], other[3]) - max(box[1], other[1])
            if k == label and w > 0 and h > 0:
                areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
                iou = w * h / (sum(areas) - w * h)
                if iou > best_iou:
                    best, best_iou = index, iou
        if best_iou >= 0.5 and (image, best) not in taken:
            taken.add((image, best))
            hits += 1
        curve.append((hits / count, hits / number))
    # The interpolated curve at given recalls; the middles of its steps give the area.
    recalls = np.arange(11) / 10 - 1e-9 if eleven else (np.arange(count) + 0.5) / count
    return 100 * np.mean([max([p for r, p in curve if r >= t], default=0) for t in recalls])


@pytest.mark.parametrize("seed", [0, 1])
def test_voc_against_a_slow_version_and_pycocotools(seed, tmp_path):
    truth, found = random_case(seed)
    register(truth, ["cat", "dog", "cow"])
    voc = detect(VOCEvaluator(NAME), found)["voc"]
    for label, name in enumerate(["cat", "dog", "cow"]):
        slow = slow_average_precision(truth, found, label, False)
        assert voc[f"AP-{name}"] == pytest.approx(slow, abs=1e-6)
    slow = [slow_average_precision(truth, found, label, True) for label in range(3)]
    assert voc["mAP_11point"] == pytest.approx(np.mean(slow), abs=1e-6)
    coco = detect(COCOBoxEvaluator(NAME, str(tmp_path)), found)["bbox"]
    assert 20 < coco["AP50"] < 95
    # COCO looks at 101 recalls, and lets a detection take its second-best object.
    for name in ("cat", "dog", "cow"):
        assert coco[f"AP50-{name}"] == pytest.approx(voc[f"AP-{name}"], abs=2)
    mean = np.mean([coco[f"AP50-{name}"] for name in ("cat", "dog", "cow")])
    assert coco["AP50"] == pytest.approx(mean)
    assert "AP-cat" in coco


def coco_of(images, annotations, classes):
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": i} for i in images],
        "annotations": annotations,
        "categories": [{"id": k} for k in classes],
    }
    coco.createIndex()
    return coco


def random_coco(seed, images=25, classes=(3, 1, 7, 8), objects=7, detections=12):
    """Objects of all sizes, some of them crowds, equal or on one another; detections with many
    equal scores. Class 8 has no object, and the last images have none."""
    rng = np.random.default_rng(seed)
    truth, results = [], []
    names = [f"image {i}" for i in rng.permutation(images)]
    for number, name in enumerate(names):
        boxes = []
        for _ in range(rng.integers(0, objects) if number < images - 3 else 0):
            boxes.append([*rng.integers(0, 60, 2), *rng.choice([8, 20, 31, 40, 97, 120], 2)])
            if rng.random() < 0.3:
                boxes.append(boxes[-1])
        for box in boxes:
            box = [float(x) for x in box]
            area = box[2] * box[3] * rng.choice([1, 0.7])
            label = int(rng.choice(classes[:3]))
            crowd = int(rng.random() < 0.15)
            truth.append({"id": len(truth) + 1, "image_id": name, "category_id": label,
                          "bbox": box, "area": area, "iscrowd": crowd,
                          "score": rng.random()})  # fmt: skip
        for _ in range(rng.integers(0, detections)):
            box = boxes[rng.integers(len(boxes))] if boxes else [5, 5, 30, 30]
            box = [float(x) for x in np.add(box, rng.integers(-2, 3, 4) * 2)]
            results.append({"image_id": name, "category_id": int(rng.choice(classes)),
                            "bbox": box, "score": float(rng.integers(1, 6) / 5)})  # fmt: skip
    return coco_of(names, truth, classes), results


def compare_with_pycocotools(coco, results, **params):
    evaluations = []
    for cls in (COCOeval, BoxEval):
        evaluations.append(cls(coco, coco.loadRes([dict(result) for result in results]), "bbox"))
        vars(evaluations[-1].params).update(params)
        evaluations[-1].evaluate()
        evaluations[-1].accumulate()
        if not params:
            evaluations[-1].summarize()
    slow, fast = evaluations
    for key in ("precision", "recall", "scores", "counts"):
        np.testing.assert_array_equal(fast.eval[key], slow.eval[key])
    np.testing.assert_array_equal(fast.stats, slow.stats)
    return fast


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("elements", [1, 2_000_000])
def test_coco_numbers_are_pycocotools_own(seed, elements, monkeypatch):
    monkeypatch.setattr(evaluation, "_CELL_ELEMENTS", elements)
    coco, results = random_coco(seed)
    stats = compare_with_pycocotools(coco, results).stats
    assert len(stats) == 12 and 0.02 < stats[0] < 0.9 and len(set(stats)) > 8


def test_coco_numbers_in_unusual_cases():
    coco, results = random_coco(0, images=6, objects=40, detections=900)  # over 100 of a class
    compare_with_pycocotools(coco, results)
    compare_with_pycocotools(coco, results, maxDets=[2, 5, 300])
    compare_with_pycocotools(coco, results, imgIds=["image 3", "image 1"], catIds=[7, 1])
    compare_with_pycocotools(coco, results, iouThrs=np.array([0.0, 1.0]))
    compare_with_pycocotools(coco, results[:1])
    compare_with_pycocotools(coco, [r for r in results if r["category_id"] == 8])  # no object
    compare_with_pycocotools(coco_of(coco.getImgIds(), [], [1, 8]), results)


def test_an_object_with_id_0_counts_like_any_other():
    coco, results = random_coco(0)
    expected = compare_with_pycocotools(coco, results).stats
    objects = [dict(a, id=a["id"] - 1) for a in coco.dataset["annotations"]]
    coco = coco_of(coco.getImgIds(), objects, [1, 3, 7, 8])
    fast = BoxEval(coco, coco.loadRes(results), "bbox")
    for step in (fast.evaluate, fast.accumulate, fast.summarize):
        step()
    np.testing.assert_array_equal(fast.stats, expected)


def test_of_objects_with_equal_iou_the_later_one_is_taken():
    """The first detection takes the second object, so the second, which equals it, finds none."""
    annotation = {"image_id": 0, "category_id": 1, "area": 100.0, "iscrowd": 0}
    boxes = [[0.0, 0, 10, 10], [4.0, 0, 10, 10]]
    truth = [dict(annotation, id=i + 1, bbox=box) for i, box in enumerate(boxes)]
    results = [
        {"image_id": 0, "category_id": 1, "bbox": box, "score": score}
        for box, score in (([2.0, 0, 10, 10], 0.9), (boxes[1], 0.8))
    ]
    fast = compare_with_pycocotools(coco_of([0], truth, [1]), results)
    assert fast.eval["recall"][0, 0, 0, -1] == 0.5


def test_coco_without_detections_or_objects(tmp_path):
    register([[(A, 0)], []], ["cat", "dog"])
    evaluator = COCOBoxEvaluator(NAME, str(tmp_path))
    assert np.isnan(detect(evaluator, [[], []])["bbox"]["AP50"])
    assert detect(evaluator, []) == {}
    results = detect(evaluator, [[(A, 0, 0.5)], [(A, 1, 0.4)]])["bbox"]
    assert results["AP50-cat"] == pytest.approx(100) and np.isnan(results["AP50-dog"])
    only = detect(evaluator, [[(A, 0, 0.5)], [(A, 1, 0.4)]], img_ids=["id1"])["bbox"]
    assert np.isnan(only["AP50-cat"])  # of these images
    register([[], []], ["cat"])
    assert detect(COCOBoxEvaluator(NAME, str(tmp_path)), [[(A, 0, 0.5)], []]) == {}


def test_coco_converts_anew(tmp_path):
    for box, expected in ((A, 100), (FAR, 0), (A, 100)):
        register([[(box, 0)]], ["cat"])
        for folder in ("a", "b"):
            evaluator = COCOBoxEvaluator(NAME, str(tmp_path / folder))
            results = detect(evaluator, [[(A, 0, 0.5)]])["bbox"]
            assert results["AP50-cat"] == pytest.approx(expected)
        DatasetCatalog.get(NAME)[0]["annotations"][0]["bbox"] = B  # the same registration
        evaluator = COCOBoxEvaluator(NAME, str(tmp_path / "a"))
        assert detect(evaluator, [[(B, 0, 0.5)]])["bbox"]["AP50"] == pytest.approx(100)


def test_metrics_are_logged_and_need_no_terminal(tmp_path, caplog, monkeypatch):
    """pycocotools prints them; what reads the output may have ended."""
    caplog.set_level("INFO", "ssd")
    register([[(A, 0)]], ["cat"])
    evaluator = COCOBoxEvaluator(NAME, str(tmp_path))
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, pytest.raises(BrokenPipeError):
        with os.fdopen(writer, "w", buffering=1) as closed:
            patch.setattr("sys.stdout", closed)
            results = detect(evaluator, [[(A, 0, 0.5)]])
            print("fails")
    assert results["bbox"]["AP50"] == pytest.approx(100)
    assert "(AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 1.000" in caplog.text


def test_images_that_were_not_evaluated_are_told(tmp_path, caplog):
    register([[(A, 0)], [(B, 0)]], ["one"])
    evaluator = COCOBoxEvaluator(NAME, str(tmp_path))
    for images, told in (([[(A, 0, 0.9)], [(B, 0, 0.8)]], False), ([[(A, 0, 0.9)]], True)):
        caplog.clear()
        results = detect(evaluator, images)["bbox"]
        assert results["AP"] == pytest.approx(100 if not told else 50.495, abs=0.01)
        text = "1 of the annotations' 2 images were evaluated: the objects of the others count"
        assert (text in caplog.text) == told
    caplog.clear()
    detect(evaluator, [[(A, 0, 0.9)]], img_ids=[0])  # as was asked for
    assert "were evaluated" not in caplog.text


def test_coco_ignores_difficult(tmp_path):
    register([[(A, 0), (B, 0, 1)]], ["cat"])
    results = detect(COCOBoxEvaluator(NAME, str(tmp_path)), [[(B, 0, 0.9), (A, 0, 0.6)]])["bbox"]
    assert results["AP50"] == pytest.approx(100)


def test_coco_file_without_optional_keys(tmp_path):
    from detectron2.data.datasets import register_coco_instances

    data = {
        "images": [{"id": "id0", "file_name": "0.jpg", "height": 100, "width": 100}],
        "annotations": [{"id": 1, "image_id": "id0", "category_id": 5, "bbox": [0, 0, 10, 10]}],
        "categories": [{"id": 5, "name": "cat"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(data))
    register_coco_instances(NAME, {}, str(tmp_path / "a.json"), str(tmp_path))
    evaluator = COCOBoxEvaluator(NAME, str(tmp_path))  # before anything has read the data set
    assert detect(evaluator, [[(A, 0, 0.5)]])["bbox"]["AP50-cat"] == pytest.approx(100)
    assert detect(VOCEvaluator(NAME), [[(A, 0, 0.5)]])["voc"]["mAP"] == pytest.approx(100)


def test_ids_of_the_file_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    boxes = {7: A, 3: B, 1: C}  # by category id; 2, 4, 5 and 6 are unused
    names = {7: "dog", 3: "cat", 1: "ox"}
    annotations = [
        {"id": i, "image_id": "id0", "category_id": i, "bbox": xywh(box)}
        for i, box in boxes.items()
    ]
    data = {
        "images": [{"id": "id0", "file_name": "0.jpg", "height": 100, "width": 100}],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in names.items()],
    }
    (tmp_path / "a.json").write_text(json.dumps(data))
    (tmp_path / "0.jpg").touch()
    cfg = get_cfg()
    add_ssd_config(cfg)
    entry = {"FORMAT": "coco", "ROOT": ".", "ANNOTATIONS": "a.json", "IMAGES": "."}
    cfg.DATASETS.REGISTER[NAME] = CfgNode({**entry, "KEEP_IDS": True})
    register_datasets(cfg)

    perfect = [(box, i - 1, 0.5) for i, box in boxes.items()]
    unused = [(FAR, 1, 0.9), (A, 5, 0.8)]
    for found, ap_of_cat in ((perfect + unused, 100), (perfect[:1] + perfect[2:] + unused, 0)):
        coco = detect(COCOBoxEvaluator(NAME, str(tmp_path)), [found])["bbox"]
        voc = detect(VOCEvaluator(NAME), [found])["voc"]
        assert coco["AP"] == pytest.approx((200 + ap_of_cat) / 3)
        assert voc["mAP"] == pytest.approx((200 + ap_of_cat) / 3)
        for results, prefix in ((coco, "AP-"), (coco, "AP50-"), (voc, "AP-")):
            aps = {name: results[prefix + name] for name in names.values()}
            assert aps == pytest.approx({"ox": 100, "cat": ap_of_cat, "dog": 100})
        assert sum(key.startswith("AP-") for key in coco) == 3
        assert np.isnan(voc["AP-id 2"])
    assert detect(COCOBoxEvaluator(NAME, str(tmp_path)), [unused])["bbox"]["AP"] == 0
    saved = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [result["category_id"] for result in saved] == [2, 6]  # the file's numbers


def xywh(box):
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def test_difficult_of_detectron2s_own_voc(tmp_path):
    from detectron2.data.datasets import register_pascal_voc

    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        os.makedirs(tmp_path / folder)
    (tmp_path / "ImageSets/Main/test.txt").write_text("id0\n")
    cv2.imwrite(str(tmp_path / "JPEGImages/id0.jpg"), np.zeros((100, 100, 3), np.uint8))
    objects = ""
    for (x1, y1, x2, y2), difficult in ((A, 0), (B, 1)):
        box = f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        objects += f"<object><name>cat</name><difficult>{difficult}</difficult>"
        objects += f"<bndbox>{box}</bndbox></object>"
    (tmp_path / "Annotations/id0.xml").write_text(f"<annotation>{objects}</annotation>")
    register_pascal_voc(NAME, str(tmp_path), "test", 2007, ["cat"])
    results = detect(VOCEvaluator(NAME), [[(A, 0, 0.5)]])["voc"]
    assert results["mAP"] == pytest.approx(100)


def test_build_evaluator(tmp_path):
    cfg = get_cfg()
    add_ssd_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path)
    register([[(A, 0)]], ["cat"])
    cfg.TEST.EVALUATORS = ["coco", "voc"]
    results = detect(build_evaluator(cfg, NAME), [[(A, 0, 0.5)]])
    assert results["voc"]["mAP"] == pytest.approx(100)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert os.path.isfile(tmp_path / "inference" / NAME / "coco_instances_results.json")
    cfg.TEST.EVALUATORS = ["lvis"]
    cfg.DATASETS.TEST = (NAME,)
    for function in (lambda: build_evaluator(cfg, NAME), lambda: metric_names(cfg)):
        with pytest.raises(ValueError, match="TEST.EVALUATORS names 'lvis'.*'coco' and 'voc'"):
            function()


@pytest.mark.parametrize("without, message", [
    ("image_id", "b.jpg has no image_id"),
    ("width", "b.jpg has no width"),
    ("", r"b.jpg and a.jpg have the same image_id 7"),
])  # fmt: skip
def test_what_evaluations_need_is_missed_at_once(tiny_cfg, register, without, message):
    cfg = tiny_cfg()
    record = {"height": 4, "width": 4, "image_id": 7, "annotations": []}
    records = [{**record, "file_name": x} for x in ("a.jpg", "b.jpg")]
    records[1].pop(without, None)
    name = register(records, MetadataCatalog.get("shapes_train").thing_classes)
    cfg.defrost()
    cfg.DATASETS.TEST = (name,)
    for evaluate in (lambda: Trainer(cfg), lambda: build_evaluator(cfg, name)):
        with pytest.raises(ValueError, match=f"data set '{name}': {message}"):
            evaluate()

    for method in ("build_evaluator", "test"):
        type("OwnTrainer", (Trainer,), {method: classmethod(NotImplementedError)})(cfg)
    if without != "image_id":
        cfg.TEST.EVALUATORS = []
        Trainer(cfg)
    if without == "width":
        cfg.TEST.EVALUATORS, records[1]["image_id"] = ["voc"], 8
        Trainer(cfg)


@pytest.mark.parametrize("classes", [["cat"], ["cat", "a/b [x]*-é"]])
@pytest.mark.parametrize("evaluators", [["coco"], ["voc"], ["coco", "voc"]])
def test_metric_names_are_what_is_logged(classes, evaluators, tmp_path):
    cfg = get_cfg()
    add_ssd_config(cfg)
    cfg.OUTPUT_DIR, cfg.TEST.EVALUATORS = str(tmp_path), evaluators
    register([[(A, 0)]], classes)
    results = detect(build_evaluator(cfg, NAME), [[(A, 0, 0.5)]])
    cfg.DATASETS.TEST = (NAME,)
    assert sorted(metric_names(cfg)) == sorted(flatten_results_dict(results))
    cfg.DATASETS.TEST = (NAME, NAME)  # evaluated as one
    assert sorted(metric_names(cfg)) == sorted(flatten_results_dict(results))
    MetadataCatalog.get("t_other").thing_classes = classes
    cfg.DATASETS.TEST = (NAME, "t_other")
    both = {NAME: results, "t_other": results}
    assert sorted(metric_names(cfg)) == sorted(flatten_results_dict(both))
    MetadataCatalog.pop("t_other")


def test_two_processes_are_gathered(tmp_path):
    def evaluate(rank):
        register([[(A, 0)], [(B, 0)]], ["cat"])
        results = []
        for evaluator in (VOCEvaluator(NAME), COCOBoxEvaluator(NAME, str(tmp_path))):
            evaluator.reset()
            instances = Instances((100, 100))
            instances.pred_boxes = Boxes(torch.tensor([[A, B][rank]]).float())
            instances.pred_classes, instances.scores = torch.tensor([0]), torch.tensor([0.5])
            evaluator.process([{"image_id": f"id{rank}"}], [{"instances": instances}])
            results.append(evaluator.evaluate())
        voc, coco = results
        if rank == 0:
            assert voc["voc"]["mAP"] == pytest.approx(100)
            assert coco["bbox"]["AP50"] == pytest.approx(100)
        else:
            assert results == [{}, {}]

    in_two_processes(evaluate, tmp_path)
