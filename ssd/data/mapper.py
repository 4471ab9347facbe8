"""From a data set's dict to the network's input."""

import copy
import logging
import os
import re
from typing import Dict, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data.transforms import Augmentation
from detectron2.structures import Boxes, Instances
from detectron2.utils.file_io import PathManager
from fvcore.transforms.transform import Transform

from ssd.data.augmentations import ImageSize, build_augmentation
from ssd.data.boxes import xyxy_boxes
from ssd.data.files import datasets_folder_text
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
    def __init__(
        self,
        *,
        is_train: bool,
        augmentation: Augmentation,
        image_format: str,
        reduced_decoding: bool = False,
    ):
        """
        Args:
            augmentation: is drawn before the image is read: asks for no pixels, only for the size
                of ``image`` and for ``boxes``, and returns a warp.
            image_format: "RGB" or "BGR".
            reduced_decoding: decode JPEGs at a reduced scale where the warp shrinks them.
        """
        self.is_train = is_train
        self.augmentation = augmentation
        self.image_format = image_format
        self.reduced_decoding = reduced_decoding

    @classmethod
    def from_config(cls, cfg, is_train: bool):
        return {
            "is_train": is_train,
            "augmentation": build_augmentation(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
            "reduced_decoding": is_train and cfg.INPUT.REDUCED_DECODING,
        }

    def __call__(self, dataset_dict: Dict) -> Dict:
        return self.load(*self.draw(dataset_dict))

    def draw(self, dataset_dict: Dict) -> Tuple[Dict, Transform]:
        """All that is random: the sample without its image, and the transform for that."""
        dataset_dict = copy.copy(dataset_dict)
        annotations = dataset_dict.pop("annotations", [])
        size = (dataset_dict.get("height"), dataset_dict.get("width"))
        if not all(size):  # not in the annotations; read_image refuses 0
            size = read_image(dataset_dict["file_name"], self.image_format, size).shape[:2]
            dataset_dict["height"], dataset_dict["width"] = size
        boxes, classes = _ground_truth(annotations, size)
        aug_input = ImageSize(size, boxes)
        transform = self.augmentation(aug_input)
        if self.is_train:
            height, width = size = aug_input.image.shape[:2]
            boxes = aug_input.boxes
            keep = centers_inside(boxes, size)
            boxes = boxes.clip(0, (width, height, width, height)).astype(np.float32)
            keep &= _has_area(boxes)
            instances = Instances(size)
            instances.gt_boxes = Boxes(torch.from_numpy(boxes[keep]))
            instances.gt_classes = torch.from_numpy(classes[keep])
            dataset_dict["instances"] = instances
        return dataset_dict, transform

    def load(self, dataset_dict: Dict, transform: Transform) -> Dict:
        """What :meth:`draw` returned → the sample: reads and transforms the image."""
        size = (dataset_dict["height"], dataset_dict["width"])
        reduction = transform.reduction if self.reduced_decoding else 1
        image = read_image(dataset_dict["file_name"], self.image_format, size, reduction)
        if image.shape[:2] != size:
            transform = transform.reduced(reduction)
        image = transform.apply_image(image)
        planes = np.empty((3, *image.shape[:2]), np.uint8)
        cv2.split(image, list(planes))  # writes into them
        dataset_dict["image"] = torch.from_numpy(planes)
        return dataset_dict


def _ground_truth(annotations: Sequence[Dict], size) -> tuple:
    """(M, 4) float64 XYXY boxes inside an image of ``size`` (height, width), (M,) int64 classes."""
    annotations = [x for x in annotations if not x.get("iscrowd", 0)]
    boxes = xyxy_boxes(annotations)
    classes = np.asarray([x["category_id"] for x in annotations], dtype=np.int64)
    height, width = size
    finite = np.isfinite(boxes).all(axis=1)
    boxes = np.clip(boxes, 0, [width, height, width, height])
    keep = finite & _has_area(boxes)
    return boxes[keep], classes[keep]


def _has_area(boxes: np.ndarray) -> np.ndarray:
    # what rounding leaves of a box at the edge would have logarithms without bound
    return (boxes[:, 2:] - boxes[:, :2] > 1e-3).all(axis=1)


def read_image(
    file_name: str, image_format: str = "RGB", size=(None, None), reduction: int = 1
) -> np.ndarray:
    """An image file as (H, W, 3) uint8: greyscale, CMYK, palette, alpha and 16-bit are converted.

    EXIF orientation is applied, unless only the image as stored has the size that the
    annotations were made for.

    Args:
        image_format: "RGB" or "BGR".
        size: (height, width) that the annotations state, or None each.
        reduction: 2, 4 or 8 decodes a JPEG of that ``size`` at a fraction of it, rounded up, which
            is faster: each pixel is the mean of reduction² ones. All others are read in full, as
            are those with EXIF data whose sides aren't multiples of it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated or no image, or has another size.
    """
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"INPUT.FORMAT: 'RGB' or 'BGR', got {image_format!r}")
    try:
        reader = PathManager.open if "://" in str(file_name) else open
        with reader(file_name, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"image {file_name} does not exist; {datasets_folder_text()}, "
            f"current folder {os.getcwd()}"
        ) from None
    if _is_truncated_jpeg(data):
        raise ValueError(f"image {file_name} is truncated ({len(data)} bytes, no end marker)")
    rgb, expected = image_format == "RGB", tuple(size)
    reducible = reduction > 1 and None not in expected and data.startswith(_JPEG)
    if reducible and b"Exif" in data[:4096]:  # turned by it, incomplete pixels could come first
        reducible = all(side % reduction == 0 for side in expected)
    if reducible:
        image = _decode(data, rgb, _REDUCTIONS[reduction])
        if image is not None and image.shape[:2] == tuple(-(-v // reduction) for v in expected):
            return image
    image = _decode(data, rgb)
    if image is None:
        raise ValueError(f"image {file_name} is empty or no readable image ({len(data)} bytes)")
    if None not in expected and image.shape[:2] != expected:
        stored = _decode(data, rgb, cv2.IMREAD_IGNORE_ORIENTATION)
        if stored.shape[:2] != expected:
            raise ValueError(
                f"image {file_name} is {image.shape[1]}x{image.shape[0]} pixels, but its "
                f"annotation says {expected[1]}x{expected[0]}"
            )
        image = stored
    return image


_JPEG = b"\xff\xd8"  # how such files begin
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)  # but those within a scan
_REDUCTIONS = {  # with a colour flag their "grayscale" doesn't hold
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


def _decode(data: bytes, rgb: bool, flags: int = 0) -> Optional[np.ndarray]:
    if not data:
        return None
    color = getattr(cv2, "IMREAD_COLOR_RGB", None) if rgb else cv2.IMREAD_COLOR
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags | (color or cv2.IMREAD_COLOR))
    if color or image is None:
        return image
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)  # OpenCV before 4.11


def _is_truncated_jpeg(data: bytes) -> bool:
    """Whether a JPEG has no end marker after its scans; OpenCV would fill it with grey."""
    last = max(data.rfind(b"\xff\xd9"), 0)
    if not data.startswith(_JPEG) or data.find(b"\xff\xda", last) < 0:
        return False
    # or what looks like a scan is in data that follows the image, such as a telephone's video
    at = len(_JPEG)
    while marker := _JPEG_MARKER.search(data, at):
        if marker[1] == b"\xd9":
            return False
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return True
