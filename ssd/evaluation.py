"""COCO's and Pascal VOC's average precision on any data set that is registered."""

import itertools
import logging
import os
from typing import Optional

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table

from ssd.data.datasets import read_voc, xyxy_boxes

__all__ = ["COCOBoxEvaluator", "VOCEvaluator", "build_evaluator"]

logger = logging.getLogger(__name__)


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
) -> DatasetEvaluators:
    """The evaluators that ``cfg.TEST.EVALUATORS`` lists.

    Args:
        output_folder: for COCO's results; default: OUTPUT_DIR/inference/``dataset_name``.

    Raises:
        ValueError: for one that doesn't exist.
    """
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    known = {
        "coco": lambda: COCOBoxEvaluator(dataset_name, folder),
        "voc": lambda: VOCEvaluator(dataset_name),
    }
    for name in cfg.TEST.EVALUATORS:
        if name not in known:
            raise ValueError(f"TEST.EVALUATORS names {name!r}; it may list {list(known)}")
    return DatasetEvaluators([known[name]() for name in dict.fromkeys(cfg.TEST.EVALUATORS)])


class COCOBoxEvaluator(COCOEvaluator):
    """Detectron2's COCOEvaluator for boxes, plus ``AP50-<class>``, for any data set.

    Unlike the stock class it converts a data set that isn't in COCO's format anew each time, takes
    JSON files whose annotations lack ``iscrowd`` (0) or ``area`` (the box's), and ignores
    detections of classes that aren't among the file's categories (KEEP_IDS of
    ``ssd.data.datasets``). Without any detection all results are NaN, as in Detectron2.
    """

    def __init__(self, dataset_name: str, output_folder: str):
        metadata = MetadataCatalog.get(dataset_name)
        in_coco_format = metadata.get("json_file") is not None
        if in_coco_format and metadata.get("thing_dataset_id_to_contiguous_id") is None:
            DatasetCatalog.get(dataset_name)  # sets it, and renders a data set that needs it
        super().__init__(
            dataset_name,
            tasks=("bbox",),
            output_dir=output_folder,
            use_fast_impl=_has_compiled_cocoeval(),
            allow_cached_coco=not comm.is_main_process(),  # which alone evaluates
        )
        if not in_coco_format:
            del metadata.json_file  # of the conversion; the next evaluator would reuse it
        for annotation in self._coco_api.anns.values():
            annotation.setdefault("iscrowd", 0)
            annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        labels = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if coco_eval is not None and class_names and labels:
            class_names = [class_names[labels[i]] for i in coco_eval.params.catIds]
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if coco_eval is not None and class_names:
            # (IoU, recall, class, area range, detections per image); -1: no ground truth
            precision = coco_eval.eval["precision"][0, :, :, 0, -1]
            for label, name in enumerate(class_names):
                known = precision[:, label] > -1
                ap50 = precision[known, label].mean() * 100 if known.any() else float("nan")
                results[f"AP50-{name}"] = float(ap50)
        return results


def _has_compiled_cocoeval() -> bool:
    try:
        from detectron2 import _C
    except ImportError:
        return False
    return hasattr(_C, "COCOevalEvaluateImages")


