import json
import os

import cv2
import numpy as np
import pytest
from catalog import COCO, VOC, YOLO, clean_catalog, make_cfg  # noqa: F401
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from torch import nn

from ssd.data import shapes
from ssd.data.boxes import find_box_defects
from ssd.data.datasets import check_class_count, register_datasets
from ssd.modeling import SSD


def write_coco(root, categories=((7, "dog"), (3, "cat"))):
    os.makedirs(root / "images", exist_ok=True)
    cv2.imwrite(str(root / "images/1.jpg"), np.zeros((30, 40, 3), np.uint8))
    data = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 30, "width": 40}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": i, "name": n} for i, n in categories],
    }
    (root / "train.json").write_text(json.dumps(data))


def test_coco(tmp_path):
    write_coco(tmp_path / "c")
    register_datasets(make_cfg({"t_coco": COCO, "t_named": {**COCO, "CLASSES": ["cat", "dog"]}}))
    assert MetadataCatalog.get("t_coco").get("thing_classes") is None
    assert MetadataCatalog.get("t_named").thing_classes == ["cat", "dog"]
    for name in ("t_coco", "t_named", "t_named"):
        (record,) = DatasetCatalog.get(name)
        assert record["file_name"] == str(tmp_path / "c/images/1.jpg")
        assert record["annotations"][0]["category_id"] == 1  # dog: 7 is the second id
        assert MetadataCatalog.get(name).thing_classes == ["cat", "dog"]


def test_coco_keeps_ids(tmp_path):
    write_coco(tmp_path / "c", [(7, "dog"), (3, "cat"), (1, "ox")])
    names = ["ox", "id 2", "cat", "id 4", "id 5", "id 6", "dog"]
    entries = {"t_ids": {**COCO, "KEEP_IDS": True}}
    entries["t_named"] = {**entries["t_ids"], "CLASSES": names}
    entries["t_wrong"] = {**entries["t_ids"], "CLASSES": ["ox", "cat", "dog"]}
    register_datasets(make_cfg(entries))
    for name in ("t_ids", "t_named", "t_ids"):
        (record,) = DatasetCatalog.get(name)
        assert record["annotations"][0]["category_id"] == 6
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == names
        assert metadata.thing_dataset_id_to_contiguous_id == {i + 1: i for i in range(7)}
    check_class_count(make_cfg(entries, ["t_ids"], ["t_named"], 7))
    with pytest.raises(ValueError, match="'t_wrong' has 3 classes .*NUM_CLASSES is 7"):
        check_class_count(make_cfg(entries, ["t_wrong"], [], 7))
    with pytest.raises(ValueError, match="t_wrong.CLASSES is .*by id, are .*'ox', 'id 2', 'cat'"):
        DatasetCatalog.get("t_wrong")
    write_coco(tmp_path / "c", [(0, "ox"), (7, "dog")])
    with pytest.raises(ValueError, match="t_ids.KEEP_IDS needs category ids from 1, .* has 0"):
        DatasetCatalog.get("t_ids")


def test_coco_errors(tmp_path):
    entry = {**COCO, "CLASSES": ["dog", "cat"]}
    register_datasets(make_cfg({"t_coco": entry}))
    with pytest.raises(FileNotFoundError, match="train.json.*t_coco.ANNOTATIONS.*DETECTRON2"):
        DatasetCatalog.get("t_coco")
    write_coco(tmp_path / "c")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"t_coco.CLASSES is \['dog', 'cat'\], .*'cat', 'dog'"):
            DatasetCatalog.get("t_coco")
    path = tmp_path / "c/train.json"
    content = path.read_text()
    for broken, text in (
        (content.replace('"category_id": 7', '"category_id": 9'), "KeyError: .*category_id=9"),
        (content.replace('"height"', '"h"'), "KeyError: height"),
        (content[:-5], "JSONDecodeError: "),
        (f"[{content}]", "AssertionError: .*'list'"),
        (content.replace('"annotations": [', '"annotations": [null, '), "TypeError: "),
        (content.replace('"width": 40', '"width": "40"'), "TypeError: width of .*1.jpg is '40'"),
        (content.replace('"dog"', "5"), "TypeError: the name of a category is 5, not text"),
        (content.replace('"bbox"', '"iscrowd": "0", "bbox"'), "TypeError: iscrowd is '0'"),
        ("[" * 100000, "RecursionError: "),
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=f"train.json .*t_coco.ANNOTATIONS.: {text}.*doctor"):
            DatasetCatalog.get("t_coco")
    path.write_bytes(content.replace("dog", "\u00f6").encode("utf-16"))
    with pytest.raises(ValueError, match="UnicodeDecodeError: 'utf-8' codec can't decode byte"):
        DatasetCatalog.get("t_coco")
    register_datasets(make_cfg({"t_coco": {**COCO, "IMAGES": "pictures"}}))
    with pytest.raises(FileNotFoundError, match="pictures.*t_coco.IMAGES = 'pictures'"):
        DatasetCatalog.get("t_coco")


