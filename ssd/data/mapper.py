"""From a data set's dict to the network's input."""

import copy
from typing import Dict, Sequence, Tuple

import cv2
import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data.transforms import Augmentation
from detectron2.structures import Boxes, Instances
from fvcore.transforms.transform import Transform

from ssd.data.augmentations import ImageSize, build_augmentation
from ssd.data.boxes import xyxy_boxes
from ssd.data.files import read_image
from ssd.data.transforms import centers_inside

__all__ = ["SSDDatasetMapper", "read_image"]


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
