"""Files of data sets: where they are looked for, and sizes of images."""

import os

from PIL import Image

__all__ = ["IMAGE_EXTENSIONS", "datasets_folder_text", "image_size", "require"]

# what counts as an image in a folder
IMAGE_EXTENSIONS = tuple(
    ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split()
)


def require(path: str, origin: str) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist (from {origin}; {datasets_folder_text()})")


def datasets_folder_text() -> str:
    """Where data sets are looked for, for messages about files that aren't there."""
    folder = os.environ.get("DETECTRON2_DATASETS", "not set, so datasets")
    return f"DETECTRON2_DATASETS is {folder!r}"


def image_size(file_name: str) -> tuple[int, int]:
    """(height, width) from the file's header, turned as EXIF says."""
    with Image.open(file_name) as image:
        width, height = image.size
        if image.format == "TIFF":  # which Pillow may have turned itself
            width, height = image.tag_v2[256], image.tag_v2[257]
        return (width, height) if image.getexif().get(0x0112) in range(5, 9) else (height, width)
