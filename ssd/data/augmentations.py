"""What the SSD augmentation draws (paper, 2.2 "Data augmentation" and 3.6).

Detectron2 Augmentations: each draws the parameters of one transform from ``np.random`` and never
changes a pixel itself. Boxes are (M, 4) XYXY in pixels of the image, sizes (height, width).
"""

import logging
from typing import Optional, Sequence, Tuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.transforms import AugInput, Augmentation, RandomFlip
from detectron2.utils.logger import log_first_n
from fvcore.transforms.transform import HFlipTransform, NoOpTransform, Transform, VFlipTransform

from ssd.checks import check_choice, check_number, check_positive, check_range
from ssd.data.transforms import (
    PhotometricTransform,
    PhotometricWarp,
    TorchvisionPhotometricTransform,
    WarpTransform,
)

__all__ = [
    "ComposedWarp",
    "Expand",
    "ImageSize",
    "IoUCrop",
    "PhotometricDistortion",
    "Resize",
    "build_augmentation",
]


def build_augmentation(cfg: CfgNode, is_train: bool) -> Augmentation:
    """The augmentation of ``cfg.INPUT``, a :class:`ComposedWarp`; for testing a resize."""
    resize = Resize(cfg.MODEL.SSD.INPUT_SIZE)
    if not is_train:
        return resize
    augmentations = []
    photo, expand, crop = cfg.INPUT.PHOTOMETRIC, cfg.INPUT.EXPAND, cfg.INPUT.IOU_CROP
    if expand.ENABLED:
        fill = tuple(int(round(value)) for value in cfg.MODEL.PIXEL_MEAN)
        augmentations.append(Expand(expand.PROB, expand.MAX_RATIO, fill))
    if crop.ENABLED:
        augmentations.append(
            IoUCrop(
                crop.MIN_IOUS,
                crop.SCALE,
                crop.ASPECT_RATIO,
                crop.TRIALS,
                crop.SAMPLER,
                crop.OBJECTS,
            )
        )
    augmentations.append(resize)
    flip = cfg.INPUT.RANDOM_FLIP
    check_choice("INPUT.RANDOM_FLIP", flip, ("none", "horizontal", "vertical"))
    if flip != "none":
        augmentations.append(
            RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")
        )
    if photo.ENABLED:
        distortion = PhotometricDistortion(
            photo.PROB,
            photo.BRIGHTNESS,
            photo.CONTRAST,
            photo.SATURATION,
            photo.HUE,
            photo.SWAP_CHANNELS_PROB,
            cfg.INPUT.FORMAT,
            photo.STYLE,
        )
        augmentations.insert(len(augmentations) if photo.LAST else 0, distortion)
    return ComposedWarp(augmentations)


class PhotometricDistortion(Augmentation):
    """Draws a :class:`PhotometricTransform`: brightness, contrast, saturation and hue.

    Each of the four is drawn uniformly with probability ``prob``, contrast comes before or after
    the colour operations with equal probability. With ``style`` "torchvision" the transform is a
    :class:`TorchvisionPhotometricTransform`.
    """

    def __init__(
        self,
        prob: float = 0.5,
        brightness: float = 32.0,
        contrast: Tuple[float, float] = (0.5, 1.5),
        saturation: Tuple[float, float] = (0.5, 1.5),
        hue: float = 18.0,
        swap_channels_prob: float = 0.0,
        image_format: str = "BGR",
        style: str = "caffe",
    ):
        """
        Args:
            prob: of each operation.
            brightness: in levels of 0 … 255, drawn from ±brightness; with ``style``
                "torchvision" a factor drawn from 1 ± brightness.
            contrast, saturation: (lowest, highest) factor.
            hue: in OpenCV's 8-bit unit of 2 degrees, drawn from ±hue.
            swap_channels_prob: of a random order of the channels.
            image_format: "BGR" or "RGB".
            style: "caffe" or "torchvision", whose formulas differ.
        """
        super().__init__()
        check_number("INPUT.PHOTOMETRIC.PROB", prob, highest=1)
        check_number("INPUT.PHOTOMETRIC.SWAP_CHANNELS_PROB", swap_channels_prob, highest=1)
        check_range("INPUT.PHOTOMETRIC.CONTRAST", contrast, 0, 255)
        check_range("INPUT.PHOTOMETRIC.SATURATION", saturation, 0, 255)
        check_number("INPUT.PHOTOMETRIC.BRIGHTNESS", brightness)
        check_number("INPUT.PHOTOMETRIC.HUE", hue)
        check_choice("INPUT.PHOTOMETRIC.STYLE", style, ("caffe", "torchvision"))
        if style == "torchvision" and brightness > 1:
            raise ValueError(
                "INPUT.PHOTOMETRIC.BRIGHTNESS must be 0 to 1 with INPUT.PHOTOMETRIC.STYLE "
                f"'torchvision', where it is a share (torchvision: 0.125), got {brightness}"
            )
        PhotometricTransform(image_format=image_format)  # raises for other formats
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> PhotometricTransform:
        def draw(low: float, high: float, otherwise: float) -> float:
            value = np.random.uniform(low, high)
            return value if np.random.rand() < self.prob else otherwise

        torchvision = self.style == "torchvision"
        neutral = 1.0 if torchvision else 0.0
        transform = TorchvisionPhotometricTransform if torchvision else PhotometricTransform
        return transform(
            brightness=draw(neutral - self.brightness, neutral + self.brightness, neutral),
            contrast=draw(*self.contrast, 1.0),
            contrast_first=np.random.rand() < 0.5,
            saturation=draw(*self.saturation, 1.0),
            hue=draw(-self.hue, self.hue, 0.0),
            channel_order=(
                np.random.permutation(3)
                if np.random.rand() < self.swap_channels_prob
                else (0, 1, 2)
            ),
            image_format=self.image_format,
        )


