"""A small rendered data set: everything runs with no download, and has to learn.

Six classes are told apart by their form only: colour, size, stretch and angle are drawn
independently of it. An image is a function of (split, number) alone.
"""

import json
import logging
import os
import tempfile
from typing import Optional

import cv2
import numpy as np

__all__ = ["CLASSES", "SPLITS", "draw_object", "draw_scene", "render_shapes", "scene_rng"]

CLASSES = ("ellipse", "rectangle", "triangle", "star", "cross", "ring")
SPLITS = {"train": 1000, "val": 200}  # images of each
SIDES = (240, 320)  # pixels: height and width of an image, each drawn between
SIZES = (0.1, 0.6)  # longer side of an object's box over the shorter side of the image
MAX_OBJECTS = 8
MAX_OVERLAP = 1 / 3  # intersection of two boxes over the smaller box
MIN_CONTRAST = 80  # 90 % of an object's pixels differ by this much (Euclidean, BGR 0-255)

logger = logging.getLogger(__name__)


def render_shapes(root: str, split: str, count: Optional[int] = None) -> str:
    """Renders a split into ``root`` unless it is there.

    Writes ``<root>/<split>/images/*.jpg`` and then ``<root>/<split>.json`` (COCO format, boxes
    only). Any number of processes may call it at once: each renders into a folder of its own and
    renames it, the first one wins.

    Args:
        root: the folder, made if needed.
        split: "train" or "val".
        count: images; default: 1000 (train), 200 (val).

    Returns:
        the path of the JSON file.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"the shapes data set has no split {split!r}; it has {list(SPLITS)}")
    json_file = os.path.join(root, f"{split}.json")
    if os.path.isfile(json_file):
        return json_file
    count = SPLITS[split] if count is None else count
    logger.info(f"Rendering {count} images of shapes into {os.path.join(root, split)}")
    os.makedirs(root, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{split}-", dir=root) as folder:
        _write_split(folder, split, count)
        try:
            os.rename(os.path.join(folder, split), os.path.join(root, split))
        except OSError:
            if not os.path.isdir(os.path.join(root, split)):
                raise  # otherwise another process was first, with the same images
        os.replace(os.path.join(folder, f"{split}.json"), json_file)
    return json_file


def _write_split(root: str, split: str, count: int) -> None:
    folder = os.path.join(root, split, "images")
    os.makedirs(folder)
    images, annotations = [], []
    for index in range(count):
        image, boxes, labels = draw_scene(scene_rng(split, index))
        name = f"{index:06d}.jpg"
        if not cv2.imwrite(os.path.join(folder, name), image, [cv2.IMWRITE_JPEG_QUALITY, 90]):
            raise OSError(f"cannot write {os.path.join(folder, name)}")
        height, width = image.shape[:2]
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist()):
            annotation = {"id": len(annotations) + 1, "image_id": index + 1, "iscrowd": 0}
            annotation.update(category_id=label + 1, bbox=[x1, y1, x2 - x1, y2 - y1])
            annotation.update(area=(x2 - x1) * (y2 - y1))
            annotations.append(annotation)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    data = {"info": {"description": "rendered shapes"}, "images": images}
    data.update(annotations=annotations, categories=categories)
    with open(os.path.join(root, f"{split}.json"), "w") as f:
        json.dump(data, f)


def scene_rng(split: str, index: int) -> np.random.Generator:
    """The random numbers of one image; no two (split, index) share a seed."""
    return np.random.default_rng([list(SPLITS).index(split), index])


def draw_scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws one image with 1 to 8 objects.

    Returns:
        (H, W, 3) uint8 BGR image; (M, 4) int64 boxes, XYXY in pixels, the tight bounds of each
        object's drawn mask (also where a later object covers it); (M,) int64 labels.
    """
    height, width = rng.integers(SIDES[0], SIDES[1] + 1, 2)
    image = _draw_background(rng, height, width)
    boxes, labels = np.zeros((0, 4), np.int64), []
    for _ in range(rng.integers(1, MAX_OBJECTS + 1)):
        label = int(rng.integers(len(CLASSES)))
        for _ in range(20):  # a crowded image may end with fewer objects than drawn, never none
            # Uniform in the logarithm, kept off the bounds for the rounding to pixels.
            low, high = np.log(SIZES[0] + 0.01), np.log(SIZES[1] - 0.01)
            size = np.exp(rng.uniform(low, high)) * min(height, width)
            mask = draw_object(rng, CLASSES[label], size)
            h, w = mask.shape
            x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            box = np.array([[x, y, x + w, y + h]])
            if _overlap(box, boxes) <= MAX_OVERLAP:
                _paint(rng, image[y : y + h, x : x + w], mask)
                boxes = np.concatenate([boxes, box])
                labels.append(label)
                break
    noise = rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(2, 10)
    return (image + noise).clip(0, 255).astype(np.uint8), boxes, np.array(labels, np.int64)