def test_shapes_are_rendered_at_first_use(tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.SPLITS, "val", 2)
    register_datasets(make_cfg({"t_shapes": {"FORMAT": "shapes", "SPLIT": "val"}}))
    assert MetadataCatalog.get("t_shapes").thing_classes == list(shapes.CLASSES)
    assert not os.listdir(tmp_path)
    records = DatasetCatalog.get("t_shapes")
    assert len(records) == 2 and os.path.isfile(tmp_path / "shapes/val.json")
    for record in records:
        assert os.path.isfile(record["file_name"])
    assert find_box_defects(records) == []


def test_registering_again():
    cfg = make_cfg({"t_voc": VOC})
    register_datasets(cfg)
    load = DatasetCatalog["t_voc"]
    register_datasets(cfg)
    assert DatasetCatalog["t_voc"] is load
    register_datasets(make_cfg({"t_voc": {**VOC, "CLASSES": ["cow"]}}))
    assert DatasetCatalog["t_voc"] is not load
    assert MetadataCatalog.get("t_voc").thing_classes == ["cow"]


def test_the_datasets_folder_is_followed(monkeypatch):
    register_datasets(make_cfg({"t_coco": COCO}))
    monkeypatch.delenv("DETECTRON2_DATASETS")
    register_datasets(make_cfg({"t_coco": COCO, "t_absolute": {**COCO, "ROOT": "/data/c"}}))
    assert MetadataCatalog.get("t_coco").json_file == "datasets/c/train.json"
    assert MetadataCatalog.get("t_absolute").json_file == "/data/c/train.json"


@pytest.mark.parametrize(
    "name, entry, message",
    [
        ("x", "voc", r"REGISTER.x is 'voc'; it must be a mapping"),
        ("a/../../b", VOC, "REGISTER.a/../../b: a data set's name must not lead out of OUTPUT_DIR"),
        ("/tmp/b", VOC, "REGISTER./tmp/b: a data set's name must not lead out of OUTPUT_DIR"),
        ("x", {"FORMAT": "cocoo"}, r"x.FORMAT is 'cocoo'.*did you mean coco"),
        ("x", {"SPLIT": "val"}, r"x.FORMAT is 'None'; it must be one of \['coco', 'voc', 'yolo'"),
        ("x", {**VOC, "SPLITT": "a"}, r"x.SPLITT = 'a'.*did you mean SPLIT"),
        ("x", {**VOC, "IMAGES": "a"}, r"x.IMAGES = 'a' isn't a key of FORMAT voc"),
        ("x", {"FORMAT": "voc", "ROOT": "v", "SPLIT": "a"}, r"x.CLASSES is missing"),
        ("x", {"FORMAT": "coco", "ROOT": "v"}, r"x.ANNOTATIONS is missing; .* needs a string"),
        ("x", {**VOC, "SPLIT": 2012}, r"x.SPLIT is 2012; FORMAT voc needs a string"),
        ("x", {**VOC, "CLASSES": []}, r"x.CLASSES is \[\]"),
        ("x", {**VOC, "CLASSES": ["a", True]}, r"x.CLASSES is \['a', True\].*different names"),
        ("x", {**VOC, "CLASSES": ["a", "a"]}, r"x.CLASSES is \['a', 'a'\]"),
        ("x", {**VOC, "CLASSES": "cat"}, r"x.CLASSES is 'cat'; .* a list of class names"),
        ("x", {**VOC, "USE_DIFFICULT": 1}, r"x.USE_DIFFICULT is 1; .* True or False"),
        ("x", {**COCO, "KEEP_IDS": "yes"}, r"x.KEEP_IDS is 'yes'; .* True or False"),
        ("x", {"FORMAT": "yolo", "ROOT": "y"}, r"x.IMAGES is missing; .* needs a string"),
        ("x", {**YOLO, "LABELS": 3}, r"x.LABELS is 3; FORMAT yolo needs a string"),
        ("x", {**YOLO, "CLASSES": 3}, r"x.CLASSES is 3; .* a list of class names or a file"),
        ("x", {**YOLO, "CLASSES": ["a", "a"]}, r"x.CLASSES is \['a', 'a'\].*different names"),
        ("x", {"FORMAT": "shapes", "SPLIT": "test"}, r"x.SPLIT is 'test'.*'train', 'val'"),
        ("coco_2017_val", VOC, r"REGISTER.coco_2017_val: .*registered by Detectron2"),
    ],
)
def test_wrong_entries(name, entry, message):
    with pytest.raises(ValueError, match=message):
        register_datasets(make_cfg({name: entry}))