class Expand(Augmentation):
    """Zooms out: puts the image at a uniform place of a larger canvas (paper, 3.6).

    The side of the canvas over the image's is uniform in 1 … ``max_ratio``; the same distribution
    as torchvision's ``RandomZoomOut``.
    """

    def __init__(
        self,
        prob: float = 0.5,
        max_ratio: float = 4.0,
        fill: Sequence[float] = (0, 0, 0),
    ):
        """
        Args:
            prob: of expanding at all.
            max_ratio: at least 1.
            fill: the canvas' value of each channel: the pixel mean, in the image's order.
        """
        super().__init__()
        check_number("INPUT.EXPAND.PROB", prob, highest=1)
        check_number("INPUT.EXPAND.MAX_RATIO", max_ratio, 1)
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        if np.random.rand() >= self.prob:
            return NoOpTransform()
        height, width = image.shape[:2]
        ratio = np.random.uniform(1, self.max_ratio)
        canvas_h, canvas_w = int(height * ratio), int(width * ratio)
        left = int((canvas_w - width) * np.random.rand())
        top = int((canvas_h - height) * np.random.rand())
        region = (-left, -top, canvas_w - left, canvas_h - top)
        return WarpTransform(region, (canvas_h, canvas_w), (height, width), self.fill)


class IoUCrop(Augmentation):
    """Crops so that at least one object keeps a minimum IoU with the crop (paper, 2.2).

    A choice is to keep the image or one of ``min_ious``. A crop is accepted when *any* object
    whose centre lies in it reaches the minimum. So an image with objects never loses all of them.
    (Caffe also counts objects whose centre is outside, which it then drops, and so can return a
    crop without objects.) Without objects the image is kept. Crops are whole pixels.

    MMDetection's ``MinIoURandomCrop`` is ``sampler`` "torchvision" and ``objects`` "all": *all*
    objects must reach the minimum, also those that the crop drops, and one centre must lie in it.
    """

    def __init__(
        self,
        min_ious: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9),
        scale: Tuple[float, float] = (0.3, 1.0),
        aspect_ratio: Tuple[float, float] = (0.5, 2.0),
        trials: int = 50,
        sampler: str = "caffe",
        objects: str = "any",
    ):
        """
        Args:
            min_ious: one choice each; 0 asks for no more than a centre in the crop.
            scale: (lowest, highest) side of the crop over the image's.
            aspect_ratio: (lowest, highest) width over height.
            trials: crops that are tried for a choice.
            sampler: "torchvision" draws one choice, sides uniform in ``scale``, rejects other
                aspect ratios (in pixels), and draws a choice again if no trial succeeds; the
                image is kept after 50 choices (torchvision's ``RandomIoUCrop`` tries forever).
                "caffe" draws scale s and then aspect ratio a, with sides s√a and s/√a as
                fractions of the image's, tries all choices and takes one of those that succeeded.
            objects: "any" or "all", which must reach the minimum.
        """
        super().__init__()
        check_choice("INPUT.IOU_CROP.SAMPLER", sampler, ("caffe", "torchvision"))
        check_choice("INPUT.IOU_CROP.OBJECTS", objects, ("any", "all"))
        check_positive("INPUT.IOU_CROP.TRIALS", trials)
        if not min_ious:
            raise ValueError("INPUT.IOU_CROP.MIN_IOUS must be numbers of 0 to 1, got none")
        for value in min_ious:
            check_number("INPUT.IOU_CROP.MIN_IOUS", value, highest=1)
        check_range("INPUT.IOU_CROP.SCALE", scale, 1e-3, 1)
        check_range("INPUT.IOU_CROP.ASPECT_RATIO", aspect_ratio, 1e-3, 1e3)
        if not aspect_ratio[0] <= 1 <= aspect_ratio[1]:
            raise ValueError(f"INPUT.IOU_CROP.ASPECT_RATIO must hold 1, got {aspect_ratio}")
        self._init(locals())

    def get_transform(self, image: np.ndarray, boxes: Optional[np.ndarray]) -> Transform:
        """
        Args:
            image: (H, W, C); only its size is read.
            boxes: (M, 4) XYXY in pixels; None counts as none.
        """
        if boxes is None:
            log_first_n(
                logging.WARNING,
                "IoUCrop crops nothing: no boxes are given. Detectron2's DatasetMapper gives "
                "augmentations none, ssd.data.mapper.SSDDatasetMapper does.",
            )
        size = image.shape[:2]
        crop = None
        if boxes is not None and len(boxes):
            draw = self._draw_caffe if self.sampler == "caffe" else self._draw_torchvision
            crop = draw(size, np.asarray(boxes))
        if crop is None:
            return NoOpTransform()
        x0, y0, x1, y1 = (int(v) for v in crop)
        return WarpTransform(crop, (y1 - y0, x1 - x0), size)

    def _draw_torchvision(self, size: Tuple[int, int], boxes: np.ndarray) -> Optional[np.ndarray]:
        for _ in range(50):
            choice = np.random.randint(len(self.min_ious) + 1)
            if choice == len(self.min_ious):
                return None
            sides = np.random.uniform(*self.scale, (self.trials, 2))
            crops = _place(sides, size)
            aspect = (crops[:, 2] - crops[:, 0]) / (crops[:, 3] - crops[:, 1])
            accepted = _reached_iou(crops, boxes, self.objects) >= self.min_ious[choice]
            accepted &= (self.aspect_ratio[0] <= aspect) & (aspect <= self.aspect_ratio[1])
            if accepted.any():
                return crops[accepted.argmax()]
        return None

    def _draw_caffe(self, size: Tuple[int, int], boxes: np.ndarray) -> Optional[np.ndarray]:
        scale = np.random.uniform(*self.scale, len(self.min_ious) * self.trials)
        aspect = np.random.uniform(
            np.maximum(self.aspect_ratio[0], scale**2),
            np.minimum(self.aspect_ratio[1], 1 / scale**2),
        )
        sides = np.stack([scale * np.sqrt(aspect), scale / np.sqrt(aspect)], axis=1)
        crops = _place(sides, size).reshape(len(self.min_ious), self.trials, 4)
        ious = _reached_iou(crops.reshape(-1, 4), boxes, self.objects).reshape(crops.shape[:2])
        accepted = ious >= np.array(self.min_ious)[:, None]
        succeeded = np.flatnonzero(accepted.any(axis=1))
        choice = np.random.randint(len(succeeded) + 1)
        if choice == len(succeeded):
            return None
        choice = succeeded[choice]
        return crops[choice, accepted[choice].argmax()]


