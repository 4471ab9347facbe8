"""A cleaned copy of a data set in COCO's format."""

from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from dataset_checks.reading import DataSet, ImageFile
from ssd.data.boxes import xyxy_boxes


class Fit(NamedTuple):
    size: Tuple[int, int]  # (height, width) that the copy states
    scale: Tuple[float, float] = (1.0, 1.0)  # of the boxes, along x and y
    change: str = ""


def clean(data: DataSet, leaked: Sequence[int] = ()) -> Tuple[dict, List[str]]:
    """The content of a COCO file without what is wrong, and a line for each change.

    Left out: images that can't be read, that are copies of an earlier one or among ``leaked``, or
    whose annotated size can't be reconciled with the file; boxes without area, outside their image,
    or with the class and place of an earlier one. Changed: an annotated size that is the file's in
    another scale (the boxes are scaled along) or with the sides exchanged; boxes are clipped to the
    image. Class i becomes category i + 1. Only boxes are written, no masks or key points.

    Args:
        leaked: indices of images that a test set has, too.
    """
    keep_ids = all(isinstance(record["image_id"], int) for record in data.records)
    images, annotations, changes, originals = [], [], [], {}
    for index, (record, file) in enumerate(zip(data.records, data.files)):
        place, fit = data.place(index), _fit(record, file)
        if file.error:
            changes.append(f"{place}: left out, it can't be read")
        elif file.digest in originals:
            changes.append(f"{place}: left out, a copy of {originals[file.digest]}")
        elif index in leaked:
            changes.append(f"{place}: left out, a test set has it, too")
        elif fit is None:
            size = f"{record['width']}x{record['height']}"
            changes.append(f"{place}: left out, annotated {size}, not as the file")
        else:
            originals[file.digest] = place
            if fit.change:
                changes.append(f"{place}: {fit.change}")
            image_id = record["image_id"] if keep_ids else len(images) + 1
            image = {"id": image_id, "file_name": place, "height": fit.size[0]}
            images.append({**image, "width": fit.size[1]})
            for annotation, (x1, y1, x2, y2) in _clean_boxes(record, fit, place, changes):
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                box.update(id=len(annotations) + 1, image_id=image_id)
                box.update(category_id=annotation["category_id"] + 1)
                annotations.append({**box, "iscrowd": annotation.get("iscrowd", 0)})
    return {
        "info": {"description": f"{data.name}, cleaned"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(data.classes)],
    }, changes


def _fit(record: dict, file: ImageFile) -> Optional[Fit]:
    """How the annotated size goes with the file's, or None if it can't."""
    height, width = size = record["height"], record["width"]
    if file.error or size in (file.size, file.stored_size):
        return Fit(size)
    scale = file.size[1] / width, file.size[0] / height
    new = f"size {width}x{height} made {file.size[1]}x{file.size[0]}"
    if abs(height * scale[0] - file.size[0]) <= 1:
        return Fit(file.size, scale, f"{new}, its boxes scaled")
    inside = np.nanmax(xyxy_boxes(record["annotations"]), axis=0, initial=0)[2:]
    if size == file.size[::-1] and (inside <= np.array([file.size[1], file.size[0]]) + 1).all():
        return Fit(file.size, change=f"{new}, the sides were exchanged")
    return None


def _clean_boxes(record: dict, fit: Fit, place: str, changes: List[str]) -> Iterator[tuple]:
    """(annotation, XYXY box) of those that stay; says in ``changes`` what happens to others."""
    height, width = fit.size
    boxes = xyxy_boxes(record["annotations"]) * np.tile(fit.scale, 2)
    clipped = np.clip(boxes, 0, [width, height, width, height])  # NaN stays NaN
    seen = set()
    for n, (annotation, old, box) in enumerate(zip(record["annotations"], boxes, clipped)):
        key = (annotation["category_id"], *box.round())
        if not (box[2:] > box[:2]).all():  # NaN, too
            changes.append(f"{place}: object {n} left out, without area in the image")
        elif key in seen:
            changes.append(f"{place}: object {n} left out, the same as another")
        else:
            seen.add(key)
            if (old != box).any():
                changes.append(f"{place}: object {n} clipped from {old.round(2).tolist()}")
            yield annotation, box.tolist()