def draw_object(rng: np.random.Generator, name: str, size: float) -> np.ndarray:
    """One object, stretched and rotated at random.

    Args:
        name: one of CLASSES.
        size: the longer side of its box in pixels.

    Returns:
        (h, w) float32 mask in 0 to 1, anti-aliased, cut to the pixels that are at least half
        covered: h, w <= size + 1.
    """
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.65, 1)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, -sin], [sin, cos]]) * [1, stretch]
    contours = [contour @ turn.T for contour in _outline(name)]
    low, extent = contours[0].min(0), np.ptp(contours[0], axis=0)  # the outer contour is the first
    scale, factor = size / extent.max(), 4  # drawn four times larger, then averaged
    shape = (np.ceil(extent * scale).astype(int) + 2) * factor
    canvas = np.zeros(shape[::-1], np.uint8)
    # fillPoly takes 1/16 pixels and has pixel centres at integers.
    points = [((c - low) * scale + 1) * factor - 0.5 for c in contours]
    cv2.fillPoly(canvas, [np.round(p * 16).astype(np.int32) for p in points], 255, shift=4)
    mask = cv2.resize(canvas, None, fx=1 / factor, fy=1 / factor, interpolation=cv2.INTER_AREA)
    ys, xs = np.nonzero(mask >= 128)
    mask = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    return mask.astype(np.float32) / 255


def _outline(name: str) -> list[np.ndarray]:
    """Contours of a form around (0, 0), each (P, 2) points; the second one is a hole."""
    corners = {"ellipse": 72, "ring": 72, "triangle": 3, "star": 10}
    angles = np.linspace(0, 2 * np.pi, corners.get(name, 4), endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    if name == "ring":
        return [circle, 0.55 * circle]
    if name == "star":
        return [circle * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]]
    if name == "cross":
        arm = np.array([[1, -0.3], [1, 0.3], [0.3, 0.3]])  # one of four
        turns = [np.array([[1, 0], [0, 1]]), np.array([[0, -1], [1, 0]])]
        turns += [-turn for turn in turns]
        return [np.concatenate([arm @ turn.T for turn in turns])]
    if name == "rectangle":
        return [np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])]
    return [circle]


def _overlap(box: np.ndarray, boxes: np.ndarray) -> float:
    """The largest intersection of ``box`` (1, 4) with one of (M, 4), over the smaller box's area;
    0 for M = 0."""
    sides = np.minimum(box[:, 2:], boxes[:, 2:]) - np.maximum(box[:, :2], boxes[:, :2])
    area, areas = ((b[:, 2:] - b[:, :2]).prod(1) for b in (box, boxes))
    return (sides.clip(0).prod(1) / np.minimum(area, areas)).max(initial=0)


def _paint(rng: np.random.Generator, patch: np.ndarray, mask: np.ndarray) -> None:
    """Blends a random colour that stands out into ``patch`` (h, w, 3) where ``mask`` (h, w) is."""
    pixels = patch[mask > 0.5]
    pixels = pixels[:: max(1, len(pixels) // 256)]
    colors = rng.uniform(0, 255, (32, 3)).astype(np.float32)
    distances = np.linalg.norm(pixels[None] - colors[:, None], axis=2)
    contrasts = np.quantile(distances, 0.1, axis=1)
    enough = contrasts >= MIN_CONTRAST
    color = colors[enough.argmax() if enough.any() else contrasts.argmax()]
    patch += mask[..., None] * (color - patch)


def _draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float32: two related colours mixed by a texture, or by two of them."""
    field = _draw_texture(rng, height, width)
    if rng.random() < 0.4:
        share = _draw_texture(rng, height, width, "blobs")
        field = share * field + (1 - share) * _draw_texture(rng, height, width)
    color = rng.uniform(0, 255, 3)
    other = (color + rng.uniform(-90, 90, 3)).clip(0, 255)
    return (color + field[..., None] * (other - color)).astype(np.float32)


def _draw_texture(rng: np.random.Generator, height: int, width: int, kind: str = "") -> np.ndarray:
    """(H, W) float32 in 0 to 1: a gradient, stripes, a checker or smooth blobs."""
    kind = kind or rng.choice(["gradient", "stripes", "checker", "blobs"])
    if kind == "blobs":
        grid = rng.random(rng.integers(3, 12, 2), dtype=np.float32)
        field = cv2.resize(grid, (int(width), int(height)), interpolation=cv2.INTER_CUBIC)
        return field.clip(0, 1)
    angle, period = rng.uniform(0, 2 * np.pi), rng.uniform(12, 60)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    if kind == "gradient":
        return (along - along.min()) / np.ptp(along)
    field = np.sin(along * np.float32(2 * np.pi / period))
    if kind == "checker":
        across = np.float32(-np.sin(angle)) * x + np.float32(np.cos(angle)) * y
        field = field * np.sin(across * np.float32(2 * np.pi / period))
    return (field * np.float32(rng.uniform(1, 20)) + 0.5).clip(0, 1)  # soft to hard edges
