"""Caffe's layers (weiliu89/caffe, branch ssd) in cases small enough to check on paper.

The settings are those of labs/_base_/ssd300_vgg16.yaml. Only the network is smaller: 20×20 pixels,
one map of 2×2 cells, step 10, min size 4, max size 16 and no aspect ratios, that is per cell a
square of 4 and one of √(4·16) = 8 pixels. The eight default boxes, areas 16 and 64:

    0 (3, 3, 7, 7)    1 (1, 1, 9, 9)      2 (13, 3, 17, 7)    3 (11, 1, 19, 9)
    4 (3, 13, 7, 17)  5 (1, 11, 9, 19)    6 (13, 13, 17, 17)  7 (11, 11, 19, 19)

Predictions are given as probabilities (class 0, class 1, background); their logarithms are logits.
Caffe's coordinates are fractions of the image, ours pixels.
"""

import itertools
import math
from pathlib import Path

import pytest
import torch
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.structures import Boxes, Instances

from ssd.config import load_config
from ssd.modeling import DefaultBoxGenerator
from ssd.modeling.multibox import encode_boxes, match_default_boxes

BASES = Path(__file__).parents[2] / "labs/_base_"
SMALL = """MODEL.DEVICE cpu MODEL.WEIGHTS '' MODEL.SSD.INPUT_SIZE [20,20] MODEL.SSD.NUM_CLASSES 2
    MODEL.SSD.BOTTOM_UP TwoByTwoBackbone MODEL.SSD.IN_FEATURES ['map'] MODEL.SSD.EXTRA_LAYERS []
    MODEL.SSD.L2_NORM_FEATURES [] MODEL.SSD.DEFAULT_BOXES.MIN_SIZES [4.0]
    MODEL.SSD.DEFAULT_BOXES.MAX_SIZE 16.0 MODEL.SSD.DEFAULT_BOXES.ASPECT_RATIOS [[]]
    MODEL.SSD.DEFAULT_BOXES.STEPS [10.0]""".split()
BOXES = [
    [3, 3, 7, 7], [1, 1, 9, 9], [13, 3, 17, 7], [11, 1, 19, 9],
    [3, 13, 7, 17], [1, 11, 9, 19], [13, 13, 17, 17], [11, 11, 19, 19],
]  # fmt: skip
LN2 = math.log(2)


