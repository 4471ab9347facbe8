import json
import os
import re

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from ssd.config import add_ssd_config
from ssd.data import datasets, shapes
from ssd.data.datasets import (
    check_class_count,
    find_box_defects,
    read_every_box,
    read_voc,
    read_yolo,
    register_datasets,
    xyxy_boxes,
)
from ssd.evaluation import COCOBoxEvaluator, VOCEvaluator

HERE = os.path.dirname(os.path.abspath(__file__))
TEST_DATA = os.environ.get("SSD_TEST_DATA") or os.path.join(HERE, "../../../shared/data")
BCCD = os.path.join(TEST_DATA, "bccd")
needs_bccd = pytest.mark.skipif(not os.path.isdir(BCCD), reason=f"no {BCCD} ($SSD_TEST_DATA)")


@pytest.fixture(autouse=True)
def clean_catalog(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    yield
    for name in list(datasets._registered):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
        del datasets._registered[name]


def make_cfg(entries, train=(), test=(), num_classes=2):
    cfg = get_cfg()
    add_ssd_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    cfg.MODEL.SSD.NUM_CLASSES = num_classes
    cfg.merge_from_other_cfg(CfgNode({"DATASETS": {"REGISTER": entries}}))
    return cfg


def write_voc(root, xmls, split="train", suffix=".jpg"):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        os.makedirs(root / folder, exist_ok=True)
    for image_id, xml in xmls.items():
        (root / "Annotations" / f"{image_id}.xml").write_text(xml)
        image = np.zeros((30, 40, 3), np.uint8)
        cv2.imwrite(str(root / "JPEGImages" / (image_id + suffix)), image)
    (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(xmls) + "\n")


def voc_object(box, name="cat", difficult=0):
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box)
    box = "".join(f"<{k}>{v}</{k}>" for k, v in corners)
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox>"
        "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
    )


def voc_xml(*objects, size="<size><width>40</width><height>30</height></size>", name="a.jpg"):
    return f"<annotation><filename>{name}</filename>{size}{''.join(objects)}</annotation>"


def write_coco(root, categories=((7, "dog"), (3, "cat"))):
    os.makedirs(root / "images", exist_ok=True)
    cv2.imwrite(str(root / "images/1.jpg"), np.zeros((30, 40, 3), np.uint8))
    data = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 30, "width": 40}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": i, "name": n} for i, n in categories],
    }
    (root / "train.json").write_text(json.dumps(data))


def write_yolo(root, labels, images="images/train", folder="labels/train"):
    """Images of 40 x 30; ``labels`` are the lines by the image's name, None for no label file."""
    for name, lines in labels.items():
        os.makedirs((root / images / name).parent, exist_ok=True)
        cv2.imwrite(str(root / images / name), np.zeros((30, 40, 3), np.uint8))
        if lines is not None:
            path = (root / folder / name).with_suffix(".txt")
            os.makedirs(path.parent, exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in lines))


VOC = {"FORMAT": "voc", "ROOT": "v", "SPLIT": "train", "CLASSES": ["cat", "dog"]}
COCO = {"FORMAT": "coco", "ROOT": "c", "ANNOTATIONS": "train.json", "IMAGES": "images"}
YOLO = {"FORMAT": "yolo", "ROOT": "y", "IMAGES": "images/train", "CLASSES": ["cat", "dog"]}


def test_voc(tmp_path):
    # 1-based inclusive (1, 1, 40, 30) is the whole image of 40 x 30.
    xml = voc_xml(voc_object((1, 1, 40, 30)), voc_object((5, 6, 7.5, 8), "dog", difficult=1))
    write_voc(tmp_path / "v", {"b": xml, "a": voc_xml()})
    register_datasets(make_cfg({"t_voc": VOC, "t_difficult": {**VOC, "USE_DIFFICULT": True}}))
    assert MetadataCatalog.get("t_voc").thing_classes == ["cat", "dog"]
    records = DatasetCatalog.get("t_voc")
    assert [r["image_id"] for r in records] == ["b", "a"]  # the list's order
    assert records[0]["file_name"] == str(tmp_path / "v/JPEGImages/b.jpg")
    assert (records[0]["height"], records[0]["width"]) == (30, 40)
    mode = BoxMode.XYXY_ABS
    cat = {"category_id": 0, "bbox": [0, 0, 40, 30], "bbox_mode": mode, "iscrowd": 0}
    dog = {"category_id": 1, "bbox": [4, 5, 7.5, 8], "bbox_mode": mode, "iscrowd": 1}
    assert records[0]["annotations"] == [cat, dog] and records[1]["annotations"] == []
    annotations = DatasetCatalog.get("t_difficult")[0]["annotations"]
    assert annotations == [cat, {**dog, "iscrowd": 0}]


