import os

import cv2
import numpy as np
import pytest
import torch
from catalog import YOLO, clean_catalog, make_cfg  # noqa: F401
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from PIL.ImageFile import ImageFile

from ssd.data.datasets import check_class_count, read_every_box, register_datasets
from ssd.data.files import image_size
from ssd.data.mapper import read_image
from ssd.data.yolo import read_yolo
from ssd.evaluation import COCOBoxEvaluator, VOCEvaluator


def write_yolo(root, labels, images="images/train", folder="labels/train"):
    """Images of 40 x 30; ``labels`` are the lines by the image's name, None for no label file."""
    for name, lines in labels.items():
        os.makedirs((root / images / name).parent, exist_ok=True)
        cv2.imwrite(str(root / images / name), np.zeros((30, 40, 3), np.uint8))
        if lines is not None:
            path = (root / folder / name).with_suffix(".txt")
            os.makedirs(path.parent, exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in lines))


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
    assert "are of no image" not in caplog.text
    assert records[2]["file_name"] == str(root / "images/train/sub/c.JPG")
    assert all((r["height"], r["width"]) == (30, 40) for r in records)
    assert [len(r["annotations"]) for r in records] == [0, 2, 0]
    mode = BoxMode.XYXY_ABS
    dog, cat = records[1]["annotations"]
    assert dog == {"category_id": 1, "bbox": [0, 0, 40, 30], "bbox_mode": mode, "iscrowd": 0}
    assert cat["category_id"] == 0 and cat["bbox"] == pytest.approx([8, 12, 12, 18])


@pytest.mark.parametrize("extension", ["jpg", "tif", "png"])
def test_yolo_size_is_turned_as_exif_says(tmp_path, extension):
    os.makedirs(tmp_path / "images")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / f"images/a.{extension}", exif=exif)
    os.makedirs(tmp_path / "labels")
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.25 1 0.5")
    (record,) = read_yolo(str(tmp_path / "images"), "", ["cat"])
    size = record["height"], record["width"]
    assert size == (40, 30) == read_image(record["file_name"], "RGB", size).shape[:2]
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
    for name, text in (("train.txt", "photos/1/a.jpg"), ("notes/a.txt", "0 .5 .5 1 1")):
        (tmp_path / "flat" / name).write_text(text, "utf-8-sig")  # as Windows' editors do
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


def test_yolo_names_labels_without_an_image(tmp_path, caplog):
    write_yolo(tmp_path, {"a.jpg": [], "sub/b.jpg": ["0 .5 .5 1 1"], "c.jpg": None})
    for name in ("sub/photo.heic.txt", "notes.md", "d.txt"):
        (tmp_path / "labels/train" / name).touch()
    images = str(tmp_path / "images/train")
    assert len(read_yolo(images, "", ["cat"])) == 3
    path = tmp_path / "labels/train/d.txt"
    assert f"{images}: 2 label files are of no image: {path}" in caplog.text
    caplog.clear()
    (tmp_path / "some.txt").write_text("images/train/a.jpg")
    assert len(read_yolo(str(tmp_path / "some.txt"), "", ["cat"])) == 1
    assert len(read_yolo(images, str(tmp_path / "labels/train"), ["cat"])) == 3
    write_yolo(tmp_path / "beside", {"a.jpg": ["0 .5 .5 1 1"]}, "x", "x")
    (tmp_path / "beside/x/README.txt").touch()
    assert len(read_yolo(str(tmp_path / "beside/x"), "", ["cat"])[0]["annotations"]) == 1
    assert "are of no image" not in caplog.text


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
    caplog.clear()
    write_yolo(tmp_path / "y", {"a.jpg": ["0 .5 .5 0 .1"] * 23 + boxes})
    DatasetCatalog.get("t_yolo")
    assert "dropped 25 boxes" in caplog.text and "object 19" in caplog.text
    assert "object 20" not in caplog.text and "… and 5 more" in caplog.text


def test_yolo_names_every_defective_line_and_image(tmp_path):
    lines = ["0 .5 .5 .1 .1", "2 .5 .5 .1 .1", "0 .5 .5 .1", "", "0 .1 .1 .2 .1 .2 .2"]
    lines += ["cat 1 1 1 1", "0.5 .5 .5 .1 .1", "0 200 100 30 20", "0 nan .5 .1 .1"]
    lines += ["0 .5 .5 -.1 .1", "-1 0 0 0 0"]
    write_yolo(tmp_path / "y", {"a.jpg": lines, "b.jpg": ["x"]})
    (tmp_path / "y/images/train/c.jpg").write_bytes(b"no image")
    Image.new("RGB", (40, 30)).save(tmp_path / "whole.png")
    cut = (tmp_path / "whole.png").read_bytes()[:20]
    (tmp_path / "y/images/train/d.png").write_bytes(cut)
    register_datasets(make_cfg({"t_yolo": YOLO}))
    with pytest.raises(ValueError) as info:
        DatasetCatalog.get("t_yolo")
    first, *found = str(info.value).splitlines()
    folder = tmp_path / "y/labels/train"
    assert first == "DATASETS.REGISTER.t_yolo: 12 errors:"
    assert found[:3] == [
        f"{folder}/a.txt, line 2: class 2 isn't one of 0 to 1: '2 .5 .5 .1 .1'",
        f"{folder}/a.txt, line 3: 4 values, not class cx cy w h: '0 .5 .5 .1'",
        f"{folder}/a.txt, line 5: 7 values, not class cx cy w h: '0 .1 .1 .2 .1 .2 .2'",
    ]
    reasons = ["not five numbers", "class 0.5 isn't", "aren't fractions", "aren't fractions"]
    for number, reason in zip((6, 7, 8, 9, 10), [*reasons, "aren't fractions"]):
        assert f"a.txt, line {number}: " in found[number - 3] and reason in found[number - 3]
    assert "line 11: class -1 isn't" in found[8] and f"{folder}/b.txt, line 1" in found[9]
    assert "c.jpg" in found[10] and "d.png" in found[11] and len(found) == 12
    write_yolo(tmp_path / "y", {"a.jpg": ["x"] * 60})
    with pytest.raises(ValueError, match="63 errors:(?s:.*)\nand 13 more$"):
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