@BACKBONE_REGISTRY.register()
class TwoByTwoBackbone(Backbone):
    """20×20 pixels to 2×2 cells."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.conv = torch.nn.Conv2d(input_shape.channels, 1, 10, 10)
        self._out_features = ["map"]
        self._out_feature_channels, self._out_feature_strides = {"map": 1}, {"map": 10}

    def forward(self, x):
        return {"map": self.conv(x)}


def caffe_config(*opts):
    return load_config(str(BASES / "ssd300_vgg16.yaml"), [*SMALL, *opts])


def tensor(values):
    return torch.tensor(values, dtype=torch.float32)


# --- PriorBox --------------------------------------------------------------------------------


def test_prior_boxes():
    """Square of min, square of √(min·max), then r wide and 1/r wide (flip) for each ratio.

    Ratio 4: 4·√4 = 8 wide, 4/√4 = 2 high. Ratio 16: 4·√16 = 16 wide, 4/√16 = 1 high.
    """
    generator = DefaultBoxGenerator(
        input_size=(20, 20), min_sizes=[4.0], max_size=16.0, aspect_ratios=[[4.0, 16.0]],
        steps=[10.0],
    )  # fmt: skip
    (boxes,) = generator.per_level([(2, 2)])
    cell = tensor([
        [3, 3, 7, 7], [1, 1, 9, 9],
        [1, 4, 9, 6], [4, 1, 6, 9],
        [-3, 4.5, 13, 5.5], [4.5, -3, 5.5, 13],
    ])  # fmt: skip
    right, down = tensor([10, 0, 10, 0]), tensor([0, 10, 0, 10])
    assert (
        boxes.tolist() == torch.cat([cell, cell + right, cell + down, cell + right + down]).tolist()
    )


def test_prior_boxes_are_centred_by_step_and_offset_one_half():
    """Step 8 on two columns of 20 pixels: centres 4 and 12, not 5 and 15."""
    generator = DefaultBoxGenerator(
        input_size=(10, 20), min_sizes=[4.0], max_size=9.0, aspect_ratios=[[]], steps=[8.0]
    )
    (boxes,) = generator.per_level([(1, 2)])
    assert boxes.tolist() == [[2, 2, 6, 6], [1, 1, 7, 7], [10, 2, 14, 6], [9, 1, 15, 7]]


@pytest.mark.parametrize(
    "base, side, percents",
    [
        ("ssd300_vgg16", 300, [7, 15, 33, 51, 69, 87, 105]),
        ("ssd512_vgg16", 512, [4, 10, 26, 42, 58, 74, 90, 106]),
    ],
)
def test_sizes_are_percents_of_the_input_truncated_to_integers(base, side, percents):
    """ssd_coco.py: 300 · 7 % = 21. The layer stores sizes in ints: 512 · 4 % = 20.48 is 20."""
    boxes = load_config(str(BASES / f"{base}.yaml")).MODEL.SSD.DEFAULT_BOXES
    assert [*boxes.MIN_SIZES, boxes.MAX_SIZE] == [side * p // 100 for p in percents]


def test_settings_of_ssd_coco_py():
    cfg = load_config(str(BASES / "ssd300_vgg16.yaml"))
    ssd = cfg.MODEL.SSD
    assert [1 / variance for variance in (0.1, 0.1, 0.2, 0.2)] == ssd.BBOX_REG_WEIGHTS
    assert ssd.DEFAULT_BOXES.STEPS == [8, 16, 32, 64, 100, 300]
    assert ssd.DEFAULT_BOXES.ASPECT_RATIOS == [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
    assert ssd.MATCHING.IOU_THRESHOLD == 0.5 and ssd.LOSS.NEG_POS_RATIO == 3
    assert ssd.LOSS.BOX_WEIGHT == (3 + 1) / 4  # loc_weight
    assert ssd.SCORE_THRESH_TEST == 0.01 and ssd.NMS_THRESH_TEST == 0.45
    assert ssd.TOPK_CANDIDATES_TEST == 400 and cfg.TEST.DETECTIONS_PER_IMAGE == 200


# --- MatchBBox, PER_PREDICTION ---------------------------------------------------------------


def match(gts, default_boxes=BOXES, padding=0, **kwargs):
    """Ground truth of each default box, -1 for background."""
    matching = caffe_config().MODEL.SSD.MATCHING
    kwargs = {"iou_threshold": matching.IOU_THRESHOLD, "best": matching.BEST, **kwargs}
    valid = torch.arange(len(gts) + padding)[None] < len(gts)
    gts = tensor([[*gts, *[[0, 0, 0, 0]] * padding]])
    return match_default_boxes(gts, valid, tensor(default_boxes), **kwargs)[0].tolist()


# IoU with box 0 and box 1:
A = [1, 1, 9, 9]  # 16 / 64 = 0.25 and 1
B = [1, 1, 9, 7]  # 16 / 48 = 0.33 and 48 / 64 = 0.75
C = [15, 15, 19, 19]  # with box 6: 4 / (16 + 16 - 4) = 0.14, with box 7: 16 / 64 = 0.25


def test_matching_is_greedy_over_all_pairs():
    """A-1 (1) is first, then B can't have box 1 and takes 0 (0.33), C takes 7 (0.25)."""
    for order in itertools.permutations("ABC"):
        matched = match([{"A": A, "B": B, "C": C}[name] for name in order])
        names = [order[gt] if gt >= 0 else "-" for gt in matched]
        assert names == list("BA-----C")
    # MMDetection: B overwrites A on box 1, and nothing is left for A
    assert match([A, B, C], best="argmax") == [-1, 1, -1, -1, -1, -1, -1, 2]


