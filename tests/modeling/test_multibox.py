"""Matching, mining and loss: cases computed by hand, and slow loops that do the same."""

import math

import pytest
import torch
import torchvision

from ssd.modeling.multibox import (
    box_iou,
    encode_boxes,
    loss_divisor,
    match_default_boxes,
    mine_hard_negatives,
    multibox_loss,
)
from ssd.modeling.postprocessing import decode_boxes

WEIGHTS = [10.0, 10.0, 5.0, 5.0]
# A 20×20 image in four quarters: top left (0), top right (1), bottom left (2), bottom right (3).
QUARTERS = torch.tensor(
    [[0, 0, 10, 10], [10, 0, 20, 10], [0, 10, 10, 20], [10, 10, 20, 20]], dtype=torch.float32
)


def test_iou_is_torchvisions_to_the_last_bit():
    torch.manual_seed(0)
    corners = torch.rand(4, 50, 2, 2) * 300
    boxes = torch.cat([corners.amin(2), corners.amax(2)], dim=-1)
    boxes[:, 0], boxes[0, 1:3] = float("nan"), 7.0  # the latter have no area
    found = box_iou(boxes, boxes[3, 5:])
    expected = [torchvision.ops.box_iou(x, boxes[3, 5:]) for x in boxes]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=0, equal_nan=True)
    assert found.shape == (4, 50, 45) and found[1, 1:].isfinite().all()
    each = box_iou(boxes, boxes)  # of an image with itself
    expected = [torchvision.ops.box_iou(x, x) for x in boxes]
    torch.testing.assert_close(each, torch.stack(expected), rtol=0, atol=0, equal_nan=True)
    assert each[0, 1, 2].isnan()


def match(gts, best="argmax", threshold=0.5, valid=None):
    """Ground truth of each quarter, -1 for background."""
    gts = torch.tensor([gts], dtype=torch.float32)
    valid = torch.tensor([valid or [True] * gts.shape[1]])
    return match_default_boxes(gts, valid, QUARTERS, threshold, best)[0].tolist()


@pytest.mark.parametrize("best", ["argmax", "bipartite"])
def test_best_default_box_is_forced_below_the_threshold(best):
    assert match([[0, 0, 5, 5]], best) == [0, -1, -1, -1]  # IoU 0.25


@pytest.mark.parametrize("best", ["argmax", "bipartite"])
def test_threshold_is_inclusive(best):
    left = [[0, 0, 10, 20]]  # IoU 100 / 200 with quarters 0 and 2
    assert match(left, best, threshold=0.5) == [0, -1, 0, -1]
    assert match(left, best, threshold=0.501) == [0, -1, -1, -1]


# A: IoU 1 with quarter 0. B: 90 / 110 with 0, 10 / 190 with 1.
A, B = [0, 0, 10, 10], [1, 0, 11, 10]


def test_argmax_later_object_overwrites_a_shared_best_default_box():
    assert match([A, B]) == [1, -1, -1, -1]
    assert match([B, A]) == [1, -1, -1, -1]


def test_bipartite_gives_a_shared_best_default_box_to_the_higher_iou():
    assert match([A, B], "bipartite") == [0, 1, -1, -1]
    assert match([B, A], "bipartite") == [1, 0, -1, -1]


def test_forced_match_beats_a_higher_iou_of_another_object():
    # C: IoU with 0: 60 / 100 = 0.6, its best. A has 1, but in argmax's order C comes later.
    c = [0, 0, 6, 10]
    assert match([A, c]) == [1, -1, -1, -1]


def test_bipartite_needs_an_overlap():
    outside = [30, 30, 40, 40]
    assert match([outside], "bipartite") == [-1] * 4
    # more objects than overlapping default boxes: the third finds none free
    assert sorted(match([A, A, A], "bipartite")) == [-1, -1, -1, 0]


def test_bipartite_with_more_objects_than_default_boxes():
    objects = [[x, y, x + 11, y + 11] for y in (-1, 2, 9) for x in (-1, 2, 9)]
    assert all(gt >= 0 for gt in match(objects, "bipartite"))


@pytest.mark.parametrize("best", ["argmax", "bipartite"])
def test_padding_and_images_without_objects(best):
    assert match([A, [10, 10, 20, 20]], best, valid=[True, False]) == [0, -1, -1, -1]
    assert match([A, B], best, valid=[False, False]) == [-1] * 4
    assert match([[0, 0, 0, 0]], best, valid=[False]) == [-1] * 4


