"""Data sets named in the config: ``DATASETS.REGISTER`` maps a name to what Detectron2 registers."""

import difflib
import logging
import math
import os
import xml.etree.ElementTree as ET
from typing import Any, Optional, Sequence

import numpy as np
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from PIL import Image

from ssd.data.shapes import CLASSES as SHAPES_CLASSES
from ssd.data.shapes import SPLITS as SHAPES_SPLITS
from ssd.data.shapes import render_shapes

__all__ = [
    "check_class_count",
    "find_box_defects",
    "read_every_box",
    "read_voc",
    "read_yolo",
    "register_datasets",
    "xyxy_boxes",
]

logger = logging.getLogger(__name__)

# Keys of an entry besides FORMAT; None: must be given.
_KEYS = {
    "coco": {
        "ROOT": None,
        "ANNOTATIONS": None,
        "IMAGES": None,
        "CLASSES": [],
        "KEEP_IDS": False,
    },
    "voc": {"ROOT": None, "SPLIT": None, "CLASSES": None, "USE_DIFFICULT": False},
    "yolo": {"ROOT": None, "IMAGES": None, "LABELS": "", "CLASSES": []},
    "shapes": {"SPLIT": None, "ROOT": "shapes"},
}
# FORMAT yolo: what counts as an image in a folder, and where names of classes are looked for.
_IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_CLASS_FILES = ("data.yaml", "classes.txt")
_registered = {}  # name -> entry, of those registered here


def register_datasets(cfg: CfgNode) -> None:
    """Registers each entry of ``cfg.DATASETS.REGISTER`` with Detectron2; reads no file yet.

    An entry is one of (ROOT is relative to ``$DETECTRON2_DATASETS``, by default ``datasets``)::

        {FORMAT: coco, ROOT: mydata, ANNOTATIONS: train.json, IMAGES: images, CLASSES: [optional],
         KEEP_IDS: False}
        {FORMAT: voc, ROOT: bccd, SPLIT: train, CLASSES: [RBC, WBC], USE_DIFFICULT: False}
        {FORMAT: yolo, ROOT: fruit, IMAGES: images/train, LABELS: "", CLASSES: [optional]}
        {FORMAT: shapes, SPLIT: val, ROOT: shapes}

    CLASSES of a COCO file must be its categories in the order of their ids. With KEEP_IDS class i
    is category id i + 1, and the classes are as many as the largest id: 90 for COCO, as in the
    models of torchvision and TensorFlow. An id that isn't in the file, say 12, is a class named
    "id 12", also in CLASSES; both evaluators ignore its detections.

    Objects of a VOC folder that are marked difficult get ``iscrowd: 1``, unless USE_DIFFICULT:
    training and both evaluators ignore them.

    ``yolo``: IMAGES is a folder, or a .txt file with the path of an image per line, relative to
    ROOT; LABELS is a folder of text files (see :func:`read_yolo`). CLASSES are names, or the file
    that holds them: ``names`` of a YAML file, otherwise a name per line; by default data.yaml or
    classes.txt in ROOT.

    ``shapes`` is rendered into ROOT at its first use (ssd.data.shapes).

    An entry of the same name registered here earlier is replaced.

    Raises:
        ValueError: for a wrong entry, or a name that is registered by someone else.
    """
    for name, node in cfg.DATASETS.REGISTER.items():
        entry = _check_entry(name, node)
        if _registered.get(name) == entry and name in DatasetCatalog:
            continue
        if name in _registered:
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)
        elif name in DatasetCatalog:
            raise ValueError(
                f"DATASETS.REGISTER.{name}: a data set of this name is registered by Detectron2 "
                "or your own code; choose another name"
            )
        prepare = {"coco": _coco, "voc": _voc, "yolo": _yolo, "shapes": _shapes}[entry["FORMAT"]]
        load, metadata = prepare(name, entry)
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**metadata)
        _registered[name] = entry