def test_voc_image_of_another_type_and_unknown_size(tmp_path):
    xmls = {"a": voc_xml(size="", name="whatever.png")}
    xmls["b"] = voc_xml(size="<size><width>0</width><height>0</height></size>", name="b.png")
    write_voc(tmp_path, xmls, suffix=".png")
    for record in read_voc(str(tmp_path), "train", ["cat"]):
        assert record["file_name"].endswith(".png")
        assert (record["height"], record["width"]) == (30, 40)


def test_voc_box_defects_are_dropped_and_logged(tmp_path, caplog):
    boxes = [(5, 5, 5, 9), (9, 5, 3, 9), (1, 1, 10, 10), (1, "x", 9, 9), (41, 1, 60, 9)]
    write_voc(tmp_path / "v", {"a": voc_xml(*map(voc_object, boxes))})
    records = read_voc(str(tmp_path / "v"), "train", ["cat", "dog"])
    defects = find_box_defects(records, ["cat", "dog"])
    file_name = records[0]["file_name"]
    assert defects == [
        f"{file_name}: object 0 (cat) has zero width: [5.0, 4.0, 5.0, 9.0]",
        f"{file_name}: object 1 (cat) has negative width: [9.0, 4.0, 3.0, 9.0]",
        f"{file_name}: object 3 (cat) isn't finite: [0.0, nan, 9.0, 9.0]",
        f"{file_name}: object 4 (cat) lies outside the image of 40x30: [40.0, 0.0, 60.0, 9.0]",
    ]
    assert "object 0 (class 0)" in find_box_defects(records)[0]
    register_datasets(make_cfg({"t_voc": VOC}))
    records = DatasetCatalog.get("t_voc")
    assert [a["bbox"] for a in records[0]["annotations"]] == [[0, 0, 10, 10]]
    assert "t_voc: dropped 4 boxes" in caplog.text and defects[0] in caplog.text
    assert find_box_defects(records) == []


@pytest.mark.parametrize("box", ["1,2", [1, 2, 3], [1, 2, 3, 4, 5], None])
def test_a_box_that_is_none_names_its_file(box):
    good = {"category_id": 0, "bbox_mode": BoxMode.XYWH_ABS, "bbox": [1, 2, 3, 4]}
    record = {"file_name": "a.jpg", "width": 9, "height": 9}
    message = f"^a.jpg: object 3 has bbox {re.escape(repr(box))}, expected 4 numbers"
    with pytest.raises(ValueError, match=message):
        find_box_defects([{**record, "annotations": [*[good] * 3, {**good, "bbox": box}]}])
    # not as many boxes of other numbers
    with pytest.raises((TypeError, ValueError)):
        xyxy_boxes([{**good, "bbox": [1, 2, 3]}] * 4)


def test_voc_errors(tmp_path):
    root = tmp_path / "v"
    key = "DATASETS.REGISTER.t_voc"
    register_datasets(make_cfg({"t_voc": VOC}))  # nothing is read yet

    def load_fails(error, *texts):
        with pytest.raises(error) as info:
            DatasetCatalog.get("t_voc")
        for text in texts:
            assert text in str(info.value)

    load_fails(FileNotFoundError, "train.txt", f"{key}.SPLIT = 'train'", f"is '{tmp_path}'")
    write_voc(root, {"a": voc_xml(voc_object((1, 1, 5, 5), "cow"))})
    load_fails(ValueError, "a.xml", "'cow'", f"{key}.CLASSES is ['cat', 'dog']")
    (root / "Annotations/a.xml").write_text("<annotation><size>")
    load_fails(ValueError, "a.xml is not valid XML", key)
    os.remove(root / "Annotations/a.xml")
    load_fails(FileNotFoundError, "a.xml", f"{key}.SPLIT")
    write_voc(root, {"a": voc_xml()})
    os.remove(root / "JPEGImages/a.jpg")
    load_fails(FileNotFoundError, "a.jpg", f"{key}.SPLIT")