def test_object_that_comes_too_late_stays_unmatched():
    """D overlaps box 0 (4 / 16) and box 1 (4 / 64) only; A-1 (1) and B-0 (0.33) are before it."""
    assert match([[3, 3, 5, 5], B, A]) == [1, 2, -1, -1, -1, -1, -1, -1]


@pytest.mark.parametrize(
    "gt",
    [
        [9.5, 9.5, 10.5, 10.5],  # between the cells
        [9, 1, 11, 9],  # touches boxes 1 and 3
        [5, 5, 5.001, 5.001],  # IoU with box 0: 1e-6 / 16, with box 1: 1e-6 / 64
    ],
)
def test_object_without_an_overlap_stays_unmatched(gt):
    assert match([gt]) == [-1] * 8


def test_any_overlap_above_1e_6_gets_a_default_box():
    # IoU with box 0: 1e-4 / 16 = 6e-6
    assert match([[5, 5, 5.01, 5.01]]) == [0, -1, -1, -1, -1, -1, -1, -1]


def test_threshold_is_inclusive():
    """8 × 4 pixels: IoU with box 0 is 16 / 32, with box 1 32 / 64.

    8 × 3.9 pixels: 15.6 / (31.2 + 16 - 15.6) = 0.494 and 31.2 / 64 = 0.488, so that only the first
    part of the matching gives it a box.
    """
    assert match([[1, 3, 9, 7]]) == [0, 0, -1, -1, -1, -1, -1, -1]
    assert match([[1, 3, 9, 6.9]]) == [0, -1, -1, -1, -1, -1, -1, -1]


def test_other_default_boxes_take_their_best_object():
    """10 wide, IoU is the ratio of heights. Objects of height 10 and 6 take boxes 0 and 2.

    Box 1: 8 / 10 = 0.8 and 6 / 8 = 0.75.
    """
    boxes = [[0, 0, 10, height] for height in (10, 8, 6)]
    assert match([boxes[0], boxes[2]], boxes) == [0, 0, 1]
    assert match([boxes[2], boxes[0]], boxes) == [1, 1, 0]


def test_of_two_objects_with_the_same_iou_the_first_is_taken():
    """Both have IoU 80 / 100 with box 0, and a box of their own."""
    boxes = [[0, 0, 10, 10], [0, 0, 10, 8], [0, 2, 10, 10]]
    assert match([boxes[1], boxes[2]], boxes) == [0, 0, 1]
    assert match([boxes[2], boxes[1]], boxes) == [0, 1, 0]


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_of_default_boxes_with_the_same_iou_the_first_is_taken(padding):
    """1 × 1 pixels in the middle of 4 × 4, 8 × 2 and 2 × 8: IoU 1 / 16 each, 1 / 64 with 8 × 8."""
    boxes, point = [[3, 3, 7, 7], [1, 1, 9, 9], [1, 4, 9, 6], [4, 1, 6, 9]], [4.5, 4.5, 5.5, 5.5]
    assert match([point], boxes, padding) == [0, -1, -1, -1]
    assert match([point] * 2, boxes, padding) == [0, -1, 1, -1]
    assert match([point] * 3, boxes, padding) == [0, -1, 1, 2]
    assert match([point] * 4, boxes, padding) == [0, 3, 1, 2]


