"""The checks of tools/doctor.py: files, boxes, classes, sizes, and what two sets share.

Sizes are (height, width), boxes XYXY in pixels of the image.
"""

import os
import re
from collections import defaultdict
from typing import Dict, List, Sequence, Tuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from dataset_checks.reading import DARK, DataSet, Finding, ImageFile, object_key
from ssd.data.boxes import find_box_defects, xyxy_boxes

ALIKE = 0.97  # correlation of two thumbnails
SMALL = 8  # pixels of the network's input
FEW = 20  # objects of a class


class _Findings(list):
    def add(self, places: Sequence[str], text: str, advice: str, level: str = "WARNING") -> None:
        """Adds a finding if there are any places; "{}" in the text is their number."""
        if places:
            self.append(Finding(level, text.format(len(places)), places, advice))


def check_files(data: DataSet) -> List[Finding]:
    """Readability, size, EXIF orientation, and copies within the set."""
    unreadable, sizes, as_stored, unclear, dark, turned = [], [], [], [], [], 0
    for index, (record, file) in enumerate(zip(data.records, data.files)):
        size, place = (record["height"], record["width"]), data.place(index)
        if file.error:
            unreadable.append(file.error.replace(data.root + os.sep, ""))
        elif size not in file.sizes:
            sizes.append(f"{place}: annotated {_wh(size)}, the file has {_wh(file.size)}")
        elif file.orientation > 1 and file.stored_size == file.size:
            unclear.append(f"{place}: orientation {file.orientation}")
        elif size != file.size:
            as_stored.append(f"{place}: annotated {_wh(size)}, turned {_wh(file.size)}")
        turned += file.orientation > 1
        if file.brightest < DARK:
            dark.append(f"{place}: at most {file.brightest} of 255")
    findings = _Findings()
    advice = "Training stops at such a file: replace it or take it out of the annotations."
    findings.add(unreadable, "files: {} can't be read", advice, "ERROR")
    advice = "Training stops there. If they were resized after annotating, scale the boxes along."
    findings.add(sizes, "files: {} of another size than annotated", advice, "ERROR")
    if not findings:
        count = len(data.files)
        findings.append(Finding("OK", f"files: all {count} readable and of the annotated size"))
    advice = "Of 16 bits training takes the upper 8: scale 12-bit images to the whole range."
    findings.add(dark, "files: {} are nearly black", advice)
    advice = (
        "Training takes them as stored, but viewers and demos turn them: turn the files "
        "(mogrify -auto-orient) and their boxes."
    )
    findings.add(as_stored, "EXIF: {} were annotated unturned", advice)
    advice = "Training turns them: check that their boxes were drawn on the turned image."
    findings.add(unclear, "EXIF: {} are turned without a change of size", advice)
    if turned and not (as_stored or unclear):
        findings.append(Finding("OK", f"EXIF: {turned} are turned by it, and annotated so"))
    copies = {False: [], True: []}  # by whether their objects differ
    for group in _by_content(data).values():
        if len(group) > 1:
            views = {_view(data.records[index]) for index in group}
            differ = len(views) > len({size for size, _ in views})
            copies[differ].append(" = ".join(map(data.place, group)))
    findings.add(copies[False], "copies: {} files are there more than once", "Keep one of each.")
    advice = "Each teaches that the other's objects are background: keep one with all (--fix)."
    text = "copies: {} times the same image with different objects"
    findings.add(copies[True], text, advice, "ERROR")
    return findings


def _view(record: dict) -> tuple:
    """Size and objects, to compare an image's entries."""
    annotations = record["annotations"]
    boxes = xyxy_boxes(annotations)
    keys = {object_key(a, box) for a, box in zip(annotations, boxes) if np.isfinite(box).all()}
    return (record["height"], record["width"]), frozenset(keys)


def check_leaks(train: DataSet, test: DataSet) -> Tuple[List[Finding], List[int]]:
    """Images that both sets have, exactly or nearly; and the indices of the exact ones in train."""
    first, second = _by_content(train), _by_content(test)
    same = [digest for digest in first if digest in second]
    title, findings = f"{train.name} and {test.name}", _Findings()
    places = [f"{train.place(first[d][0])} = {test.place(second[d][0])}" for d in same]
    advice = "A result on images of the training says nothing: take them out of one set."
    findings.add(places, f"{title}: {{}} files are in both", advice, "ERROR")
    alike = _most_alike(train.files, test.files)
    places = [f"{train.place(i)} ~ {test.place(j)}" for i, j in alike]
    text = f"{title}: {{}} of {len(test.files)} test images look like a training image"
    advice = "Look at them: copies in another size, or frames of one scene, make results too good."
    findings.add(places, text, advice)
    if not findings:
        findings.append(Finding("OK", f"{title}: no image in both, none that look alike"))
    return findings, sorted(i for digest in same for i in first[digest])


