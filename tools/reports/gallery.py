"""Thumbnails of mistakes, as JPEG in data URIs."""

import base64
from typing import Optional

import cv2
import numpy as np

SIDE = 320  # pixels of a thumbnail's longer side, at most
_QUALITY = 75
_OBJECT, _DETECTION = (233, 180, 86), (0, 159, 230)  # BGR: Okabe and Ito's sky blue and orange


def thumbnail(
    image: np.ndarray, detection: Optional[np.ndarray] = None, truth: Optional[np.ndarray] = None
) -> str:
    """A crop around the boxes as a data URI: the object's dashed, the detection's with a full line.

    Args:
        image: (H, W, 3) uint8, BGR.
        detection, truth: (4,) XYWH in pixels; at least one of them.
    """
    boxes = np.array([box for box in (detection, truth) if box is not None], float)
    boxes[:, 2:] += boxes[:, :2]
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    margin = np.maximum(0.4 * (high - low).max(), 16)
    bounds = np.array(image.shape[1::-1])
    low = np.clip(np.floor(low - margin), 0, bounds - 1).astype(int)
    high = np.clip(np.ceil(high + margin), low + 1, bounds).astype(int)
    crop = image[low[1] : high[1], low[0] : high[0]]
    scale = SIDE / max(crop.shape[:2])
    size = [max(1, int(round(scale * side))) for side in crop.shape[1::-1]]
    crop = cv2.resize(crop, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    for box, color, dash in ((truth, _OBJECT, 8), (detection, _DETECTION, 0)):
        if box is not None:
            corners = np.concatenate([box[:2], box[:2] + box[2:]])
            corners = (corners - np.tile(low, 2)) * scale
            _rectangle(crop, corners.clip(1, np.tile(size, 2) - 2), color, dash)
    data = cv2.imencode(".jpg", crop, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1]
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def _rectangle(image: np.ndarray, box: np.ndarray, color: tuple, dash: int) -> None:
    """Of (4,) XYXY; over a black one, to be seen on any ground. ``dash``: length in pixels or 0."""
    x1, y1, x2, y2 = box
    corners = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)])
    for a, b in zip(corners, corners[1:]):
        pieces = max(1, int(np.abs(b - a).max() / (2 * dash))) if dash else 1
        steps = np.linspace(0, 1, 2 * pieces + 1) if dash else np.array([0, 1])
        for start, end in zip(steps[::2], steps[1::2]):
            ends = [np.round(a + (b - a) * t).astype(int).tolist() for t in (start, end)]
            cv2.line(image, *ends, (0, 0, 0), 5)
            cv2.line(image, *ends, color, 3)
