"""Default boxes: computed by hand, and those of the released models."""

import math
from pathlib import Path

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator, build_model
from detectron2.structures import Boxes

from ssd.config import load_config
from ssd.modeling import DefaultBoxGenerator

BASES = Path(__file__).parents[2] / "labs/_base_"


def make(**kwargs):
    """One level with min 8, max 18 (their geometric mean is 12) and ratio 4, on 20×40 pixels."""
    kwargs = {
        "input_size": (20, 40), "min_sizes": [8.0], "max_size": 18.0, "aspect_ratios": [[4.0]],
        **kwargs,
    }  # fmt: skip
    return DefaultBoxGenerator(**kwargs)


def test_boxes_computed_by_hand():
    # 1 row, 2 columns: steps (20, 20), centres (10, 10) and (30, 10);
    # sizes: 8×8, 12×12, 16×4 (8·√4 × 8/√4), 4×16
    first = torch.tensor([[6, 6, 14, 14], [4, 4, 16, 16], [2, 8, 18, 12], [8, 2, 12, 18.0]])
    second = first + torch.tensor([20, 0, 20, 0])
    (boxes,) = make().per_level([(1, 2)])
    assert boxes.dtype == torch.float32
    torch.testing.assert_close(boxes, torch.cat([first, second]), rtol=0, atol=1e-5)


def centers(boxes):
    return ((boxes[:, :2] + boxes[:, 2:]) / 2).tolist()


def test_order_is_level_row_column_shape():
    generator = make(min_sizes=[4.0, 8.0], aspect_ratios=[[], []])
    first, second = generator.per_level([(2, 2), (1, 1)])
    # 2 shapes a cell; x runs before y
    assert centers(first)[::2] == centers(first)[1::2] == [[10, 5], [30, 5], [10, 15], [30, 15]]
    assert (first[::2, 2] - first[::2, 0]).tolist() == [4.0] * 4
    assert (first[1::2, 2] - first[1::2, 0]).tolist() == pytest.approx([math.sqrt(32)] * 4)
    assert centers(second) == [[20, 10]] * 2


def test_steps_are_taken_over_input_size():
    (boxes,) = make(aspect_ratios=[[]], steps=[7]).per_level([(2, 2)])
    assert centers(boxes)[::2] == [[3.5, 3.5], [10.5, 3.5], [3.5, 10.5], [10.5, 10.5]]


@pytest.mark.parametrize("pair", [(6, 8), [6, 8]])
def test_steps_per_axis_are_y_x(pair):
    (boxes,) = make(aspect_ratios=[[]], steps=[pair]).per_level([(2, 2)])
    assert centers(boxes)[::2] == [[4, 3], [12, 3], [4, 9], [12, 9]]


# One cell, centre (20, 10): a square of side 14, one of √(14·56) = 28, and of ratio 9 42 × 14/3.
# The input is 40 wide and 20 high.
@pytest.mark.parametrize(
    "clip, square, wide",
    [
        ("none", [6, -4, 34, 24], [-1, 10 - 7 / 3, 41, 10 + 7 / 3]),
        ("xyxy", [6, 0, 34, 20], [0, 10 - 7 / 3, 40, 10 + 7 / 3]),
        ("cxcywh", [6, 0, 34, 20], [0, 10 - 7 / 3, 40, 10 + 7 / 3]),
        ("wh", [6, 0, 34, 20], [0, 10 - 7 / 3, 40, 10 + 7 / 3]),
    ],
)
def test_clip_of_a_centred_box(clip, square, wide):
    generator = make(min_sizes=[14.0], max_size=56.0, aspect_ratios=[[9.0]], clip=clip)
    (boxes,) = generator.per_level([(1, 1)])
    assert boxes[0].tolist() == [13, 3, 27, 17]
    assert boxes[1].tolist() == pytest.approx(square, abs=1e-5)
    assert boxes[2].tolist() == pytest.approx(wide, abs=1e-5)


# Centres (18, 12) and (54, 12), the second right of the input's 40 columns; a square of side 30.
@pytest.mark.parametrize(
    "clip, first, second",
    [
        ("none", [3, -3, 33, 27], [39, -3, 69, 27]),
        ("xyxy", [3, 0, 33, 20], [39, 0, 40, 20]),
        # sizes 30×20; centre (40, 12): the box still leaves the input
        ("cxcywh", [3, 2, 33, 22], [25, 2, 55, 22]),
        ("wh", [3, 2, 33, 22], [39, 2, 69, 22]),
    ],
)
def test_clip_of_a_box_at_the_border(clip, first, second):
    generator = make(
        min_sizes=[30.0], max_size=31.0, aspect_ratios=[[]], steps=[(24, 36)], clip=clip
    )
    (boxes,) = generator.per_level([(1, 2)])
    assert boxes[::2].tolist() == [first, second]


def test_clip_that_leaves_nothing_of_a_box():
    # centres 15 and 45 of boxes 8 and 9 wide: the second begins right of the 40 columns
    kwargs = {"max_size": 9.0, "aspect_ratios": [[]], "steps": [30]}
    assert len(make(**kwargs).per_level([(1, 2)])[0]) == 4
    with pytest.raises(ValueError, match=r"STEPS \(30, 30\) of level 0 .*\(20, 40\).*CLIP 'xyxy'"):
        make(**kwargs, clip="xyxy").per_level([(1, 2)])