class Resize(Augmentation):
    """Resizes to ``output_size`` (height, width): bilinear without antialiasing."""

    def __init__(self, output_size: Tuple[int, int]):
        super().__init__()
        WarpTransform((0, 0, 1, 1), output_size, (1, 1))  # raises for other than a size
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> WarpTransform:
        height, width = image.shape[:2]
        return WarpTransform((0, 0, width, height), self.output_size, (height, width))


class ComposedWarp(Augmentation):
    """Draws a chain of augmentations and returns *one* transform, which samples the image once.

    Each one sees the size and boxes that those before it leave, but no pixels. They must return a
    :class:`WarpTransform`, a horizontal or vertical flip or nothing. The first one may also be a
    :class:`PhotometricDistortion`, which then distorts only the pixels that survive, or else the
    last one, which distorts the result.
    """

    def __init__(self, augmentations: Sequence[Augmentation]):
        super().__init__()
        photometric = [isinstance(a, PhotometricDistortion) for a in augmentations]
        if any(photometric[1:-1]) or sum(photometric) > 1:
            raise ValueError(
                f"augmentations are {augmentations}, expected the photometric one first or last"
            )
        self._init(locals())

    def get_transform(self, image: np.ndarray, boxes: Optional[np.ndarray]) -> Transform:
        """
        Args:
            image: (H, W, C); only its size is read.
            boxes: (M, 4) XYXY in pixels; None counts as none.
        """
        geometry = ImageSize(image.shape[:2], boxes)
        for augmentation in self.augmentations:
            augmentation(geometry)
        if geometry.photometric is None:
            return geometry.warp
        last = not isinstance(self.augmentations[0], PhotometricDistortion)
        return PhotometricWarp(geometry.photometric, geometry.warp, last)


