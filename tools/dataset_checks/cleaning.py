"""A cleaned copy of a data set in COCO's format."""

import math
from typing import Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np

from dataset_checks.reading import DataSet, ImageFile, object_key
from ssd.data.boxes import xyxy_boxes


class Fit(NamedTuple):
    size: Tuple[int, int]  # (height, width) that the copy states
    scale: Tuple[float, float] = (1.0, 1.0)  # of the boxes, along x and y
    change: str = ""


def clean(data: DataSet, leaked: Sequence[int] = ()) -> Tuple[dict, List[str]]:
    """The content of a COCO file without what is wrong, and a line for each change.

    Left out: what the reader couldn't read; images that can't be read, that are copies of an
    earlier one or among ``leaked``, or whose annotated size can't be reconciled with the file;
    boxes without area, outside their image, or with the class and place of an earlier one. Changed:
    an annotated size that is the file's in another scale (the boxes are scaled along) or with the
    sides exchanged; boxes are clipped to the image; a copy's objects move to the image that stays.
    Only boxes are written, no masks or key points, but a mask's area is kept.

    Args:
        leaked: indices of images that a test set has, too.
    """
    keep_ids = all(isinstance(record["image_id"], int) for record in data.records)
    images, annotations, changes, originals = [], [], list(data.changes), {}
    for index, (record, file) in enumerate(zip(data.records, data.files)):
        place, fit = data.place(index), _fit(record, file)
        if file.error:
            changes.append(f"{place}: left out, it can't be read")
        elif index in leaked:
            changes.append(f"{place}: left out, a test set has it, too")
        elif fit is None:
            size = f"{record['width']}x{record['height']}"
            changes.append(f"{place}: left out, annotated {size}, not as the file")
        else:
            is_copy = file.digest in originals
            if not is_copy:
                image_id = record["image_id"] if keep_ids else len(images) + 1
                image = {"id": image_id, "file_name": place, "height": fit.size[0]}
                images.append({**image, "width": fit.size[1]})
                originals[file.digest] = images[-1], set()
            image, seen = originals[file.digest]
            if fit.size != (image["height"], image["width"]):
                other = f"{image['file_name']} of another size"
                changes.append(f"{place}: left out with its objects, a copy of {other}")
                continue
            if fit.change:
                changes.append(f"{place}: {fit.change}")
            boxes = list(_clean_boxes(record, fit, place, seen, changes))
            if is_copy:
                moved = f"{len(boxes)} of its {len(record['annotations'])} objects moved there"
                changes.append(f"{place}: left out, a copy of {image['file_name']}; {moved}")
            for box in boxes:
                box.update(id=len(annotations) + 1, image_id=image["id"])
                annotations.append({**box, "category_id": data.ids[box["category_id"]]})
    return {
        "info": {"description": f"{data.name}, cleaned"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in zip(data.ids, data.classes)],
    }, changes


def _fit(record: dict, file: ImageFile) -> Optional[Fit]:
    """How the annotated size goes with the file's, or None if it can't."""
    height, width = size = record["height"], record["width"]
    if file.error or size in file.sizes:
        return Fit(size)
    scale = file.size[1] / width, file.size[0] / height
    new = f"size {width}x{height} made {file.size[1]}x{file.size[0]}"
    if abs(height * scale[0] - file.size[0]) <= 1:
        return Fit(file.size, scale, f"{new}, its boxes scaled")
    inside = np.nanmax(xyxy_boxes(record["annotations"]), axis=0, initial=0)[2:]
    exchanged = size == file.size[::-1] and size != file.stored_size  # else a TIFF that is turned
    if exchanged and (inside <= np.array([file.size[1], file.size[0]]) + 1).all():
        return Fit(file.size, change=f"{new}, the sides were exchanged")
    return None


def _clean_boxes(
    record: dict, fit: Fit, place: str, seen: Set[tuple], changes: List[str]
) -> Iterator[dict]:
    """COCO's annotations, but with labels, of the objects that aren't among the keys ``seen``;
    adds theirs, and says in ``changes`` what happens to others."""
    height, width = fit.size
    boxes = xyxy_boxes(record["annotations"]) * np.tile(fit.scale, 2)
    clipped = np.clip(boxes, 0, [width, height, width, height])  # NaN stays NaN
    for n, (annotation, old, box) in enumerate(zip(record["annotations"], boxes, clipped)):
        key = object_key(annotation, box)
        if not (np.isfinite(old).all() and (box[2:] > box[:2]).all()):
            changes.append(f"{place}: object {n} left out, without area in the image")
        elif key in seen:
            changes.append(f"{place}: object {n} left out, the same as another")
        else:
            seen.add(key)
            x, y, w, h = *box[:2].tolist(), *(box[2:] - box[:2]).tolist()
            area = annotation.get("area")  # of a mask, by which COCO's AP tells small from large
            valid = isinstance(area, (int, float)) and 0 < area < math.inf
            area = area * fit.scale[0] * fit.scale[1] if valid else w * h
            if (old != box).any():
                changes.append(f"{place}: object {n} clipped from {old.round(2).tolist()}")
                area = min(area, w * h)
            ids = {"category_id": annotation["category_id"], "iscrowd": key[1]}
            yield {"bbox": [x, y, w, h], "area": area, **ids}
