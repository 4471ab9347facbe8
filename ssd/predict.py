"""Detections of photographs and videos, drawn, listed and saved.

With published weights (names: ``ssd.model_zoo``)::

    python -m ssd.predict ssdlite_mobilenetv3_coco_torchvision photograph.jpg --output pictures

``tools/demo.py`` has more options, and takes a lab's config.
"""

import argparse
import collections
import csv
import glob
import itertools
import json
import logging
import os
import re
import sys
from typing import Dict, Iterable, Iterator, List, Sequence, Tuple

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, Metadata
from detectron2.structures import Instances

from ssd import model_zoo
from ssd.data.files import IMAGE_EXTENSIONS, read_image
from ssd.drawing import class_name, draw_instances, write_image
from ssd.predictor import Predictor

__all__ = [
    "batches",
    "can_show",
    "find_images",
    "image_ids",
    "output_paths",
    "prepare_file",
    "print_any_name",
    "read_images",
    "save_records",
    "table",
    "to_records",
]

logger = logging.getLogger(__name__)

_COLUMNS = ["image_id", "file_name", "category", "score", "x1", "y1", "x2", "y2"]


def find_images(inputs: Sequence[str]) -> List[str]:
    """Paths of image files, each once.

    Args:
        inputs: each a file; a folder, of which the image files are taken by name, not those of
            its folders; or a glob pattern such as ``photos/**/*.jpg``. One that matches nothing is
            logged.
    """
    paths = []
    for name in map(os.path.expanduser, inputs):
        if os.path.isdir(name):
            found = [os.path.join(name, x) for x in sorted(os.listdir(name))]
            found = [x for x in found if x.lower().endswith(IMAGE_EXTENSIONS)]
        elif os.path.exists(name) or not glob.has_magic(name):
            found = [name]  # if it isn't there, reading it says so
        else:
            found = sorted(x for x in glob.glob(name, recursive=True) if os.path.isfile(x))
        if not found:
            logger.warning("%s: no image", name)
        paths += found
    return list({os.path.abspath(path): path for path in paths}.values())


def read_images(paths: Iterable[str]) -> Iterator[Tuple[str, np.ndarray]]:
    """(path, image) of those files that can be read, the others are logged.

    Images are (H, W, 3) uint8 BGR, turned as EXIF says.
    """
    for path in paths:
        try:
            yield path, read_image(path, "BGR")
        except (OSError, ValueError) as error:
            logger.warning("Left out: %s", error)


def batches(items: Iterable, size: int) -> Iterator[List]:
    """Lists of ``size`` items, the last may be shorter."""
    iterator = iter(items)
    return iter(lambda: list(itertools.islice(iterator, size)), [])


def to_records(instances: Instances, file_name: str, image_id, metadata: Metadata) -> List[Dict]:
    """COCO's result format: ``image_id``, ``category_id``, ``bbox`` (XYWH in pixels) and ``score``
    of each detection, plus ``file_name`` and ``category``.

    As COCOEvaluator writes them, category ids are those of the data set's JSON, or else the
    classes from 0.
    """
    labels = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    category_ids = {label: category_id for category_id, label in labels.items()}
    boxes = instances.pred_boxes.tensor.clone()
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {
            "image_id": image_id,
            "category_id": category_ids.get(label, label),
            "bbox": box,
            "score": score,
            "file_name": file_name,
            "category": class_name(metadata, label),
        }
        for box, score, label in zip(
            boxes.tolist(), instances.scores.tolist(), instances.pred_classes.tolist()
        )
    ]


def image_ids(paths: Sequence[str], metadata: Metadata) -> Dict[str, object]:
    """``image_id`` by path: that of ``metadata``'s data set for its images, else the file's name
    without its extension; images that share one have their paths instead."""
    stems = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    count = collections.Counter(stems)
    names = {p: stem if count[stem] == 1 else p for p, stem in zip(paths, stems)}
    return {**names, **_known_image_ids(paths, metadata)}


def _known_image_ids(paths: Sequence[str], metadata: Metadata) -> Dict[str, object]:
    root = metadata.get("image_root") or metadata.get("dirname")  # the latter is VOC's
    files = {os.path.abspath(path): path for path in paths}
    if not (root and any(x.startswith(os.path.abspath(root) + os.sep) for x in files)):
        return {}
    try:
        records = DatasetCatalog.get(metadata.name)
    except FileNotFoundError as error:  # images without their annotations
        logger.warning("image_id is the file's name: %s", error)
        return {}
    records = [(os.path.abspath(x["file_name"]), x["image_id"]) for x in records]
    return {files[path]: image_id for path, image_id in records if path in files}