def test_images_of_a_batch_do_not_mix():
    gts = torch.tensor([[A, B], [[10, 10, 20, 20], [0, 0, 0, 0]]], dtype=torch.float32)
    valid = torch.tensor([[True, True], [True, False]])
    for best in ("argmax", "bipartite"):
        both = match_default_boxes(gts, valid, QUARTERS, 0.5, best)
        for i in range(2):
            alone = match_default_boxes(gts[i : i + 1], valid[i : i + 1], QUARTERS, 0.5, best)
            assert both[i].tolist() == alone[0].tolist()


def test_unknown_kind_of_matching_names_the_key():
    with pytest.raises(ValueError, match=r"MODEL\.SSD\.MATCHING\.BEST.*'greedy'"):
        match([A], "greedy")


def iou_of(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def slow_argmax(iou, threshold):
    """MMDetection's MaxIoUAssigner; iou[gt][default box]."""
    matched = [-1] * len(iou[0])
    for r in range(len(matched)):
        gt = max(range(len(iou)), key=lambda g: iou[g][r])
        if iou[gt][r] >= threshold:
            matched[r] = gt
    for gt, row in enumerate(iou):
        matched[row.index(max(row))] = gt
    return matched


def slow_bipartite(iou, threshold):
    """Caffe's MatchBBox, bbox_util.cpp."""
    matched = [-1] * len(iou[0])
    pool = list(range(len(iou)))
    while pool:
        pairs = [
            (iou[g][r], g, r)
            for r in range(len(matched)) if matched[r] == -1
            for g in pool if iou[g][r] > 1e-6
        ]  # fmt: skip
        if not pairs:
            break
        _, gt, box = max(pairs)
        matched[box] = gt
        pool.remove(gt)
    for r in range(len(matched)):
        if matched[r] == -1:
            gt = max(range(len(iou)), key=lambda g: iou[g][r])
            if iou[gt][r] >= threshold and iou[gt][r] > 1e-6:
                matched[r] = gt
    return matched


def random_boxes(generator, *shape):
    """Boxes of 5 to 45 pixels in a 100×100 image, or thereabouts."""
    corner = torch.rand(*shape, 2, generator=generator) * 80
    return torch.cat([corner, corner + 5 + torch.rand(*shape, 2, generator=generator) * 40], -1)


@pytest.mark.parametrize("best, slow", [("argmax", slow_argmax), ("bipartite", slow_bipartite)])
@pytest.mark.parametrize("num_boxes, num_gt", [(60, 6), (8, 12), (200, 30)])
def test_matching_equals_a_slow_loop(best, slow, num_boxes, num_gt):
    generator = torch.Generator().manual_seed(num_boxes)
    default_boxes = random_boxes(generator, num_boxes)
    gts = random_boxes(generator, 3, num_gt)
    counts = [num_gt, num_gt // 2, 1]
    valid = torch.arange(num_gt)[None] < torch.tensor(counts)[:, None]
    matched = match_default_boxes(gts, valid, default_boxes, 0.4, best)
    for i, count in enumerate(counts):
        iou = [[iou_of(g, d) for d in default_boxes.tolist()] for g in gts[i, :count].tolist()]
        assert matched[i].tolist() == slow(iou, 0.4)


@pytest.fixture(params=["topk", "sort"])
def mine(request, monkeypatch):
    """Mining as on CPUs, and as in a compiled function or on another device."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param == "sort")
    return mine_hard_negatives


def test_mining_takes_the_hardest_per_image(mine):
    loss = torch.tensor([[9.0, 5, 1, 4, 3, 2], [1.0, 2, 3, 4, 5, 6]])
    positive = torch.tensor([[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0]]).bool()
    mined = mine(loss, positive, ratio=3.0)
    assert mined.int().tolist() == [[0, 1, 0, 1, 1, 0], [0, 0, 1, 1, 0, 1]]


@pytest.mark.parametrize("ratio, count", [(3.0, 6), (1.0, 2), (0.5, 1), (1.25, 2), (0.0, 0)])
def test_mining_ratio_is_rounded_down(mine, ratio, count):
    loss, positive = torch.rand(1, 20), torch.zeros(1, 20, dtype=torch.bool)
    positive[0, [3, 7]] = True
    mined = mine(loss, positive, ratio)
    assert mined.sum() == count and not (mined & positive).any()


@pytest.mark.parametrize("value", [0.0, -0.0, 0.7])
def test_mining_takes_the_first_of_equal_losses(mine, value):
    positive = torch.zeros(2, 50, dtype=torch.bool)
    positive[0, 3:7], positive[1, 40] = True, True
    loss = torch.full((2, 50), value)
    loss[1, 20] = 0.8
    mined = mine(loss, positive)
    assert mined[0].nonzero().flatten().tolist() == [0, 1, 2, *range(7, 16)]
    assert mined[1].nonzero().flatten().tolist() == [0, 1, 20]


def test_mining_equals_a_stable_sort(mine):
    torch.manual_seed(0)
    loss, positive = torch.rand(20, 1000), torch.rand(20, 1000) < 0.05
    loss = torch.where(loss < 0.5, (loss * 20).round(), loss)  # half of them in ties
    expected = torch.zeros_like(positive)
    for row, values, taken in zip(expected, loss.tolist(), positive.tolist()):
        negatives = [r for r in range(1000) if not taken[r]]
        negatives.sort(key=lambda r: (-values[r], r))
        row[negatives[: 3 * sum(taken)]] = True
    assert mine(loss, positive).equal(expected)


def test_mining_never_takes_positives_when_negatives_run_out(mine):
    positive = torch.tensor([[True] * 4 + [False] * 3])
    assert mine(torch.rand(1, 7), positive).equal(~positive)


def test_mining_of_float64_and_of_no_image(mine):
    loss = 0.5 + torch.arange(3, dtype=torch.float64)[None] * 1e-12  # equal in float32
    positive = torch.zeros(1, 3, dtype=torch.bool)
    assert mine(loss, positive, without_positives=1).tolist() == [[False, False, True]]
    assert mine(torch.rand(0, 3), positive[:0]).shape == (0, 3)


@pytest.mark.parametrize("count", [0, 5])
def test_mining_of_images_without_positives(mine, count):
    positive = torch.zeros(2, 10, dtype=torch.bool)
    positive[1, 0] = True
    mined = mine(torch.rand(2, 10), positive, without_positives=count)
    assert mined.sum(1).tolist() == [count, 3]


def slow_loss(logits, deltas, labels, targets, ratio, without_positives, beta):
    """Eq. 1 of the paper for one image, summed, in Python floats."""
    background = len(logits[0]) - 1
    cross_entropy = []
    for row, label in zip(logits, labels):
        cross_entropy.append(math.log(sum(math.exp(x) for x in row)) - row[label])
    positives = [r for r, label in enumerate(labels) if label != background]
    negatives = [r for r, label in enumerate(labels) if label == background]
    count = int(len(positives) * ratio) if positives else without_positives
    negatives = sorted(negatives, key=lambda r: -cross_entropy[r])[:count]
    box = 0.0
    for r in positives:
        for x, y in zip(deltas[r], targets[r]):
            d = abs(x - y)
            box += 0.5 * d * d / beta if d < beta else d - 0.5 * beta
    return sum(cross_entropy[r] for r in positives + negatives), box


def random_batch(seed=0, positives=(4, 0, 9), boxes=40, classes=3):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(positives), boxes, classes + 1, generator=generator)
    deltas, targets = torch.randn(2, len(positives), boxes, 4, generator=generator) * 2
    labels = torch.full((len(positives), boxes), classes)
    for i, count in enumerate(positives):
        where = torch.randperm(boxes, generator=generator)[:count]
        labels[i, where] = torch.randint(classes, (count,), generator=generator)
    return logits, deltas, labels, targets


@pytest.mark.parametrize("ratio, without, beta", [(3.0, 0, 1.0), (2.0, 7, 0.5), (20.0, 0, 1.0)])
def test_loss_equals_a_slow_computation_per_image(ratio, without, beta):
    batch = random_batch()
    losses = multibox_loss(
        *batch,
        neg_pos_ratio=ratio, negatives_without_positives=without, smooth_l1_beta=beta,
    )  # fmt: skip
    expected = [slow_loss(*(x[i].tolist() for x in batch), ratio, without, beta) for i in range(3)]
    for loss, values in zip(losses, zip(*expected)):
        assert loss.tolist() == pytest.approx(values, rel=1e-5)


def test_loss_compiles_as_one_graph():
    inputs = random_batch()
    assert torch._dynamo.explain(multibox_loss)(*inputs).graph_count == 1
    compiled = torch.compile(multibox_loss, backend="eager")
    torch.testing.assert_close(compiled(*inputs), multibox_loss(*inputs))


def test_sigmoid_loss_by_hand():
    """Two classes and the background; binary cross entropy over the three outputs."""
    logits = torch.tensor([[[2.0, -1, 0.5], [-3, 1, 0], [0, 0, 4], [1, 2, -1], [-1, -2, 3]]])
    labels = torch.tensor([[0, 2, 2, 2, 2]])

    def bce(row, target):
        probabilities = [1 / (1 + math.exp(-x)) for x in row]
        return -sum(math.log(p if i == target else 1 - p) for i, p in enumerate(probabilities))

    values = [bce(row, label) for row, label in zip(logits[0].tolist(), labels[0].tolist())]
    # the hardest two: (1, 2, -1), and of the others (-3, 1, 0)
    assert sorted(range(1, 5), key=lambda r: -values[r])[:2] == [3, 1]
    loss_cls, loss_box_reg = multibox_loss(
        logits, torch.zeros(1, 5, 4), labels, torch.full((1, 5, 4), 0.5),
        neg_pos_ratio=2.0, score_function="sigmoid",
    )  # fmt: skip
    assert loss_cls.tolist() == pytest.approx([values[0] + values[3] + values[1]])
    assert loss_box_reg.tolist() == [4 * 0.5 * 0.5**2]


def test_unknown_score_function_names_the_key():
    with pytest.raises(ValueError, match=r"MODEL\.SSD\.SCORE_FUNCTION.*'relu'"):
        multibox_loss(*random_batch(), score_function="relu")


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_batch_without_objects_gives_zero_loss_and_zero_gradients(score_function):
    logits, deltas, labels, targets = random_batch(positives=(0, 0))
    logits.requires_grad_(), deltas.requires_grad_()
    losses = multibox_loss(logits, deltas, labels, targets, score_function=score_function)
    assert [loss.tolist() for loss in losses] == [[0, 0], [0, 0]]
    sum(losses).sum().backward()
    assert not logits.grad.any() and not deltas.grad.any()  # NaN would count as true


def test_offsets_of_background_boxes_may_be_infinite():
    logits, deltas, labels, targets = random_batch()
    deltas[labels == 3] = float("inf")
    losses = multibox_loss(logits, deltas, labels, targets)
    assert all(loss.isfinite().all() for loss in losses)


def test_encoding_computed_by_hand():
    default_box = torch.tensor([[10, 20, 30, 60.0]])  # centre (20, 40), 20×40
    box = torch.tensor([[14, 30, 34, 70.0]])  # centre (24, 50), the same size
    # dx = 4 / 20, dy = 10 / 40, times 10
    torch.testing.assert_close(
        encode_boxes(box, default_box, WEIGHTS), torch.tensor([[2, 2.5, 0, 0]])
    )
    box = torch.tensor([[15, 0, 25, 80.0]])  # the same centre, half as wide, twice as high
    expected = torch.tensor([[0, 0, -5 * math.log(2), 5 * math.log(2)]])
    torch.testing.assert_close(encode_boxes(box, default_box, WEIGHTS), expected)


@pytest.mark.parametrize("weights", [WEIGHTS, [0.5, 2.5, 3.0, 4.0]])
def test_decoding_inverts_encoding(weights):
    generator = torch.Generator().manual_seed(1)
    default_boxes, boxes = random_boxes(generator, 50), random_boxes(generator, 2, 50)
    encoded = encode_boxes(boxes, default_boxes, weights)
    decoded = decode_boxes(encoded, default_boxes, weights, "none")
    torch.testing.assert_close(decoded, boxes, rtol=0, atol=1e-4)


def test_normalizers():
    matched = torch.tensor([[0, 1, -1, -1], [-1] * 4, [0, -1, -1, -1]])
    assert loss_divisor(matched, "image") == 2 + 1 + 1
    assert loss_divisor(matched, "batch") == 2 + 0 + 1
    # each image by its own positives, at least one, then the mean over the three images
    assert loss_divisor(matched, "each").tolist() == [2 * 3, 1 * 3, 1 * 3]
    losses = torch.tensor([5.0, 0.5, 7])
    assert (losses / loss_divisor(matched, "each")).sum() == pytest.approx((2.5 + 0.5 + 7) / 3)
    with pytest.raises(ValueError, match=r"MODEL\.SSD\.LOSS\.NORMALIZER.*'boxes'"):
        loss_divisor(matched, "boxes")


@pytest.mark.parametrize("normalizer", ["image", "batch", "each"])
def test_two_halves_of_a_batch_give_the_loss_of_the_whole(normalizer):
    batch = random_batch(positives=(4, 0, 9, 1))

    def losses(start, stop, divisor=None):
        part = [x[start:stop] for x in batch]
        matched = torch.where(part[2] < 3, 0, -1)
        divisor = loss_divisor(matched, normalizer) if divisor is None else divisor
        return torch.stack([(loss / divisor).sum() for loss in multibox_loss(*part)]), divisor

    whole, divisor = losses(0, 4)
    halves = [losses(0, 2), losses(2, 4)]
    if normalizer == "each":  # the mean over processes, as DistributedDataParallel takes it
        halves = (halves[0][0] + halves[1][0]) / 2
    else:
        assert halves[0][1] + halves[1][1] == divisor
        halves = losses(0, 2, divisor)[0] + losses(2, 4, divisor)[0]
    torch.testing.assert_close(halves, whole)