def check_class_count(cfg: CfgNode) -> None:
    """Checks that all data sets of DATASETS.TRAIN and TEST have the model's classes.

    A data set whose entry doesn't list its CLASSES is read for this.

    Raises:
        ValueError: for an unknown data set, one whose class count isn't MODEL.SSD.NUM_CLASSES,
            or classes that differ in name or order between the data sets.
    """
    first = None
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog:
                raise ValueError(
                    f"DATASETS.{key}: data set {name!r} is neither in DATASETS.REGISTER nor known "
                    f"to Detectron2{_hint(name, DatasetCatalog.list())}"
                )
            metadata = MetadataCatalog.get(name)
            if metadata.get("thing_classes") is None:
                DatasetCatalog.get(name)
            if metadata.get("thing_classes") is None:
                raise ValueError(
                    f"data set {name!r} has no class names: "
                    f"MetadataCatalog.get({name!r}).thing_classes = [...] where it is registered"
                )
            classes = list(metadata.thing_classes)
            where = f"MetadataCatalog.get({name!r}).thing_classes"
            if name in _registered:
                where = f"DATASETS.REGISTER.{name}.CLASSES"
            if len(classes) != cfg.MODEL.SSD.NUM_CLASSES:
                raise ValueError(
                    f"data set {name!r} has {len(classes)} classes ({', '.join(classes[:10])}"
                    f"{', …' if len(classes) > 10 else ''}) but MODEL.SSD.NUM_CLASSES is "
                    f"{cfg.MODEL.SSD.NUM_CLASSES}; change this key or {where}"
                )
            first = first or (name, classes)
            if classes != first[1]:
                raise ValueError(
                    f"the classes of data set {name!r}, {classes}, aren't those of {first[0]!r}, "
                    f"{first[1]}: names and order must agree ({where})"
                )


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
            defect = _box_defect(box, record)
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


def _box_defect(box: Sequence[float], record: dict) -> str:
    x1, y1, x2, y2 = box
    if not all(math.isfinite(value) for value in box):
        return f"isn't finite: {box}"
    for side, length in (("width", x2 - x1), ("height", y2 - y1)):
        if length <= 0:
            return f"has {'negative' if length < 0 else 'zero'} {side}: {box}"
    width, height = record.get("width", math.inf), record.get("height", math.inf)
    if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        return f"lies outside the image of {width}x{height}: {box}"
    return ""


def read_voc(
    root: str,
    split: str,
    class_names: Sequence[str],
    use_difficult: bool = False,
    key: str = "DATASETS.REGISTER.<name>",
) -> list[dict]:
    """Reads a folder in the format of Pascal VOC.

    Args:
        root: holds Annotations/ID.xml, ImageSets/Main/SPLIT.txt (an ID per line), and
            JPEGImages/ID.jpg, or ID with the extension of <filename>.
        split: the name of the list.
        class_names: in the order of the labels.
        use_difficult: difficult objects get ``iscrowd`` 0 instead of 1.
        key: of the config, for error messages.

    Returns:
        a dict per image in Detectron2's format, ``image_id`` being the ID. Boxes are XYXY in
        pixels, 0-based: VOC's 1-based inclusive corners xmin, ymin, xmax, ymax become xmin - 1,
        ymin - 1, xmax, ymax. One with xmin = xmax, a pixel wide by VOC's rule but a slip of the
        hand in practice, gets zero width, likewise for y; what isn't a number is NaN.

    Raises:
        FileNotFoundError: naming the missing file and the config key.
        ValueError: for XML that cannot be read or a class that isn't in ``class_names``.
    """
    list_file = os.path.join(root, "ImageSets", "Main", f"{split}.txt")
    _require(list_file, f"{key}.SPLIT = {split!r}")
    image_folder = os.path.join(root, "JPEGImages")
    _require(image_folder, f"{key}.ROOT = {root!r}")
    images = set(os.listdir(image_folder))
    with open(list_file, encoding="utf-8") as f:
        ids = dict.fromkeys(line.strip() for line in f if line.strip())
    records = []
    for image_id in ids:
        xml_file = os.path.join(root, "Annotations", f"{image_id}.xml")
        _require(xml_file, f"{image_id!r} in {list_file}, {key}.SPLIT")
        try:
            tree = ET.parse(xml_file)
        except ET.ParseError as error:
            raise ValueError(f"{xml_file} is not valid XML: {error} ({key}.ROOT)") from None
        image = f"{image_id}.jpg"
        if image not in images:
            image = image_id + os.path.splitext(tree.findtext("filename", ""))[1]
        file_name = os.path.join(image_folder, image)
        if image not in images:
            _require(file_name, f"{image_id!r} in {list_file}, {key}.SPLIT")
        height, width = (int(_number(tree.find("size"), side)) for side in ("height", "width"))
        if height <= 0 or width <= 0:
            height, width = _image_size(file_name)
        record = {"file_name": file_name, "image_id": image_id, "height": height, "width": width}
        record["annotations"] = []
        for obj in tree.findall("object"):
            label = obj.findtext("name", "").strip()
            if label not in class_names:
                raise ValueError(
                    f"{xml_file}: unknown class {label!r}; {key}.CLASSES is {list(class_names)}"
                )
            difficult = _number(obj, "difficult") == 1 and not use_difficult
            annotation = {"bbox": _voc_box(obj), "bbox_mode": BoxMode.XYXY_ABS}
            annotation.update(category_id=list(class_names).index(label), iscrowd=int(difficult))
            record["annotations"].append(annotation)
        records.append(record)
    return records


