"""COCO's and Pascal VOC's average precision on any data set that is registered."""

import contextlib
import io
import itertools
import json
import logging
import os
from typing import Optional

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from pycocotools.cocoeval import COCOeval

from ssd.data.boxes import xyxy_boxes
from ssd.data.voc import read_voc

__all__ = ["BoxEval", "COCOBoxEvaluator", "VOCEvaluator", "build_evaluator", "metric_names"]

logger = logging.getLogger(__name__)


_CELL_ELEMENTS = 2_000_000  # of an array in BoxEval: bounds its memory


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
) -> DatasetEvaluators:
    """The evaluators that ``cfg.TEST.EVALUATORS`` lists.

    Args:
        output_folder: for COCO's results; default: OUTPUT_DIR/inference/``dataset_name``.

    Raises:
        ValueError: for one that doesn't exist.
    """
    check_records(cfg, dataset_name)
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    known = {
        "coco": lambda: COCOBoxEvaluator(dataset_name, folder),
        "voc": lambda: VOCEvaluator(dataset_name),
    }
    return DatasetEvaluators([known[name]() for name in _evaluators(cfg)])


def check_records(cfg: CfgNode, dataset_name: str) -> None:
    """Checks what ``cfg.TEST.EVALUATORS`` read of each image of a data set of one's own.

    Those that DATASETS.REGISTER names and in COCO's format have it, and aren't read for this.

    Raises:
        ValueError: an evaluator that doesn't exist, an image without ``height``, ``width`` or
            ``image_id``, or two with the same.
    """
    evaluators, metadata = _evaluators(cfg), MetadataCatalog.get(dataset_name)
    from_ssd = metadata.get("registered_by") == "ssd"
    if not evaluators or from_ssd or metadata.get("json_file"):
        return
    needed = ("image_id", "height", "width") if "coco" in evaluators else ("image_id",)
    records = DatasetCatalog.get(dataset_name)
    if not isinstance(records, list):  # a torch Dataset
        return
    known = {}
    for record in records:
        where = f"data set {dataset_name!r}: {record.get('file_name')}"
        if missing := [key for key in needed if key not in record]:
            raise ValueError(f"{where} has no {', '.join(missing)}, which evaluations need")
        if (other := known.setdefault(record["image_id"], record)) is not record:
            raise ValueError(
                f"{where} and {other.get('file_name')} have the same image_id "
                f"{record['image_id']!r}; evaluations need different ones"
            )


def metric_names(cfg: CfgNode) -> list[str]:
    """What an evaluation of all test sets logs: "bbox/AP", …, with several "<data set>/bbox/AP".

    The data sets' classes must be known, as after ``check_class_count``.

    Raises:
        ValueError: for an evaluator that doesn't exist.
    """
    names = []
    datasets = list(dict.fromkeys(cfg.DATASETS.TEST))
    for dataset_name in datasets:
        prefix = f"{dataset_name}/" if len(datasets) > 1 else ""
        classes = MetadataCatalog.get(dataset_name).thing_classes
        known = {
            "coco": [
                *(f"bbox/AP{x}" for x in ("", "50", "75", "s", "m", "l")),
                *(f"bbox/{metric}-{x}" for metric in ("AP", "AP50") for x in classes),
            ],
            "voc": ["voc/mAP", "voc/mAP_11point", *(f"voc/AP-{x}" for x in classes)],
        }
        names += [prefix + name for evaluator in _evaluators(cfg) for name in known[evaluator]]
    return names


def _evaluators(cfg: CfgNode) -> list[str]:
    for name in cfg.TEST.EVALUATORS:
        if name not in ("coco", "voc"):
            raise ValueError(f"TEST.EVALUATORS names {name!r}; it may list 'coco' and 'voc'")
    return list(dict.fromkeys(cfg.TEST.EVALUATORS))


