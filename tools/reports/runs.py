"""Reads a run's folder: metrics, config, detections, and the ground truth that the config names."""

import contextlib
import io
import json
import math
import os
from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from pycocotools.coco import COCO

from reports import analysis
from reports.analysis import Boxes, Calibration, Mistakes, OperatingPoint, Overlaps
from ssd.config import read_config
from ssd.data.datasets import register_datasets
from ssd.evaluation import BoxEval
from ssd.metrics import read_metrics

RESULTS = "coco_instances_results.json"


@dataclass
class Evaluation:
    """A run's detections on a data set of K classes, and what they come to. Percent where COCO
    gives percent."""

    class_names: list[str]
    images: list[dict]  # file_name, height, width
    objects: Boxes
    detections: Boxes
    pairs: Overlaps
    mistakes: Mistakes
    stats: np.ndarray  # (12,) COCO's summary
    ap: np.ndarray  # (K,) AP by class, NaN for a class without objects
    ap50: np.ndarray  # (K,)
    curves: dict[float, np.ndarray]  # IoU -> (101, K) precision by recall, NaN without objects
    threshold: float  # of the score, for everything that counts single detections
    points: OperatingPoint  # of all classes together, at each of analysis.THRESHOLDS
    class_points: list[Optional[OperatingPoint]]  # (K,) the best of each class
    calibration: Calibration

    @property
    def kept(self) -> np.ndarray:
        """(D,) bool: the detections from the threshold up."""
        return self.detections.score >= self.threshold

    @property
    def hits(self) -> np.ndarray:
        """(D,) bool."""
        return self.mistakes.kind == analysis.HIT


@dataclass
class Run:
    folder: str
    name: str
    series: dict[str, tuple[np.ndarray, np.ndarray]]  # of metrics.json: iterations and values
    settings: dict[str, str] = field(default_factory=dict)  # every key of the config
    evaluations: dict[str, Evaluation] = field(default_factory=dict)  # by data set
    notes: list[str] = field(default_factory=list)  # what the page can't show, and why


def read_run(folder: str, threshold: Optional[float] = None) -> Run:
    """Everything that the folder has; what it lacks is in ``notes``.

    Args:
        folder: a run's OUTPUT_DIR.
        threshold: of the score; None: that of the best F1.
    """
    parts = os.path.normpath(os.path.abspath(folder)).split(os.sep)
    run = Run(folder, parts[-2] if parts[-1] == "output" else parts[-1], {})
    run.series, logged = _read_metrics(os.path.join(folder, "metrics.json"), run.notes)
    path = os.path.join(folder, "config.yaml")
    try:
        run.settings, names = _read_settings(path)
    except FileNotFoundError:
        run.notes.append(f"{path} is missing, so the ground truth isn't known.")
        return run
    except Exception as error:  # of YAML, yacs or a data set's entry
        run.notes.append(f"{path} can't be read, so the ground truth isn't known: {error}")
        return run
    iterations = run.series.get("total_loss", ((), ()))[0]
    most = int(run.settings.get("SOLVER.MAX_ITER", 0))
    in_epochs = run.settings.get("SOLVER.MAX_EPOCHS", "0") != "0"  # MAX_ITER follows from them
    if len(iterations) and iterations[-1] + 1 < most and not in_epochs:
        run.notes.append(f"The training ends at iteration {iterations[-1] + 1:.0f} of {most}.")
    if not names:
        run.notes.append("DATASETS.TEST is empty: nothing was evaluated.")
    for name in names:
        path = os.path.join(folder, "inference", name, RESULTS)
        stock = os.path.join(folder, "inference", RESULTS)  # where Detectron2's own trainer writes
        if not os.path.isfile(path) and len(names) == 1 and os.path.isfile(stock):
            path = stock
        try:
            run.evaluations[name] = _evaluate(name, path, threshold, run.notes)
            with_tta = os.path.join(folder, "inference_TTA", name, RESULTS)
            if run.settings.get("TEST.AUG.ENABLED") == "True" and os.path.isfile(with_tta):
                title = f"{name}, with test-time augmentation"
                run.evaluations[title] = _evaluate(name, with_tta, threshold, run.notes)
        except Exception as error:  # whatever a data set's own code raises
            run.notes.append(f"{name}: {error}")
    logs_evaluation = any("bbox/" in name for name in logged)
    if run.evaluations and "total_loss" in logged and not logs_evaluation:
        run.notes.append(
            "This training has logged no evaluation: the detections are of an earlier one in the "
            "folder, or of --eval-only."
        )
    return run


def _read_metrics(path: str, notes: list[str]) -> tuple[dict, set[str]]:
    """Series by name, without values that aren't finite, and all names."""
    series, not_finite, names = {}, set(), set()
    try:
        records, broken = read_metrics(path)
    except OSError:
        notes.append(f"{path} is missing, so there are no training curves.")
        return {}, names
    for record in records:
        iteration = record.pop("iteration")
        names.update(record)
        for name, value in record.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(name, {})[iteration] = value
            elif "loss" in name:
                not_finite.add(name)
    if broken:
        notes.append(f"{path}: lines that can't be read and are left out: {broken}.")
    if not_finite:
        notes.append(f"{path}: {', '.join(sorted(not_finite))} isn't always finite.")
    return {
        name: tuple(np.array(x, float) for x in zip(*sorted(points.items())))
        for name, points in series.items()
    }, names