def test_categories_of_one_name_are_refused(tmp_path):
    write_coco(tmp_path / "c")
    path = tmp_path / "c" / "train.json"
    content = json.loads(path.read_text())
    content["categories"][1]["name"] = content["categories"][0]["name"]
    path.write_text(json.dumps(content))
    register_datasets(make_cfg({"t_coco": COCO}))
    with pytest.raises(ValueError, match="t_coco.ANNOTATIONS.* several categories .*: dog"):
        DatasetCatalog.get("t_coco")


@pytest.mark.parametrize("sizes", [(40, 30), (40.0, 30.0), (None, None), ("40", 30), (40, "30")])
def test_sizes_may_be_null_or_fractions(tmp_path, sizes):
    write_coco(tmp_path / "c")
    path = tmp_path / "c/train.json"
    content = json.loads(path.read_text())
    content["images"][0].update(zip(("width", "height"), sizes))
    path.write_text(json.dumps(content))
    register_datasets(make_cfg({"t_coco": COCO}))
    if str in map(type, sizes):
        with pytest.raises(ValueError, match="(height|width) of .* is '.0', not a number"):
            DatasetCatalog.get("t_coco")
    else:
        (record,) = DatasetCatalog.get("t_coco")
        assert (record["width"], record["height"]) == sizes


def test_check_class_count(tmp_path, monkeypatch):
    write_coco(tmp_path / "c")
    entries = {"t_voc": VOC, "t_coco": COCO, "t_turned": {**VOC, "CLASSES": ["dog", "cat"]}}
    register_datasets(make_cfg(entries))
    check_class_count(make_cfg(entries, ["t_voc"], ["t_coco"]))  # reads the COCO file
    for num_classes in (1, 3):
        with pytest.raises(ValueError) as info:
            check_class_count(make_cfg(entries, ["t_voc"], [], num_classes))
        assert "'t_voc' has 2 classes (cat, dog)" in str(info.value)
        assert f"MODEL.SSD.NUM_CLASSES is {num_classes}" in str(info.value)
        assert "DATASETS.REGISTER.t_voc.CLASSES" in str(info.value)
    with pytest.raises(
        ValueError, match="2 of .* 't_turned' .* 't_voc', as class 0, 'dog' and not 'cat'"
    ):
        check_class_count(make_cfg(entries, ["t_voc"], ["t_turned"]))
    with pytest.raises(ValueError, match="DATASETS.TEST: data set 't_cocoo'.*did you mean t_coco"):
        check_class_count(make_cfg(entries, ["t_voc"], ["t_cocoo"]))
    check_class_count(make_cfg({}, ["coco_2017_train"], ["coco_2017_val"], 80))
    other = make_cfg(entries, ["t_voc"], [], 80)
    other.MODEL.META_ARCHITECTURE = "RetinaNet"  # which has a key of its own
    check_class_count(other)
    with monkeypatch.context() as patch:
        classes = {"MyRetinaNet": type("MyRetinaNet", (RetinaNet,), {})}
        classes["MySSD"] = type("MySSD", (SSD,), {"__module__": "detectron2.own"})
        classes["Own"] = type("Own", (nn.Module,), {"__module__": "detectron2_own"})
        patch.setattr(META_ARCH_REGISTRY, "_obj_map", {"SSD": SSD, **classes})
        other.MODEL.META_ARCHITECTURE = "MyRetinaNet"
        check_class_count(other)
        for other.MODEL.META_ARCHITECTURE in ("MySSD", "Own"):
            with pytest.raises(ValueError, match="MODEL.SSD.NUM_CLASSES is 80"):
                check_class_count(other)
    other.MODEL.META_ARCHITECTURE = "of one's own"  # perhaps an SSD in a function or a module
    with pytest.raises(ValueError, match="MODEL.SSD.NUM_CLASSES is 80"):
        check_class_count(other)
    with pytest.raises(ValueError, match="'t_new' of DATASETS.REGISTER isn't registered"):
        check_class_count(make_cfg({"t_new": VOC}, ["t_new"], []))


@pytest.mark.parametrize("entry", [VOC, COCO, {"FORMAT": "yolo", "ROOT": "d", "IMAGES": "i"}])
def test_detectron2s_scripts_know_the_evaluator(entry):
    register_datasets(make_cfg({"t_any": entry}))
    assert MetadataCatalog.get("t_any").evaluator_type == "coco"


def test_an_evaluation_does_not_read_the_training_data(tmp_path):
    register_datasets(make_cfg({"t_gone": {**COCO, "ROOT": "gone"}, "t_voc": VOC}))
    for train in (["t_gone"], ["t_unknown"], []):
        check_class_count(make_cfg({}, train, ["t_voc"]), is_train=False)
    with pytest.raises(FileNotFoundError, match="t_gone"):
        check_class_count(make_cfg({}, ["t_gone"], ["t_voc"]))
    with pytest.raises(FileNotFoundError, match="t_gone"):
        check_class_count(make_cfg({}, [], ["t_gone"]), is_train=False)
