"""Files of data sets: where they are looked for, and images, read as they are to be seen."""

import contextlib
import os
import re
from typing import Optional

import cv2
import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image

__all__ = [
    "IMAGE_EXTENSIONS",
    "datasets_folder_text",
    "image_size",
    "read_image",
    "read_text",
    "require",
]

# what counts as an image in a folder
IMAGE_EXTENSIONS = tuple(
    ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split()
)


def require(path: str, origin: str) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist (from {origin}; {datasets_folder_text()})")


def read_text(path: str, key: str) -> str:
    """A text file in UTF-8; ``key`` of the config that it comes from, for the error."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            return file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} ({key}) isn't UTF-8, save it as such: {error}") from None


def datasets_folder_text() -> str:
    """Where data sets are looked for, for messages about files that aren't there."""
    folder = os.environ.get("DETECTRON2_DATASETS", "not set, so datasets")
    return f"DETECTRON2_DATASETS is {folder!r}"


def image_size(file_name: str) -> tuple[int, int]:
    """(height, width) from the file's header, turned as EXIF says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no readable header; names it.
    """
    try:
        with Image.open(file_name) as image:
            (width, height), exif = image.size, Image.Exif()
            if image.format == "PNG" and _has_exif(image.fp):
                image.load()  # it may follow the pixels; getexif() would decode every PNG
            orientation = None
            with contextlib.suppress(Exception):  # damaged ones, which OpenCV ignores
                exif.load(image.info.get("exif"))
                orientation = exif.get(0x0112)
            if image.format == "TIFF":  # which Pillow may have turned itself
                width, height = image.tag_v2[256], image.tag_v2[257]
                orientation = image.tag_v2.get(0x0112)
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError:  # large, but what read_image takes
        return read_image(file_name).shape[:2]
    except Exception as error:  # Pillow raises anything, without the name
        raise ValueError(f"image {file_name} has no readable header: {error}") from None
    return (width, height) if orientation in range(5, 9) else (height, width)


def _has_exif(png) -> bool:
    """Whether a PNG has such a chunk."""
    found = False
    png.seek(8)
    while not found and len(head := png.read(8)) == 8:
        found = head[4:] == b"eXIf"
        png.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return found


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
    if not os.path.isfile(file_name) and os.path.exists(file_name):
        raise ValueError(f"image {file_name} is no regular file")
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
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # but those within a scan
_REDUCTIONS = {  # with a colour flag their "grayscale" doesn't hold
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


def _decode(data: bytes, rgb: bool, flags: int = 0) -> Optional[np.ndarray]:
    if not data:
        return None
    color = getattr(cv2, "IMREAD_COLOR_RGB", None) if rgb else cv2.IMREAD_COLOR
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags | (color or cv2.IMREAD_COLOR))
    except cv2.error:  # a header that claims more pixels than OpenCV takes
        return None
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
