"""tools/analyze_default_boxes.py: its numbers against the model's boxes, and its suggestion."""

import re
from pathlib import Path

import analyze_default_boxes as tool
import default_box_search as search
import numpy as np
import pytest
import torch
import yaml
from commands import run
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from PIL import Image
from torchvision.ops import box_iou

from ssd.config import load_config, read_config
from ssd.data.shapes import CLASSES
from ssd.modeling.multibox import match_default_boxes

ROOT = Path(__file__).resolve().parents[2]
BCCD = str(ROOT / "labs/bccd_ssdlite_mobilenetv2/config.yaml")


def record(boxes, labels, size=(100, 200), crowd=0):
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "iscrowd": crowd}
        for box, label in zip(boxes, labels)
    ]
    height, width = size
    return {"file_name": "", "height": height, "width": width, "image_id": 1,
            "annotations": annotations}  # fmt: skip


def random_objects(count, size=96, seed=0):
    """Objects in 3 images of 2 classes, well inside the input."""
    rng = np.random.default_rng(seed)
    wh = rng.uniform(5, 30, (count, 2))
    xy = rng.uniform(0, size - wh)
    images = np.sort(rng.integers(0, 3, count))
    return tool.Objects(np.concatenate([xy, xy + wh], 1), rng.integers(0, 2, count), images)