def test_a_size_is_read_from_the_header_alone(tmp_path, monkeypatch):
    """Decoding takes a second for 20 megapixels."""
    monkeypatch.setattr(ImageFile, "load", lambda image: pytest.fail("decoded"))
    for extension in ("jpg", "png", "bmp", "tif"):
        cv2.imwrite(str(tmp_path / f"a.{extension}"), np.zeros((30, 40, 3), np.uint8))
        assert image_size(str(tmp_path / f"a.{extension}")) == (30, 40)


def test_a_size_that_pillow_takes_for_a_bomb(tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((30, 40, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert image_size(str(tmp_path / "a.jpg")) == (30, 40)


@pytest.mark.parametrize("exif", [b"garbage", b"II*\0"])
def test_damaged_exif_is_ignored(tmp_path, exif):
    """As OpenCV does."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
    assert image_size(str(tmp_path / "a.jpg")) == (30, 40)


def test_a_turned_png_whose_exif_follows_the_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png", exif=exif)
    data = (tmp_path / "a.png").read_bytes()
    chunk = data.index(b"eXIf") - 4
    end = chunk + 12 + int.from_bytes(data[chunk : chunk + 4], "big")
    last = data.index(b"IEND") - 4
    assert chunk < data.index(b"IDAT")
    moved = data[:chunk] + data[end:last] + data[chunk:end] + data[last:]
    (tmp_path / "a.png").write_bytes(moved)
    assert image_size(str(tmp_path / "a.png")) == (40, 30)


def test_a_missing_image_has_its_own_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        image_size(str(tmp_path / "a.jpg"))


def test_yolo_images_of_one_name(tmp_path, caplog):
    """Of a list with LABELS they would share a file; beside one another they may be copies."""
    root = tmp_path / "y"
    write_yolo(root, {"a.jpg": ["0 .5 .5 1 1"], "a.png": None}, "both", "both")
    assert [len(x["annotations"]) for x in read_yolo(str(root / "both"), "", ["cat"])] == [1, 1]
    assert "both/a.txt is of 2 images of one name" in caplog.text
    for folder in ("1", "2"):
        write_yolo(root, {"a.jpg": None}, folder)
    write_yolo(root, {"a.jpg": ["0 .5 .5 1 1"]}, "copies", "notes")
    write_yolo(root, {"b.jpg": ["0 .5 .5 1 1"]}, "3", "others")
    (root / "train.txt").write_text("1/a.jpg\n2/a.jpg\n3/b.jpg\n")
    assert len(read_yolo(str(root / "train.txt"), str(root / "others"), ["cat"])) == 3  # no a.txt
    with pytest.raises(ValueError, match="notes/a.txt is of 2 images of one name"):
        read_yolo(str(root / "train.txt"), str(root / "notes"), ["cat"])


def test_yolo_follows_links_to_folders(tmp_path):
    write_yolo(tmp_path / "other", {"b.jpg": ["0 .5 .5 1 1"]}, "images", "labels")
    write_yolo(tmp_path / "y", {"a.jpg": []}, "images", "labels")
    for folder in ("images", "labels"):
        (tmp_path / "y" / folder / "more").symlink_to(tmp_path / "other" / folder)
    for name in ("self", "again"):
        (tmp_path / "y/images" / name).symlink_to(tmp_path / "y/images")
    write_yolo(tmp_path / "y", {"train/c.jpg": ["0 .5 .5 1 1"]}, "images", "labels")
    for name in ("latest", "zlatest"):  # has no labels of its own
        (tmp_path / "y/images" / name).symlink_to("train")
    records = read_yolo(str(tmp_path / "y/images"), "", ["cat"])
    assert [(r["image_id"], len(r["annotations"])) for r in records] == [
        ("a.jpg", 0), ("more/b.jpg", 1), ("train/c.jpg", 1)
    ]  # fmt: skip


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
    (root / "names.txt").write_bytes(b"K\xe4fer")
    load_fails(ValueError, "names.txt", f"{key}.CLASSES", "isn't UTF-8", CLASSES="names.txt")
    (root / "train.txt").write_bytes(b"\xe4.jpg")
    load_fails(ValueError, "train.txt", f"{key}.IMAGES", "isn't UTF-8", IMAGES="train.txt")
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