def test_first_square_replaces_the_two_of_the_first_level():
    generator = make(min_sizes=[4.0, 9.0], aspect_ratios=[[4.0], [4.0]], first_square=3.0)
    assert generator.num_anchors == [3, 4]
    first, second = generator.per_level([(1, 1), (1, 1)])
    # 3×3, 8×2 (4·√4 × 4/√4), 2×8 around (20, 10)
    assert first.tolist() == [[18.5, 8.5, 21.5, 11.5], [16, 9, 24, 11], [19, 6, 21, 14]]
    (plain,) = make(min_sizes=[9.0]).per_level([(1, 1)])
    assert torch.equal(second, plain)


def test_boxes_of_tensorflows_ssd300():
    """Scales 0.2 to 0.95, in the first level 0.1 and 0.2: 19² · 3 + 139 · 6 = 1917."""
    generator = make(
        input_size=(300, 300),
        min_sizes=[60.0, 105.0, 150.0, 195.0, 240.0, 285.0],
        max_size=300.0,
        aspect_ratios=[[2.0]] + [[2.0, 3.0]] * 5,
        first_square=30.0,
    )
    assert generator.num_anchors == [3, 6, 6, 6, 6, 6]
    levels = generator.per_level([(side, side) for side in (19, 10, 5, 3, 2, 1)])
    assert sum(len(level) for level in levels) == 1917
    sizes = (levels[0][:3, 2:] - levels[0][:3, :2]).flatten().tolist()
    long, short = 60 * math.sqrt(2), 60 / math.sqrt(2)
    assert sizes == pytest.approx([30, 30, long, short, short, long], abs=1e-4)
    assert centers(levels[0][:1])[0] == pytest.approx([300 / 19 / 2] * 2, abs=1e-4)


# Number of boxes, and of each level: map size, boxes per cell, step
PUBLISHED = {
    "ssd300_vgg16": (
        8732, [38, 19, 10, 5, 3, 1], [4, 6, 6, 6, 4, 4], [8, 16, 32, 64, 100, 300],
    ),
    "ssd512_vgg16": (
        24564, [64, 32, 16, 8, 4, 2, 1], [4, 6, 6, 6, 6, 4, 4], [8, 16, 32, 64, 128, 256, 512],
    ),
    "ssdlite_mobilenetv2": (3234, [20, 10, 5, 3, 2, 1], [6] * 6, [16, 32, 64, 107, 160, 320]),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    total, sides, per_cell, steps = PUBLISHED[name]
    cfg = load_config(str(BASES / f"{name}.yaml"), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    assert model.default_boxes.shape == (total, 4)
    assert model.boxes_per_level == [side * side * a for side, a in zip(sides, per_cell)]
    keys = cfg.MODEL.SSD.DEFAULT_BOXES
    for level, boxes in enumerate(model.default_boxes.split(model.boxes_per_level)):
        assert centers(boxes[:1])[0] == pytest.approx([steps[level] / 2] * 2, abs=1e-3)
        last = (sides[level] - 0.5) * steps[level]
        assert centers(boxes[-1:])[0] == pytest.approx([last, last], abs=1e-3)
        side = float(boxes[0, 2] - boxes[0, 0])
        assert side == pytest.approx(keys.MIN_SIZES[level], abs=1e-3)


def test_is_a_detectron2_anchor_generator():
    cfg = load_config(str(BASES / "ssd300_vgg16.yaml"))
    generator = build_anchor_generator(cfg, [ShapeSpec(channels=8, stride=8)] * 6)
    assert isinstance(generator, DefaultBoxGenerator)
    assert generator.num_anchors == [4, 6, 6, 6, 4, 4] and generator.box_dim == 4
    sizes = [(38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)]
    boxes = generator([torch.zeros(2, 8, *size) for size in sizes])
    assert all(isinstance(level, Boxes) for level in boxes)
    assert [len(level) for level in boxes] == [
        h * w * a for (h, w), a in zip(sizes, generator.num_anchors)
    ]


@pytest.mark.parametrize(
    "change, key",
    [
        ({"min_sizes": [8.0, 8.0], "aspect_ratios": [[], []]}, "MIN_SIZES"),
        ({"min_sizes": [20.0]}, "MAX_SIZE"),
        ({"min_sizes": [0.0]}, "MIN_SIZES"),
        ({"aspect_ratios": [[2.0], [2.0]]}, "ASPECT_RATIOS"),
        ({"aspect_ratios": []}, "ASPECT_RATIOS"),
        ({"min_sizes": [math.nan]}, "MIN_SIZES"),
        ({"max_size": math.inf}, "MAX_SIZE"),
        ({"steps": [8, 16]}, "STEPS"),
        ({"steps": [0]}, r"STEPS.*got \[0\]"),
        ({"steps": [math.nan]}, "STEPS"),
        ({"steps": [(8, 16, 8)]}, "STEPS"),
        ({"clip": "corners"}, "CLIP.*'cxcywh'.*'corners'"),
    ],
)
def test_errors_name_the_key(change, key):
    with pytest.raises(ValueError, match=rf"MODEL\.SSD\.DEFAULT_BOXES.*{key}"):
        make(**change)


def test_too_few_feature_maps():
    with pytest.raises(ValueError, match="2 feature maps, but 1 levels"):
        make().per_level([(2, 2), (1, 1)])


def test_config_with_another_number_of_levels_than_the_backbone():
    cfg = load_config(str(BASES / "ssd300_vgg16.yaml"))
    with pytest.raises(ValueError, match="MIN_SIZES has 6 levels.*make 5"):
        build_anchor_generator(cfg, [ShapeSpec(channels=8, stride=8)] * 5)