def _read_settings(path: str) -> tuple[dict[str, str], list[str]]:
    """All settings, and DATASETS.TEST; registers the data sets. Of the config only DATASETS need
    fit this version of the project: a run may be older."""
    with open(path, encoding="utf-8") as file:
        settings = yaml.safe_load(file)
    cfg = read_config("")
    names = list(settings["DATASETS"]["TEST"])
    cfg.DATASETS.REGISTER.update(settings["DATASETS"].get("REGISTER", {}))
    register_datasets(cfg)
    return _flat(settings), names


def _flat(node: dict, prefix: str = "") -> dict[str, str]:
    result = {}
    for key, value in node.items():
        if isinstance(value, dict):
            result.update(_flat(value, f"{prefix}{key}."))
        else:
            result[prefix + key] = str(value)
    return result


def _evaluate(name: str, path: str, threshold: Optional[float], notes: list[str]) -> Evaluation:
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} is missing: the run was stopped before an evaluation, or TEST.EVALUATORS "
            "lacks coco."
        )
    with open(path, encoding="utf-8") as file:
        try:
            results = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} can't be read, perhaps it is cut off: {error}") from None
    truth = _ground_truth(name)
    known = len(results)
    image_ids, category_ids = sorted(truth.imgs), sorted(truth.cats)
    results = [x for x in results if x["image_id"] in truth.imgs]
    if len(results) < known:
        notes.append(
            f"{name}: {known - len(results)} of {known} detections are for images that the data "
            "set doesn't have (has it changed since?); they are left out."
        )
    if not results:
        notes.append(f"{name}: there are no detections.")
    objects = analysis.objects_of(truth.dataset["annotations"], image_ids, category_ids)
    detections = analysis.detections_of(results, image_ids, category_ids)
    pairs = analysis.overlaps(detections, objects)
    mistakes = analysis.find_mistakes(detections, objects, pairs)
    counted = mistakes.kind != analysis.IGNORED
    hits = mistakes.kind == analysis.HIT

    def points(of, label):
        positives = (~objects.crowd & label).sum()
        return analysis.operating_points(detections.score[of], hits[of], positives)

    together = points(counted, True)
    class_points = [
        analysis.best_point(points(counted & (detections.label == k), objects.label == k))
        if (~objects.crowd & (objects.label == k)).any()
        else None
        for k in range(len(category_ids))
    ]
    coco = _coco_eval(truth, results)
    precision = coco.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class)
    precision = np.where(precision < 0, np.nan, precision)
    return Evaluation(
        class_names=[truth.cats[i]["name"] for i in category_ids],
        images=[truth.imgs[i] for i in image_ids],
        objects=objects, detections=detections, pairs=pairs, mistakes=mistakes,
        stats=100 * np.where(coco.stats < 0, np.nan, coco.stats),
        ap=100 * precision.mean((0, 1)), ap50=100 * precision[0].mean(0),
        curves={0.5: precision[0], 0.75: precision[5]},
        threshold=analysis.best_point(together).threshold if threshold is None else threshold,
        points=together, class_points=class_points,
        calibration=analysis.calibration(detections.score[counted], hits[counted]),
    )  # fmt: skip


def _ground_truth(name: str) -> COCO:
    """A registered data set in COCO's format, as COCOBoxEvaluator sees it; ``file_name`` is the
    path of the image."""
    json_file = MetadataCatalog.get(name).get("json_file")
    coco = COCO()
    if json_file:
        paths, root = {}, MetadataCatalog.get(name).get("image_root", "")
        try:
            paths = {record["image_id"]: record["file_name"] for record in DatasetCatalog.get(name)}
        except FileNotFoundError:  # of an image: only the pictures need them
            if not os.path.isfile(json_file):
                raise
        with open(json_file, encoding="utf-8") as file:
            coco.dataset = json.load(file)
        for image in coco.dataset["images"]:
            image["file_name"] = paths.get(image["id"]) or os.path.join(root, image["file_name"])
    else:
        coco.dataset = convert_to_coco_dict(name)
    if not coco.dataset.get("annotations"):
        raise ValueError("the data set has no annotations, so nothing can be compared.")
    for annotation in coco.dataset["annotations"]:
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _coco_eval(truth: COCO, results: list[dict]) -> BoxEval:
    """As with COCO.loadRes, which doesn't take an empty list. Adds id and area to the results."""
    for number, result in enumerate(results):
        result.update(id=number + 1, area=result["bbox"][2] * result["bbox"][3])
    found = COCO()
    found.dataset = {"annotations": results}
    evaluation = BoxEval(truth, found, "bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation
