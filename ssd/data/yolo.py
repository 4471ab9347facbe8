"""Data sets in YOLO's format."""

import collections
import logging
import os
import reprlib
from typing import Sequence

import yaml
from detectron2.structures import BoxMode

from ssd.data.files import IMAGE_EXTENSIONS, image_size, read_text, require

__all__ = ["read_class_names", "read_yolo"]

logger = logging.getLogger(__name__)

# where names of classes are looked for
_CLASS_FILES = ("data.yaml", "classes.txt")


def read_yolo(
    images: str,
    labels: str,
    class_names: Sequence[str],
    key: str = "DATASETS.REGISTER.<name>",
) -> list[dict]:
    """Reads text files as YOLO takes them: per object a line ``class cx cy w h``.

    ``class`` counts from 0, the others are the box's centre and sides as fractions of the image's
    width and height. An image without a label file has no objects.

    Args:
        images: a folder, whose images are read with those of its folders, by name; or a .txt file
            with the path of an image per line, absolute or relative to the folder of that file.
        labels: folder of the label files, which are named as the images (those of a folder are in
            the same folder here). "": they lie where the last folder named ``images`` of an
            image's path is replaced by ``labels``, beside the image if it has none.
        class_names: in the order of the labels.
        key: of the config, for error messages.

    Returns:
        a dict per image in Detectron2's format. ``image_id`` is its path relative to the folder of
        ``images``; height and width come from the file's header, turned as EXIF says; boxes are
        XYXY in pixels.

    Raises:
        FileNotFoundError: there is no ``images``, or no label file for any of them.
        ValueError: with every image that can't be read, every line that isn't as above (its file,
            number and defect), and every file in ``labels`` of two images of a list.
    """
    require(images, f"{key}.IMAGES")
    is_list = images.endswith(".txt")
    root = os.path.dirname(images) if is_list else images
    names = _listed_images(images, f"{key}.IMAGES") if is_list else _images_in(images)
    records, problems, label_files = [], [], []
    for name in names:
        file_name = os.path.join(root, name)
        try:
            height, width = image_size(file_name)
        except (OSError, ValueError) as error:  # names the file
            problems.append(str(error))
            continue
        record = {"file_name": file_name, "image_id": name, "height": height, "width": width}
        stem = os.path.splitext(os.path.basename(name) if is_list else name)[0]
        label_files.append(os.path.join(labels, f"{stem}.txt") if labels else _labels_of(file_name))
        record["annotations"], found = _yolo_annotations(
            label_files[-1], (height, width), class_names
        )
        problems += found
        records.append(record)
    counts = collections.Counter(label_files)
    shared = [
        f"{path} is of {n} images of one name"
        for path, n in counts.items()
        if n > 1 and os.path.isfile(path)
    ]
    if is_list and labels:  # images of several folders
        problems += shared
    elif shared:  # copies in two formats, perhaps
        logger.warning(f"{images}: {shared[0]}" + f", {len(shared) - 1} more" * (len(shared) > 1))
    if problems:
        more = [f"and {len(problems) - 50} more"] if len(problems) > 50 else []
        raise ValueError(f"{key}: {len(problems)} errors:\n" + "\n".join(problems[:50] + more))
    missing = sum(not os.path.isfile(path) for path in label_files)
    if records and missing == len(records):
        require(label_files[0], f"{key}.LABELS; no image has a label file")
    if missing:
        logger.info(f"{images}: {missing} of {len(records)} images have no label file: no objects")
    if not (is_list or labels):  # which may be of several sets
        folders = {os.path.dirname(x) for x in label_files}
        folders -= {os.path.dirname(x["file_name"]) for x in records}  # notes may lie there
        paths = (os.path.join(x, y) for x in filter(os.path.isdir, folders) for y in os.listdir(x))
        spare = {x for x in paths if x.endswith(".txt")} - set(label_files)
        if spare:
            logger.warning(f"{images}: {len(spare)} label files are of no image: {min(spare)} …")
    return records