@needs_bccd
def test_bccd():
    classes = ["RBC", "WBC", "Platelets"]
    counts, defects = {}, []
    for split in ("train", "val", "test"):
        records = read_voc(BCCD, split, classes)
        counts[split] = len(records), sum(len(r["annotations"]) for r in records)
        defects += find_box_defects(records, classes)
    assert {split: count[0] for split, count in counts.items()} == {
        "train": 205, "val": 87, "test": 72,
    }  # fmt: skip
    assert sum(count[1] for count in counts.values()) == 4888
    assert sorted(os.path.basename(line) for line in defects) == [
        "BloodImage_00338.jpg: object 12 (RBC) has zero width: [504.0, 337.0, 504.0, 337.0]",
        "BloodImage_00343.jpg: object 3 (RBC) has zero width: [181.0, 329.0, 181.0, 329.0]",
    ]


def test_yolo(tmp_path, caplog):
    caplog.set_level("INFO")
    root = tmp_path / "y"
    write_yolo(root, {"b.png": ["1 0.5 0.5 1 1", "", " 0 0.25 .5 0.1 2e-1 "], "sub/c.JPG": None})
    write_yolo(root, {"a.jpg": []})
    (root / "images/train/notes.txt").write_text("no image")
    register_datasets(make_cfg({"t_yolo": YOLO}))
    assert MetadataCatalog.get("t_yolo").thing_classes == ["cat", "dog"]
    assert MetadataCatalog.get("t_yolo").image_root == str(root / "images/train")
    records = DatasetCatalog.get("t_yolo")
    assert [r["image_id"] for r in records] == ["a.jpg", "b.png", "sub/c.JPG"]
    assert "images/train: 1 of 3 images have no label file" in caplog.text
    assert records[2]["file_name"] == str(root / "images/train/sub/c.JPG")
    assert all((r["height"], r["width"]) == (30, 40) for r in records)
    assert [len(r["annotations"]) for r in records] == [0, 2, 0]
    mode = BoxMode.XYXY_ABS
    dog, cat = records[1]["annotations"]
    assert dog == {"category_id": 1, "bbox": [0, 0, 40, 30], "bbox_mode": mode, "iscrowd": 0}
    assert cat["category_id"] == 0 and cat["bbox"] == pytest.approx([8, 12, 12, 18])


def test_yolo_size_is_turned_as_exif_says(tmp_path):
    os.makedirs(tmp_path / "images")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "images/a.jpg", exif=exif)
    os.makedirs(tmp_path / "labels")
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.25 1 0.5")
    (record,) = read_yolo(str(tmp_path / "images"), "", ["cat"])
    assert (record["height"], record["width"]) == (40, 30)
    assert record["annotations"][0]["bbox"] == [0, 0, 30, 20]


def test_yolo_label_files_and_lists(tmp_path):
    """Beside the images, in a folder that is named, and by the rule for ``images`` in a list."""
    write_yolo(tmp_path / "beside", {"a.jpg": ["0 .5 .5 1 1"]}, "photos", "photos")
    write_yolo(tmp_path / "named", {"s/a.jpg": ["0 .5 .5 1 1"]}, "photos", "notes")
    write_yolo(tmp_path / "images/list", {"a.jpg": ["0 .5 .5 1 1"], "b.jpg": [], "c.jpg": None})
    absolute = tmp_path / "images/list/images/train/b.jpg"
    lines = f"\n./images/train/a.jpg\n{absolute}\nimages/train/a.jpg\n"
    (tmp_path / "images/list/train.txt").write_text(lines)
    write_yolo(tmp_path / "flat", {"1/a.jpg": None}, "photos")
    write_yolo(tmp_path / "flat", {"a.jpg": ["0 .5 .5 1 1"]}, "copies", "notes")
    (tmp_path / "flat/train.txt").write_text("photos/1/a.jpg")
    expected = {
        ("beside/photos", ""): ["a.jpg"],
        ("named/photos", "named/notes"): ["s/a.jpg"],
        ("images/list/train.txt", ""): ["images/train/a.jpg", str(absolute)],
        ("flat/train.txt", "flat/notes"): ["photos/1/a.jpg"],
    }
    for (images, labels), image_ids in expected.items():
        labels = str(tmp_path / labels) if labels else ""
        records = read_yolo(str(tmp_path / images), labels, ["cat"])
        assert [r["image_id"] for r in records] == image_ids
        assert records[0]["annotations"][0]["bbox"] == [0, 0, 40, 30]


