"""tools/doctor.py on copies of rendered shapes that are damaged in one way each."""

import copy
import json
import logging
import os
import re
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import cv2
import doctor
import numpy as np
import pytest
import yaml
from commands import run, start
from dataset_checks import checks, reading
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ssd.config import load_config
from ssd.data.mapper import read_image

ROOT = Path(__file__).resolve().parents[2]


class Lab:
    """A config whose training and test sets are copies of 12 and 4 images of shapes."""

    def __init__(self, folder, shapes, capsys):
        self.folder, self.capsys = folder, capsys
        for split, name in (("train", "train"), ("val", "test")):
            shutil.copytree(shapes / split / "images", folder / name)
            setattr(self, name, json.loads((shapes / f"{split}.json").read_text()))
        entries = {
            f"doctor_{name}": {"FORMAT": "coco", "ROOT": ".", "ANNOTATIONS": f"{name}.json",
                               "IMAGES": name}
            for name in ("train", "test")
        }  # fmt: skip
        self.config = folder / "config.yaml"
        keys = {"_BASE_": str(ROOT / "labs/quickstart/config.yaml")}
        datasets = {"TRAIN": ["doctor_train"], "TEST": ["doctor_test"], "REGISTER": entries}
        self.config.write_text(json.dumps({**keys, "DATASETS": datasets}))

    def image(self, number, name="train"):
        return self.folder / name / f"{number:06d}.jpg"

    def objects(self, number):
        """The annotations of a training image."""
        return [a for a in self.train["annotations"] if a["image_id"] == number + 1]

    def write(self):
        for name in ("train", "test"):
            (self.folder / f"{name}.json").write_text(json.dumps(getattr(self, name)))

    def check(self, *opts, fix=None, dataset=None):
        """What the doctor prints about the training set and both sets together."""
        self.write()
        self.report = doctor.Report(show=5)
        args = Namespace(config_file=str(self.config), opts=list(opts), fix=fix, dataset=dataset)
        doctor.check_lab(args, self.report)
        text = self.capsys.readouterr().out
        return re.sub(r"(?ms)^doctor_test .*?^training", "training", text)