def _voc_box(obj: ET.Element) -> list[float]:
    node = obj.find("bndbox")
    x1, y1, x2, y2 = (_number(node, k, math.nan) for k in ("xmin", "ymin", "xmax", "ymax"))
    return [x1 - (x1 < x2), y1 - (y1 < y2), x2, y2]


def _number(node: Optional[ET.Element], tag: str, default: float = 0.0) -> float:
    try:
        return float(node.findtext(tag))
    except (AttributeError, TypeError, ValueError):
        return default


def _image_size(file_name: str) -> tuple[int, int]:
    """(height, width) from the file's header, turned as EXIF says."""
    with Image.open(file_name) as image:
        width, height = image.size
        return (width, height) if image.getexif().get(0x0112, 1) >= 5 else (height, width)


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
        ValueError: with every image that can't be read, and every line that isn't as above: its
            file, number and defect.
    """
    _require(images, f"{key}.IMAGES")
    is_list = images.endswith(".txt")
    root = os.path.dirname(images) if is_list else images
    names = _listed_images(images) if is_list else _images_in(images)
    records, problems, label_files = [], [], []
    for name in names:
        file_name = os.path.join(root, name)
        try:
            height, width = _image_size(file_name)
        except OSError as error:  # names the file
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
    if problems:
        more = [f"and {len(problems) - 50} more"] if len(problems) > 50 else []
        raise ValueError(f"{key}: {len(problems)} errors:\n" + "\n".join(problems[:50] + more))
    missing = sum(not os.path.isfile(path) for path in label_files)
    if records and missing == len(records):
        _require(label_files[0], f"{key}.LABELS; no image has a label file")
    if missing:
        logger.info(f"{images}: {missing} of {len(records)} images have no label file: no objects")
    return records


def _listed_images(path: str) -> list[str]:
    with open(path, encoding="utf-8-sig") as f:
        names = (line.strip() for line in f)
        return list(dict.fromkeys(os.path.normpath(name) for name in names if name))


def _images_in(folder: str) -> list[str]:
    """Paths relative to ``folder``, in order."""
    return sorted(
        os.path.relpath(os.path.join(parent, file), folder)
        for parent, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(_IMAGE_EXTENSIONS)
    )


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


def _read_class_names(root: str, file_name: str, key: str) -> list[str]:
    """Names from ``file_name`` in ``root``, or if it is "" from the first of _CLASS_FILES there."""
    paths = [os.path.join(root, name) for name in ([file_name] if file_name else _CLASS_FILES)]
    path = next(filter(os.path.isfile, paths), paths[-1])
    _require(path, f"{key}.CLASSES, which may be a list of names or a file")
    with open(path, encoding="utf-8-sig") as f:
        if path.endswith((".yaml", ".yml")):
            try:
                content = yaml.load(f, Loader=yaml.BaseLoader)  # strings only: a class may be "no"
            except yaml.YAMLError as error:
                raise ValueError(f"{path} is not valid YAML ({key}.CLASSES): {error}") from None
            names = content.get("names") if isinstance(content, dict) else None
            if isinstance(names, dict):
                names = [names.get(str(i)) for i in range(len(names))]
        else:
            names = [line.strip() for line in f if line.strip()]
    valid = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    if not valid or len(set(names)) < len(names):
        raise ValueError(
            f"{key}.CLASSES: {path} needs different names of the classes 0, 1, …, got {names!r}"
        )
    return names


def read_every_box(name: str) -> list[dict]:
    """A data set registered in VOC's or YOLO's format, with the boxes that the catalog leaves out.

    Afterwards its metadata has ``thing_classes``.
    """
    entry, key = _registered[name], f"DATASETS.REGISTER.{name}"
    root, classes = entry["ROOT"], entry["CLASSES"]
    if entry["FORMAT"] == "voc":
        return read_voc(root, entry["SPLIT"], classes, entry["USE_DIFFICULT"], key)
    if isinstance(classes, str) or not classes:
        metadata = MetadataCatalog.get(name)
        metadata.__dict__.pop("thing_classes", None)  # of the file as it was
        classes = metadata.thing_classes = _read_class_names(root, classes or "", key)
    labels = os.path.join(root, entry["LABELS"]) if entry["LABELS"] else ""
    return read_yolo(os.path.join(root, entry["IMAGES"]), labels, classes, key)


def _without_defects(name: str) -> list[dict]:
    # Here and not in the mapper alone, so that no evaluator asks for such an object.
    records = read_every_box(name)
    defects = find_box_defects(records, MetadataCatalog.get(name).thing_classes)
    if defects:
        logger.warning(f"{name}: dropped {len(defects)} boxes:\n" + "\n".join(defects))
    for record in records:
        boxes = xyxy_boxes(record["annotations"]).tolist()
        record["annotations"] = [
            a for a, box in zip(record["annotations"], boxes) if not _box_defect(box, record)
        ]
    return records


def _voc(name: str, entry: dict) -> tuple:
    metadata = {"image_root": os.path.join(entry["ROOT"], "JPEGImages")}
    return lambda: _without_defects(name), {**metadata, "thing_classes": entry["CLASSES"]}


def _yolo(name: str, entry: dict) -> tuple:
    images = os.path.join(entry["ROOT"], entry["IMAGES"])
    metadata = {"image_root": os.path.dirname(images) if images.endswith(".txt") else images}
    if entry["CLASSES"] and not isinstance(entry["CLASSES"], str):
        metadata["thing_classes"] = entry["CLASSES"]
    return lambda: _without_defects(name), metadata


def _coco(name: str, entry: dict) -> tuple:
    json_file, images = (os.path.join(entry["ROOT"], entry[k]) for k in ("ANNOTATIONS", "IMAGES"))

    def load() -> list[dict]:
        key = f"DATASETS.REGISTER.{name}"
        _require(json_file, f"{key}.ANNOTATIONS = {entry['ANNOTATIONS']!r}")
        _require(images, f"{key}.IMAGES = {entry['IMAGES']!r}")
        metadata = MetadataCatalog.get(name)
        for known in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
            metadata.__dict__.pop(known, None)  # load_coco_json sets the file's own
        try:
            records = load_coco_json(json_file, images, name)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            # which say what, but not in which file
            text = str(error.args[0]).rstrip(".")
            raise ValueError(
                f"{json_file} ({key}.ANNOTATIONS): {type(error).__name__}: {text}; "
                "tools/doctor.py lists what is wrong with it"
            ) from None
        if entry["KEEP_IDS"]:
            _keep_ids(records, metadata, f"{key}.KEEP_IDS")
        if entry["CLASSES"] and entry["CLASSES"] != metadata.thing_classes:
            raise ValueError(
                f"{key}.CLASSES is {entry['CLASSES']}, but the categories of {json_file}, by id, "
                f"are {metadata.thing_classes}"
            )
        for record in records[:1]:
            _require(record["file_name"], f"an image of {json_file}, {key}.IMAGES")
        return records

    metadata = {"json_file": json_file, "image_root": images, "evaluator_type": "coco"}
    return load, {**metadata, **({"thing_classes": entry["CLASSES"]} if entry["CLASSES"] else {})}


def _keep_ids(records: list[dict], metadata: Metadata, key: str) -> None:
    """Renumbers classes that follow one another into category ids less 1, in place."""
    ids = list(metadata.thing_dataset_id_to_contiguous_id)  # rising
    if ids[0] < 1:
        raise ValueError(f"{key} needs category ids from 1, {metadata.json_file} has {ids[0]}")
    for record in records:
        for annotation in record["annotations"]:
            annotation["category_id"] = ids[annotation["category_id"]] - 1
    names = dict(zip(ids, metadata.thing_classes))
    del metadata.thing_classes, metadata.thing_dataset_id_to_contiguous_id
    metadata.set(
        thing_classes=[names.get(i, f"id {i}") for i in range(1, ids[-1] + 1)],
        thing_dataset_id_to_contiguous_id={i: i - 1 for i in range(1, ids[-1] + 1)},
    )


def _shapes(name: str, entry: dict) -> tuple:
    root, split = entry["ROOT"], entry["SPLIT"]
    if split not in SHAPES_SPLITS:
        raise ValueError(
            f"DATASETS.REGISTER.{name}.SPLIT is {split!r}; it must be one of {list(SHAPES_SPLITS)}"
        )
    files = {"ANNOTATIONS": f"{split}.json", "IMAGES": os.path.join(split, "images")}
    coco_entry = {"ROOT": root, "CLASSES": list(SHAPES_CLASSES), "KEEP_IDS": False, **files}
    load_coco, metadata = _coco(name, coco_entry)

    def load() -> list[dict]:
        render_shapes(root, split)
        return load_coco()

    return load, metadata


def _check_entry(name: str, node: Any) -> dict:
    """The entry with its defaults filled in and ROOT made a path from the current folder."""
    key = f"DATASETS.REGISTER.{name}"
    if not isinstance(node, dict):
        raise ValueError(f"{key} is {node!r}; it must be a mapping such as {{FORMAT: coco, …}}")
    value = str(node.get("FORMAT"))
    if value not in _KEYS:
        raise ValueError(
            f"{key}.FORMAT is {value!r}; it must be one of {list(_KEYS)}{_hint(value, _KEYS)}"
        )
    keys = _KEYS[value]
    for k in node:
        if k != "FORMAT" and k not in keys:
            raise ValueError(
                f"{key}.{k} = {node[k]!r} isn't a key of FORMAT {node['FORMAT']}, whose keys are "
                f"{list(keys)}{_hint(k, keys)}"
            )
    entry = {"FORMAT": node["FORMAT"]}
    for k, default in keys.items():
        value = entry[k] = node.get(k, default)
        if k == "CLASSES" and isinstance(value, (list, tuple)):
            entry[k] = value = list(value)
            valid = all(isinstance(c, str) for c in value) and len(set(value)) == len(value)
            valid = valid and (value or default is not None)
            expected = "a list of different names (in quotes if YAML takes them for numbers)"
        elif k in ("USE_DIFFICULT", "KEEP_IDS"):
            valid, expected = isinstance(value, bool), "True or False"
        else:
            is_file = k == "CLASSES" and entry["FORMAT"] == "yolo"
            valid = isinstance(value, str) and (value or default == "")
            valid = valid and (k != "CLASSES" or is_file)
            expected = "a list of class names" if k == "CLASSES" else "a string"
            expected += " or a file of them" if is_file else ""
        if not valid:
            given = f"is {value!r}" if k in node else "is missing"
            raise ValueError(f"{key}.{k} {given}; FORMAT {node['FORMAT']} needs {expected}")
    folder = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    entry["ROOT"] = os.path.join(folder, os.path.expanduser(entry["ROOT"]))
    return entry


def _require(path: str, origin: str) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist (from {origin}; {datasets_folder_text()})")


def datasets_folder_text() -> str:
    """Where data sets are looked for, for messages about files that aren't there."""
    folder = os.environ.get("DETECTRON2_DATASETS", "not set, so datasets")
    return f"DETECTRON2_DATASETS is {folder!r}"


def _hint(value: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
