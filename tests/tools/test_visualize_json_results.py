"""Pictures of an evaluation's JSON, of COCO's and VOC's format, beside the ground truth."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import visualize_json_results as tool
from commands import run
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from ssd.config import load_config
from ssd.evaluation import COCOBoxEvaluator

ROOT = Path(__file__).parent.parent.parent
TOOL = ROOT / "tools" / "visualize_json_results.py"
CONFIG = ["--config-file", str(ROOT / "labs/quickstart/config.yaml")]
VOC = """<annotation><filename>{0}.jpg</filename>
<size><width>80</width><height>60</height></size><object><name>pear</name><bndbox>
<xmin>11</xmin><ymin>21</ymin><xmax>50</xmax><ymax>50</ymax></bndbox></object></annotation>"""


@pytest.fixture
def predictions(datasets_folder):
    """The ground truth of the shapes as detections."""
    truth = json.loads((datasets_folder / "shapes" / "val.json").read_text())
    keys = ("image_id", "category_id", "bbox")
    return [{**{key: x[key] for key in keys}, "score": 0.75} for x in truth["annotations"]]


def halves(path):
    """Left and right half without their titles."""
    picture = cv2.imread(str(path))[28:].astype(int)
    width = (picture.shape[1] - 8) // 2
    return picture[:, :width], picture[:, -width:]


def test_command_on_a_labs_results(predictions, datasets_folder, tmp_path):
    (tmp_path / "found.json").write_text(json.dumps(predictions))
    command = [TOOL, *CONFIG, "--input", tmp_path / "found.json", "--output", tmp_path / "new"]
    assert "4 pictures" in run(*command, DETECTRON2_DATASETS=datasets_folder)
    assert sorted(x.name for x in (tmp_path / "new").iterdir()) == [
        f"{i:06d}.jpg" for i in range(4)
    ]
    for path in (tmp_path / "new").iterdir():
        image = cv2.imread(str(datasets_folder / "shapes/val/images" / path.name))
        left, right = halves(path)
        assert left.shape == right.shape and max(left.shape) == 480
        differ = (np.abs(left - right).max(axis=2) > 40).mean()
        assert 0 < differ < 0.1  # the same boxes, but scores in the texts
        small = cv2.resize(right.astype(np.uint8), image.shape[1::-1])
        drawn = (np.abs(small.astype(int) - image).max(axis=2) > 100).mean()
        assert 0.003 < drawn < 0.3


def test_low_scores_are_not_drawn(predictions, datasets_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_folder))
    images = []
    for number, (found, threshold) in enumerate(
        [(predictions, "0.8"), ([], "0.8"), (predictions, "0.7")]
    ):
        (tmp_path / "found.json").write_text(json.dumps(found))
        arguments = ["--input", str(tmp_path / "found.json"), "--conf-threshold", threshold]
        output = tmp_path / str(number)
        tool.main([*CONFIG, *arguments, "--output", str(output)])
        images.append(halves(output / "000001.jpg"))
    below, without, above = images
    assert (below[0] == without[0]).all() and (above[0] != without[0]).any()
    assert np.abs(below[1] - above[1]).max() < 60  # the ground truth is there, but for JPEG


def test_voc_data_set_as_its_evaluator_writes_it(tmp_path, monkeypatch):
    root = tmp_path / "fruit"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/val.txt").write_text("one\ntwo\n")
    for name in ("one", "two"):
        (root / f"Annotations/{name}.xml").write_text(VOC.format(name))
        cv2.imwrite(str(root / f"JPEGImages/{name}.jpg"), np.zeros((60, 80, 3), np.uint8))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"MODEL:\n  DEVICE: cpu\nDATASETS:\n  TEST: ('t_fruit',)\n  REGISTER:\n    t_fruit: "
        f"{{FORMAT: voc, ROOT: {root}, SPLIT: val, CLASSES: [apple, pear]}}\n"
    )
    load_config(str(config))
    evaluator = COCOBoxEvaluator("t_fruit", str(tmp_path))
    evaluator.reset()
    for record in DatasetCatalog.get("t_fruit"):
        instances = Instances((60, 80), pred_boxes=Boxes([[10.0, 20, 50, 50]]))
        instances.scores, instances.pred_classes = torch.tensor([0.9]), torch.tensor([1])
        evaluator.process([record], [{"instances": instances}])
    evaluator.evaluate()
    arguments = ["--config-file", config, "--input", tmp_path / "coco_instances_results.json"]
    tool.main(list(map(str, [*arguments, "--output", tmp_path / "new"])))
    assert sorted(x.name for x in (tmp_path / "new").iterdir()) == ["one.jpg", "two.jpg"]
    for left, right in map(halves, (tmp_path / "new").iterdir()):
        # of 480x360: the box, and nothing on the black image below it
        for half in (left, right):
            assert half.shape == (360, 480, 3)
            assert half[200, 60].max() > 150 and half[300, 180].max() > 150
            assert half[320:].max() < 60 and half[200, 150].max() < 60


@pytest.mark.parametrize(
    "change, text",
    [
        ({"image_id": 77}, "image 77 .*shapes_val.*--dataset"),
        ({"category_id": 0}, r"category 0; the categories of shapes_val are \[1, 2, 3, 4, 5, 6\]"),
        ({"bbox": None}, "must be a list of detections"),
    ],
)
def test_results_of_something_else(
    predictions, datasets_folder, tmp_path, monkeypatch, change, text
):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_folder))
    changed = {**predictions[0], **change}
    changed = {key: value for key, value in changed.items() if value is not None}
    (tmp_path / "found.json").write_text(json.dumps([changed]))
    arguments = ["--input", str(tmp_path / "found.json"), "--output", str(tmp_path / "new")]
    with pytest.raises(ValueError, match=text):
        tool.main([*CONFIG, *arguments])


@pytest.mark.parametrize(
    "arguments, text",
    [([], "--dataset NAME"), ([*CONFIG, "--dataset", "shapes_vall"], "'shapes_vall' is neither")],
)
def test_the_data_set_must_be_known(arguments, text, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--input", "x.json", "--output", "new", *arguments])
    assert text in capsys.readouterr().err
