"""Pictures of the training data, and the default boxes that each object is matched to."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import visualize_data as tool
from commands import run
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torchvision.ops import box_iou

from ssd.data.loader import build_train_loader

ROOT = Path(__file__).parent.parent.parent
TOOL = ROOT / "tools" / "visualize_data.py"
CONFIG = ["--config-file", str(ROOT / "labs/quickstart/config.yaml")]


@pytest.fixture
def draw(tiny_opts, datasets_folder, tmp_path, monkeypatch):
    """A function (arguments, overrides) → {name: picture}."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_folder))
    number = iter(range(9))

    def run(arguments, *opts):
        folder = tmp_path / str(next(number))
        flags = [*CONFIG, *arguments.split(), "--output-dir", str(folder)]
        assert tool.main([*flags, *map(str, [*tiny_opts, *opts])]) == 0
        return {x.name: cv2.imread(str(x)) for x in folder.iterdir()}

    return run


def instances_of(*boxes):
    instances = Instances((96, 96))
    instances.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.long)
    return instances


def test_command_draws_what_the_training_gets(tiny_opts, tiny_cfg, datasets_folder, tmp_path):
    command = [TOOL, *CONFIG, "--source", "dataloader", "--matches", "--num-images", "3"]
    command += ["--output-dir", tmp_path, *tiny_opts, "SEED", "7"]
    printed = run(*command, DETECTRON2_DATASETS=datasets_folder)

    cfg = tiny_cfg("SEED", 7)
    default_boxes = build_model(cfg).default_boxes
    stream = build_train_loader(cfg).dataset
    expected = {}
    for number in range(3):
        sample = stream[number]
        iou = box_iou(sample["instances"].gt_boxes.tensor, default_boxes)
        positive = (iou >= 0.5).any(dim=0)
        positive[iou.argmax(dim=1)] = True
        name = f"{number:05d}_{Path(sample['file_name']).stem}"
        expected[name] = (len(sample["instances"]), int(positive.sum()))
    assert sum(count for _, count in expected.values()) > 3
    found = re.findall(r"^(\S+): (\d+) objects, (\d+) positives$", printed, re.MULTILINE)
    assert {name: (int(m), int(p)) for name, m, p in found} == expected
    assert {x.stem for x in tmp_path.iterdir()} == set(expected)
    objects, positives = map(sum, zip(*expected.values()))
    last = rf"^3 images, {objects} objects, {positives / objects:.1f} positives per object"
    assert re.search(last, printed, re.MULTILINE)
    for path in tmp_path.iterdir():
        assert len(np.unique(cv2.imread(str(path)).reshape(-1, 3), axis=0)) > 1000, path


def test_samples_follow_from_the_seed(draw):
    arguments = "--source dataloader --num-images 3"
    first, again, other = (draw(arguments, "SEED", seed) for seed in (1, 1, 2))
    assert len(first) == 3 and list(first) == list(again)
    assert all((first[name] == again[name]).all() for name in first)
    assert set(first) != set(other) or any((first[x] != other[x]).any() for x in first)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_only_the_order_of_the_channels_is_undone(tiny_cfg, order):
    cfg = tiny_cfg("SEED", 3, "INPUT.FORMAT", order)
    sample = build_train_loader(cfg).dataset[0]
    ((name, image, instances),) = tool.samples(cfg, 1)
    given = sample["image"].permute(1, 2, 0).numpy()
    assert image.dtype == np.uint8 and (image == given[:, :, :: 1 if order == "RGB" else -1]).all()
    assert torch.equal(instances.gt_boxes.tensor, sample["instances"].gt_boxes.tensor)
    assert name == f"00000_{Path(sample['file_name']).stem}"


def test_annotations_are_spread_over_the_data_set(draw, datasets_folder):
    pictures = draw("--source annotation --num-images 4")
    assert set(pictures) == {f"{i:05d}_{i:06d}.png" for i in (0, 4, 8, 12)}
    image = cv2.imread(str(datasets_folder / "shapes/train/images/000004.jpg"))
    picture = pictures["00004_000004.png"]
    assert max(picture.shape) == 640
    small = cv2.resize(picture, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    same = (np.abs(small.astype(int) - image).max(axis=2) < 3).mean()
    assert 0.5 < same < 1  # boxes and names are on it


def test_unreadable_and_defective_annotations_are_named(register, tiny_cfg, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "good.png"), np.zeros((30, 40, 3), np.uint8))
    record = {"height": 30, "width": 40, "image_id": 1, "file_name": str(tmp_path / "good.png")}
    boxes = [[5.0, 5, 20, 20], [5, 5, 5, 20], [float("nan"), 1, 2, float("inf")]]
    objects = [{"bbox": x, "bbox_mode": 0, "category_id": 0, "iscrowd": 0} for x in boxes]
    (tmp_path / "bad.png").touch()
    records = [
        {**record, "annotations": objects},
        {**record, "file_name": str(tmp_path / "bad.png"), "annotations": []},
    ]
    cfg = tiny_cfg("DATASETS.TRAIN", (register(records, ["dot"]),))
    ((name, picture),) = tool.annotated(cfg, 5)
    assert name == "00000_good" and picture.shape == (480, 640, 3) and picture.any()
    errors = capsys.readouterr().err
    assert "bad.png is empty" in errors and "zero width" in errors and "isn't finite" in errors


def test_matches_of_known_objects(tiny_cfg):
    """A default box itself, a dot that none fits, and an image without objects."""
    model = build_model(tiny_cfg())
    inside = (model.default_boxes >= 0).all(dim=1) & (model.default_boxes <= 96).all(dim=1)
    last_of_level_0 = int(inside[: model.boxes_per_level[0]].nonzero()[-1])
    box = model.default_boxes[last_of_level_0].tolist()
    matches = tool.Matches(model, instances_of(box, [1.0, 1, 3, 3]))
    counts = matches.counts()
    assert counts[0, 0] >= 1 and counts[1].sum() == 1
    assert matches.best_iou[0] == pytest.approx(1) and matches.best_iou[1] < 0.1
    assert matches.forced.tolist() == [gt == 1 for gt in matches.gt.tolist()]
    assert matches.counts(matches.forced).sum(axis=1).tolist() == [0, 1]
    assert matches.counts(matches.gt == 0)[1].sum() == 0
    assert matches.table(["box", "dot"]).splitlines()[2].split()[-len(counts[0]) - 1] == "2x2,"
    image = np.full((96, 96, 3), 120, np.uint8)
    with_objects = matches.draw(image, ["US$ 5_ / AU$ 5_", "dot"])  # no formula

    empty = tool.Matches(model, instances_of())
    assert empty.counts().shape == (0, len(model.boxes_per_level)) and empty.table([]) == ""
    picture = empty.draw(image, [])
    height = min(picture.shape[0], with_objects.shape[0]) // 2
    assert (picture[:height] == 255).all(axis=2).sum() < (
        (with_objects[:height] == 255).all(axis=2).sum()
    )


@pytest.mark.parametrize(
    "arguments, text",
    [
        ("--source annotation --matches", "--matches needs --source dataloader"),
        ("--source dataloader --num-images 0", "--num-images must be at least 1, got 0"),
        ("--source annotation --show", "--output-dir"),
        ("--num-images 3", "--source"),
    ],
)
def test_wrong_arguments(arguments, text, capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(SystemExit) as stop:
        tool.main([*CONFIG, *arguments.split()])
    assert stop.value.code == 2 and text in capsys.readouterr().err