def _by_content(data: DataSet) -> Dict[bytes, List[int]]:
    groups = defaultdict(list)
    for index, file in enumerate(data.files):
        if not file.error:
            groups[file.digest].append(index)
    return groups


def _most_alike(train: Sequence[ImageFile], test: Sequence[ImageFile]) -> List[Tuple[int, int]]:
    """Of each test file whose thumbnail correlates with a training file's by ALIKE at least,
    whatever their brightness: the most alike one and itself. Copies don't count."""
    copies = {file.digest for file in train}
    rows = [i for i, file in enumerate(train) if not file.error]
    tests = [j for j, file in enumerate(test) if not (file.error or file.digest in copies)]
    if not (rows and tests):
        return []
    thumbnails, pairs = np.stack([train[i].thumbnail for i in rows]), []
    for start in range(0, len(tests), 256):  # as many floats for each training image at a time
        chunk = tests[start : start + 256]
        correlation = thumbnails @ np.stack([test[j].thumbnail for j in chunk]).T
        best = zip(correlation.argmax(0), correlation.max(0), chunk)
        pairs += [(rows[i], j) for i, value, j in best if value >= ALIKE]
    return pairs


def check_boxes(data: DataSet) -> List[Finding]:
    """Boxes without area, beyond the image, of the whole image, and copies of others."""
    beyond, whole, copies, rivals = [], [], [], []
    as_corners = 0  # of those beyond, which would fit if their four numbers were x1, y1, x2, y2
    for index, record in enumerate(data.records):
        image = np.array([record["width"], record["height"]])
        boxes = xyxy_boxes(record["annotations"])
        sides = boxes[:, 2:] - boxes[:, :2]
        seen = {}
        for n in np.flatnonzero((sides > 0).all(1) & np.isfinite(boxes).all(1)).tolist():
            annotation, box = record["annotations"][n], boxes[n]
            label = annotation["category_id"]
            place = f"{data.place(index)}: object {n} ({data.classes[label]}): {box.tolist()}"
            touches = (box[2:] > 0).all() and (box[:2] < image).all()
            if touches and ((box[:2] < -1).any() or (box[2:] > image + 1).any()):
                beyond.append(f"{place} in {image[0]}x{image[1]}")
                numbers = np.array(annotation["bbox"])
                as_corners += (numbers[:2] < numbers[2:]).all() and (numbers[2:] <= image).all()
            if (sides[n] >= 0.98 * image).all():
                whole.append(place)
            key = object_key({**annotation, "category_id": 0}, box)
            other, other_label = seen.setdefault(key, (n, label))
            if other != n:
                (copies if label == other_label else rivals).append(f"{place}, as object {other}")
    findings = _Findings()
    lines = find_box_defects(data.records, data.classes)
    defects = [line.replace(data.root + os.sep, "") for line in lines]
    advice = "Training leaves them out: correct them."
    if MetadataCatalog.get(data.name).get("json_file"):  # whose own objects COCO's numbers are of
        advice = "Training leaves them out, the evaluation counts them as missed: correct them."
    findings.add(defects, "boxes: {} without area or outside the image", advice)
    advice = "Training clips them to the image, the evaluation doesn't."
    if as_corners > 0.8 * len(beyond):
        advice = "They would fit as x1, y1, x2, y2, but COCO's are x, y, width, height."
    findings.add(beyond, "boxes: {} reach beyond the image", advice)
    findings.add(copies, "boxes: {} have the class and place of another", "Keep one of each.")
    advice = "Only one of two can be learnt: take one out."
    findings.add(rivals, "boxes: {} have the place of another class's", advice)
    if not findings:
        count = sum(len(record["annotations"]) for record in data.records)
        findings.append(Finding("OK", f"boxes: {count} inside their images, none twice"))
    level = "WARNING" if len(whole) > 0.05 * len(data.records) else "OK"
    advice = "Check that no label of an image was made a box."
    findings.add(whole, "boxes: {} cover the whole image", advice, level)
    return findings


