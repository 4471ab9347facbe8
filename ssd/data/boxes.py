"""The boxes of data set dicts: as an array, and what is wrong with them."""

import math
from typing import Sequence

import numpy as np
from detectron2.structures import BoxMode

__all__ = ["box_defect", "find_box_defects", "xyxy_boxes"]


def find_box_defects(dataset_dicts: Sequence[dict], class_names: Sequence[str] = ()) -> list[str]:
    """Describes the boxes that no detector could find.

    Args:
        dataset_dicts: in Detectron2's format.
        class_names: to name the classes; without them their numbers are given.

    Returns:
        a line for each box that isn't finite, has zero or negative width or height, or lies
        outside its image: "FILE: object 3 (RBC) has zero width: [5.0, 5.0, 5.0, 9.0]" (XYXY).

    Raises:
        ValueError: for a ``bbox`` that isn't four values, with its file.
    """
    lines = []
    for record in dataset_dicts:
        annotations = record.get("annotations", [])
        for index, annotation in enumerate(annotations):
            box = annotation.get("bbox")
            if not (isinstance(box, (list, tuple, np.ndarray)) and len(box) == 4):
                text = f"object {index} has bbox {box!r}, expected 4 numbers"
                raise ValueError(f"{record['file_name']}: {text}")
            if "bbox_mode" not in annotation:
                text = f"object {index} has no bbox_mode, expected BoxMode.XYXY_ABS or XYWH_ABS"
                raise ValueError(f"{record['file_name']}: {text}")
        for index, box in enumerate(xyxy_boxes(annotations).tolist()):
            defect = box_defect(box, record)
            if defect:
                label = annotations[index]["category_id"]
                label = class_names[label] if class_names else f"class {label}"
                lines.append(f"{record['file_name']}: object {index} ({label}) {defect}")
    return lines


def xyxy_boxes(annotations: Sequence[dict]) -> np.ndarray:
    """The boxes of M annotations (XYXY_ABS or XYWH_ABS) as (M, 4) float64 XYXY in pixels."""
    boxes = np.array([x["bbox"] for x in annotations], dtype=np.float64)
    boxes = boxes.reshape(len(annotations), 4)
    modes = {x["bbox_mode"] for x in annotations}
    if unknown := modes - {BoxMode.XYXY_ABS, BoxMode.XYWH_ABS}:
        raise ValueError(f"bbox_mode: XYXY_ABS or XYWH_ABS, got {unknown}")
    if BoxMode.XYWH_ABS in modes:
        xywh = [x["bbox_mode"] == BoxMode.XYWH_ABS for x in annotations]
        boxes[xywh, 2:] += boxes[xywh, :2]
    return boxes


def box_defect(box: Sequence[float], record: dict) -> str:
    x1, y1, x2, y2 = box
    if not all(math.isfinite(value) for value in box):
        return f"isn't finite: {box}"
    for side, length in (("width", x2 - x1), ("height", y2 - y1)):
        if length <= 0:
            return f"has {'negative' if length < 0 else 'zero'} {side}: {box}"
    width, height = (record.get(side) or math.inf for side in ("width", "height"))
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        return f"lies outside the image of {width}x{height}: {box}"
    return ""