class COCOBoxEvaluator(COCOEvaluator):
    """Detectron2's COCOEvaluator for boxes, by :class:`BoxEval`, plus ``AP50-<class>``.

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
            use_fast_impl=False,
            allow_cached_coco=not comm.is_main_process(),  # which alone evaluates
        )
        if not in_coco_format:
            del metadata.json_file  # of the conversion; the next evaluator would reuse it
        for annotation in self._coco_api.anns.values():
            annotation.setdefault("iscrowd", 0)
            annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])

    def _eval_predictions(self, predictions, img_ids=None):
        results = [result for image in predictions for result in image["instances"]]
        labels = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if labels:
            category_ids = {label: category_id for category_id, label in labels.items()}
            for result in results:
                result["category_id"] = category_ids[result["category_id"]]
        path = os.path.join(self._output_dir, "coco_instances_results.json")
        with PathManager.open(path, "w") as file:
            file.write(json.dumps(results))
        if not self._do_evaluation:
            logger.info(f"{path} is written; without annotations there is nothing to evaluate")
            return
        evaluated = {image["image_id"] for image in predictions}
        if img_ids is None and len(evaluated) < len(self._coco_api.imgs):
            logger.warning(
                f"{len(evaluated)} of the annotations' {len(self._coco_api.imgs)} images were "
                "evaluated: the objects of the others count as missed"
            )
        coco_eval = None
        if results:
            logger.info(f"Evaluating {len(results)} detections with ssd.evaluation's BoxEval")
            with contextlib.redirect_stdout(io.StringIO()):
                detections = self._coco_api.loadRes(results)
            coco_eval = BoxEval(self._coco_api, detections, "bbox")
            if img_ids is not None:
                coco_eval.params.imgIds = img_ids
            coco_eval.evaluate()
            coco_eval.accumulate()
            with contextlib.redirect_stdout(io.StringIO()) as table:
                coco_eval.summarize()
            logger.info("COCO's metrics:\n%s", table.getvalue().rstrip())
        names = self._metadata.get("thing_classes")
        self._results["bbox"] = self._derive_coco_results(coco_eval, "bbox", class_names=names)

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        labels = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if coco_eval is not None and class_names and labels:
            class_names = [class_names[labels[i]] for i in coco_eval.params.catIds]
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if coco_eval is not None and class_names:
            results.setdefault(f"AP-{class_names[0]}", results["AP"])  # left out for a single one
            # (IoU, recall, class, area range, detections per image); -1: no ground truth
            precision = coco_eval.eval["precision"][0, :, :, 0, -1]
            for label, name in enumerate(class_names):
                known = precision[:, label] > -1
                ap50 = precision[known, label].mean() * 100 if known.any() else float("nan")
                results[f"AP50-{name}"] = float(ap50)
        return results


class BoxEval(COCOeval):
    """pycocotools' COCOeval of boxes per class, on arrays: equal ``eval`` and ``stats``, no
    ``evalImgs``.

    A (image, class) with objects is a cell. The detections of all cells that have the same rank
    find their objects at once, for T IoU thresholds and A area ranges. Of equal scores the earlier
    image and the earlier detection come first; of equal IoUs the later object is taken. An object
    with id 0, where some tools' files begin, counts like any other: pycocotools never finds it.
    """

    def evaluate(self):
        p = self.params
        p.imgIds, p.catIds = list(np.unique(p.imgIds)), list(np.unique(p.catIds))
        p.maxDets = sorted(p.maxDets)
        truth, found = self._columns(self.cocoGt, False), self._columns(self.cocoDt, True)
        found["rank"] = _rank(found["cell"])
        found = {key: column[found["rank"] < p.maxDets[-1]] for key, column in found.items()}
        low, high = np.array(p.areaRng, float).T
        area = truth["area"][:, None]
        truth["ignored"] = truth["crowd"][:, None] | (area < low) | (area > high)  # (G, A)
        area = found["area"][:, None]
        outside = (area < low) | (area > high)  # (D, A)
        hit, ignored = self._match(truth, found)  # (D, A, T)
        ignored |= ~hit & outside[:, :, None]
        self._truth, self._found, self._hit, self._ignored = truth, found, hit, ignored

    def _columns(self, coco, scored: bool) -> dict[str, np.ndarray]:
        """The annotations as arrays, by class and image, and by falling score if ``scored``."""
        images = {image: i for i, image in enumerate(self.params.imgIds)}
        classes = {category: i for i, category in enumerate(self.params.catIds)}
        rows = [
            (classes[a["category_id"]], images[a["image_id"]], a["score"] if scored else 0,
             a["area"], bool(a.get("iscrowd")), *a["bbox"])
            for a in coco.dataset["annotations"]
            if a["image_id"] in images and a["category_id"] in classes
        ]  # fmt: skip
        table = np.array(rows, float).reshape(-1, 9)
        cell = (table[:, 0] * len(images) + table[:, 1]).astype(int)
        order = np.lexsort((-table[:, 2], cell))
        table, cell = table[order], cell[order]
        return {
            "cell": cell, "class": table[:, 0].astype(int), "score": table[:, 2],
            "area": table[:, 3], "crowd": table[:, 4].astype(bool), "box": table[:, 5:],
        }  # fmt: skip

    def _match(self, truth: dict, found: dict) -> tuple[np.ndarray, np.ndarray]:
        """(D, A, T) which detections find an object, and which of those one that is ignored."""
        p = self.params
        shape = len(found["cell"]), len(p.areaRng), len(p.iouThrs)
        hit, ignored = np.zeros(shape, bool), np.zeros(shape, bool)
        cells, first, count = np.unique(truth["cell"], return_index=True, return_counts=True)
        start, stop = (np.searchsorted(found["cell"], cells, side) for side in ("left", "right"))
        width = 2 ** np.ceil(np.log2(count)).astype(int)  # similar numbers of objects together
        order = np.lexsort((start - stop, width))  # in a part the cells with most detections first
        order = order[(stop > start)[order]]
        for part in np.split(order, np.flatnonzero(np.diff(width[order])) + 1):
            size = max(1, _CELL_ELEMENTS // (shape[1] * shape[2] * width[part[:1]].max(initial=1)))
            for chunk in np.array_split(part, len(part) // size + 1):
                index = first[chunk, None] + np.arange(count[chunk].max(initial=0))
                index[np.arange(index.shape[1]) >= count[chunk, None]] = -1  # there is none
                self._match_cells(truth, found, index, start[chunk], stop[chunk], hit, ignored)
        return hit, ignored

    def _match_cells(self, truth, found, index, start, stop, hit, ignored) -> None:
        """Of B cells: the indices of their objects (B, G), -1 for none, and of the first detection
        and that after the last (B,), most detections first. Fills ``hit`` and ``ignored``."""
        thresholds = np.minimum(self.params.iouThrs, 1 - 1e-10)[:, None]
        crowd = truth["crowd"][index][:, None, None]  # (B, A, T, G)
        ignore = truth["ignored"][index].swapaxes(1, 2)[:, :, None]
        free = np.ones((len(index), ignore.shape[1], len(thresholds), index.shape[1]), bool)
        for rank in range((stop - start).max(initial=0)):
            n = int((stop - start > rank).sum())
            det = start[:n] + rank
            iou = _coco_iou(found["box"][det, None], truth["box"][index[:n]], crowd[:n, 0, 0])
            iou = np.where(index[:n] < 0, -1, iou)[:, None, None]
            able = (free[:n] | crowd[:n]) & (iou >= thresholds)
            wanted = able & ~ignore[:n]
            able = np.where(wanted.any(-1, keepdims=True), wanted, able)
            # of equal ones the last
            best = able.shape[-1] - 1 - np.where(able, iou, -1)[..., ::-1].argmax(-1)[..., None]
            some = able.any(-1)
            free_best = np.take_along_axis(free[:n], best, -1) & ~some[..., None]
            np.put_along_axis(free[:n], best, free_best, -1)
            of_ignored = np.broadcast_to(ignore[:n], able.shape)
            of_ignored = np.take_along_axis(of_ignored, best, -1)[..., 0]
            hit[det], ignored[det] = some, some & of_ignored

    def accumulate(self):
        p = self.params
        counts = [len(x) for x in (p.iouThrs, p.recThrs, p.catIds, p.areaRng, p.maxDets)]
        precision, scores = -np.ones(counts), -np.ones(counts)
        recall = -np.ones(counts[:1] + counts[2:])
        classes, score, rank = (self._found[key] for key in ("class", "score", "rank"))
        for k in range(len(p.catIds)):
            positives = (~self._truth["ignored"][self._truth["class"] == k]).sum(0)  # (A,)
            of_class = slice(*np.searchsorted(classes, [k, k + 1]))
            order = of_class.start + np.argsort(-score[of_class], kind="stable")
            for m, most in enumerate(p.maxDets):
                chosen = order[rank[order] < most]
                hit, counted = self._hit[chosen], ~self._ignored[chosen]
                for a in np.flatnonzero(positives):
                    found = (hit[:, a] & counted[:, a]).T.cumsum(1).astype(float)  # (T, D)
                    false = (~hit[:, a] & counted[:, a]).T.cumsum(1).astype(float)
                    curve = found / (false + found + np.spacing(1))
                    curve = np.maximum.accumulate(curve[:, ::-1], 1)[:, ::-1]
                    reached = found / positives[a]
                    recall[:, k, a, m] = reached[:, -1] if len(chosen) else 0
                    for t in range(counts[0]):
                        at = np.searchsorted(reached[t], p.recThrs, side="left")
                        at = at[at < len(chosen)]
                        precision[t, :, k, a, m] = scores[t, :, k, a, m] = 0
                        precision[t, : len(at), k, a, m] = curve[t, at]
                        scores[t, : len(at), k, a, m] = score[chosen[at]]
        self.eval = {
            "params": p, "counts": counts, "precision": precision, "recall": recall,
            "scores": scores,
        }  # fmt: skip


def _rank(cell: np.ndarray) -> np.ndarray:
    """(D,) of sorted numbers: how many before each are equal to it."""
    return np.arange(len(cell)) - np.searchsorted(cell, cell, "left")


def _coco_iou(a: np.ndarray, b: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(…) IoU of (…, 4) XYWH boxes; over the area of ``a`` alone where ``b`` is a crowd."""
    sides = np.minimum(a[..., 2:] + a[..., :2], b[..., 2:] + b[..., :2])
    sides = (sides - np.maximum(a[..., :2], b[..., :2])).clip(0)
    overlap, area = sides[..., 0] * sides[..., 1], a[..., 2] * a[..., 3]
    union = np.where(crowd, area, area + b[..., 2] * b[..., 3] - overlap)
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=overlap > 0)


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