def test_encoded_targets():
    """CENTER_SIZE: shift over the box's size, logarithm of the ratio of sizes, over variances.

    A is box 1 itself. B, 8 × 6 at (5, 4), on box 0, 4 × 4 at (5, 5):
    (0, -1/4) / 0.1, (ln 2, ln 1.5) / 0.2. C, 4 × 4 at (17, 17), on box 7, 8 × 8 at (15, 15):
    (2/8, 2/8) / 0.1, (ln 1/2, ln 1/2) / 0.2.
    """
    weights = caffe_config().MODEL.SSD.BBOX_REG_WEIGHTS
    targets = encode_boxes(tensor([A, B, C]), tensor([BOXES[i] for i in (1, 0, 7)]), weights)
    expected = [[0, 0, 0, 0], [0, -2.5, 5 * LN2, 5 * math.log(1.5)], [2.5, 2.5, -5 * LN2, -5 * LN2]]
    torch.testing.assert_close(targets, tensor(expected))


# --- MultiBoxLoss, MAX_NEGATIVE, VALID -------------------------------------------------------


def maps(values):
    """(N, 8, C) in the order of the default boxes to the head's map (N, 2 · C, 2, 2)."""
    return values.reshape(len(values), 2, 2, -1).permute(0, 3, 1, 2)


def losses(probabilities, objects, deltas=None):
    """Of N images: ``probabilities`` (N, 8, 3), ``objects`` [(box, class), …] of each image."""
    model = build_model(caffe_config())
    if not torch.is_tensor(probabilities):
        probabilities = tensor(probabilities)
    deltas = torch.zeros(len(objects), 8, 4) if deltas is None else deltas
    targets = []
    for boxes in objects:
        targets.append(Instances((20, 20)))
        targets[-1].gt_boxes = Boxes(tensor([box for box, _ in boxes]).reshape(-1, 4))
        targets[-1].gt_classes = torch.tensor([cls for _, cls in boxes], dtype=torch.int64)
    predictions = [maps(probabilities.log())], [maps(deltas)]
    return model.forward_training(None, None, predictions, targets)


def one_over(*numbers):
    """Rows whose probability of the background is 1 / number, of class 0 the rest but for 0.01."""
    return [[0.99 - 1 / number, 0.01, 1 / number] for number in numbers]


def test_negatives_are_the_three_hardest_of_each_positive():
    """Σ -ln p = ln Π 1/p. Box 1 is positive, p = 1/2; the least backgrounds: 1/19, 1/17, 1/13."""
    rows = one_over(5, 4, 13, 3, 19, 7, 17, 11)
    rows[1] = [0.5, 0.25, 0.25]
    loss = losses([rows], [[(A, 0)]])
    assert loss["loss_cls"].item() == pytest.approx(math.log(2 * 19 * 17 * 13), rel=1e-5)


def test_negatives_are_ranked_by_their_loss():
    """Not by their highest object probability, which would take boxes 2, 3 and 4.

    Box 0 has the lowest background, 0.1, in spite of 0.45 for each class.
    """
    easy = [0.05, 0.05, 0.9]
    rows = [
        [0.45, 0.45, 0.1], [0.5, 0.25, 0.25], [0.7, 0.1, 0.2], [0.6, 0.15, 0.25],
        [0.48, 0.02, 0.5], easy, easy, easy,
    ]  # fmt: skip
    loss = losses([rows], [[(A, 0)]])
    assert loss["loss_cls"].item() == pytest.approx(math.log(2 * 10 * 5 * 4), rel=1e-5)


def test_fewer_negatives_than_three_per_positive():
    """Boxes 0, 1 and 7 are positive, p = 1/2 each: 9 negatives wanted, 5 there; divisor 3."""
    rows = one_over(2, 2, 3, 5, 7, 11, 13, 2)
    rows[0] = [0.25, 0.5, 0.25]  # B has class 1
    rows[1] = rows[7] = [0.5, 0.25, 0.25]
    loss = losses([rows], [[(A, 0), (B, 1), (C, 0)]])
    product = 2 * 2 * 2 * 3 * 5 * 7 * 11 * 13
    assert loss["loss_cls"].item() == pytest.approx(math.log(product) / 3, rel=1e-5)


