"""From a data set's dict to the network's input."""

import copy
import logging
import os
from typing import Dict, Sequence

import cv2
import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data.transforms import AugInput, Augmentation, AugmentationList
from detectron2.structures import Boxes, Instances

from ssd.data.augmentations import build_augmentations
from ssd.data.datasets import xyxy_boxes
from ssd.data.transforms import centers_inside

__all__ = ["SSDDatasetMapper", "read_image"]

logger = logging.getLogger(__name__)


class SSDDatasetMapper:
    """Reads, augments and resizes one image with its boxes; the ``mapper`` of a data loader.

    Returns a copy of the given dict with ``image``, a (3, H, W) uint8 tensor of the network's
    input size in the config's channel order, ``height`` and ``width`` of the original image, and
    in training ``instances``: ``gt_boxes`` XYXY in pixels of ``image`` and ``gt_classes``.

    Crowds, boxes without area or outside the image, and objects whose centre the crop has cut
    off are left out, boxes together with their classes; an image may end up without any.
    """

    @configurable
    def __init__(self, *, is_train: bool, augmentations: Sequence[Augmentation], image_format: str):
        self.is_train = is_train
        self.augmentations = AugmentationList(augmentations)
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg, is_train: bool):
        return {
            "is_train": is_train,
            "augmentations": build_augmentations(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
        }

    def __call__(self, dataset_dict: Dict) -> Dict:
        dataset_dict = copy.copy(dataset_dict)
        annotations = dataset_dict.pop("annotations", [])
        size = (dataset_dict.get("height"), dataset_dict.get("width"))
        image = read_image(dataset_dict["file_name"], self.image_format, size)
        dataset_dict["height"], dataset_dict["width"] = image.shape[:2]
        boxes, classes = _ground_truth(annotations, image.shape[:2])

        aug_input = AugInput(image, boxes=boxes)
        self.augmentations(aug_input)
        image, boxes = aug_input.image, aug_input.boxes
        dataset_dict["image"] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if self.is_train:
            keep = centers_inside(boxes, image.shape[:2])
            instances = Instances(image.shape[:2])
            instances.gt_boxes = Boxes(torch.from_numpy(boxes[keep].astype(np.float32)))
            instances.gt_boxes.clip(image.shape[:2])
            instances.gt_classes = torch.from_numpy(classes[keep])
            dataset_dict["instances"] = instances[instances.gt_boxes.nonempty()]
        return dataset_dict


def _ground_truth(annotations: Sequence[Dict], size) -> tuple:
    """(M, 4) float64 XYXY boxes inside an image of ``size`` (height, width), (M,) int64 classes."""
    annotations = [x for x in annotations if not x.get("iscrowd", 0)]
    boxes = xyxy_boxes(annotations)
    classes = np.asarray([x["category_id"] for x in annotations], dtype=np.int64)
    height, width = size
    boxes = np.clip(boxes, 0, [width, height, width, height])  # NaN stays NaN
    keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # False for NaN
    return boxes[keep], classes[keep]


def read_image(file_name: str, image_format: str = "RGB", size=(None, None)) -> np.ndarray:
    """An image file as (H, W, 3) uint8: greyscale, CMYK, palette, alpha and 16-bit are converted.

    EXIF orientation is applied, unless only the image as stored has the size that the
    annotations were made for.

    Args:
        image_format: "RGB" or "BGR".
        size: (height, width) that the annotations state, or None each.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated or no image, or has another size.
    """
    try:
        data = np.fromfile(file_name, dtype=np.uint8)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"image {file_name} does not exist; DETECTRON2_DATASETS is "
            f"{os.environ.get('DETECTRON2_DATASETS', 'unset')!r}, current folder {os.getcwd()}"
        ) from None
    if _is_truncated_jpeg(data):
        raise ValueError(f"image {file_name} is truncated ({len(data)} bytes, no end marker)")
    color = cv2.IMREAD_COLOR
    image = cv2.imdecode(data, color) if len(data) else None
    if image is None:
        raise ValueError(f"image {file_name} is empty or no readable image ({len(data)} bytes)")
    expected = tuple(size)
    if None not in expected and image.shape[:2] != expected:
        stored = cv2.imdecode(data, color | cv2.IMREAD_IGNORE_ORIENTATION)
        if stored.shape[:2] != expected:
            raise ValueError(
                f"image {file_name} is {image.shape[1]}x{image.shape[0]} pixels, but its "
                f"annotation says {expected[1]}x{expected[0]}"
            )
        image = stored
    if image_format == "RGB":
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    if image_format == "BGR":
        return image
    raise ValueError(f"INPUT.FORMAT: 'RGB' or 'BGR', got {image_format!r}")


def _is_truncated_jpeg(data: np.ndarray) -> bool:
    """Whether a JPEG has no end marker after its last scan; OpenCV would fill it with grey."""
    raw = data.tobytes()
    return raw[:2] == b"\xff\xd8" and raw.rfind(b"\xff\xd9") < raw.rfind(b"\xff\xda")