class ImageSize(AugInput):
    """An image's size and boxes without its pixels, and the warp that led to them.

    ``image`` has the size, but no channels; it takes no memory.
    """

    def __init__(self, size: Tuple[int, int], boxes: Optional[np.ndarray] = None):
        self.photometric = None
        self.warp = WarpTransform((0, 0, size[1], size[0]), size, size)
        self.sem_seg = None
        self._source_boxes = boxes

    @property
    def image(self) -> np.ndarray:
        return np.empty((*self.warp.output_size, 0), np.uint8)

    @property
    def boxes(self) -> Optional[np.ndarray]:
        return None if self._source_boxes is None else self.warp.apply_box(self._source_boxes)

    def transform(self, tfm: Transform) -> None:
        if isinstance(tfm, NoOpTransform):
            return
        height, width = size = self.warp.output_size
        if isinstance(tfm, PhotometricWarp):
            self.photometric, tfm = tfm.photometric, tfm.warp
        elif isinstance(tfm, HFlipTransform):
            tfm = WarpTransform((width, 0, 0, height), size, size)
        elif isinstance(tfm, VFlipTransform):
            tfm = WarpTransform((0, height, width, 0), size, size)
        if isinstance(tfm, PhotometricTransform):
            self.photometric = tfm
        elif isinstance(tfm, WarpTransform):
            self.warp = self.warp.then(tfm)
        else:
            raise ValueError(
                f"ComposedWarp can't compose {tfm}; Detectron2's DatasetMapper takes any"
            )


def _place(sides: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """Uniformly placed crops: (n, 2) width, height as fractions → (n, 4) XYXY whole pixels."""
    image_wh = np.array(size[::-1])
    wh = np.maximum((sides * image_wh).astype(int), 1)
    xy = ((image_wh - wh) * np.random.rand(*wh.shape)).astype(int)
    return np.concatenate([xy, xy + wh], axis=1)


def _reached_iou(crops: np.ndarray, boxes: np.ndarray, objects: str) -> np.ndarray:
    """(n,) of n crops: the highest IoU with those of M ≥ 1 boxes whose centre lies inside, or with
    ``objects`` "all" the lowest with all M boxes; -1 without any centre inside."""
    crops = crops.T.astype(np.float32, order="C")  # x0, y0, x1, y1, each (n,)
    boxes = boxes.T.astype(np.float32, order="C")[:, :, None]  # each (M, 1)
    low, high, centers = boxes[:2], boxes[2:], (boxes[:2] + boxes[2:]) / 2
    sides = np.minimum(crops[2:, None], high) - np.maximum(crops[:2, None], low)  # (2, M, n)
    both = np.multiply(*np.maximum(sides, 0))
    area, areas = np.multiply(*(crops[2:] - crops[:2])), np.multiply(*(high - low))
    iou = both / (area + areas - both)
    inside = np.logical_and(*((crops[:2, None] < centers) & (centers < crops[2:, None])))
    if objects == "all":
        return np.where(inside.any(axis=0), iou.min(axis=0), -1)
    return np.where(inside, iou, -1).max(axis=0)