@pytest.fixture
def lab(datasets_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    yield Lab(tmp_path, datasets_folder / "shapes", capsys)
    for name in ("doctor_train", "doctor_test"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def finding(text, pattern):
    """(level, lines below) of the only verdict whose text matches."""
    verdicts = re.findall(r"(?m)^  (OK|WARNING|ERROR) +(.*)\n((?: {9,}.*\n)*)", text)
    found = [(level, below) for level, line, below in verdicts if re.search(pattern, line)]
    assert len(found) == 1, text
    return found[0]


def test_sound_data_has_no_error(lab):
    text = lab.check()
    assert lab.report.counts["ERROR"] == 0
    assert finding(text, "files: all 16 readable")[0] == "OK"
    assert finding(text, r"boxes: \d+ inside their images, none twice")[0] == "OK"
    assert finding(text, "doctor_train and doctor_test: no image in both")[0] == "OK"
    counts = np.bincount([a["category_id"] for a in lab.train["annotations"]], minlength=7)[1:]
    assert f"classes: {sum(0 < counts) - sum(counts >= 20)} with fewer than 20 objects" in text
    assert re.search(rf"(?m)^  ellipse +\d+ +{counts[0]} +{counts[0] / counts.sum():.1%}", text)


def test_unreadable_files(lab):
    data = lab.image(0).read_bytes()
    lab.image(0).write_bytes(data[: len(data) // 2])
    lab.image(1).write_bytes(b"")
    lab.image(2).write_bytes(b"no image")
    lab.image(3).unlink()
    level, below = finding(lab.check(), "files: 4 can't be read")
    assert level == "ERROR"
    for number, reason in enumerate(["truncated", "empty", "no readable", "No such file"]):
        assert re.search(rf"(?m)^.*{reason}.*{number:06d}.jpg|{number:06d}.jpg.*{reason}", below)


def test_size_of_annotation_and_file(lab):
    lab.train["images"][2]["width"] += 1
    level, below = finding(lab.check(), "files: 1 of another size than annotated")
    image = lab.train["images"][2]
    size = f"{image['width'] - 1}x{image['height']}"
    assert level == "ERROR"
    assert f"000002.jpg: annotated {image['width']}x{image['height']}, the file has {size}" in below


def test_images_of_12_bits_in_16(lab):
    cv2.imwrite(str(lab.image(0)), np.zeros((50, 60), np.uint8))
    image = np.full((50, 60), 4095, np.uint16)
    path = lab.image(1).with_suffix(".png")
    cv2.imwrite(str(path), image)
    for entry, name in zip(lab.train["images"], (lab.image(0).name, path.name)):
        entry.update(file_name=name, height=50, width=60)
    small = np.zeros((600, 600, 3), np.uint8)  # one bright pixel, of blue
    small[300, 300, 0] = 255
    cv2.imwrite(str(lab.image(2).with_suffix(".png")), small)
    lab.train["images"][2].update(file_name="000002.png", height=600, width=600)
    level, below = finding(lab.check(), "files: 2 are nearly black")
    assert level == "WARNING" and "000001.png: at most 15 of 255" in below


def turn(path, orientation):
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = orientation
        image.load()
        image.save(path, exif=exif, quality=95)


def test_exif(lab):
    images = lab.train["images"]
    turn(lab.image(0), 6)
    images[0]["width"], images[0]["height"] = images[0]["height"], images[0]["width"]
    text = lab.check()
    assert finding(text, "EXIF: 1 are turned by it, and annotated so")[0] == "OK"
    assert "files: all 16" in text
    turn(lab.image(1), 8)  # annotated as stored
    turn(lab.image(2), 3)
    text = lab.check()
    level, below = finding(text, "EXIF: 1 were annotated unturned")
    assert level == "WARNING" and "000001.jpg" in below
    level, below = finding(text, "EXIF: 1 are turned without a change of size")
    assert level == "WARNING" and "000002.jpg: orientation 3" in below


def test_turned_tiff(lab):
    """OpenCV turns TIFFs in any case, and 9 is no orientation."""
    image = lab.train["images"][0]
    name = image["file_name"] = "000000.tif"
    path = str(lab.image(0).with_name(name))
    with Image.open(lab.image(0)) as picture:
        exif = picture.getexif()
        exif[0x0112] = 6
        picture.save(path, exif=exif)
    assert reading.scan_file(path).size == read_image(path).shape[:2]
    out = lab.folder / "cleaned.json"
    text = lab.check(fix=str(out))  # annotated as stored
    assert "000000.tif" in finding(text, "files: 1 of another size than annotated")[1]
    assert "000000.tif: left out, annotated" in text
    image["width"], image["height"] = image["height"], image["width"]
    turn(lab.image(1), 9)
    text = lab.check()
    assert finding(text, "files: all 16")[0] == "OK"
    assert finding(text, "EXIF: 1 are turned by it, and annotated so")[0] == "OK"


def test_copies_within_a_set_and_between_sets(lab):
    for number in (1, 3):  # one with the same objects, one with others
        shutil.copy(lab.image(number - 1), lab.image(number))
        name, image = f"{number:06d}.jpg", lab.train["images"][number]
        image.update(lab.train["images"][number - 1], id=number + 1, file_name=name)
    for annotation in lab.objects(1):
        lab.train["annotations"].remove(annotation)
    twins = [{**a, "id": 1000 + a["id"], "image_id": 2} for a in lab.objects(0)]
    lab.train["annotations"] += twins
    shutil.copy(lab.image(5), lab.image(1, "test"))
    lab.test["images"][1].update(lab.train["images"][5], id=2, file_name="000001.jpg")
    picture = cv2.imread(str(lab.image(8)))  # half as large, brighter and compressed anew
    picture = cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    picture = cv2.convertScaleAbs(picture, alpha=1.1, beta=10)
    cv2.imwrite(str(lab.image(2, "test")), picture, [cv2.IMWRITE_JPEG_QUALITY, 70])
    lab.test["images"][2].update(height=picture.shape[0], width=picture.shape[1])
    text = lab.check()
    level, below = finding(text, "copies: 1 files are there more than once")
    assert level == "WARNING" and "000000.jpg = 000001.jpg" in below
    level, below = finding(text, "copies: 1 times the same image with different objects")
    assert level == "ERROR" and "000002.jpg = 000003.jpg" in below
    level, below = finding(text, "1 files are in both")
    assert level == "ERROR" and "000005.jpg = 000001.jpg" in below
    level, below = finding(text, "1 of 4 test images look like a training image")
    assert level == "WARNING" and "000008.jpg ~ 000002.jpg" in below


def test_fixed_camera():
    """Of images that all look alike each test image is named once, with the most alike one."""
    sets = []
    for name, count in (("train", 400), ("test", 300)):
        noise = 0.05 * np.random.default_rng(0).standard_normal((count, 256))
        views = np.tile([-1, 1], 128) + noise + 0.01 * (name == "test") * np.arange(256) / 256
        views /= np.linalg.norm(views, axis=1, keepdims=True)
        files = [reading.ImageFile("", (9, 9), 1, f"{name}{i}".encode(), v)
                 for i, v in enumerate(views)]  # fmt: skip
        records = [{"file_name": f"{i}.jpg"} for i in range(count)]
        sets.append(reading.DataSet(name, records, files, ["a"], ".", True))
    (found,), same = checks.check_leaks(*sets)
    assert found.text == "train and test: 300 of 300 test images look like a training image"
    assert same == [] and found.places == [f"{i}.jpg ~ {i}.jpg" for i in range(300)]


def test_box_defects(lab):
    nan, flat, outside, beyond, twin, rival, whole = (
        copy.deepcopy(lab.objects(0)[0]) for _ in "abcdefg"
    )
    image = lab.train["images"][0]
    x, y, w, h = nan["bbox"]
    nan["bbox"][0] = float("nan")
    flat["bbox"][2] = 0
    outside["bbox"][0] = image["width"] + 5
    beyond["bbox"] = [image["width"] - 5, 3, 10, 10]
    rival["category_id"] = rival["category_id"] % 6 + 1
    whole["bbox"] = [0, 0, image["width"], image["height"]]
    last = len(lab.train["annotations"])
    for number, defect in enumerate((nan, flat, outside, beyond, twin, rival, whole)):
        lab.train["annotations"].append({**defect, "id": last + 1 + number})
    text, first = lab.check(), len(lab.objects(0)) - 7  # number of nan among the image's objects
    level, below = finding(text, "boxes: 3 without area or outside the image")
    assert level == "WARNING"
    assert re.findall(r"object (\d+) \(\w+\) (\w+)", below) == [
        (str(first), "isn"), (str(first + 1), "has"), (str(first + 2), "lies")
    ]  # fmt: skip
    assert "the evaluation counts them as missed" in below
    corners = [image["width"] - 5.0, 3.0, image["width"] + 5.0, 13.0]
    assert f"{corners} in {image['width']}x" in finding(text, "boxes: 1 reach beyond")[1]
    twice = f"object {first + 4} .*, as object 0"
    assert re.search(twice, finding(text, "boxes: 1 have the class and place of another")[1])
    twice = f"object {first + 5} .*, as object 0"
    assert re.search(twice, finding(text, "boxes: 1 have the place of another class's")[1])
    level, below = finding(text, "boxes: 1 cover the whole image")
    assert level == "WARNING" and f"object {first + 6}" in below  # more than 5 % of 16 images


def test_corners_in_place_of_width_and_height(lab):
    for annotation in lab.train["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]
    assert "would fit as x1, y1, x2, y2" in finding(lab.check(), "reach beyond the image")[1]


def test_classes_and_objects(lab):
    lab.train["categories"].append({"id": 7, "name": "moon"})
    lab.test["categories"].append({"id": 7, "name": "moon"})
    for annotation in list(lab.objects(0)):
        lab.train["annotations"].remove(annotation)
    box = lab.objects(1)[0]["bbox"]
    box[2], box[3] = 3, 3  # under 2 pixels of the input
    most = max(len(lab.objects(i)) for i in range(16))
    text = lab.check("MODEL.SSD.NUM_CLASSES", "7", "TEST.DETECTIONS_PER_IMAGE", str(most - 1))
    level, below = finding(text, "classes: 1 without any object")
    assert level == "WARNING" and "moon" in below
    level, below = finding(text, rf"images have more than {most - 1}")
    assert level == "WARNING" and f".jpg: {most} objects" in below
    level, below = finding(text, "objects: 1 images have none")
    assert level == "OK" and "000000.jpg" in below and "NEGATIVES_WITHOUT_POSITIVES" in below
    total = len(lab.train["annotations"])
    assert f"{1 / total:.1%} under 8 px, at the input's 160x160" in text
    text = lab.check("MODEL.SSD.DEFAULT_BOXES.MIN_SIZES", "[90,95,100,110]",
                     "MODEL.SSD.NUM_CLASSES", "7")  # fmt: skip
    level, below = finding(text, "smallest default box, 90 px")
    assert level == "WARNING" and re.search(r"ellipse: \d+% can't reach IoU 0.5", below)
    assert "MIN_SIZES" in below


def test_class_count_and_misspelt_keys(lab):
    level, _ = finding(lab.check("MODEL.SSD.NUM_CLASSES", "5"), "6 classes .*NUM_CLASSES is 5")
    assert level == "ERROR"
    text = lab.check("MODEL.SSD.NUM_CLASS", "5")
    assert finding(text, "unknown config key MODEL.SSD.NUM_CLASS")[0] == "ERROR"


@pytest.mark.parametrize(
    "change, level, text, place",
    [
        ({"image_id": 99}, "WARNING", "1 annotations of unknown images", "annotation 1"),
        ({"category_id": 9}, "ERROR", "1 annotations of unknown categories", "category 9"),
        ({"bbox": []}, "ERROR", "1 annotations without a bbox", "000000.jpg: annotation 1"),
        ({"bbox": None}, "ERROR", "1 annotations without a bbox", "000000.jpg: annotation 1"),
        ({"segmentation": [1, 2, 3, 4, 5, 6]}, "ERROR", "no list of polygons", "annotation 1"),
        ({"image_id": [1]}, "ERROR", "train.json can't be checked further: TypeError", ""),
        ({"id": 2}, "ERROR", "1 annotations with the id of another", "annotation 2"),
        ({"ignore": 1}, "ERROR", "1 annotations with ignore: 1", "annotation 1"),
        ({"segmentation": [[1, 2]]}, "WARNING", "1 annotations whose segmentation", "annotation 1"),
        ({"segmentation": [[1] * 7]}, "WARNING", "1 annotations whose segmentation", "on 1"),
        ({"segmentation": "none"}, "WARNING", "1 annotations whose segmentation", "annotation 1"),
    ],
)
def test_broken_coco_annotations(lab, change, level, text, place):
    """Each is a verdict; the ERRORs are what Detectron2's reader stops at."""
    lab.train["annotations"][0].update(change)
    printed = lab.check()
    found, below = finding(printed, text)
    assert (found, place in below) == (level, True)
    assert ("can't be loaded" in printed) == (level == "ERROR")


def test_an_image_listed_twice(lab):
    lab.train["images"].append(dict(lab.train["images"][3]))
    lab.train["images"][3]["width"] = 7  # Detectron2 takes the last one
    out = lab.folder / "cleaned.json"
    text = lab.check(fix=str(out))
    assert lab.report.counts["ERROR"] == 0
    assert "000003.jpg" in finding(text, "1 images that are listed twice")[1]
    content = json.loads(out.read_text())
    counts = [len(content[key]) for key in ("images", "annotations")]
    assert counts == [len(lab.train["images"]) - 1, len(lab.train["annotations"])]


def test_broken_coco_images_and_files(lab):
    del lab.train["images"][0]["width"]
    lab.train["images"][1]["id"] = 3
    lab.train["images"][4]["height"] = "278"
    text = lab.check()
    assert "000000.jpg" in finding(text, "1 images without height or width")[1]
    assert "000004.jpg" in finding(text, "1 images whose height or width is no number")[1]
    assert "000002.jpg: id 3" in finding(text, "2 images with the id of another")[1]
    assert finding(text, f"{len(lab.objects(2))} annotations of ambiguous images")[0] == "ERROR"
    sound, numbers = lab.train, [{"id": 1, "name": 5}]
    for broken in (
        [],
        {**sound, "annotations": None},
        {**sound, "images": ["a.jpg"]},
        {**sound, "categories": []},
        {**sound, "categories": numbers},
    ):
        lab.train = broken
        text = lab.check(fix=str(lab.folder / "cleaned.json"))
        assert finding(text, "train.json is no COCO file")[0] == "ERROR"
        if not (broken and broken["categories"] is numbers):
            assert text.count("Training stops with this error") == 1
        assert finding(text, "NUM_CLASSES 6 fits")[0] == "OK" and "fits doctor_test" in text
        assert finding(text, "doctor_train can't be copied until the ERRORs above")[0] == "ERROR"
        assert not (lab.folder / "cleaned.json").exists()
    lab.train = {**sound, "images": []}
    assert finding(lab.check(), "holds no image")[0] == "ERROR"
    lab.train = sound
    lab.objects(5)[0]["bbox"][0] = 10**400
    text = lab.check()
    assert finding(text, "train.json can't be checked further: OverflowError")[0] == "ERROR"


@pytest.mark.parametrize("key", ["id", "name"])
def test_categories_of_the_same(lab, key):
    first, second = lab.train["categories"][:2]
    second[key] = first[key]
    text = lab.check(fix=str(lab.folder / "cleaned.json"))
    level, below = finding(text, f"^2 categories of the same {key}")
    assert level == "ERROR" and f"{second['name']}: id {second['id']}" in below
    assert finding(text, "can't be copied")[0] == "ERROR"


@pytest.mark.parametrize("filters", ["True", "False"])
def test_nothing_to_learn(lab, filters):
    for annotation in lab.train["annotations"]:
        annotation["iscrowd"] = 1
    text = lab.check("DATALOADER.FILTER_EMPTY_ANNOTATIONS", filters)
    assert finding(text, "DATASETS.TRAIN has no object to learn")[0] == "ERROR"
    lab.train["annotations"][0]["iscrowd"] = 0
    assert "no object to learn" not in lab.check()


def used_entry(text):
    return yaml.safe_load(re.search(r"use it in DATASETS.REGISTER with \w+: (.*)", text)[1])


def test_fix_merges_the_entries_of_a_file(lab):
    """One image per annotation, as converters of tables write it; EXIF tells two sizes."""
    images = {image["id"]: image for image in lab.train["images"]}
    lab.train["images"] = []
    for number, annotation in enumerate(lab.train["annotations"], 1):
        lab.train["images"].append({**images[annotation["image_id"]], "id": number})
        annotation["image_id"] = number
    first = lab.train["images"][0]
    twin = {**first, "id": 1000}
    stored = {**first, "id": 1001, "height": first["width"], "width": first["height"]}
    lab.train["images"] += [twin, stored]
    total = len(lab.train["annotations"])
    for image_id in (1000, 1001):
        annotation = {**lab.train["annotations"][0], "id": image_id, "image_id": image_id}
        lab.train["annotations"].append(annotation)
    turn(lab.image(0), 6)
    out = lab.folder / "cleaned.json"
    text = lab.check(fix=str(out))
    assert finding(text, "the same image with different objects")[0] == "ERROR"
    for line in (
        "000001.jpg: left out, a copy of 000001.jpg; 1 of its 1 objects moved there",
        "000000.jpg: left out, a copy of 000000.jpg; 0 of its 1 objects moved there",
        "000000.jpg: left out with its objects, a copy of 000000.jpg of another size",
    ):
        assert line in text
    content = json.loads(out.read_text())
    used = {a["image_id"] for a in content["annotations"]}
    assert used == {image["id"] for image in content["images"]}
    assert (len(content["images"]), len(content["annotations"])) == (len(images), total)


def test_fix_says_what_the_reader_left_out(lab):
    images, annotations = lab.train["images"], lab.train["annotations"]
    images[1]["id"] = images[2]["id"]
    del images[3]
    images[3]["height"] = "high"
    of = {number: lab.objects(number)[0] for number in range(1, 9)}
    of[5]["category_id"] = str(of[5]["category_id"])
    of[6]["bbox"] = []
    of[7]["ignore"] = 1
    of[8]["segmentation"] = [[1, 2, 3]]
    out = lab.folder / "cleaned.json"
    text = lab.check(fix=str(out))
    for line in (
        "000001.jpg: id 3: left out (images with the id of another)",
        "000002.jpg: id 3: left out (images with the id of another)",
        f"annotation {lab.objects(2)[0]['id']}: left out (annotations of ambiguous images)",
        f"annotation {of[1]['id']}: left out (annotations of unknown images)",
        f"annotation {of[3]['id']}: left out (annotations of unknown images)",
        "000004.jpg: given the file's size (images whose height or width is no number)",
        f"annotation {of[5]['id']}, category '{of[5]['category_id']}': left out (annotations of un",
        f"000006.jpg: annotation {of[6]['id']}: left out (annotations without a bbox of four",
        f"000007.jpg: annotation {of[7]['id']}: made a crowd (annotations with ignore: 1)",
        f"annotation {of[8]['id']}: kept as a box (annotations whose segmentation is no polygon)",
        "left out of all annotations: segmentation",
    ):
        assert line in text
    gone = sum(len(lab.objects(number)) for number in (1, 2, 3)) + 2
    assert len(json.loads(out.read_text())["annotations"]) == len(annotations) - gone


def test_fix_keeps_areas_and_categories(lab):
    """A mask's area goes with its box, but isn't larger than a clipped one; without it it's the
    box's."""
    for part, key in ((lab.train["categories"], "id"), (lab.train["annotations"], "category_id")):
        for entry in part:
            entry[key] *= 10
    plain, scaled, clipped, mask, wrong = (lab.objects(number)[0] for number in range(5))
    for annotation in (plain, scaled, mask):
        annotation["area"] = 12.5
    clipped["area"], wrong["area"] = 200, float("nan")
    for side in ("height", "width"):
        lab.train["images"][1][side] *= 2
    clipped["bbox"] = mask["bbox"] = [-3, 2, 10, 20]
    out = lab.folder / "cleaned.json"
    lab.check(fix=str(out))
    content = json.loads(out.read_text())
    areas = {a["id"]: a["area"] for a in content["annotations"]}
    expected = [12.5, 12.5 / 4, 7 * 20, 12.5, wrong["bbox"][2] * wrong["bbox"][3]]
    assert [areas[a["id"]] for a in (plain, scaled, clipped, mask, wrong)] == expected
    assert content["categories"] == lab.train["categories"]
    labels = [a["category_id"] for a in content["annotations"]]
    assert labels == [a["category_id"] for a in lab.train["annotations"]]


def test_fix_with_very_many_changes(lab):
    lab.train["annotations"] += [
        {**lab.objects(0)[0], "id": 1000 + i, "bbox": [5, 5, 0, 9 + i]} for i in range(130)
    ]
    out = lab.folder / "cleaned.json"
    text = lab.check(fix=str(out))
    assert f"… and 30 more: all are in {out}.changes.txt" in text
    assert len((lab.folder / "cleaned.json.changes.txt").read_text().splitlines()) == 130
    assert text.count("left out") == 100 and "use it in DATASETS.REGISTER" in text


def test_fix_keeps_what_training_sees(lab):
    """A crowd in front of an object doesn't take its place, an infinite box isn't clipped."""
    real, endless = lab.objects(0)[0], lab.objects(1)[0]
    lab.train["annotations"].insert(0, {**real, "id": 1000, "iscrowd": 1})
    endless["bbox"][2] = float("inf")
    out = lab.folder / "cleaned.json"
    text = lab.check(fix=str(out))
    assert finding(text, "boxes: 1 without area or outside")[0] == "WARNING"
    assert "have the class and place" not in text
    assert "000001.jpg: object 0 left out, without area in the image" in text
    total = len(lab.train["annotations"])
    # the crowd and the endless box don't count in the table
    assert sum(map(int, re.findall(r"(?m)^  \w+ +\d+ +(\d+) +[\d.]+%", text))) == total - 2
    crowds = [a["iscrowd"] for a in json.loads(out.read_text())["annotations"]]
    assert (sum(crowds), len(crowds)) == (1, total - 1)


@pytest.mark.parametrize(
    "opts, dataset",
    [
        (["DATASETS.TRAIN", "()"], None),
        (["DATASETS.TRAIN", "('doctor_train', 'doctor_test')"], None),
        ([], "doctor_val"),
    ],
)
def test_fix_asks_for_a_data_set_before_the_scan(lab, opts, dataset):
    text = lab.check(*opts, fix=str(lab.folder / "cleaned.json"), dataset=dataset)
    level, _ = finding(text, r"--fix needs a --dataset of \[.*'doctor_test'\], got")
    assert level == "ERROR" and "images" not in text


def test_fix_in_an_odd_folder(lab):
    """What is printed is YAML, whatever the path."""
    out = lab.folder / "a, [b] #c: 'd' ä"
    out.mkdir()
    entry = used_entry(lab.check(fix=str(out / "cleaned.json")))
    assert entry["ANNOTATIONS"] == str(out / "cleaned.json")


def test_fix_loads_and_is_sound(lab, monkeypatch):
    """A copy of a set with every kind of damage has no ERROR and keeps the sound boxes."""
    images = lab.train["images"]
    lab.image(0).write_bytes(b"")
    shutil.copy(lab.image(1), lab.image(2))  # copies: within the set …
    images[2].update(images[1], id=3, file_name="000002.jpg")
    shutil.copy(lab.image(3), lab.image(0, "test"))  # … and in the test set
    lab.test["images"][0].update(images[3], id=1, file_name="000000.jpg")
    images[4]["height"], images[4]["width"] = images[4]["height"] * 2, images[4]["width"] * 2
    for annotation in lab.objects(4):
        annotation["bbox"] = [2 * value for value in annotation["bbox"]]
    images[5]["height"], images[5]["width"] = images[5]["width"], images[5]["height"]
    images[6]["width"] += 40  # cut since
    lab.objects(7)[0]["bbox"][2] = 0
    lab.objects(8)[0]["bbox"][0] = -3
    lab.objects(9)[0]["category_id"] = 9
    lab.write()
    before = (lab.folder / "train.json").read_text()
    out = lab.folder / "cleaned.json"
    text = lab.check(fix=str(out))
    assert (lab.folder / "train.json").read_text() == before
    for line in (
        "000000.jpg: left out, it can't be read",
        "000002.jpg: left out, a copy of 000001.jpg",
        "000003.jpg: left out, a test set has it, too",
        "its boxes scaled",
        "the sides were exchanged",
        "000006.jpg: left out, annotated",
        "000007.jpg: object 0 left out, without area in the image",
        "000008.jpg: object 0 clipped from [-3.0",
    ):
        assert line in text
    entry = used_entry(text)
    assert entry["FORMAT"] == "coco"
    opts = sum(([f"DATASETS.REGISTER.doctor_train.{k}", v] for k, v in entry.items()), [])
    load_config(str(lab.config), opts)
    records = {Path(r["file_name"]).name: r for r in DatasetCatalog.get("doctor_train")}
    assert sorted(records) == [f"{i:06d}.jpg" for i in range(16) if i not in (0, 2, 3, 6)]
    moved = len(lab.objects(2))  # of the copy
    assert f"000001.jpg; {moved} of its {moved} objects moved there" in text
    assert [len(records[f"{i:06d}.jpg"]["annotations"]) - len(lab.objects(i))
            for i in (1, 4, 7, 8, 9, 10)] == [moved, 0, -1, 0, -1, 0]  # fmt: skip
    for annotation, old in zip(records["000004.jpg"]["annotations"], lab.objects(4)):
        np.testing.assert_allclose(annotation["bbox"], np.array(old["bbox"]) / 2)
        assert annotation["category_id"] == old["category_id"] - 1
    lab.check(*opts)
    assert lab.report.counts["ERROR"] == 0


def test_fix_of_voc(bccd, tmp_path, monkeypatch, capsys):
    """BCCD's copy has all boxes but the two without area."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(bccd))
    config, out = ROOT / "labs/bccd_ssdlite_mobilenetv2/config.yaml", tmp_path / "cleaned.json"
    opts = ["DATASETS.TEST", "()"]
    report = doctor.Report(show=5)
    args = Namespace(config_file=str(config), opts=opts, fix=str(out), dataset=None)
    doctor.check_lab(args, report)
    text = capsys.readouterr().out
    assert "BloodImage_00338.jpg: object 12 (RBC) has zero width" in text
    assert report.counts == {"OK": 5, "WARNING": 1, "ERROR": 0}
    entry = {"FORMAT": "coco", "ROOT": str(bccd / "bccd"), "ANNOTATIONS": str(out)}
    entry["IMAGES"] = "JPEGImages"
    keys = {"_BASE_": str(config), "DATASETS": {"REGISTER": {"doctor_train": entry}}}
    (tmp_path / "config.yaml").write_text(json.dumps(keys))
    load_config(str(tmp_path / "config.yaml"))
    records = DatasetCatalog.get("doctor_train")
    assert sum(len(record["annotations"]) for record in records) == 3943 - 2
    assert MetadataCatalog.get("doctor_train").thing_classes == ["RBC", "WBC", "Platelets"]
    DatasetCatalog.pop("doctor_train")
    MetadataCatalog.pop("doctor_train")


def test_yolo(lab):
    """What the reader leaves out is named, and what it stops at is one verdict."""
    for name, content in (("train", lab.train), ("test", lab.test)):
        (lab.folder / "labels" / name).mkdir(parents=True)
        (lab.folder / "images").mkdir(exist_ok=True)
        (lab.folder / "images" / name).symlink_to(lab.folder / name)
        for image in content["images"]:
            lines = []
            for annotation in content["annotations"]:
                if annotation["image_id"] == image["id"]:
                    x, y, w, h = annotation["bbox"]
                    w, h = w / image["width"], h / image["height"]
                    x, y = x / image["width"] + w / 2, y / image["height"] + h / 2
                    lines.append(f"{annotation['category_id'] - 1} {x:.6f} {y:.6f} {w:.6f} {h:.6f}")
            path = lab.folder / "labels" / name / image["file_name"]
            path.with_suffix(".txt").write_text("\n".join(lines))
    names = [category["name"] for category in lab.train["categories"]]
    (lab.folder / "classes.txt").write_text("\n".join(names))
    entry = {"FORMAT": "yolo", "ROOT": str(lab.folder)}
    entries = {
        f"doctor_{name}": {**entry, "IMAGES": f"images/{name}"} for name in ("train", "test")
    }
    config = json.loads(lab.config.read_text())
    config["DATASETS"]["REGISTER"] = entries
    lab.config.write_text(json.dumps(config))
    labels = lab.folder / "labels/train/000000.txt"
    sound = labels.read_text()
    labels.write_text(f"0 .5 .5 0 .1\n{sound}")
    labels.with_name("photo.heic.txt").touch()
    out = lab.folder / "cleaned.json"
    text = lab.check(fix=str(out))
    assert lab.report.counts["ERROR"] == 0
    assert finding(text, "1 label files are of no image: .*photo.heic.txt")[0] == "WARNING"
    level, below = finding(text, "boxes: 1 without area or outside the image")
    assert level == "WARNING" and "000000.jpg: object 0 (ellipse) has zero width" in below
    assert "Training leaves them out: correct them" in below
    total = len(lab.train["annotations"])
    assert (
        f"doctor_train (train): 16 images, {total + 1} boxes, {lab.folder / 'images/train'}" in text
    )
    assert len(json.loads(out.read_text())["annotations"]) == total
    labels.write_text(f"{sound}\n0 100 80 30 20")
    out = lab.folder / "none.json"
    text = lab.check(fix=str(out))
    level, below = finding(text, "can't be loaded: ValueError: .*doctor_train: 1 errors")
    assert level == "ERROR"
    assert finding(text, "can't be copied")[0] == "ERROR" and not out.exists()
    number = len(sound.splitlines()) + 1
    assert f"000000.txt, line {number}: cx cy w h aren't fractions from 0 to 1" in text


def test_kept_category_ids(tmp_path):
    content = {"images": [], "categories": [{"id": 3, "name": "b"}, {"id": 1, "name": "a"}]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    assert reading.read_coco(str(path), "", keep_ids=True)[1] == {1: "a", 2: "id 2", 3: "b"}
    assert reading.read_coco(str(path), "")[1] == {1: "a", 3: "b"}


def test_exit_codes(lab, monkeypatch):
    """0 with warnings, 1 with --strict or an error; an existing file is never written over."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["doctor.py", "--config-file", str(lab.config), *options])
        try:
            return doctor.main()
        finally:
            logging.disable(logging.NOTSET)

    lab.write()
    assert [run(), run("--strict")] == [0, 1]
    with pytest.raises(SystemExit):
        run("--fix", str(lab.folder / "train.json"))
    with pytest.raises(SystemExit):
        run("--fix", str(lab.folder / "missing/cleaned.json"))
    (lab.folder / "new.json.changes.txt").write_text("notes")
    with pytest.raises(SystemExit):
        run("--fix", str(lab.folder / "new.json"))
    assert "new.json.changes.txt exists; nothing is changed" in lab.capsys.readouterr().err
    lab.image(0).write_bytes(b"")
    assert run() == 1


def test_command(lab):
    name = lab.train["images"][0]["file_name"] = os.fsdecode(b"caf\xe9.jpg")  # not UTF-8
    lab.image(0).rename(lab.folder / "train" / name)
    lab.objects(0)[0]["bbox"][2] = 0
    lab.write()
    printed = run(ROOT / "tools/doctor.py", "--config-file", lab.config)
    assert re.search(r"OK +Python [\d.]+, torch [\d.]+", printed)
    assert "doctor_test (test): 4 images" in printed
    assert r"caf\udce9.jpg: object 0 (" in printed


@pytest.mark.parametrize(
    "module, error",
    [
        ("torch", "OSError: libcudart.so is missing"),
        ("torchvision", "RuntimeError: operator torchvision::nms does not exist"),
        ("cv2", "ImportError: libGL.so.1: cannot open shared object file"),
    ],
)
def test_broken_environment(tmp_path, module, error):
    name, _, text = error.partition(": ")
    (tmp_path / f"{module}.py").write_text(f"raise {name}({text!r})")
    done = start(ROOT / "tools/doctor.py", PYTHONPATH=tmp_path)
    assert done.returncode == 1
    level, below = finding(done.stdout, f"{module}: found .* fails with {error}")
    assert level == "ERROR" and "Mend it with" in below
    assert done.stdout.endswith("1 ERROR, 0 WARNING\n")
