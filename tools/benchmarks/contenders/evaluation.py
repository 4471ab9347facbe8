"""COCO's evaluation of given detections."""

from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np
import torch

from benchmarks.contenders.base import Contender
from benchmarks.inputs import SIZE
from benchmarks.machine import Work


def detections(folder: Path) -> Tuple[List[Dict], List[Dict]]:
    """Inputs and outputs of a detector for the synthetic images of ``eval``."""
    from detectron2.structures import Boxes, Instances

    inputs, outputs = [], []
    with np.load(folder / "eval.npz") as file:
        values = torch.from_numpy(file["arr_0"])
    for number, x in enumerate(values):
        instances = Instances(SIZE, pred_boxes=Boxes(x[:, :4]), scores=x[:, 4])
        instances.pred_classes = x[:, 5].long()
        inputs.append({"image_id": number, "file_name": f"{number}.jpg"})
        outputs.append({"instances": instances})
    return inputs, outputs


def register_evaluation(folder: Path) -> None:
    """As "eval" in Detectron2's catalogs."""
    from detectron2.data.datasets import register_coco_instances

    register_coco_instances("eval", {}, str(folder / "eval.json"), "")


def evaluate_with(evaluator, folder: Path) -> Work:
    """Detectron2's protocol: 8 images at a time, then the results."""
    inputs, outputs = detections(folder)
    results = {}

    def run():
        evaluator.reset()
        for i in range(0, len(inputs), 8):
            evaluator.process(inputs[i : i + 8], outputs[i : i + 8])
        results.update(evaluator.evaluate()["bbox"])

    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    return Work(run, len(inputs), lambda: {name: float(results[name]) for name in names})


class Pycocotools(Contender):
    """pycocotools from the same detections, without what Detectron2 adds."""

    def eval(self) -> Work:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        truth = COCO(str(self.folder / "eval.json"))
        inputs, outputs = detections(self.folder)
        stats = []

        def run():
            found = []
            for record, output in zip(inputs, outputs):
                instances = output["instances"]
                boxes = instances.pred_boxes.tensor.clone()
                boxes[:, 2:] -= boxes[:, :2]
                fields = boxes, instances.scores, instances.pred_classes
                found += [
                    {
                        "image_id": record["image_id"], "bbox": box, "score": score,
                        "category_id": label + 1,
                    }
                    for box, score, label in zip(*(x.tolist() for x in fields))
                ]  # fmt: skip
            evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            stats[:] = evaluation.stats[:6]

        names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        return Work(
            run, len(inputs), lambda: {name: 100 * float(x) for name, x in zip(names, stats)}
        )


class Detectron2(Contender):
    """Detectron2's evaluator with its compiled COCOeval_opt."""

    def eval(self) -> Work:
        from detectron2.data import DatasetCatalog
        from detectron2.evaluation import COCOEvaluator

        register_evaluation(self.folder)
        DatasetCatalog.get("eval")  # the ids of its classes are known once it has been read
        evaluator = COCOEvaluator(
            "eval", ("bbox",), output_dir=str(self.folder / "detectron2"), use_fast_impl=True
        )
        return evaluate_with(evaluator, self.folder)
