"""The demo: what it reads, draws and saves, as a command and in this process."""

import csv
import json
from pathlib import Path

import cv2
import demo as tool
import numpy as np
import pytest
import torch
from commands import start
from detectron2.data import Metadata
from detectron2.modeling import build_model
from PIL import Image
from pycocotools.coco import COCO

from ssd import Predictor, load_config
from ssd.checkpoint import SSDCheckpointer
from ssd.predict import read_images

ROOT = Path(__file__).parent.parent.parent
TOOL = ROOT / "tools" / "demo.py"


@pytest.fixture(scope="session")
def opts(tiny_opts, tmp_path_factory, repo):
    """Overrides of the quickstart lab: tiny, with random weights, few detections."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = build_model(load_config(str(repo / "labs/quickstart/config.yaml"), tiny_opts))
    SSDCheckpointer(model, str(folder)).save("model")
    return [*tiny_opts, "MODEL.WEIGHTS", str(folder / "model.pth"), "TEST.DETECTIONS_PER_IMAGE", 5]


@pytest.fixture
def demo(opts, datasets_folder, tmp_path, monkeypatch):
    """A function (arguments) → exit code; runs in a folder with photos/."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_folder))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name, height, width in (("b.png", 60, 80), ("a.jpg", 90, 50), ("c.jpg", 40, 40)):
        coarse = rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
        cv2.imwrite(f"photos/{name}", coarse.repeat(10, 0).repeat(10, 1))

    def run(*arguments):
        return tool.main([*arguments_of(*arguments), "--opts", *map(str, opts)])

    return run


def arguments_of(*arguments):
    config = str(ROOT / "labs/quickstart/config.yaml")
    return ["--config-file", config, "--confidence-threshold", "0.1", *map(str, arguments)]


def expected(opts, image):
    """Boxes (XYWH), scores, classes of a Predictor."""
    cfg = load_config(
        str(ROOT / "labs/quickstart/config.yaml"), [*opts, "MODEL.SSD.SCORE_THRESH_TEST", 0.1]
    )
    instances = Predictor(cfg)(image)["instances"]
    boxes = instances.pred_boxes.tensor.clone()
    boxes[:, 2:] -= boxes[:, :2]
    return boxes.tolist(), instances.scores.tolist(), instances.pred_classes.tolist()


def test_command_on_files_folders_and_patterns(opts, demo, datasets_folder):
    Path("photos/broken.jpg").write_bytes(b"no image")
    Path("photos/notes.txt").write_text("not looked at")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.fromarray(np.zeros((40, 70, 3), np.uint8)).save("turned.jpg", exif=exif)
    shape = datasets_folder / "shapes" / "val" / "images" / "000002.jpg"
    command = [TOOL, *arguments_of("--input", "photos", "turned.jpg", "p*/a.*")]
    command += ["missing.jpg", "*.gif", shape, "--output", "pictures"]
    command += ["--save-detections", "found/all.json", "--batch-size", "2"]
    done = start(*command, "--opts", *opts)
    assert done.returncode == 0, done.stderr
    for name in ("photos/broken.jpg", "missing.jpg", "*.gif"):
        assert name in done.stdout + done.stderr
    assert "notes" not in done.stdout + done.stderr and "25 detections in 5 images" in done.stdout

    pictures = {x.name: cv2.imread(str(x)) for x in Path("pictures").rglob("*.*")}
    assert set(pictures) == {"a.jpg", "b.png", "c.jpg", "turned.jpg", "000002.jpg"}
    assert pictures["turned.jpg"].shape == (70, 40, 3)
    image = cv2.imread("photos/b.png")
    assert pictures["b.png"].shape == image.shape and (pictures["b.png"] != image).any()

    records = json.loads(Path("found/all.json").read_text())
    names = {x["file_name"] for x in records}
    assert names == {"photos/a.jpg", "photos/b.png", "photos/c.jpg", "turned.jpg", str(shape)}
    found = [x for x in records if x["file_name"] == "photos/b.png"]
    boxes, scores, classes = expected(opts, image)
    np.testing.assert_allclose([x["bbox"] for x in found], boxes, atol=1e-2)
    np.testing.assert_allclose([x["score"] for x in found], scores, atol=1e-5)
    shapes = ["ellipse", "rectangle", "triangle", "star", "cross", "ring"]
    assert [x["category"] for x in found] == [shapes[label] for label in classes]
    assert [x["category_id"] for x in found] == [label + 1 for label in classes]
    assert {x["image_id"] for x in found} == {"b"}

    # an image of the test set has its id, with which COCO's evaluation reads the file
    results = [x for x in records if x["file_name"] == str(shape)]
    coco = COCO(str(datasets_folder / "shapes" / "val.json"))
    assert [x["id"] for x in coco.dataset["images"] if x["file_name"] == shape.name] == [3]
    assert {x["image_id"] for x in results} == {3} and len(coco.loadRes(results).anns) == 5