@pytest.mark.parametrize("objects", [[], [([9.5, 9.5, 10.5, 10.5], 0)]])
def test_image_without_positives_has_no_negatives(objects):
    """Without objects, or with one that overlaps no default box. The divisor is 1, not 0."""
    loss = losses([one_over(*[100] * 8)], [objects])
    assert [value.item() for value in loss.values()] == [0, 0]


@pytest.mark.parametrize(
    "x, value, slope",
    [
        (0, 0, 0),
        (0.5, 0.125, 0.5),
        (-0.5, 0.125, -0.5),
        (0.9, 0.405, 0.9),
        (1, 0.5, 1),
        (-1.1, 0.6, -1),
        (3, 2.5, 1),
    ],
)
def test_smooth_l1(x, value, slope):
    """0.5 x² for |x| < 1, else |x| - 0.5. A's target is 0, as it is box 1."""
    deltas = torch.zeros(1, 8, 4)
    deltas[0, 1, 2] = x
    deltas.requires_grad_()
    loss = losses([one_over(*[2] * 8)], [[(A, 0)]], deltas)["loss_box_reg"]
    loss.backward()
    assert loss.item() == pytest.approx(value)
    expected = torch.zeros(1, 8, 4)
    expected[0, 1, 2] = slope
    torch.testing.assert_close(deltas.grad, expected)


def three_images():
    """Probabilities, objects and offsets of three images with 3, 1 and 0 positives.

    Image 0 has A (class 0, box 1), B (class 1, box 0), C (class 0, box 7):
        -ln p of the positives: ln 2, ln 2, ln 8; all 5 others are negatives, ln 2 each;
        offsets minus targets: A (3, 0, 0, -0.2): 2.5 + 0.02;
        B (0.5, -1, 2, 0): 0.125 + 0.5 + 1.5; C 0.
    Image 1 has class 1 in box 3:
        its -ln p: ln 4; the 3 negatives with backgrounds 0.1, 0.2, 0.4: ln 10, ln 5, ln 2.5;
        offsets (1.5, -1.5, 0.1, 0): 1 + 1 + 0.005.
    Image 2 has no object.
    """
    half = [0.25, 0.25, 0.5]
    first = [[0.25, 0.5, 0.25], [0.5, 0.25, 0.25], *[half] * 5, [0.125, 0.125, 0.75]]
    second = [[0.5 - b / 2, 0.5 - b / 2, b] for b in (0.9, 0.8, 0.1, 0.5, 0.2, 0.7, 0.4, 0.6)]
    probabilities = tensor([first, second, one_over(*[100] * 8)])
    objects = [[(A, 0), (B, 1), (C, 0)], [(BOXES[3], 1)], []]
    deltas = torch.full((3, 8, 4), 100.0)  # those of negatives don't count
    deltas[0, 0] = tensor([0.5, -2.5 - 1, 5 * LN2 + 2, 5 * math.log(1.5)])
    deltas[0, 1] = tensor([3, 0, 0, -0.2])
    deltas[0, 7] = tensor([2.5, 2.5, -5 * LN2, -5 * LN2])
    deltas[1, 3] = tensor([1.5, -1.5, 0.1, 0])
    return probabilities, objects, deltas


def test_losses_are_divided_by_the_positives_of_the_batch():
    """3 + 1 + 0 = 4, whatever the number of images."""
    probabilities, objects, deltas = three_images()
    loss = losses(probabilities, objects, deltas)
    image_0, image_1 = (1 + 1 + 3 + 5) * LN2, math.log(4 * 10 * 5 * 2.5)
    assert loss["loss_cls"].item() == pytest.approx((image_0 + image_1) / 4, rel=1e-5)
    image_0, image_1 = 2.52 + 2.125 + 0, 2.005
    assert loss["loss_box_reg"].item() == pytest.approx((image_0 + image_1) / 4, rel=1e-5)
    two = losses(probabilities[:2], objects[:2], deltas[:2])
    assert [x.item() for x in two.values()] == pytest.approx([x.item() for x in loss.values()])


