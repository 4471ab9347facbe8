"""What the SSD augmentation applies: deterministic transforms with all their parameters given.

Coordinates are continuous pixels: pixel i spans [i, i + 1], boxes are XYXY. Sizes are
(height, width). Images are (H, W, C) or (H, W) arrays.
"""

import copy
import math
from typing import Optional, Sequence, Tuple

import cv2
import numpy as np
from fvcore.transforms.transform import Transform

__all__ = [
    "PhotometricTransform",
    "PhotometricWarp",
    "TorchvisionPhotometricTransform",
    "WarpTransform",
    "centers_inside",
]

_EPS = 1e-6  # pixels: what composing warps in floating point may add to an integer coordinate


def centers_inside(boxes: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """Tells which boxes have their centre in an image; the others go when it is cropped.

    Args:
        boxes: (M, 4) XYXY in pixels.
        size: (height, width) of the image.

    Returns:
        (M,) bool, with M = 0 for no boxes; a centre on the border is outside.
    """
    boxes = np.asarray(boxes).reshape(-1, 4)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((centers > 0) & (centers < (size[1], size[0]))).all(axis=1)


class WarpTransform(Transform):
    """Samples a region of the image into an image of another size (paper, 2.2 and 3.6).

    Expand, crop, resize and flip, and any chain of them, are such warps: x → (x - x0) * w /
    (x1 - x0) and likewise y. A chain composed by :meth:`then` samples the image once and never
    builds the expanded canvas.
    """

    def __init__(
        self,
        region: Sequence[float],
        output_size: Tuple[int, int],
        source_size: Tuple[int, int],
        fill: Sequence[float] = (0, 0, 0),
    ):
        """
        Args:
            region: (x0, y0, x1, y1) in the image's pixels. It may reach beyond the image
                (expand); x0 > x1 mirrors horizontally, y0 > y1 vertically.
            output_size: (height, width) of the result.
            source_size: (height, width) of the image that is warped.
            fill: value of each channel, in the image's channel order, outside the image.
        """
        super().__init__()
        self.region = tuple(map(float, region))
        self.output_size = _checked_size("output_size", output_size)
        self.source_size = _checked_size("source_size", source_size)
        self.fill = tuple(fill)
        if len(self.region) != 4 or not all(map(math.isfinite, self.region)):
            raise ValueError(f"region is {region}, expected 4 finite numbers (x0, y0, x1, y1)")
        if self.region[0] == self.region[2] or self.region[1] == self.region[3]:
            raise ValueError(f"region is {region}, expected a width and height other than 0")

    def apply_image(
        self, img: np.ndarray, photometric: Optional["PhotometricTransform"] = None
    ) -> np.ndarray:
        """Bilinear with half-pixel centres and without antialiasing, as cv2.INTER_LINEAR.

        Equal to building the canvas, cropping it, ``cv2.resize`` and flipping: exactly where the
        region is whole pixels of the image, else within the interpolation's rounding.

        Args:
            img: uint8 or float, of ``source_size``.
            photometric: distorts the image, but not the fill: the pixels that the region shows
                or, where these are more, those sampled from them (:class:`PhotometricWarp`).

        Returns:
            an array of ``output_size`` with the dtype and channels of ``img``.
        """
        self._check_source(img)
        out_h, out_w = self.output_size
        (left, right), (top, bottom) = self._pixels(0), self._pixels(1)
        shown = img[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
        x0, y0, x1, y1 = self.region
        if photometric is not None and abs((x1 - x0) * (y1 - y0)) <= out_w * out_h and shown.size:
            shown, photometric = photometric.apply_image(shown), None

        whole = all(abs(v - round(v)) < _EPS for v in self.region)
        if whole and not self._reaches_outside():
            out = cv2.resize(shown, (out_w, out_h), interpolation=cv2.INTER_LINEAR)
            out = out if photometric is None else photometric.apply_image(out)
            if x0 > x1 or y0 > y1:
                out = cv2.flip(out, -1 if x0 > x1 and y0 > y1 else int(x0 > x1))
            return out.reshape(out_h, out_w, *img.shape[2:])

        channels = 1 if img.ndim == 2 else img.shape[2]
        fill = self.fill * channels if len(self.fill) == 1 else self.fill
        if self._reaches_outside() and len(fill) != channels:
            raise ValueError(
                f"fill is {self.fill} for an image of {channels} channels, expected one number or "
                "one for each channel (MODEL.PIXEL_MEAN)"
            )
        if shown.size:
            out = self._sample(shown, photometric, fill)
        else:
            out = np.broadcast_to(np.array(fill, np.float64), (out_h, out_w, channels))
            out = (out.round() if img.dtype == np.uint8 else out).astype(img.dtype)
        return out.reshape(out_h, out_w, *img.shape[2:])

    def _sample(self, shown: np.ndarray, photometric: Optional[Transform], fill) -> np.ndarray:
        """The output, from those pixels of the image that the region touches.

        Only the part of it that shows the image is sampled, with half a pixel around it where
        image and fill blend.
        """
        (height, width), (out_h, out_w) = self.source_size, self.output_size
        (left, right), (top, bottom) = self._pixels(0), self._pixels(1)
        x0, y0, x1, y1 = self.region
        rows, columns = shown.shape[:2]
        u0, u1, start_x, step_x = _samples(x0, x1, out_w, max(left, 0), columns)
        v0, v1, start_y, step_y = _samples(y0, y1, out_h, max(top, 0), rows)
        inner = cv2.warpAffine(
            shown,
            np.array([[step_x, 0, start_x], [0, step_y, start_y]]),
            (u1 - u0, v1 - v0),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,  # as at the edge of a crop
        )
        inner = inner if photometric is None else photometric.apply_image(inner)
        inner = inner.reshape(v1 - v0, u1 - u0, -1)  # OpenCV drops a single channel
        for axis, start, step, length, before, after in (
            (1, start_x, step_x, columns, left < 0, right > width),
            (0, start_y, step_y, rows, top < 0, bottom > height),
        ):
            if before or after:
                _fade(inner.swapaxes(0, axis), start, step, length, before, after, fill)
        return cv2.copyMakeBorder(
            inner, v0, out_h - v1, u0, out_w - u1, cv2.BORDER_CONSTANT, value=fill
        )

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Maps points, also those outside the region.

        Args:
            coords: (P, 2) of x, y in pixels of the image.

        Returns:
            (P, 2) in pixels of the result; a floating dtype is kept.
        """
        x0, y0, x1, y1 = self.region
        height, width = self.output_size
        coords = np.asarray(coords)
        dtype = coords.dtype if coords.dtype.kind == "f" else np.float64
        scale = np.array([width / (x1 - x0), height / (y1 - y0)])
        return ((coords.reshape(-1, 2) - np.array([x0, y0])) * scale).astype(dtype)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Nearest label at each pixel's centre, 255 (Detectron2's "ignore") outside; (H, W)."""
        self._check_source(segmentation)
        out = np.full(self.output_size, 255, segmentation.dtype)
        centers = []
        for axis, size in ((0, self.output_size[1]), (1, self.output_size[0])):
            low, high = self.region[axis], self.region[axis + 2]
            centers.append(np.floor(low + (np.arange(size) + 0.5) * (high - low) / size))
        x, y = (c.astype(int) for c in centers)
        in_x = (x >= 0) & (x < self.source_size[1])
        in_y = (y >= 0) & (y < self.source_size[0])
        out[np.ix_(in_y, in_x)] = segmentation[np.ix_(y[in_y], x[in_x])]
        return out

    def inverse(self) -> "WarpTransform":
        """The warp back to ``source_size``; what lay outside the region becomes ``fill``."""
        height, width = self.source_size
        region = self.apply_coords(np.array([[0.0, 0.0], [width, height]])).ravel()
        return WarpTransform(region, self.source_size, self.output_size, self.fill)

    def then(self, second: "WarpTransform") -> "WarpTransform":
        """One warp with the geometry of this one followed by ``second``.

        Its pixels are sampled once where the two would sample twice.

        Raises:
            ValueError: if the two have no common warp: ``second`` is for another size, or reaches
                outside of what this one has cropped or filled differently.
        """
        if second.source_size != self.output_size:
            raise ValueError(
                f"the second warp is for images of {second.source_size} (height, width), "
                f"expected {self.output_size}, the first one's output_size"
            )
        fill = self.fill if self._reaches_outside() else second.fill
        if second._reaches_outside():
            if fill != second.fill:
                raise ValueError(f"two fill values in one warp: {fill} and {second.fill}")
            if self._crops():
                raise ValueError(f"{second} expands what {self} crops: expand first, then crop")
        x0, y0, x1, y1 = self.region
        height, width = self.output_size
        step_x, step_y = (x1 - x0) / width, (y1 - y0) / height
        u0, v0, u1, v1 = second.region
        region = (x0 + u0 * step_x, y0 + v0 * step_y, x0 + u1 * step_x, y0 + v1 * step_y)
        return WarpTransform(region, second.output_size, self.source_size, fill)

    @property
    def reduction(self) -> int:
        """1, 2, 4 or 8: the image decoded at that fraction still has more pixels than are shown."""
        x0, y0, x1, y1 = self.region
        height, width = self.output_size
        step = min(abs(x1 - x0) / width, abs(y1 - y0) / height)
        return max(factor for factor in (1, 2, 4, 8) if factor <= max(step, 1))

    def reduced(self, factor: int) -> "WarpTransform":
        """This warp of an image decoded at 1 / ``factor``, its size rounded up."""
        source_size = [-(-v // factor) for v in self.source_size]
        region = [v / factor for v in self.region]
        return WarpTransform(region, self.output_size, source_size, self.fill)

    def _pixels(self, axis: int) -> Tuple[int, int]:
        """First pixel and one past the last that the region touches along x (0) or y (1)."""
        low, high = sorted((self.region[axis], self.region[axis + 2]))
        return math.floor(low + _EPS), math.ceil(high - _EPS)

    def _reaches_outside(self) -> bool:
        (left, right), (top, bottom) = self._pixels(0), self._pixels(1)
        return left < 0 or top < 0 or right > self.source_size[1] or bottom > self.source_size[0]

    def _crops(self) -> bool:
        (left, right), (top, bottom) = self._pixels(0), self._pixels(1)
        return left > 0 or top > 0 or right < self.source_size[1] or bottom < self.source_size[0]

    def _check_source(self, img: np.ndarray) -> None:
        if img.shape[:2] != self.source_size:
            raise ValueError(
                f"image of {img.shape[:2]} (height, width), expected source_size {self.source_size}"
            )

    def __repr__(self) -> str:
        return (
            f"WarpTransform(region={self.region}, output_size={self.output_size}, "
            f"source_size={self.source_size}, fill={self.fill})"
        )


class PhotometricTransform(Transform):
    """One draw of the photometric distortion (paper, 2.2), as in Caffe; boxes stay.

    For values x in 0 … 255, each step clipped to its range::

        x = x + brightness
        x = x * contrast                            if contrast_first
        H, S, V = HSV(x)                            H in 0 … 180, S and V in 0 … 255
        H = (H + hue) mod 180;  S = S * saturation
        x = RGB(H, S, V)
        x = x * contrast                            if not contrast_first
        channel i of the result = channel channel_order[i] of x

    Brightness and contrast are one look-up table, hue and saturation one each on OpenCV's 8-bit
    HSV, with values rounded after each table. HSV is skipped where it changes nothing; where it
    is used, its unit of 2 degrees costs at most about 10 of 255 levels, on average under 1
    (times ``contrast``). Two differences from Caffe: there hue saturates at 0 instead of wrapping,
    and it rounds between brightness and contrast. MMDetection adds hue in degrees (half of ours)
    and distorts floating-point values, which it doesn't clip.
    """

    def __init__(
        self,
        brightness: float = 0.0,
        contrast: float = 1.0,
        contrast_first: bool = True,
        saturation: float = 1.0,
        hue: float = 0.0,
        channel_order: Sequence[int] = (0, 1, 2),
        image_format: str = "BGR",
    ):
        """
        Args:
            brightness: added, in levels of 0 … 255.
            contrast, saturation: factors, at least 0.
            contrast_first: contrast before the colour operations, otherwise after them.
            hue: added, in OpenCV's 8-bit unit of 2 degrees.
            channel_order: a permutation of 0, 1, 2.
            image_format: "BGR" or "RGB" (``INPUT.FORMAT``).
        """
        super().__init__()
        if image_format not in ("BGR", "RGB"):
            raise ValueError(
                f"image format {image_format!r}, expected 'BGR' or 'RGB' (INPUT.FORMAT; or set "
                "INPUT.PHOTOMETRIC.ENABLED to False)"
            )
        if not (contrast >= 0 and saturation >= 0):
            raise ValueError(
                f"contrast {contrast} and saturation {saturation}, expected factors of at least 0 "
                "(INPUT.PHOTOMETRIC.CONTRAST, INPUT.PHOTOMETRIC.SATURATION)"
            )
        if sorted(channel_order) != [0, 1, 2]:
            raise ValueError(f"channel_order {channel_order}, expected a permutation of 0, 1, 2")
        self.brightness = float(brightness)
        self.contrast = float(contrast)
        self.contrast_first = bool(contrast_first)
        self.saturation = float(saturation)
        self.hue = float(hue)
        self.channel_order = tuple(int(c) for c in channel_order)
        self.image_format = image_format

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Distorts ``img``, (H, W, 3) uint8; with nothing to change it is returned itself."""
        if img.dtype != np.uint8 or img.ndim != 3 or img.shape[2] != 3:
            raise ValueError(f"image is {img.dtype} of {img.shape}, expected uint8 of (H, W, 3)")
        img = self._distort(img)
        if self.channel_order != (0, 1, 2):
            planes = cv2.split(img)
            img = cv2.merge([planes[c] for c in self.channel_order])
        return img

    def fixed(self, img: np.ndarray) -> "PhotometricTransform":
        """What to apply to a part of ``img`` so that it comes out as in the whole: here this
        transform itself, as no pixel depends on another."""
        return self

    def _distort(self, img: np.ndarray) -> np.ndarray:
        colour = self.saturation != 1 or self.hue != 0
        before = self.contrast if self.contrast_first or not colour else 1.0
        after = 1.0 if self.contrast_first or not colour else self.contrast
        values = np.arange(256.0)
        if self.brightness != 0 or before != 1:
            img = cv2.LUT(img, _table(np.clip(values + self.brightness, 0, 255) * before))
        if colour:
            img = self._change_hsv(img, self.hue, self.saturation)
        if after != 1:
            img = cv2.LUT(img, _table(values * after))
        return img

    def _change_hsv(self, img: np.ndarray, hue: float, saturation: float) -> np.ndarray:
        values = np.arange(256.0)
        rgb = self.image_format == "RGB"
        row = img.reshape(1, -1, 3)  # OpenCV handles the end of each row apart
        hsv = cv2.cvtColor(row, cv2.COLOR_RGB2HSV if rgb else cv2.COLOR_BGR2HSV)
        planes = list(cv2.split(hsv))
        if hue != 0:
            planes[0] = cv2.LUT(planes[0], _table(np.round(values + hue) % 180))
        if saturation != 1:
            planes[1] = cv2.LUT(planes[1], _table(values * saturation))
        hsv = cv2.merge(planes, hsv)
        out = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB if rgb else cv2.COLOR_HSV2BGR)
        return out.reshape(img.shape)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation

    def __repr__(self) -> str:
        names = "brightness contrast contrast_first saturation hue channel_order image_format"
        values = (f"{name}={getattr(self, name)!r}" for name in names.split())
        return f"{type(self).__name__}({', '.join(values)})"


class TorchvisionPhotometricTransform(PhotometricTransform):
    """One draw of torchvision's ``RandomPhotometricDistort``; boxes stay.

    Other formulas than Caffe's, for values x in 0 … 255, each step clipped and rounded::

        x = x * brightness
        x = contrast * x + (1 - contrast) * mean grey of the image       if contrast_first
        x = saturation * x + (1 - saturation) * grey of the pixel
        H = (H + hue) mod 180                                            H of HSV(x)
        x = contrast * x + (1 - contrast) * mean grey of the image       if not contrast_first
        channel i of the result = channel channel_order[i] of x

    where grey is 0.299 R + 0.587 G + 0.114 B. Arguments as for :class:`PhotometricTransform`, but
    ``brightness`` is a factor. torchvision cuts off fractions instead of rounding, and computes
    hue in floating point.
    """

    def __init__(self, brightness: float = 1.0, *args, mean_grey: Optional[float] = None, **kwargs):
        """
        Args:
            mean_grey: of the image where contrast changes it; None: of the one that is distorted.
        """
        super().__init__(brightness, *args, **kwargs)
        self.mean_grey = mean_grey

    def fixed(self, img: np.ndarray) -> "TorchvisionPhotometricTransform":
        """With the mean grey of ``img``, or of its 40 to 79 evenly spaced rows: for photographs
        within a level."""
        if self.contrast == 1 or self.mean_grey is not None:
            return self
        fixed = copy.copy(self)
        fixed.mean_grey = self._mean_grey(img[:: max(1, len(img) // 40)])
        return fixed

    def _distort(self, img: np.ndarray) -> np.ndarray:
        colour = self.saturation != 1 or self.hue != 0
        before = self.contrast_first or not colour
        values = np.arange(256.0)
        table, contrast = _table(values * self.brightness), None
        if self.contrast != 1:
            mean = self._mean_grey(img) if self.mean_grey is None else self.mean_grey
            contrast = _table(mean + (values - mean) * self.contrast)
            table = contrast[table] if before else table
        if self.brightness != 1 or (contrast is not None and before):
            img = cv2.LUT(img, table)
        if self.saturation != 1:
            # linear in the channels: a row for each channel of the result
            grey = self._grey()
            img = cv2.transform(img, self.saturation * np.eye(3) + (1 - self.saturation) * grey)
        if self.hue != 0:
            img = self._change_hsv(img, self.hue, 1.0)
        return img if contrast is None or before else cv2.LUT(img, contrast)

    def _mean_grey(self, img: np.ndarray) -> float:
        """Of ``img`` after the steps before contrast."""
        colour = (1.0, 0.0) if self.contrast_first else (self.saturation, self.hue)
        steps = TorchvisionPhotometricTransform(
            self.brightness, 1.0, True, *colour, image_format=self.image_format
        )
        return float(np.dot(self._grey(), cv2.mean(steps._distort(img))[:3]))

    def _grey(self) -> np.ndarray:
        return np.array([0.299, 0.587, 0.114])[:: 1 if self.image_format == "RGB" else -1]

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, mean_grey={self.mean_grey})"


class PhotometricWarp(Transform):
    """``photometric`` and then ``warp``, or the other way round if ``photometric_last``.

    Distorts only the pixels that the warp shows or, last, those of its result, where the fill of an
    expanded image is distorted too.

    Where the warp shrinks, the pixels sampled by it are distorted instead, without the fill. These
    two steps nearly commute: on BCCD's photographs levels differ by at most 0.5 on average and 15
    at an edge, where what is clipped or rounded differs on both sides.
    """

    def __init__(
        self,
        photometric: PhotometricTransform,
        warp: WarpTransform,
        photometric_last: bool = False,
    ):
        super().__init__()
        self.photometric = photometric
        self.warp = warp
        self.photometric_last = photometric_last

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        if self.photometric_last:
            return self.photometric.apply_image(self.warp.apply_image(img))
        return self.warp.apply_image(img, self.photometric.fixed(img))

    @property
    def reduction(self) -> int:
        return self.warp.reduction

    def reduced(self, factor: int) -> "PhotometricWarp":
        return PhotometricWarp(self.photometric, self.warp.reduced(factor), self.photometric_last)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return self.warp.apply_coords(coords)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self.warp.apply_segmentation(segmentation)


def _checked_size(name: str, size: Tuple[int, int]) -> Tuple[int, int]:
    checked = tuple(map(int, size))
    if len(checked) != 2 or min(checked) < 1 or checked != tuple(size):
        raise ValueError(
            f"{name} is {size}, expected (height, width), whole numbers of at least 1 "
            "(MODEL.SSD.INPUT_SIZE)"
        )
    return checked


def _samples(low: float, high: float, size: int, first: int, count: int) -> tuple:
    """Along one axis, ``size`` samples of low … high: those that pixels first … first + count have
    a share in, as (first sample, one past the last), the place of the first one, counted from the
    middle of pixel ``first``, and the step between them."""
    step = (high - low) / size
    ends = sorted(((first - 0.5 - low) / step, (first + count + 0.5 - low) / step))
    start, stop = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), size)
    return start, stop, low + (start + 0.5) * step - 0.5 - first, step


def _fade(
    img: np.ndarray,
    start: float,
    step: float,
    length: int,
    before: bool,
    after: bool,
    fill: Sequence[float],
) -> None:
    """Blends with ``fill``, in place, the rows of ``img`` that were sampled half a pixel or more
    ``before`` the first or ``after`` the last pixel of ``length``, as bilinear sampling does."""
    places = start + step * np.arange(len(img))
    share = np.minimum(
        places + 1 if before else np.inf, length - places if after else np.inf
    )  # of the image
    rows = np.flatnonzero(share < 1)
    if len(rows):
        blend = fill + (img[rows] - fill) * share[rows, None, None].clip(0)
        img[rows] = blend.round() if img.dtype == np.uint8 else blend


def _table(values: np.ndarray) -> np.ndarray:
    """256 look-up values, clipped and rounded to uint8."""
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