def test_objects_are_those_of_the_network(tiny_cfg, register):
    """Boxes are resized to the input and clipped; crowds and boxes without area lack."""
    boxes = [[20, 10, 60, 50], [5, 5, 5, 9], [150, 40, 260, 90]]
    dicts = [record(boxes, [0, 1, 2]), record([[0, 0, 9, 9]], [3], crowd=1)]
    name = register(dicts, CLASSES)
    cfg = tiny_cfg("DATASETS.TRAIN", f"('{name}',)")  # input 96x96, images 200x100
    found = tool.read_objects(cfg, augmented=False, max_images=10)
    expected = np.array([[20, 10, 60, 50], [150, 40, 200, 90]]) * [0.48, 0.96, 0.48, 0.96]
    np.testing.assert_allclose(found.boxes, expected)
    assert found.classes.tolist() == [0, 2] and found.images.tolist() == [0, 0]
    flipped = tool.read_objects(
        tiny_cfg("DATASETS.TRAIN", f"('{name}',)", "INPUT.EXPAND.ENABLED", "False",
                 "INPUT.IOU_CROP.ENABLED", "False"), augmented=True, max_images=10,
    )  # fmt: skip
    mirrored = expected[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [96, 0, 96, 0]
    assert any(np.allclose(flipped.boxes, boxes) for boxes in (expected, mirrored))
    sizes = {tuple(tool.read_objects(cfg, True, 10).sides), tuple(found.sides)}
    assert len(sizes) == 2  # expand and crop change them


def test_fit_is_the_models_matching(tiny_cfg):
    cfg = tiny_cfg()
    model, objects = build_model(cfg), random_objects(40)
    found = tool.fit(objects, tool.default_boxes(cfg))
    iou = box_iou(torch.from_numpy(objects.boxes).float(), model.default_boxes)
    np.testing.assert_allclose(found.iou, iou.max(1).values, atol=1e-6)
    first = np.cumsum([0, *model.boxes_per_level])
    level = np.searchsorted(first, iou.argmax(1).numpy(), side="right") - 1
    np.testing.assert_array_equal(found.level, level)
    for image in range(3):
        boxes = torch.from_numpy(objects.boxes[objects.images == image]).float()[None]
        valid = torch.ones(boxes.shape[:2], dtype=torch.bool)
        matched = match_default_boxes(boxes, valid, model.default_boxes)
        counts = torch.bincount(matched[matched >= 0], minlength=boxes.shape[1])
        assert found.positives[objects.images == image].tolist() == counts.tolist()


def test_forced_and_unmatched_objects():
    """Of two objects with one best default box the later takes it, the earlier has none."""
    boxes = np.array([[10.0, 10, 14, 14], [11, 11, 15, 15], [60, 60, 80, 80]])
    objects = tool.Objects(boxes, np.array([0, 0, 1]), np.zeros(3, int))
    default = tool.DefaultBoxes(
        torch.tensor([[0.0, 0, 20, 20], [60, 60, 80, 80], [61, 60, 81, 80]]),
        np.array([0, 1, 1]),
        {"iou_threshold": 0.5, "best": "argmax"},
    )
    found = tool.fit(objects, default)
    assert found.positives.tolist() == [0, 1, 2]
    np.testing.assert_allclose(found.iou, [0.04, 0.04, 1])
    lines = tool.table(objects, found, ["dot", "square"], [20, 30])
    rows = {line[:24].strip(): line[24:].split() for line in lines[1:]}
    assert rows["all"][:5] == ["3", "33.3%", "0.36", "33.3%", "33.3%"]
    assert rows["dot"] == ["2", "0.0%", "0.04", "50.0%", "50.0%", "0", "0", "1"]
    assert rows["side 0 to 8 px"][:2] == ["2", "0.0%"]
    assert rows["best on level 1, 30 px"][:2] == ["1", "100.0%"]
    assert "side 8 to 16 px" not in rows


@pytest.mark.parametrize("first_square", ["0.0", "9.0"])
def test_search_knows_the_best_ious(tiny_cfg, first_square):
    """Its closed form is the IoU with all default boxes of the generator."""
    cfg = tiny_cfg("MODEL.SSD.DEFAULT_BOXES.FIRST_SQUARE", first_square)
    objects, setting = random_objects(60), tool.lab_setting(cfg)
    own = search.Search(
        objects.boxes, objects.classes, tool.cell_centers(cfg), 0.5,
        input_size=(96, 96), first_square=float(first_square),
    )  # fmt: skip
    levels = [own.level_ious(level, shapes) for level, shapes in enumerate(own.shapes(setting))]
    found = tool.fit(objects, tool.default_boxes(cfg))
    np.testing.assert_allclose(np.max(levels, axis=0), found.iou, atol=1e-5)
    by_class = [found.iou[objects.classes == k] for k in (0, 1)]
    score = np.mean([iou.mean() + (iou >= 0.5).mean() for iou in by_class])
    assert own.score(np.array(levels)) == pytest.approx(score, abs=1e-5)


def test_reach():
    """A square of the reach, half a step off along both axes, has IoU 0.5."""
    side = search.reach(8)
    overlap = (side - 4) ** 2
    assert overlap / (2 * side**2 - overlap) == pytest.approx(0.5)


def test_suggestion_finds_small_objects(tiny_cfg):
    """Default boxes that are too large for all objects; the suggested ones fit most."""
    cfg = tiny_cfg("MODEL.SSD.DEFAULT_BOXES.MIN_SIZES", "[50,60,70,80]",
                   "MODEL.SSD.DEFAULT_BOXES.MAX_SIZE", "90.0")  # fmt: skip
    objects = random_objects(100)
    before = tool.fit(objects, tool.default_boxes(cfg))
    setting = tool.suggest(cfg, objects, tool.cell_centers(cfg))
    after = tool.fit(objects, tool.default_boxes(tool.with_keys(cfg, tool.as_keys(setting))))
    assert (before.iou >= 0.5).mean() < 0.1 < 0.6 < (after.iou >= 0.5).mean()
    assert setting.sizes == sorted(setting.sizes)
    assert [len(level) for level in setting.aspect_ratios] == [1, 1, 1, 1]
    more = tool.suggest(cfg, objects, tool.cell_centers(cfg), ratios=3)
    assert [len(set(level)) for level in more.aspect_ratios] == [3, 3, 3, 3]
    lab = tool.lab_setting(cfg)
    assert "keeps its channels" in tool.as_yaml(setting, lab)
    assert "gets other channels" in tool.as_yaml(more, lab)


def test_platelets_of_bccd(bccd, monkeypatch):
    """MMDetection's smallest box has 48 px where platelets have 23; the lab's boxes fit them."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(bccd))
    mmdet = load_config(str(ROOT / "labs/ssdlite_mobilenetv2_size320_600e/config.yaml"))
    own = load_config(BCCD)
    objects = tool.read_objects(own, augmented=False, max_images=60)
    assert np.median(objects.sides[objects.classes == 2]) == pytest.approx(23, abs=1)
    recall = [
        (tool.fit(objects, tool.default_boxes(cfg)).iou[objects.classes == 2] >= 0.5).mean()
        for cfg in (mmdet, own)
    ]
    assert recall[0] < 0.05 and recall[1] > 0.95


def test_command(datasets_folder, tmp_path):
    """The YAML that it prints loads and builds a model with the suggested boxes."""
    lab, picture = str(ROOT / "labs/quickstart/config.yaml"), tmp_path / "new" / "boxes.png"
    command = [ROOT / "tools/analyze_default_boxes.py", "--config-file", lab, "--output", picture]
    command += ["MODEL.SSD.DEFAULT_BOXES.MAX_SIZE", "130.0"]
    printed = run(*command, DETECTRON2_DATASETS=datasets_folder)
    assert "objects at 160x160, without augmentation" in printed
    assert re.search(r"(?m)^ring +\d+ +[\d.]+%", printed)
    with Image.open(picture) as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 20)) > 100  # something is drawn
    text = printed[printed.index("MODEL:") :]
    suggested = yaml.safe_load(text)["MODEL"]["SSD"]["DEFAULT_BOXES"]
    (tmp_path / "config.yaml").write_text(f"_BASE_: {lab}\n{text}")
    cfg = read_config(str(tmp_path / "config.yaml"), ["MODEL.DEVICE", "cpu"])
    assert cfg.MODEL.SSD.DEFAULT_BOXES.MIN_SIZES == suggested["MIN_SIZES"]
    assert len(build_model(cfg).default_boxes) == 2136