def save_records(path: str, records: Sequence[Dict]) -> None:
    """Writes records of :func:`to_records`: as they are to FILE.json; to FILE.csv a line for each,
    with the box as x1, y1, x2, y2.

    Raises:
        ValueError: for another extension.
    """
    prepare_file(path)
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        if path.endswith(".json"):
            json.dump(records, file)
            return
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for record in records:
            x, y, width, height = record["bbox"]
            box = [round(value, 2) for value in (x, y, x + width, y + height)]
            values = [record[key] for key in _COLUMNS[:3]]
            writer.writerow([*values, f"{record['score']:.4f}", *box])


def prepare_file(path: str) -> None:
    """Makes the folder of a file for :func:`save_records`, before there is anything to lose.

    Raises:
        OSError: the file can't be written.
        ValueError: for another extension.
    """
    if os.path.splitext(path)[1] not in (".json", ".csv"):
        raise ValueError(f"detections are saved to FILE.json or FILE.csv, got {path!r}")
    if os.path.dirname(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    existed = os.path.exists(path)
    with open(path, "a"):
        pass
    if not existed:
        os.remove(path)


def table(records: Sequence[Dict]) -> str:
    """A line for each detection: score, box as x1, y1, x2, y2 in pixels, class; "" without any."""
    lines = ["  score     x1     y1     x2     y2  class\n"] if records else []
    for record in records:
        x, y, width, height = record["bbox"]
        numbers = "".join(f"{value:7.0f}" for value in (x, y, x + width, y + height))
        lines.append(f"  {record['score']:5.2f}{numbers}  {record['category']}\n")
    return "".join(lines)


def output_paths(paths: Sequence[str], output: str) -> Dict[str, str]:
    """Where the pictures of images go.

    Args:
        output: a file, for a single image; or a folder, which is made if needed: the pictures get
            the images' names, below the folder that all images have in common.

    Raises:
        ValueError: several images and one file, or a picture would overwrite one of the images.
    """
    is_file = output.lower().endswith(IMAGE_EXTENSIONS) and not os.path.isdir(output)
    if is_file and len(paths) > 1:
        raise ValueError(f"--output {output} is a file, but there are {len(paths)} images")
    files = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(x) for x in files]) if files else ""
    images = {os.path.realpath(path): path for path in paths}
    result = {}
    for path, file in zip(paths, files):
        result[path] = output if is_file else os.path.join(output, os.path.relpath(file, common))
        if image := images.get(os.path.realpath(result[path])):
            raise ValueError(f"--output {output} would overwrite the image {image}")
    return result


def print_any_name() -> None:
    """Lets files' names be printed that aren't UTF-8."""
    if hasattr(sys.stdout, "reconfigure"):  # not in notebooks
        sys.stdout.reconfigure(errors="backslashreplace")


def can_show() -> bool:
    """Whether windows can be shown: without a display OpenCV would end the program."""
    has_display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not has_display:
        return False
    return not re.search(r"GUI: +NONE", cv2.getBuildInformation())  # opencv-python-headless


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ssd.predict", description="Detections of published weights."
    )
    parser.add_argument("name", help="of published weights, or of a lab that has some")
    parser.add_argument("images", nargs="+", help="files, folders or glob patterns")
    parser.add_argument("--output", help="a file or folder for pictures")
    parser.add_argument("--confidence-threshold", type=float, default=0.5)
    args = parser.parse_args(argv)
    print_any_name()
    paths = find_images(args.images)
    pictures = output_paths(paths, args.output) if args.output else {}
    opts = ["MODEL.SSD.SCORE_THRESH_TEST", args.confidence_threshold]
    predictor = Predictor(model_zoo.get_config(args.name, trained=True, opts=opts))
    count = 0
    for path, image in read_images(paths):
        count += 1
        instances = predictor(image)["instances"].to("cpu")
        print(f"{path}: {len(instances)} detections")
        print(table(to_records(instances, path, path, predictor.metadata)), end="")
        if path in pictures:
            write_image(pictures[path], draw_instances(image, instances, predictor.metadata))
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