def test_a_single_file_and_a_table(demo, opts):
    assert (
        demo("--input", "photos/b.png", "--output", "new/b.png", "--save-detections", "b.csv") == 0
    )
    assert cv2.imread("new/b.png").shape == (60, 80, 3)
    with open("b.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == "image_id file_name category score x1 y1 x2 y2".split()
    boxes, scores, _ = expected(opts, cv2.imread("photos/b.png"))
    assert [float(row[3]) for row in rows] == pytest.approx(scores, abs=1e-4)
    corners = [[x, y, x + w, y + h] for x, y, w, h in boxes]
    np.testing.assert_allclose([list(map(float, row[4:])) for row in rows], corners, atol=6e-3)


def test_without_output_nothing_is_drawn(demo):
    assert demo("--input", "photos", "--save-detections", "x.json") == 0
    assert sorted(x.name for x in Path().iterdir()) == ["photos", "x.json"]


def test_an_interruption_saves_what_has_been_detected(demo, monkeypatch):
    def interrupted(paths):
        yield from read_images(sorted(paths)[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "read_images", interrupted)
    assert demo("--input", "photos", "--save-detections", "x.json") == 130
    before = Path("x.json").read_text()
    assert {x["file_name"] for x in json.loads(before)} == {"photos/a.jpg"}

    def interrupted_at_once(paths):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(tool, "read_images", interrupted_at_once)
    assert demo("--input", "photos", "--save-detections", "x.json") == 130
    assert Path("x.json").read_text() == before


def test_nothing_readable_is_a_failure(demo, capsys):
    Path("empty.jpg").touch()
    assert demo("--input", "empty.jpg", "--save-detections", "x.json") == 1
    assert not Path("x.json").exists() and "nothing could be read" in capsys.readouterr().err
    assert demo("--video-input", "empty.jpg", "--output", "x.mp4") == 1
    assert "empty.jpg can't be read" in capsys.readouterr().err


def test_video(demo, monkeypatch):
    predictor = tool.build_predictor

    def with_odd_names(args):
        found = predictor(args)
        found.metadata = Metadata(thing_classes=["US$ 5_ / AU$ 5_"] * 6)
        return found

    monkeypatch.setattr(tool, "build_predictor", with_odd_names)
    writer = cv2.VideoWriter("clip.avi", cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (64, 48))
    for level in range(5):
        writer.write(np.full((48, 64, 3), level * 40, np.uint8))
    writer.release()
    arguments = "--video-input clip.avi --output out/ --save-detections clip.csv --batch-size 2"
    Path("out").mkdir()
    assert demo(*arguments.split()) == 0
    capture = cv2.VideoCapture("out/clip.mp4")
    frames = [capture.read()[1] for _ in range(6)]
    assert frames[5] is None and [x.shape for x in frames[:5]] == [(48, 64, 3)] * 5
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(5)
    with open("clip.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(x["image_id"], x["file_name"]) for x in rows} == {
        (str(i), "clip.avi") for i in range(5)
    }
    assert "US$ 5_ / AU$ 5_" in rows[0].values()


@pytest.mark.parametrize(
    "arguments, text",
    [
        ("--input photos", "--output or --save-detections"),
        ("--input photos --output photos", "overwrite"),
        ("--input photos --output one.jpg", "3 images"),
        ("--input photos --save-detections x.xml", "FILE.json or FILE.csv, got 'x.xml'"),
        ("--input photos --save-detections photos/a.jpg/x.csv", "photos/a.jpg"),
        ("--input photos --output x.csv --save-detections x.csv", "are the same file"),
        ("--input photos --output x --batch-size 0", "--batch-size must be at least 1, got 0"),
        ("--input photos --webcam", "not allowed"),
        ("--output x", "required"),
        ("--input photos --model ssd300_coco_mmdet", "not allowed"),
    ],
)
def test_wrong_arguments(demo, arguments, text, capsys, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    before = [x.read_bytes() for x in sorted(Path("photos").iterdir())]
    with pytest.raises(SystemExit) as stop:
        demo(*arguments.split())
    assert stop.value.code == 2 and text in capsys.readouterr().err
    assert [x.read_bytes() for x in sorted(Path("photos").iterdir())] == before