def test_yolo_box_defects_are_dropped_and_logged(tmp_path, caplog):
    boxes = ["0 .5 .5 0 .1", "0 .5 .5 .1 .1", "1 1.01 .5 .01 .1", "1 .05 .5 .2 .1"]
    write_yolo(tmp_path / "y", {"a.jpg": boxes})
    register_datasets(make_cfg({"t_yolo": YOLO}))
    assert len(read_every_box("t_yolo")[0]["annotations"]) == 4
    (record,) = DatasetCatalog.get("t_yolo")
    assert [a["category_id"] for a in record["annotations"]] == [0, 1]
    assert record["annotations"][1]["bbox"][0] == pytest.approx(-2)  # the mapper clips
    assert "t_yolo: dropped 2 boxes" in caplog.text
    assert "a.jpg: object 0 (cat) has zero width" in caplog.text
    assert "a.jpg: object 2 (dog) lies outside the image of 40x30" in caplog.text


def test_yolo_names_every_defective_line_and_image(tmp_path):
    lines = ["0 .5 .5 .1 .1", "2 .5 .5 .1 .1", "0 .5 .5 .1", "", "0 .1 .1 .2 .1 .2 .2"]
    lines += ["cat 1 1 1 1", "0.5 .5 .5 .1 .1", "0 200 100 30 20", "0 nan .5 .1 .1"]
    lines += ["0 .5 .5 -.1 .1", "-1 0 0 0 0"]
    write_yolo(tmp_path / "y", {"a.jpg": lines, "b.jpg": ["x"]})
    (tmp_path / "y/images/train/c.jpg").write_bytes(b"no image")
    register_datasets(make_cfg({"t_yolo": YOLO}))
    with pytest.raises(ValueError) as info:
        DatasetCatalog.get("t_yolo")
    first, *found = str(info.value).splitlines()
    folder = tmp_path / "y/labels/train"
    assert first == "DATASETS.REGISTER.t_yolo: 11 errors:"
    assert found[:3] == [
        f"{folder}/a.txt, line 2: class 2 isn't one of 0 to 1: '2 .5 .5 .1 .1'",
        f"{folder}/a.txt, line 3: 4 values, not class cx cy w h: '0 .5 .5 .1'",
        f"{folder}/a.txt, line 5: 7 values, not class cx cy w h: '0 .1 .1 .2 .1 .2 .2'",
    ]
    reasons = ["not five numbers", "class 0.5 isn't", "aren't fractions", "aren't fractions"]
    for number, reason in zip((6, 7, 8, 9, 10), [*reasons, "aren't fractions"]):
        assert f"a.txt, line {number}: " in found[number - 3] and reason in found[number - 3]
    assert "line 11: class -1 isn't" in found[8] and f"{folder}/b.txt, line 1" in found[9]
    assert "c.jpg" in found[10] and len(found) == 11
    write_yolo(tmp_path / "y", {"a.jpg": ["x"] * 60})
    with pytest.raises(ValueError, match="62 errors:(?s:.*)\nand 12 more$"):
        DatasetCatalog.get("t_yolo")


@pytest.mark.parametrize(
    "file, text",
    [
        ("data.yaml", "names: [cat, no]"),
        ("data.yaml", "train: images\nnc: 2\nnames: {1: no, 0: cat}"),
        ("classes.txt", "\ufeffcat\nno\n\n"),
        ("labels/obj.names", "cat\nno"),
    ],
)
def test_yolo_class_names_from_a_file(tmp_path, file, text):
    write_yolo(tmp_path / "y", {"a.jpg": ["1 .5 .5 1 1"]})
    (tmp_path / "y" / file).write_text(text, encoding="utf-8")
    entry = {k: v for k, v in YOLO.items() if k != "CLASSES"}
    if file.startswith("labels"):
        entry["CLASSES"] = file
    cfg = make_cfg({"t_yolo": entry}, ["t_yolo"], [], 2)
    register_datasets(cfg)
    assert MetadataCatalog.get("t_yolo").get("thing_classes") is None
    check_class_count(cfg)
    DatasetCatalog.get("t_yolo")  # once more
    assert MetadataCatalog.get("t_yolo").thing_classes == ["cat", "no"]


