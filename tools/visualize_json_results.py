#!/usr/bin/env python
"""Draws an evaluation's detections beside the ground truth, for each image of the data set.

In a lab::

    python ../../tools/visualize_json_results.py --config-file config.yaml --output pictures \\
        --input output/inference/shapes_val/coco_instances_results.json
"""

import argparse
import json
from collections import defaultdict

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

from ssd import load_config
from ssd.data.boxes import xyxy_boxes
from ssd.data.mapper import read_image
from ssd.drawing import draw_boxes, write_image
from ssd.predict import output_paths

_SIDE = 480  # of each half, at least, in pixels


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="coco_instances_results.json, or what tools/demo.py --save-detections wrote",
    )
    parser.add_argument("--output", required=True, help="folder for the pictures")
    parser.add_argument(
        "--config-file", metavar="FILE", help="the lab's, which registers its data sets"
    )
    parser.add_argument("--dataset", help="its name; default: the first of DATASETS.TEST")
    parser.add_argument("--conf-threshold", type=float, default=0.5, help="least score drawn")
    return parser


def read_predictions(path: str, dataset: str, records, metadata) -> dict:
    """{image_id: detections}; ``label`` is the class from 0.

    Raises:
        ValueError: the file isn't a list of detections, or they aren't of this data set.
    """
    with open(path, encoding="utf-8") as file:
        predictions = json.load(file)
    keys = {"image_id", "category_id", "bbox", "score"}
    if not isinstance(predictions, list) or not all(keys <= set(x) for x in predictions):
        raise ValueError(f"--input {path} must be a list of detections with {sorted(keys)}")
    labels = metadata.get("thing_dataset_id_to_contiguous_id")
    labels = labels or {i: i for i in range(len(metadata.thing_classes))}
    known = {record["image_id"] for record in records}
    result = defaultdict(list)
    for prediction in predictions:
        image_id, category_id = prediction["image_id"], prediction["category_id"]
        if image_id not in known or category_id not in labels:
            raise ValueError(
                f"--input {path} has a detection of image {image_id!r} and category "
                f"{category_id!r}; the categories of {dataset} are {list(labels)}, its images "
                f"{sorted(known, key=str)[:3]} … : is --dataset the one that was evaluated?"
            )
        result[image_id].append({**prediction, "label": labels[category_id]})
    return result


def draw(record, predictions, names) -> np.ndarray:
    """The image twice, BGR: detections on the left, ground truth on the right."""
    image = read_image(record["file_name"], "RGB", (record["height"], record["width"]))
    scale = max(_SIDE / max(image.shape[:2]), 1)
    boxes = np.array([x["bbox"] for x in predictions], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = [f"{names[x['label']]} {x['score']:.0%}" for x in predictions]
    found = draw_boxes(image, boxes, [x["label"] for x in predictions], labels, scale)

    objects = record.get("annotations", [])
    labels = [names[x["category_id"]] + " (crowd)" * x.get("iscrowd", 0) for x in objects]
    classes = [x["category_id"] for x in objects]
    truth = draw_boxes(image, xyxy_boxes(objects), classes, labels, scale)
    halves = _with_title(found, "detections"), _with_title(truth, "ground truth")
    return np.hstack([halves[0], np.full_like(halves[0][:, :8], 255), halves[1]])[:, :, ::-1]


def _with_title(picture: np.ndarray, title: str) -> np.ndarray:
    strip = np.full((28, picture.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, title, (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([strip, picture])


def main(argv=None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    cfg = load_config(args.config_file)
    dataset = args.dataset or next(iter(cfg.DATASETS.TEST), None)
    if dataset is None:
        parser.error("--dataset NAME, or --config-file of a lab with DATASETS.TEST, is needed")
    if dataset not in DatasetCatalog:
        parser.error(
            f"--dataset {dataset!r} is neither in DATASETS.REGISTER of --config-file nor known to "
            "Detectron2"
        )
    records, metadata = DatasetCatalog.get(dataset), MetadataCatalog.get(dataset)
    predictions = read_predictions(args.input, dataset, records, metadata)
    paths = output_paths([record["file_name"] for record in records], args.output)
    for record in tqdm(records, unit="image"):
        found = [x for x in predictions[record["image_id"]] if x["score"] >= args.conf_threshold]
        picture = draw(record, found, metadata.thing_classes)
        write_image(paths[record["file_name"]], picture)
    print(f"{len(records)} pictures in {args.output}")


if __name__ == "__main__":
    main()