class VOCEvaluator(DatasetEvaluator):
    """Pascal VOC's AP at IoU 0.5 of any registered data set, by both of VOC's definitions.

    Ground truth comes from the data set's dicts. An object with ``iscrowd`` 1 counts as VOC's
    difficult: finding it is neither hit nor miss. The dicts of Detectron2's own voc_2007_* and
    voc_2012_* don't say which objects are difficult, so their XML is read again.

    The devkit takes 1-based inclusive corners and a width of x2 - x1 + 1. The dicts and detections
    here have 0-based continuous corners (x1 - 1, y1 - 1, x2, y2), where the same width is x2 - x1:
    the plain IoU equals the devkit's. As in the devkit, a detection belongs to the object of its
    class with the largest IoU, taken or not; further detections of that object are false
    positives. Among equal scores the earlier image and the earlier detection come first.
    """

    def __init__(self, dataset_name: str):
        metadata = MetadataCatalog.get(dataset_name)
        if metadata.get("dirname") and metadata.get("year"):  # set by register_pascal_voc
            records = read_voc(metadata.dirname, metadata.split, metadata.thing_classes)
        else:
            records = DatasetCatalog.get(dataset_name)
        self._dataset_name = dataset_name
        self._class_names = list(metadata.thing_classes)  # for some known only after the above
        self._truth = [_ground_truth(record) for record in records]
        self._image_ids = [record["image_id"] for record in records]
        self.reset()

    def reset(self):
        self._predictions = {}

    def process(self, inputs, outputs):
        """Keeps the detections: ``outputs`` have ``instances`` in the pixels of the dicts."""
        for record, output in zip(inputs, outputs):
            instances = output["instances"]
            fields = instances.pred_boxes.tensor, instances.scores, instances.pred_classes
            self._predictions[record["image_id"]] = [x.detach().cpu().numpy() for x in fields]

    def evaluate(self):
        """Gathers the detections of all processes.

        Returns:
            {"voc": results} in percent, {} in all but the main process. mAP and AP-<class> are the
            area under the interpolated curve (VOC 2010 and later), mAP_11point is that of VOC 2007.
            A class without objects has NaN and isn't in the means.
        """
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return {}
        predictions = dict(itertools.chain(*(part.items() for part in gathered)))
        detections = self._match(predictions)
        labels = np.concatenate([np.zeros(0, int)] + [t[1] for t in self._truth])
        difficult = np.concatenate([np.zeros(0, bool)] + [t[2] for t in self._truth])
        area, points = {}, []
        for label, name in enumerate(self._class_names):
            count = int(((labels == label) & ~difficult).sum())
            scores, best = (x[detections[0] == label] for x in detections[1:])
            hits, false = _hits(scores, best, difficult)
            area[name] = _average_precision(hits, false, count)
            points.append(_average_precision(hits, false, count, eleven_points=True))
        results = {"mAP": _mean(area.values()), "mAP_11point": _mean(points)}
        logger.info(f"VOC AP of {self._dataset_name}:\n{create_small_table(results)}")
        logger.info("Per class: " + ", ".join(f"{k} {value:.2f}" for k, value in area.items()))
        results.update({f"AP-{name}": value for name, value in area.items()})
        return {"voc": results}

    def _match(self, predictions: dict) -> list[np.ndarray]:
        """Of all D detections: (D,) labels, scores, and the number of the object each belongs to
        among those of the whole data set, or -1 where no IoU reaches 0.5."""
        columns, first = [(np.zeros(0, int), np.zeros(0), np.zeros(0, int))], 0
        for image_id, (boxes, labels, _) in zip(self._image_ids, self._truth):
            if image_id in predictions:
                found, scores, classes = predictions[image_id]
                best = np.full(len(found), -1)
                if len(boxes) and len(found):
                    iou = np.where(classes[:, None] == labels, _pairwise_iou(found, boxes), 0)
                    best = np.where(iou.max(1) >= 0.5, iou.argmax(1) + first, -1)
                columns.append((classes, scores, best))
            first += len(boxes)
        return [np.concatenate(column) for column in zip(*columns)]


def _ground_truth(record: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(M, 4) XYXY boxes in pixels, (M,) labels, (M,) difficult."""
    annotations = record.get("annotations", [])
    labels = np.array([a["category_id"] for a in annotations], int)
    difficult = np.array([a.get("iscrowd", 0) == 1 for a in annotations], bool)
    return xyxy_boxes(annotations), labels, difficult


def _pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(D, M) IoU of (D, 4) and (M, 4) XYXY boxes; 0 where a box is empty or not finite."""
    a = a.astype(float)[:, None]
    sides = np.minimum(a[..., 2:], b[:, 2:]) - np.maximum(a[..., :2], b[:, :2])
    overlap = sides.clip(0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[:, 2:] - b[:, :2]).prod(-1) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=(overlap > 0) & (union > 0))


def _hits(scores: np.ndarray, best: np.ndarray, difficult: np.ndarray) -> tuple:
    """Of one class's detections, by falling score: (D,) running numbers of hits and of false
    positives. ``best`` (D,) are object numbers or -1, ``difficult`` is by object number."""
    best = best[np.argsort(-scores, kind="stable")]
    taken = np.zeros(len(best), bool)
    taken[np.unique(best, return_index=True)[1]] = True  # the first detection of each object
    ignored = np.zeros(len(best), bool)
    ignored[best >= 0] = difficult[best[best >= 0]]
    hit = taken & (best >= 0) & ~ignored
    return hit.cumsum(), (~hit & ~ignored).cumsum()


def _average_precision(
    hits: np.ndarray, false: np.ndarray, count: int, eleven_points: bool = False
) -> float:
    """AP in percent from (D,) running numbers of hits and false positives, ``count`` objects."""
    if count == 0:
        return float("nan")
    precision = hits / np.maximum(hits + false, 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or a higher
    if eleven_points:  # at recalls 0, 0.1, … 1, compared as integers
        reached = [precision[hits * 10 >= tenth * count] for tenth in range(11)]
        return 100 * float(np.mean([p.max(initial=0) for p in reached]))
    return 100 * float((precision * np.diff(hits, prepend=0)).sum() / count)


def _mean(values) -> float:
    values = [value for value in values if not np.isnan(value)]
    return float(np.mean(values)) if values else float("nan")