def check_objects(data: DataSet, cfg: CfgNode) -> Tuple[List[Finding], List[str]]:
    """Classes, objects of an image, and their sizes at the network's input; crowds don't count.

    Returns:
        the findings, and the lines of a table of the classes.
    """
    boxes, input_size = cfg.MODEL.SSD.DEFAULT_BOXES, cfg.MODEL.SSD.INPUT_SIZE
    smallest = min(boxes.MIN_SIZES[0], boxes.FIRST_SQUARE or boxes.MIN_SIZES[0])
    labels, images, sides = _objects(data, input_size)
    counts = np.bincount(images, minlength=len(data.records))
    findings = _check_classes(data.classes, np.bincount(labels, minlength=len(data.classes)))

    text = f"objects per image: {counts.min()} to {counts.max()}, median {np.median(counts):.0f}"
    findings.append(Finding("OK", text))
    most = cfg.TEST.DETECTIONS_PER_IMAGE
    places = [f"{data.place(i)}: {n} objects" for i, n in enumerate(counts) if n > most]
    advice = f"TEST.DETECTIONS_PER_IMAGE {most} is the most that is detected: raise it."
    findings.add(places, f"objects: {{}} images have more than {most}", advice)
    empty = [data.place(i) for i in np.flatnonzero(counts == 0)]
    use = "learns from them what MODEL.SSD.LOSS.NEGATIVES_WITHOUT_POSITIVES says"
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        use = "leaves them out (DATALOADER.FILTER_EMPTY_ANNOTATIONS)"
    level = "WARNING" if len(empty) > 0.1 * len(counts) else "OK"
    advice = f"Training {use}. Check that nothing was forgotten there."
    findings.add(empty, "objects: {} images have none", advice, level)

    size = f"at the input's {_wh(input_size)}"
    table = [f"{'class':20} images objects  share  side, px {size}: 10 %  median    90 %"]
    too_small = []
    for label, name in enumerate(data.classes):
        own = labels == label
        quantiles = np.quantile(sides[own], [0.1, 0.5, 0.9]) if own.any() else [float("nan")] * 3
        share = own.sum() / max(len(own), 1)
        cells = "".join(f"{value:8.0f}" for value in quantiles)
        line = f"{name[:20]:20} {len(set(images[own])):6} {own.sum():7} {share:6.1%}"
        table.append(f"{line}{cells:>{len(table[0]) - len(line)}}")
        hopeless = (sides[own] < smallest / 2**0.5).mean() if own.any() else 0
        if hopeless > 0.1:
            too_small.append(f"{name}: {hopeless:.0%} can't reach IoU 0.5 with it")
    if len(sides):
        tiny = (sides < SMALL).mean()
        text = (
            f"sizes: {(sides < smallest).mean():.1%} of the objects are smaller than the "
            f"smallest default box, {smallest:g} px, {tiny:.1%} under {SMALL} px, {size}"
        )
        level = "WARNING" if too_small or tiny > 0.05 else "OK"
        advice = (
            "Lower MODEL.SSD.DEFAULT_BOXES.MIN_SIZES (see tools/analyze_default_boxes.py) and add "
            "a finer level, or raise MODEL.SSD.INPUT_SIZE."
        )
        findings.append(Finding(level, text, too_small, advice if level == "WARNING" else ""))
    return findings, table


def check_training(sets: Sequence[DataSet]) -> List[Finding]:
    """Whether the training sets have any object together."""
    if not sets or any(len(_objects(data, (1, 1))[0]) or not data.records for data in sets):
        return []
    advice = "Training stops with DATALOADER.FILTER_EMPTY_ANNOTATIONS, else it learns nothing."
    return [Finding("ERROR", "DATASETS.TRAIN has no object to learn", (), advice)]


def _objects(data: DataSet, input_size: Tuple[int, int]) -> Tuple[np.ndarray, ...]:
    """Of M objects that training can use: classes, numbers of their images, and the square roots
    of their areas in pixels of the network's input; (M,) each."""
    labels, images, sides = [], [], []
    for index, record in enumerate(data.records):
        objects = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
        image = np.array([record["width"], record["height"]])
        boxes = xyxy_boxes(objects)
        boxes = np.where(np.isfinite(boxes), np.clip(boxes, 0, np.tile(image, 2)), np.nan)
        wh = (boxes[:, 2:] - boxes[:, :2]) * np.array(input_size[::-1]) / np.maximum(image, 1)
        keep = np.flatnonzero((wh > 0).all(1))  # not NaN
        labels += [objects[i]["category_id"] for i in keep]
        images += [index] * len(keep)
        sides += np.sqrt(wh[keep].prod(1)).tolist()
    return np.array(labels, int), np.array(images, int), np.array(sides)


def _check_classes(names: Sequence[str], objects: np.ndarray) -> _Findings:
    findings, counts = _Findings(), list(zip(names, objects.tolist()))
    # KEEP_IDS names what a COCO file lacks "id 12"
    missing = [name for name, n in counts if n == 0 and not re.fullmatch(r"id \d+", name)]
    advice = "They can't be learnt, and their AP is NaN: check their names."
    findings.add(missing, "classes: {} without any object", advice)
    few = [f"{name}: {count}" for name, count in counts if 0 < count < FEW]
    findings.add(few, f"classes: {{}} with fewer than {FEW} objects", "Annotate more of them.")
    rare = [f"{name}: {n}" for name, n in counts if n >= FEW and 100 * n < objects.max()]
    advice = "Annotate more of them, or name a set of their images besides in DATASETS.TRAIN."
    findings.add(rare, "classes: {} of under 1 % of the most frequent one's objects", advice)
    if not findings:
        text = f"classes: {len(names)}, of {objects.min()} to {objects.max()} objects"
        findings.append(Finding("OK", text))
    return findings


def _wh(size: Tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