def test_yolo_errors(tmp_path):
    key = "DATASETS.REGISTER.t_yolo"
    root = tmp_path / "y"

    def load_fails(error, *texts, **entry):
        register_datasets(make_cfg({"t_yolo": {**YOLO, **entry}}))
        with pytest.raises(error) as info:
            DatasetCatalog.get("t_yolo")
        for text in texts:
            assert text in str(info.value)

    load_fails(FileNotFoundError, "y/images/train does not exist", f"{key}.IMAGES")
    write_yolo(root, {"a.jpg": None})
    text = "labels/train/a.txt does not exist"
    load_fails(FileNotFoundError, text, f"{key}.LABELS; no image has a label file")
    load_fails(FileNotFoundError, "y/notes/a.txt", f"{key}.LABELS", LABELS="notes")
    load_fails(FileNotFoundError, "classes.txt", f"{key}.CLASSES", CLASSES=[])
    for text in ("names: [a, a]", "names: {1: a}", "names: {0: [a]}", "[a]", "names: ''"):
        (root / "data.yaml").write_text(text)
        load_fails(ValueError, "data.yaml needs different names", key, CLASSES=[])
    (root / "data.yaml").write_text("names: [")
    load_fails(ValueError, "data.yaml is not valid YAML", f"{key}.CLASSES", CLASSES="data.yaml")
    (root / "train.txt").write_text("images/train/b.jpg")
    load_fails(ValueError, f"{key}: 1 errors", "y/images/train/b.jpg", IMAGES="train.txt")


def test_both_evaluators_take_yolo(tmp_path):
    """Perfect detections of one class have AP 100; the other one's object is missed."""
    write_yolo(tmp_path / "y", {"a.jpg": ["0 .5 .5 .5 .5", "1 .2 .2 .2 .2"], "b.jpg": None})
    (tmp_path / "y/classes.txt").write_text("cat\ndog")
    register_datasets(make_cfg({"t_yolo": {**YOLO, "CLASSES": "classes.txt"}}))
    evaluators = COCOBoxEvaluator("t_yolo", str(tmp_path / "out")), VOCEvaluator("t_yolo")
    outputs = []
    for record in DatasetCatalog.get("t_yolo"):
        found = [a for a in record["annotations"] if a["category_id"] == 0]
        instances = Instances((30, 40), scores=torch.ones(len(found)))
        instances.pred_boxes = Boxes(torch.tensor([a["bbox"] for a in found]).reshape(-1, 4))
        instances.pred_classes = torch.zeros(len(found), dtype=torch.int64)
        outputs.append({"instances": instances})
    results = {}
    for evaluator in evaluators:
        evaluator.reset()
        evaluator.process(DatasetCatalog.get("t_yolo"), outputs)
        results.update(evaluator.evaluate())
    found = [results["bbox"][f"AP50-{name}"] for name in ("cat", "dog")]
    assert found == pytest.approx([100, 0])
    assert [results["voc"][f"AP-{name}"] for name in ("cat", "dog")] == pytest.approx([100, 0])


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
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=f"train.json .*t_coco.ANNOTATIONS.: {text}.*doctor"):
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


def test_check_class_count(tmp_path):
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
    with pytest.raises(ValueError, match="'t_turned'.*'dog', 'cat'.*'t_voc'.*'cat', 'dog'"):
        check_class_count(make_cfg(entries, ["t_voc"], ["t_turned"]))
    with pytest.raises(ValueError, match="DATASETS.TEST: data set 't_cocoo'.*did you mean t_coco"):
        check_class_count(make_cfg(entries, ["t_voc"], ["t_cocoo"]))
    check_class_count(make_cfg({}, ["coco_2017_train"], ["coco_2017_val"], 80))
