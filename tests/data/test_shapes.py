import json
import multiprocessing
import os

import cv2
import numpy as np
import pytest

from ssd.data import shapes


def _scenes(split, count):
    return [shapes.draw_scene(shapes.scene_rng(split, index)) for index in range(count)]


@pytest.fixture(scope="module")
def scenes():
    return _scenes("train", 150)


def test_rendering_is_deterministic_and_writes_coco(tmp_path):
    for folder in ("a", "b"):
        json_file = shapes.render_shapes(str(tmp_path / folder), "val", count=3)
        assert json_file == str(tmp_path / folder / "val.json")
        assert sorted(os.listdir(tmp_path / folder)) == ["val", "val.json"]  # nothing temporary
    names = ["val.json"] + [f"val/images/{i:06d}.jpg" for i in range(3)]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    data = json.loads((tmp_path / "a" / "val.json").read_text())
    assert [c["name"] for c in data["categories"]] == list(shapes.CLASSES)
    for image in data["images"]:
        pixels = cv2.imread(str(tmp_path / "a" / "val" / "images" / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3)
    assert {a["image_id"] for a in data["annotations"]} == {1, 2, 3}
    assert all(a["area"] == a["bbox"][2] * a["bbox"][3] for a in data["annotations"])


def test_an_existing_split_is_kept(tmp_path):
    json_file = shapes.render_shapes(str(tmp_path), "val", count=1)
    before = os.stat(json_file).st_mtime_ns
    assert shapes.render_shapes(str(tmp_path), "val", count=2) == json_file
    assert os.stat(json_file).st_mtime_ns == before


def test_images_without_json_of_a_killed_process_are_taken(tmp_path):
    json_file = shapes.render_shapes(str(tmp_path), "val", count=2)
    os.remove(json_file)
    shapes.render_shapes(str(tmp_path), "val", count=2)
    assert sorted(os.listdir(tmp_path)) == ["val", "val.json"]


def test_two_processes_render_at_once(tmp_path):
    context = multiprocessing.get_context("fork")  # a new process would import everything again
    job = {"target": shapes.render_shapes, "args": (str(tmp_path), "train", 20)}
    processes = [context.Process(**job) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)  # on a busy machine
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(os.listdir(tmp_path)) == ["train", "train.json"]
    assert len(os.listdir(tmp_path / "train" / "images")) == 20


def test_unknown_split(tmp_path):
    with pytest.raises(ValueError, match="no split 'test'.*train.*val"):
        shapes.render_shapes(str(tmp_path), "test")


def test_splits_share_no_image():
    first = {
        shapes.scene_rng(split, index).bytes(16) for split in shapes.SPLITS for index in range(1000)
    }
    assert len(first) == 2000


def test_sizes_counts_and_overlaps(scenes):
    for image, boxes, labels in scenes:
        height, width = image.shape[:2]
        assert 240 <= height <= 320 and 240 <= width <= 320 and image.dtype == np.uint8
        assert 1 <= len(boxes) <= 8 and len(boxes) == len(labels)
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= [width, height]).all()
        sides = boxes[:, 2:] - boxes[:, :2]
        share = sides.max(1) / min(height, width)
        assert (share >= 0.1).all() and (share <= 0.6).all()
        for i in range(len(boxes)):
            for j in range(i):
                low = np.maximum(boxes[i, :2], boxes[j, :2])
                high = np.minimum(boxes[i, 2:], boxes[j, 2:])
                overlap = (high - low).clip(0).prod()
                assert overlap <= sides[[i, j]].prod(1).min() / 3
    assert {len(boxes) for _, boxes, _ in scenes} == set(range(1, 9))


def test_classes_are_balanced_and_colours_independent_of_them(scenes):
    labels = np.concatenate([scene[2] for scene in scenes])
    counts = np.bincount(labels, minlength=6)
    expected = len(labels) / 6
    assert (abs(counts - expected) < 4 * np.sqrt(expected)).all()
    # The mean colour of 6 x 6 pixels at the centre; a ring has a hole there and is left out.
    colors = []
    for image, boxes, _ in scenes:
        for x, y in (boxes[:, :2] + boxes[:, 2:]) // 2:
            patch = image[max(0, y - 3) : y + 3, max(0, x - 3) : x + 3]
            colors.append(patch.reshape(-1, 3).mean(0))
    colors = np.array(colors)
    solid = labels != shapes.CLASSES.index("ring")
    for label in range(5):
        error = colors[solid].std(0) / np.sqrt((labels == label).sum())
        difference = colors[labels == label].mean(0) - colors[solid].mean(0)
        assert (abs(difference) < 4 * error).all()


def test_objects_stand_out():
    # Grey ground with a mark at 200: the colour chosen differs by MIN_CONTRAST from 90 % of it.
    for seed in range(20):
        rng = np.random.default_rng(seed)
        ground = np.full((30, 30, 3), 128, np.float32)
        ground[:4] = 200
        patch = ground.copy()
        shapes._paint(rng, patch, np.ones((30, 30), np.float32))
        far = np.linalg.norm(patch - ground, axis=2) >= shapes.MIN_CONTRAST - 1e-3
        assert far.mean() >= 0.86  # of all pixels; one in three of them was looked at


def test_box_is_tight_and_forms_differ():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        solidity, corners = {}, {}
        for name in shapes.CLASSES:
            mask = shapes.draw_object(rng, name, 100.0)
            assert max(mask.shape) in (99, 100, 101) and 0 <= mask.min() and mask.max() == 1
            for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
                assert edge.max() >= 0.5
            drawn = (mask >= 0.5).astype(np.uint8)
            contours, _ = cv2.findContours(drawn, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            assert len(contours) == 1
            hull = cv2.contourArea(cv2.convexHull(contours[0]))
            solidity[name] = drawn.sum() / hull
            polygon = cv2.approxPolyDP(contours[0], 4, True)
            corners[name] = len(polygon)
            center = drawn[drawn.shape[0] // 2, drawn.shape[1] // 2]
            assert center == (name != "ring")
        assert corners["triangle"] == 3 and corners["rectangle"] == 4 and corners["ellipse"] >= 6
        assert corners["star"] == 10 and corners["cross"] == 12
        for name in ("ellipse", "rectangle", "triangle"):
            assert solidity[name] > 0.95
        # Area over that of the convex hull. Ring: 1 - 0.55^2 = 0.70. Star: ten triangles of
        # 0.42 sin 36 / 2 over five of sin 72 / 2 = 0.52. Cross: two bars less their common
        # square, 2.4 - 0.36, over a square less four corners, 4 - 4 * 0.49 / 2: 0.675.
        for name, value in {"ring": 0.70, "star": 0.52, "cross": 0.675}.items():
            assert solidity[name] == pytest.approx(value, abs=0.05)
