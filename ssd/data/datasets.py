"""Data sets named in the config: ``DATASETS.REGISTER`` maps a name to what Detectron2 registers."""

import collections
import difflib
import logging
import os
from typing import Any, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ssd.checks import is_detectron2s
from ssd.data import shapes
from ssd.data.boxes import box_defect, find_box_defects, xyxy_boxes
from ssd.data.files import require
from ssd.data.voc import read_voc
from ssd.data.yolo import read_class_names, read_yolo

__all__ = ["check_class_count", "read_every_box", "register_datasets"]

logger = logging.getLogger(__name__)

# Keys of an entry besides FORMAT, with their defaults; None: must be given.
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
    ROOT; LABELS is a folder of text files (see :mod:`ssd.data.yolo`). CLASSES are names, or the
    file that holds them: ``names`` of a YAML file, otherwise a name per line; by default data.yaml
    or classes.txt in ROOT.

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
        MetadataCatalog.get(name).set(registered_by="ssd", **metadata)
        _registered[name] = entry


def check_names(cfg: CfgNode, is_train: bool = True) -> None:
    """Raises ValueError for a data set of DATASETS.TRAIN, if ``is_train``, or TEST that isn't
    registered."""
    for key in ("TRAIN", "TEST") if is_train else ("TEST",):
        for name in cfg.DATASETS[key]:
            if name in DatasetCatalog:
                continue
            if name in cfg.DATASETS.REGISTER:
                raise ValueError(
                    f"DATASETS.{key}: {name!r} of DATASETS.REGISTER isn't registered; "
                    "ssd.load_config does so, or register_datasets of ssd.data.datasets"
                )
            raise ValueError(
                f"DATASETS.{key}: data set {name!r} is neither in DATASETS.REGISTER nor known "
                f"to Detectron2{_hint(name, DatasetCatalog.list())}"
            )


def check_class_count(cfg: CfgNode, is_train: bool = True) -> None:
    """Checks that all data sets of DATASETS.TRAIN and TEST have the model's classes.

    A data set whose entry doesn't list its CLASSES is read for this, one of DATASETS.TRAIN only if
    ``is_train``: an evaluation doesn't need it.

    Raises:
        ValueError: for an unknown data set, one whose class count isn't MODEL.SSD.NUM_CLASSES
            (Detectron2's own models have other keys), or classes that differ in name or order
            between the data sets.
    """
    check_names(cfg, is_train)
    first = None
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            metadata = MetadataCatalog.get(name)
            if key == "TRAIN" and not is_train and metadata.get("thing_classes") is None:
                continue
            if metadata.get("thing_classes") is None:
                DatasetCatalog.get(name)
            if metadata.get("thing_classes") is None:
                raise ValueError(
                    f"data set {name!r} has no class names: "
                    f"MetadataCatalog.get({name!r}).thing_classes = [...] where it is registered"
                )
            classes = list(metadata.thing_classes)
            where = f"MetadataCatalog.get({name!r}).thing_classes"
            if metadata.get("json_file"):
                where = f"the categories of {metadata.json_file}"
            elif name in _registered:
                where = f"DATASETS.REGISTER.{name}.CLASSES"
            if not is_detectron2s(cfg) and len(classes) != cfg.MODEL.SSD.NUM_CLASSES:
                raise ValueError(
                    f"data set {name!r} has {len(classes)} classes ({', '.join(classes[:10])}"
                    f"{', …' if len(classes) > 10 else ''}) but MODEL.SSD.NUM_CLASSES is "
                    f"{cfg.MODEL.SSD.NUM_CLASSES}; change this key or {where}"
                )
            first = first or (name, classes)
            if wrong := [i for i, both in enumerate(zip(classes, first[1])) if len(set(both)) > 1]:
                raise ValueError(
                    f"{len(wrong)} of the classes of data set {name!r} aren't those of "
                    f"{first[0]!r}, as class {wrong[0]}, {classes[wrong[0]]!r} and not "
                    f"{first[1][wrong[0]]!r}: names and order must agree ({where})"
                )


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
        classes = metadata.thing_classes = read_class_names(root, classes or "", key)
    labels = os.path.join(root, entry["LABELS"]) if entry["LABELS"] else ""
    return read_yolo(os.path.join(root, entry["IMAGES"]), labels, classes, key)


def _without_defects(name: str) -> list[dict]:
    # Here and not in the mapper alone, so that no evaluator asks for such an object.
    records = read_every_box(name)
    defects = find_box_defects(records, MetadataCatalog.get(name).thing_classes)
    if not defects:
        return records
    more = [f"… and {len(defects) - 20} more"] if len(defects) > 20 else []
    logger.warning(f"{name}: dropped {len(defects)} boxes:\n" + "\n".join(defects[:20] + more))
    for record in records:
        boxes = xyxy_boxes(record["annotations"]).tolist()
        record["annotations"] = [
            a for a, box in zip(record["annotations"], boxes) if not box_defect(box, record)
        ]
    return records