def test_gradients():
    """Of a logit: (p - 1 for the label, p else) / 4 for positives and mined negatives, else 0."""
    probabilities, objects, deltas = three_images()
    probabilities.requires_grad_()
    deltas.requires_grad_()
    loss = losses(probabilities, objects, deltas)
    sum(loss.values()).backward()
    of_logits = probabilities.grad * probabilities.detach()  # d ln p = dp / p
    expected = torch.zeros(3, 8, 3)
    expected[0] = tensor([
        [0.25, -0.5, 0.25], [-0.5, 0.25, 0.25], *[[0.25, 0.25, -0.5]] * 5, [-0.875, 0.125, 0.75],
    ])  # fmt: skip
    expected[1, 2] = tensor([0.45, 0.45, -0.9])
    expected[1, 3] = tensor([0.25, -0.75, 0.5])
    expected[1, 4] = tensor([0.4, 0.4, -0.8])
    expected[1, 6] = tensor([0.3, 0.3, -0.6])
    torch.testing.assert_close(of_logits, expected / 4)
    expected = torch.zeros(3, 8, 4)
    expected[0, 0] = tensor([0.5, -1, 1, 0])
    expected[0, 1] = tensor([1, 0, 0, -0.2])
    expected[1, 3] = tensor([1, -1, 0.1, 0])
    torch.testing.assert_close(deltas.grad, expected / 4, atol=1e-6, rtol=1e-5)


# --- DetectionOutput -------------------------------------------------------------------------


def detections(rows, *opts):
    """(class, score, box) of one image, best first.

    Args:
        rows: {default box: (p of class 0, p of class 1)} or {…: (…, …, offsets)}.
    """
    probabilities, deltas = tensor([[[0, 0, 1.0]] * 8]), torch.zeros(1, 8, 4)
    for i, (first, second, *offsets) in rows.items():
        probabilities[0, i] = tensor([first, second, 1 - first - second])
        if offsets:
            deltas[0, i] = tensor(offsets[0])
    model = build_model(caffe_config(*opts))
    logits, deltas = model.head.flatten([maps(probabilities.log())], [maps(deltas)])
    (result,) = model.detect(logits, deltas)
    boxes = [[round(x, 2) for x in box] for box in result.pred_boxes.tensor.tolist()]
    scores = [round(x, 4) for x in result.scores.tolist()]
    return list(zip(result.pred_classes.tolist(), scores, boxes))


def moved(pixels):
    """Offsets that move a box of 8 pixels to the right: pixels / 8 / 0.1."""
    return [pixels / 8 / 0.1, 0, 0, 0]


def test_decoding():
    """Box 1, 8 × 8 at (5, 5): centre 5 + 0.1 · 1.25 · 8 = 6, 5 - 0.1 · 2.5 · 8 = 3;
    size 8 · e^(0.2 · -5 ln 2) = 4, 8 · e^(0.2 · -5 ln 4) = 2.
    """
    offsets = [1.25, -2.5, -5 * LN2, -10 * LN2]
    assert detections({1: (0.5, 0, offsets)}) == [(0, 0.5, [4, 2, 8, 4])]


def test_decoded_sizes_are_not_clamped_and_boxes_are_clipped():
    """Box 0, 4 × 4 at (5, 5): 4 · 100 wide at 5 + 0.1 · 512.5 · 4 = 210: from 10 to 410, clipped.

    With the clamp at 1000 / 16 it would begin at 85.
    """
    offsets = [512.5, 0, 5 * math.log(100), 0]
    assert detections({0: (0.5, 0, offsets)}) == [(0, 0.5, [10, 3, 20, 7])]


def test_a_score_must_be_above_the_threshold():
    rows = {1: (0.5, 0)}
    assert detections(rows, "MODEL.SSD.SCORE_THRESH_TEST", "0.5") == []
    assert len(detections(rows, "MODEL.SSD.SCORE_THRESH_TEST", "0.4999")) == 1