def _listed_images(path: str, key: str) -> list[str]:
    names = (line.strip() for line in read_text(path, key).split("\n"))
    return list(dict.fromkeys(os.path.normpath(name) for name in names if name))


def _images_in(folder: str) -> list[str]:
    """Paths relative to ``folder``, in order. A link counts if it leads to other folders."""
    paths, seen = [], set()
    for followlinks in (False, True):  # a link doesn't take the place of a folder
        for parent, folders, files in os.walk(folder, followlinks=followlinks):
            if (real := os.path.realpath(parent)) in seen:
                if parent != folder and os.path.islink(parent):
                    folders.clear()
                continue
            seen.add(real)
            files = [file for file in files if file.lower().endswith(IMAGE_EXTENSIONS)]
            paths += [os.path.relpath(os.path.join(parent, file), folder) for file in files]
    return sorted(paths)


def _labels_of(file_name: str) -> str:
    path = os.path.splitext(file_name)[0]
    head, folder, tail = path.rpartition(os.path.join(os.sep, "images", ""))
    return os.path.join(head, "labels", f"{tail}.txt") if folder else f"{path}.txt"


def _yolo_annotations(
    path: str, size: tuple[int, int], class_names: Sequence[str]
) -> tuple[list[dict], list[str]]:
    """The annotations of a label file for an image of ``size`` (height, width), and what is wrong
    with its lines."""
    if not os.path.isfile(path):
        return [], []
    annotations, problems = [], []
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        for number, line in enumerate(f, 1):
            fields = line.split()
            if not fields:
                continue
            if defect := _yolo_defect(fields, len(class_names)):
                problems.append(f"{path}, line {number}: {defect}: {line.strip()[:80]!r}")
                continue
            cx, cy, w, h = (float(value) for value in fields[1:])
            height, width = size
            box = [(cx - w / 2) * width, (cy - h / 2) * height]
            box += [(cx + w / 2) * width, (cy + h / 2) * height]
            annotation = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 0}
            annotations.append({**annotation, "category_id": int(float(fields[0]))})
    return annotations, problems


def _yolo_defect(fields: Sequence[str], num_classes: int) -> str:
    if len(fields) != 5:
        return f"{len(fields)} values, not class cx cy w h"
    try:
        label, *box = map(float, fields)
    except ValueError:
        return "not five numbers"
    if not (label.is_integer() and 0 <= label < num_classes):
        return f"class {fields[0]} isn't one of 0 to {num_classes - 1}"
    if not all(-0.01 <= value <= 1.01 for value in box):  # rounded
        return "cx cy w h aren't fractions from 0 to 1"
    return ""


def read_class_names(root: str, file_name: str, key: str) -> list[str]:
    """Names from ``file_name`` in ``root``, or if it is "" from the first of _CLASS_FILES there."""
    paths = [os.path.join(root, name) for name in ([file_name] if file_name else _CLASS_FILES)]
    path = next(filter(os.path.isfile, paths), paths[-1])
    others = f", nor does {paths[0]}" if len(paths) > 1 else ""
    require(path, f"{key}.CLASSES, which may be a list of names or a file{others}")
    text = read_text(path, f"{key}.CLASSES")
    if path.endswith((".yaml", ".yml")):
        try:
            content = yaml.load(text, Loader=yaml.BaseLoader)  # strings only: a class may be "no"
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML ({key}.CLASSES): {error}") from None
        names = content.get("names") if isinstance(content, dict) else None
        if isinstance(names, dict):
            names = [names.get(str(i)) for i in range(len(names))]
    else:
        names = [line.strip() for line in text.split("\n") if line.strip()]
    valid = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    if not valid or len(set(names)) < len(names):
        raise ValueError(
            f"{key}.CLASSES: {path} needs different names of the classes 0, 1, …, got "
            f"{reprlib.repr(names)}"
        )
    return names