def _voc(name: str, entry: dict) -> tuple:
    metadata = {"image_root": os.path.join(entry["ROOT"], "JPEGImages"), "evaluator_type": "coco"}
    return lambda: _without_defects(name), {**metadata, "thing_classes": entry["CLASSES"]}


def _yolo(name: str, entry: dict) -> tuple:
    images = os.path.join(entry["ROOT"], entry["IMAGES"])
    root = os.path.dirname(images) if images.endswith(".txt") else images
    metadata = {"image_root": root, "evaluator_type": "coco"}
    if entry["CLASSES"] and not isinstance(entry["CLASSES"], str):
        metadata["thing_classes"] = entry["CLASSES"]
    return lambda: _without_defects(name), metadata


def _coco(name: str, entry: dict) -> tuple:
    json_file, images = (os.path.join(entry["ROOT"], entry[k]) for k in ("ANNOTATIONS", "IMAGES"))

    def load() -> list[dict]:
        key = f"DATASETS.REGISTER.{name}"
        require(json_file, f"{key}.ANNOTATIONS = {entry['ANNOTATIONS']!r}")
        require(images, f"{key}.IMAGES = {entry['IMAGES']!r}")
        metadata = MetadataCatalog.get(name)
        for known in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
            metadata.__dict__.pop(known, None)  # load_coco_json sets the file's own
        try:
            records = load_coco_json(json_file, images, name)
            _check_types(records, MetadataCatalog.get(name).thing_classes)
        except (AssertionError, KeyError, RecursionError, TypeError, ValueError) as error:
            # which say what, but not in which file
            text = str(error if isinstance(error, UnicodeError) else error.args[0]).rstrip(".")
            raise ValueError(
                f"{json_file} ({key}.ANNOTATIONS): {type(error).__name__}: {text}; "
                "tools/doctor.py lists what is wrong with it"
            ) from None
        if entry["KEEP_IDS"]:
            _keep_ids(records, metadata, f"{key}.KEEP_IDS")
        counts = collections.Counter(metadata.thing_classes)
        if twice := sorted(x for x, count in counts.items() if count > 1):
            raise ValueError(
                f"{json_file} ({key}.ANNOTATIONS) has several categories of the same name: "
                f"{', '.join(twice)}; rename or merge them"
            )
        if entry["CLASSES"] and entry["CLASSES"] != metadata.thing_classes:
            raise ValueError(
                f"{key}.CLASSES is {entry['CLASSES']}, but the categories of {json_file}, by id, "
                f"are {metadata.thing_classes}"
            )
        for record in records[:1]:
            require(record["file_name"], f"an image of {json_file}, {key}.IMAGES")
        return records

    metadata = {"json_file": json_file, "image_root": images, "evaluator_type": "coco"}
    return load, {**metadata, **({"thing_classes": entry["CLASSES"]} if entry["CLASSES"] else {})}


def _check_types(records: list[dict], names: Sequence[str]) -> None:
    """Of values that JSON may hold, and that fail or are misread later."""
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"the name of a category is {name!r}, not text")
    for record in records:
        for key in ("height", "width"):
            if not (record[key] is None or isinstance(record[key], (int, float))):
                found = f"{key} of {record['file_name']} is {record[key]!r}"
                raise TypeError(f"{found}, not a number")
        for annotation in record["annotations"]:
            if isinstance(annotation.get("iscrowd"), str):
                raise TypeError(f"iscrowd is {annotation['iscrowd']!r}, not 0 or 1")


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
    if split not in shapes.SPLITS:
        raise ValueError(
            f"DATASETS.REGISTER.{name}.SPLIT is {split!r}; it must be one of {list(shapes.SPLITS)}"
        )
    files = {"ANNOTATIONS": f"{split}.json", "IMAGES": os.path.join(split, "images")}
    coco_entry = {"ROOT": root, "CLASSES": list(shapes.CLASSES), "KEEP_IDS": False, **files}
    load_coco, metadata = _coco(name, coco_entry)

    def load() -> list[dict]:
        shapes.render_shapes(root, split)
        return load_coco()

    return load, metadata


def _check_entry(name: str, node: Any) -> dict:
    """The entry with its defaults filled in and ROOT made a path from the current folder."""
    key = f"DATASETS.REGISTER.{name}"
    if os.path.isabs(name) or ".." in name.split("/"):  # its results get a folder of this name
        raise ValueError(f"{key}: a data set's name must not lead out of OUTPUT_DIR")
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
        elif isinstance(default, bool):
            valid, expected = isinstance(value, bool), "True or False"
        elif k == "CLASSES" and entry["FORMAT"] != "yolo":
            valid, expected = False, "a list of class names"
        else:
            valid = isinstance(value, str) and (value or default == "")
            expected = "a list of class names or a file of them" if k == "CLASSES" else "a string"
        if not valid:
            given = f"is {value!r}" if k in node else "is missing"
            raise ValueError(f"{key}.{k} {given}; FORMAT {node['FORMAT']} needs {expected}")
    folder = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    entry["ROOT"] = os.path.join(folder, os.path.expanduser(entry["ROOT"]))
    return entry


def _hint(value: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
