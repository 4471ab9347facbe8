"""python -m ssd.predict, and the functions that it shares with the tools."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from commands import start
from detectron2.data import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from ssd import model_zoo
from ssd.checkpoint import SSDCheckpointer
from ssd.checkpoint.published import PUBLISHED
from ssd.drawing import write_image
from ssd.predict import find_images, image_ids, output_paths, save_records, to_records


def test_command_with_published_weights(tmp_path):
    """A file of the published name in the current folder is taken for it: random weights."""
    name = "ssdlite_mobilenetv2_voc0712_lufficc"
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    torch.manual_seed(0)
    model = build_model(model_zoo.get_config(name, opts=opts))
    with torch.no_grad():  # some detections
        model.head.cls_predictors[-1][-1].bias[7] = 5
    SSDCheckpointer(model, str(tmp_path)).save(Path(PUBLISHED[name].file_name).stem)
    cv2.imwrite(str(tmp_path / "photo.jpg"), np.full((60, 80, 3), 90, np.uint8))
    images = ("photo.jpg", "none.jpg")
    done = start("-m", "ssd.predict", name, *images, "--output", "new", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "none.jpg does not exist" in done.stderr
    title, header, row, *rows = done.stdout.splitlines()
    assert title == f"photo.jpg: {len(rows) + 1} detections"
    assert header.split() == "score x1 y1 x2 y2 class".split()
    score, x1, y1, x2, y2, label = row.split()
    assert float(score) > 0.5 and label == "cat"
    assert 0 <= int(x1) < int(x2) <= 80 and 0 <= int(y1) < int(y2) <= 60
    assert cv2.imread(str(tmp_path / "new" / "photo.jpg")).shape == (60, 80, 3)


def test_files_folders_and_patterns(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    for name in ("a/2.jpg", "a/1.PNG", "a/notes.txt", "a/b/3.jpg", "[x].jpg", "empty/notes.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert find_images(["a"]) == ["a/1.PNG", "a/2.jpg"]
    assert find_images(["a/**/*.jpg"]) == ["a/2.jpg", "a/b/3.jpg"]
    assert find_images(["a/2.jpg", "./a/2.jpg", "a"]) == ["a/2.jpg", "a/1.PNG"]
    assert find_images(["[x].jpg"]) == ["[x].jpg"]  # a file, no pattern
    assert not caplog.messages
    assert find_images(["empty", "*.gif"]) == []
    assert caplog.messages == ["empty: no image", "*.gif: no image"]
    assert find_images(["missing.jpg"]) == ["missing.jpg"]  # reading it says that it isn't there


def test_images_of_one_name_have_ids_of_their_own():
    paths = ["a/1.jpg", "b/1.png", "b/2.x.jpg"]
    ids = image_ids(paths, Metadata())
    assert ids == {"a/1.jpg": "a/1.jpg", "b/1.png": "b/1.png", "b/2.x.jpg": "2.x"}


def test_pictures_keep_names_and_never_overwrite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert output_paths(["a/x.jpg", "a/y.jpg"], "out") == {
        "a/x.jpg": "out/x.jpg", "a/y.jpg": "out/y.jpg",
    }  # fmt: skip
    same_name = output_paths(["a/x.jpg", "a/b/x.jpg"], "out")
    assert list(same_name.values()) == ["out/x.jpg", "out/b/x.jpg"]
    assert output_paths(["a/x.jpg"], "new.png") == {"a/x.jpg": "new.png"}
    assert output_paths([], "out") == {}
    with pytest.raises(ValueError, match="new.png is a file, but there are 2 images"):
        output_paths(["a/x.jpg", "a/y.jpg"], "new.png")
    for output in ("a", "./a/x.jpg"):
        with pytest.raises(ValueError, match="would overwrite the image a/x.jpg"):
            output_paths(["a/x.jpg"], output)
    with pytest.raises(ValueError, match="would overwrite the image a/b/x.jpg"):  # of another
        output_paths(["a/x.jpg", "a/b/x.jpg"], "a/b")


def test_names_that_are_not_utf8(tmp_path):
    """OpenCV ends the program for those."""
    name = os.fsdecode(b"caf\xe9.jpg")
    path = write_image(str(tmp_path / name), np.zeros((4, 5, 3), np.uint8))
    assert path == str(tmp_path / name) and os.path.getsize(path)
    instances = Instances((4, 5), scores=torch.ones(1), pred_classes=torch.zeros(1).long())
    instances.pred_boxes = Boxes(torch.ones(1, 4))
    records = to_records(instances, path, path, Metadata())
    for file in ("x.csv", "x.json"):
        save_records(str(tmp_path / file), records)
    assert b"caf\xe9.jpg" in (tmp_path / "x.csv").read_bytes()
    assert json.loads((tmp_path / "x.json").read_text())[0]["file_name"] == path


@pytest.mark.parametrize("name", ["x.svg", "x.PGM"])  # the latter has no colour
def test_formats_that_cannot_be_written_become_png(name, tmp_path):
    path = write_image(str(tmp_path / "new" / name), np.full((4, 5, 3), (0, 9, 200), np.uint8))
    assert path.endswith(f"{name}.png") and cv2.imread(path)[0, 0].tolist() == [0, 9, 200]