def test_detections_of_one_image():
    """Box 3, moved 7 pixels to the left, is (4, 1, 12, 9); its IoU with box 1 is 5 / 11 = 0.4545.

    In class 0 box 1 suppresses it, in class 1 it suppresses box 1. Of box 7 only class 1 is above
    0.01.
    """
    rows = {1: (0.6, 0.3), 3: (0.5, 0.4, moved(-7)), 5: (0.2, 0.002), 7: (0.009, 0.02)}
    assert detections(rows) == [
        (0, 0.6, BOXES[1]),
        (1, 0.4, [4, 1, 12, 9]),
        (0, 0.2, BOXES[5]),
        (1, 0.02, BOXES[7]),
    ]


@pytest.mark.parametrize(
    "pixels, threshold, kept",
    [
        (-7, "0.45", 1),  # 3 apart: 5 / 11 = 0.4545
        (-6.9, "0.45", 2),  # 3.1 apart: 4.9 / 11.1 = 0.4414
        (-8, "0.6", 2),  # 2 apart: 6 / 10, as much as allowed
        (-8, "0.59", 1),
    ],
)
def test_nms_suppresses_above_its_threshold(pixels, threshold, kept):
    """Box 3 is 10 pixels to the right of box 1. No + 1 in widths, heights and areas."""
    rows = {1: (0.6, 0), 3: (0.5, 0, moved(pixels))}
    assert len(detections(rows, "MODEL.SSD.NMS_THRESH_TEST", threshold)) == kept


def test_suppressed_box_suppresses_nothing():
    """Boxes at x = 1, 4, 7: neighbours have IoU 5 / 11, the outer two 2 / 14."""
    rows = {1: (0.6, 0), 3: (0.5, 0, moved(-7)), 5: (0.4, 0, [6 / 0.8, -10 / 0.8, 0, 0])}
    assert detections(rows) == [(0, 0.6, [1, 1, 9, 9]), (0, 0.4, [7, 1, 15, 9])]


def test_top_k_of_each_class_comes_before_nms():
    """The 2 best of class 0 are boxes 1 and 3, moved onto each other; 5 and 7 are never looked at.

    Class 1 has a top 2 of its own.
    """
    rows = {1: (0.9, 0), 3: (0.8, 0, moved(-10)), 5: (0.7, 0.02), 7: (0.6, 0.3)}
    assert detections(rows, "MODEL.SSD.TOPK_CANDIDATES_TEST", "2") == [
        (0, 0.9, BOXES[1]),
        (1, 0.3, BOXES[7]),
        (1, 0.02, BOXES[5]),
    ]


def test_keep_top_k_is_over_all_classes_after_nms():
    """The 0.8 is suppressed by the 0.9 and counts no more."""
    rows = {1: (0.9, 0), 3: (0.8, 0, moved(-10)), 5: (0.1, 0.7), 7: (0.6, 0.3)}
    assert detections(rows, "TEST.DETECTIONS_PER_IMAGE", "4") == [
        (0, 0.9, BOXES[1]),
        (1, 0.7, BOXES[5]),
        (0, 0.6, BOXES[7]),
        (1, 0.3, BOXES[7]),
    ]


def test_of_equal_scores_the_first_default_box_is_kept():
    """Box 3 is moved to (3, 1, 11, 9), IoU with box 1 6 / 10; the sort is stable."""
    assert detections({1: (0.5, 0), 3: (0.5, 0, moved(-8))}) == [(0, 0.5, BOXES[1])]
    assert detections({1: (0.5, 0, moved(8)), 3: (0.5, 0)}) == [(0, 0.5, [9, 1, 17, 9])]
    apart = {1: (0.5, 0), 3: (0.5, 0)}
    assert detections(apart, "MODEL.SSD.TOPK_CANDIDATES_TEST", "1") == [(0, 0.5, BOXES[1])]
