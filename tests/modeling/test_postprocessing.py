"""Decoding, candidates and NMS, beside slow loops that do the same."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import detector_postprocess
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from ssd.modeling.postprocessing import (
    _nms_per_class,
    _nms_without_waiting,
    best_detections,
    class_scores,
    decode_boxes,
    detect,
    never_waits,
    rank_in_group,
    select_candidates,
)

WEIGHTS = [10.0, 10.0, 5.0, 5.0]
LIMIT = 1000 / 16
SIZE = (90, 120)


@pytest.mark.parametrize(
    "clamp, wide, narrow",
    [
        ("both", 8 * LIMIT, 8 / LIMIT),
        ("upper", 8 * LIMIT, 8 * math.exp(-6)),
        ("none", 8 * math.exp(6), 8 * math.exp(-6)),
    ],
)
def test_decoding_clamps_the_log_scales(clamp, wide, narrow):
    default_boxes = torch.tensor([[0, 0, 8, 8.0]]).expand(2, 4)
    deltas = torch.tensor([[0, 0, 30, -30], [0, 0, -30, 30.0]])  # dw, dh = ±6 after the weights
    boxes = decode_boxes(deltas, default_boxes, WEIGHTS, clamp)
    sizes = (boxes[:, 2:] - boxes[:, :2]).tolist()
    assert sizes[0] == pytest.approx([wide, narrow], rel=1e-3)
    assert sizes[1] == pytest.approx([narrow, wide], rel=1e-3)
    torch.testing.assert_close((boxes[:, :2] + boxes[:, 2:]) / 2, torch.full((2, 2), 4.0))


def test_clamp_does_not_touch_smaller_scales_or_centres():
    default_boxes = torch.tensor([[10, 20, 18, 28.0]])  # centre (14, 24)
    deltas = torch.tensor([[10000.0, -10000, 5 * math.log(2), 5 * math.log(0.5)]])
    boxes = decode_boxes(deltas, default_boxes, WEIGHTS, "both")
    # centre 14 + 1000 · 8, 24 - 1000 · 8; 16 wide, 4 high
    torch.testing.assert_close(boxes, torch.tensor([[8006, -7978, 8022, -7974.0]]))


def test_unknown_clamp_names_the_key():
    with pytest.raises(ValueError, match=r"MODEL\.SSD\.BBOX_REG_CLAMP.*'lower'"):
        decode_boxes(torch.zeros(1, 4), torch.ones(1, 4), WEIGHTS, "lower")


def test_rank_in_group():
    group = torch.tensor([[7, 0, 7, 0, 7], [1, 2, 1, 1, 2]])
    assert rank_in_group(group).tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 2, 1]]
    assert rank_in_group(group[:, :0]).tolist() == [[], []]


def groups(kind, boxes=30, classes=4):
    """Group of each (box, class), as SSD makes them; 3 levels of 18, 9 and 3 boxes."""
    if kind == "class":
        return torch.arange(classes)[None], classes
    return torch.arange(3).repeat_interleave(torch.tensor([18, 9, 3]))[:, None], 3


def slow_candidates(scores, group, thresh, topk):
    """Of one image: scores[box][class] and group[box][class]; (box, class), best first."""
    pairs = [(-x, box, cls) for box, row in enumerate(scores) for cls, x in enumerate(row)]
    chosen, used = [], {}
    for negative, box, cls in sorted(pairs):
        number = group[box][cls]
        if -negative > thresh and used.get(number, 0) < topk:
            used[number] = used.get(number, 0) + 1
            chosen.append((box, cls))
    return chosen


def random_predictions(num_images=3, boxes=30, classes=4):
    """Logits, whose softmax are the scores, offsets and default boxes."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(num_images, boxes, classes + 1, generator=generator) * 2
    deltas = torch.randn(num_images, boxes, 4, generator=generator) * 2
    corner = torch.rand(boxes, 2, generator=generator) * torch.tensor([90.0, 60.0])
    sizes = 10 + torch.rand(boxes, 2, generator=generator) * 50
    return logits, deltas, torch.cat([corner, corner + sizes], -1)


def sigmoid_logits(scores):
    """Those whose sigmoid the scores (…, K) are, but for rounding, with a background that has no
    meaning."""
    return F.pad(scores.logit(), (0, 1))


@pytest.mark.parametrize("kind", ["level", "class"])
@pytest.mark.parametrize("topk", [1, 5, 1000])
def test_candidates_equal_a_slow_loop(kind, topk):
    scores = class_scores(random_predictions()[0], "softmax")
    group, _ = groups(kind)
    for count in (10, 1000):
        box, cls, found, candidate, complete = select_candidates(scores, 0.1, topk, group, count)
        for i in range(len(scores)):
            slow = slow_candidates(scores[i].tolist(), group.expand(30, 4).tolist(), 0.1, topk)
            actual = list(zip(box[i][candidate[i]].tolist(), cls[i][candidate[i]].tolist()))
            assert actual == slow[: len(actual)] and (count < 1000 or len(actual) == len(slow))
            assert complete[i] == ((scores[i] > 0.1).sum() < count)
            assert torch.equal(found[i][candidate[i]], scores[i][tuple(zip(*actual))])


def run_detect(logits, deltas, default_boxes, kind="class", **kwargs):
    group, num_groups = groups(kind, logits.shape[1], logits.shape[2] - 1)
    kwargs = {
        "score_function": "softmax", "score_thresh": 0.1, "topk_candidates": 8, "nms_thresh": 0.45,
        "detections_per_image": 15, "bbox_reg_weights": WEIGHTS, "bbox_reg_clamp": "none", **kwargs,
    }  # fmt: skip
    return detect(logits, deltas, default_boxes, SIZE, group=group, num_groups=num_groups, **kwargs)


def slow_iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0) * max(h, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return both / (sum(areas) - both) if both else 0


def slow_detections(scores, deltas, default_boxes, kind, thresh, topk, nms_thresh, kept, clip):
    """(score, class, clipped box) of one image, best first: each box kept unless one that is kept
    and of its class overlaps it."""
    group, _ = groups(kind)
    results = []
    for r, cls in slow_candidates(
        scores.tolist(), group.expand(scores.shape).tolist(), thresh, topk
    ):
        x0, y0, x1, y1 = default_boxes[r].tolist()
        dx, dy, dw, dh = (d / w for d, w in zip(deltas[r].tolist(), WEIGHTS))
        x, y = (x0 + x1) / 2 + dx * (x1 - x0), (y0 + y1) / 2 + dy * (y1 - y0)
        w, h = (x1 - x0) * math.exp(dw), (y1 - y0) * math.exp(dh)
        box = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        clipped = [min(max(v, 0), SIZE[1 - i % 2]) for i, v in enumerate(box)]
        if clip == "before_nms":
            box = clipped
            if box[0] >= box[2] or box[1] >= box[3]:
                continue
        if all(k != cls or slow_iou(box, other) <= nms_thresh for _, k, _, other in results):
            results.append((float(scores[r, cls]), cls, clipped, box))
    return [result[:3] for result in results[:kept]]


def check_detections(
    logits, deltas, default_boxes, kind, thresh, topk, nms_thresh, kept, clip, function="softmax"
):
    """Compares detections of N images with slow ones; returns how many there are."""
    results = run_detect(
        logits, deltas, default_boxes, kind, score_thresh=thresh, topk_candidates=topk,
        nms_thresh=nms_thresh, detections_per_image=kept, clip=clip, score_function=function,
    )  # fmt: skip
    assert len(results) == len(logits)
    scores = class_scores(logits, function)
    for i, result in enumerate(results):
        expected = slow_detections(
            scores[i], deltas[i], default_boxes, kind, thresh, topk, nms_thresh, kept, clip
        )
        assert result.image_size == SIZE
        assert result.scores.tolist() == [score for score, _, _ in expected]
        assert result.pred_classes.tolist() == [cls for _, cls, _ in expected]
        boxes = torch.tensor([box for *_, box in expected]).reshape(-1, 4)
        torch.testing.assert_close(result.pred_boxes.tensor, boxes, rtol=0, atol=1e-3)
    return [len(result) for result in results]


@pytest.mark.parametrize("kind", ["level", "class"])
@pytest.mark.parametrize("clip", ["before_nms", "after_nms"])
@pytest.mark.parametrize(
    "thresh, topk, nms_thresh, kept",
    [(0.1, 8, 0.45, 15), (0.02, 99, 0.3, 200), (0.0, 5, 0.1, 8), (0.3, 99, 0.6, 1)],
)
def test_detections_equal_a_slow_implementation(kind, clip, thresh, topk, nms_thresh, kept):
    found = check_detections(*random_predictions(), kind, thresh, topk, nms_thresh, kept, clip)
    assert min(found) >= min(5, kept)


@pytest.mark.parametrize("kind", ["level", "class"])
@pytest.mark.parametrize("seed", range(4))
def test_detections_of_unusual_scores_equal_slow_ones(kind, seed):
    _, deltas, default_boxes = random_predictions(num_images=6)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(6, 30, 4, generator=generator)
    scores[0] = 0.5  # all equal
    scores[1] = (scores[1] * 4).round() / 4  # many equal ones, 0 and 1 among them
    scores[2] = torch.where(scores[2] > 0.9, scores[2], 0)  # few
    scores[3] = 0
    scores[4] = scores[4] ** 40  # down to numbers that are hardly any
    scores[5, :25] = 0.5
    for thresh, topk, kept in ((0.0, 3, 2), (0.25, 7, 4), (0.0, 1000, 1), (0.5, 1000, 100)):
        for clip in ("before_nms", "after_nms"):
            check_detections(
                sigmoid_logits(scores), deltas, default_boxes, kind, thresh, topk, 0.45, kept, clip,
                "sigmoid",
            )  # fmt: skip


@pytest.mark.parametrize("kept", [1, 2, 5, 40])
def test_detections_behind_many_overlapping_ones(kept):
    """Images that need all pairs until NMS leaves enough, beside one that needs the first."""
    _, _, default_boxes = random_predictions()
    scores = torch.rand(3, 30, 4, generator=torch.Generator().manual_seed(0)) / 2
    default_boxes[:20] = torch.tensor([10.0, 10, 50, 50]) + torch.linspace(0, 1, 20)[:, None]
    scores[1, :20] += 0.5
    deltas = torch.zeros(3, 30, 4)
    for topk in (15, 1000):
        for kind in ("level", "class"):
            check_detections(
                sigmoid_logits(scores), deltas, default_boxes, kind, 0.0, topk, 0.45, kept,
                "before_nms", "sigmoid",
            )  # fmt: skip


def test_more_boxes_than_one_nms_call_takes():
    """All of 800 boxes × 4 classes: NMS goes class by class, which changes nothing."""
    logits, deltas, default_boxes = random_predictions(1, 800)
    logits, group = sigmoid_logits(class_scores(logits, "softmax")), torch.arange(4)[None]
    results = [
        detect(
            logits[..., [*classes, 4]], deltas, default_boxes, SIZE, group=group[:, classes] * 0,
            num_groups=1, score_function="sigmoid", score_thresh=0.0, topk_candidates=10000,
            nms_thresh=0.95, detections_per_image=3200, bbox_reg_weights=WEIGHTS,
            bbox_reg_clamp="none",
        )[0]
        for classes in ([0, 1, 2, 3], [0, 1], [2, 3])
    ]  # fmt: skip
    assert len(results[0]) == len(results[1]) + len(results[2]) > 1000
    expected = torch.cat([results[1].scores, results[2].scores]).sort(descending=True)[0]
    assert torch.equal(results[0].scores, expected)


def test_long_chains_of_overlapping_boxes_end_on_gpus(monkeypatch):
    """With few boxes a further attempt has no more pairs than the first one."""
    boxes = torch.tensor([[0.0, 10, 40, 50]]) + torch.arange(0, 80, 2.0)[:, None] * torch.tensor(
        [1.0, 0, 1, 0]
    )
    scores = torch.linspace(0.9, 0.5, 40).view(1, 40, 1)  # each suppresses the next two
    arguments = (sigmoid_logits(scores), torch.zeros(1, 40, 4), boxes, (200, 200))
    settings = dict(
        group=torch.zeros(40, 1, dtype=torch.int64), num_groups=1, score_function="sigmoid",
        score_thresh=0.1, topk_candidates=400, nms_thresh=0.8, detections_per_image=100,
        bbox_reg_weights=WEIGHTS, bbox_reg_clamp="both",
    )  # fmt: skip
    (expected,) = detect(*arguments, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)  # the same operations as on a GPU
        first = best_detections(*arguments, **settings)
        second = best_detections(*arguments, attempt=1, **settings)
        assert [int(x[3][0, 1]) for x in (first, second)] == [0, 1]
        (found,) = detect(*arguments, **settings)
    assert len(expected) == 14  # two of three overlap one before them
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_no_images_and_scores_that_are_not_numbers():
    logits, deltas, default_boxes = random_predictions()
    assert run_detect(logits[:0], deltas[:0], default_boxes) == []
    logits[1] = float("nan")
    results = run_detect(logits, deltas, default_boxes)
    assert [len(result) > 0 for result in results] == [True, False, True]
    for clip in ("before_nms", "after_nms"):
        expected = run_detect(logits, deltas, default_boxes, clip=clip)
        broken = deltas.clone()
        broken[2] = float("nan")  # boxes of another image
        assert torch.equal(
            run_detect(logits, broken, default_boxes, clip=clip)[0].pred_boxes.tensor,
            expected[0].pred_boxes.tensor,
        )


def test_score_threshold_is_exclusive():
    logits = sigmoid_logits(torch.tensor([[[0.5, 0.0], [0.75, 0.0]]]))  # 0.5 exactly
    boxes = torch.tensor([[0, 0, 10, 10], [50, 50, 60, 60.0]])
    for thresh, count in ((0.5, 1), (0.49, 2)):
        (result,) = run_detect(
            logits, torch.zeros(1, 2, 4), boxes, score_thresh=thresh, score_function="sigmoid"
        )
        assert len(result) == count


def test_nothing_passes():
    for result in run_detect(*random_predictions(), score_thresh=1.0):
        assert len(result) == 0 and result.image_size == SIZE
        assert result.pred_boxes.tensor.shape == (0, 4)
        assert result.scores.shape == (0,) and result.scores.dtype == torch.float32
        assert result.pred_classes.shape == (0,) and result.pred_classes.dtype == torch.int64


def test_detections_per_image_keeps_the_best_of_each_image():
    predictions = random_predictions()
    for few, many in zip(
        run_detect(*predictions, detections_per_image=3), run_detect(*predictions)
    ):
        assert len(few) == 3 and few.scores.tolist() == many.scores[:3].tolist()


def test_nms_is_per_class_and_per_image():
    # The same box in two classes of two images: none suppresses another.
    scores = torch.tensor([[[0.9, 0.8]], [[0.7, 0.6]]])
    results = run_detect(
        sigmoid_logits(scores), torch.zeros(2, 1, 4), torch.tensor([[10, 10, 50, 50.0]]),
        score_function="sigmoid",
    )  # fmt: skip
    assert [result.pred_classes.tolist() for result in results] == [[0, 1], [0, 1]]
    assert [len(result) for result in results] == [2, 2]


def test_images_of_a_batch_do_not_mix():
    logits, deltas, boxes = random_predictions()
    for i, together in enumerate(run_detect(logits, deltas, boxes)):
        (alone,) = run_detect(logits[i : i + 1], deltas[i : i + 1], boxes)
        assert torch.equal(alone.pred_boxes.tensor, together.pred_boxes.tensor)
        assert torch.equal(alone.scores, together.scores)
        assert torch.equal(alone.pred_classes, together.pred_classes)


def test_boxes_without_an_area_in_the_image_are_dropped():
    boxes = torch.tensor([[10, 10, 30, 30], [200, 10, 220, 30], [10, -50, 30, -20.0]])
    logits = torch.tensor([[[0, 0], [2, 0], [1, 0.0]]])
    (result,) = run_detect(logits, torch.zeros(1, 3, 4), boxes)
    assert result.pred_boxes.tensor.tolist() == [[10, 10, 30, 30]]


def test_unclamped_overflow_does_not_stop_an_evaluation():
    logits = torch.tensor([[[0, 0], [2, 0.0]]])
    boxes = torch.tensor([[10, 10, 30, 30], [40, 40, 50, 50.0]])
    deltas = torch.tensor([[[0, 0, 0, 0], [0, 0, 5 * 89, 0.0]]])  # e⁸⁹ is infinite in float32
    (result,) = run_detect(logits, deltas, boxes)
    assert [10, 10, 30, 30] in result.pred_boxes.tensor.tolist()
    assert result.pred_boxes.tensor.isfinite().all()


def detections(boxes, scores, clip, kept=10):
    """Detections of one class: boxes (R, 4) with these scores, NMS at 0.45, size 120×90."""
    boxes, scores = torch.tensor(boxes), torch.tensor(scores)
    (result,) = detect(
        sigmoid_logits(scores[None, :, None]), torch.zeros(1, len(boxes), 4), boxes, SIZE,
        group=torch.zeros(1, 1, dtype=torch.int64), num_groups=1, score_function="sigmoid",
        score_thresh=0.0, topk_candidates=100, nms_thresh=0.45, detections_per_image=kept,
        bbox_reg_weights=WEIGHTS, bbox_reg_clamp="none", clip=clip,
    )  # fmt: skip
    return result.pred_boxes.tensor.tolist(), result.scores.tolist()


def test_clipping_before_or_after_nms():
    """IoU 5 / 11 = 0.4545 as they are, 16 / 40 = 0.40 clipped at x = 0."""
    boxes = [[-6.0, 1, 2, 9], [-3.0, 1, 5, 9]]
    clipped = [[0.0, 1, 2, 9], [0.0, 1, 5, 9]]
    assert detections(boxes, [1.0, 0.5], "before_nms") == (clipped, [1.0, 0.5])
    assert detections(boxes, [1.0, 0.5], "after_nms") == (clipped[:1], [1.0])


def test_boxes_outside_the_image_compete_only_if_clipped_after_nms():
    boxes = [[-30.0, 1, -20, 9], [1.0, 1, 5, 9]]
    assert detections(boxes, [1.0, 0.5], "before_nms", kept=1) == (boxes[1:], [0.5])
    assert detections(boxes, [1.0, 0.5], "after_nms", kept=1) == ([[0.0, 1, 0, 9]], [1.0])


def test_classes_do_not_suppress_one_another_left_of_the_image():
    """Before and after: the same box in every class, one far outside moves their coordinates."""
    boxes = torch.tensor([[-50.0, -40, 8, 8], [1e5, 0, 2e5, 1], [-50.0, -40, 8, 8]])
    scores = torch.tensor([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4], [0.3, 0.2, 0.1]])
    (result,) = detect(
        sigmoid_logits(scores[None]), torch.zeros(1, 3, 4), boxes, SIZE,
        group=torch.arange(3)[None], num_groups=3, score_function="sigmoid", score_thresh=0.0,
        topk_candidates=100, nms_thresh=0.45, detections_per_image=100, bbox_reg_weights=WEIGHTS,
        bbox_reg_clamp="none", clip="after_nms",
    )  # fmt: skip
    assert result.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    assert result.pred_classes.tolist() == [0, 1, 2, 0, 1, 2]


def test_infinite_boxes_do_not_spoil_the_others():
    """Nor those of another class, whose coordinates are moved."""
    deltas = torch.zeros(1, 3, 4)
    deltas[0, 0, 2:] = 1000.0  # e^200
    (result,) = detect(
        sigmoid_logits(torch.tensor([[[0.9, 0], [0, 0.8], [0, 0.7]]])), deltas,
        torch.tensor([[1.0, 1, 5, 5]] * 3), SIZE, group=torch.zeros(1, 1, dtype=torch.int64),
        num_groups=1, score_function="sigmoid", score_thresh=0.0, topk_candidates=10,
        nms_thresh=0.45, detections_per_image=10, bbox_reg_weights=WEIGHTS, bbox_reg_clamp="none",
        clip="after_nms",
    )  # fmt: skip
    assert result.pred_boxes.tensor.tolist() == [[0.0, 0, 120, 90], [1.0, 1, 5, 5]]


def test_unknown_clip_names_the_key():
    with pytest.raises(ValueError, match=r"MODEL\.SSD\.CLIP_TEST.*'never'"):
        detections([[1.0, 1, 5, 9]], [1.0], "never")


def test_nms_without_waiting_is_nms():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(4, 150, 2, generator=generator) * 100
    boxes = torch.cat([corner, corner + torch.rand(4, 150, 2, generator=generator) * 90], dim=-1)
    boxes[0, 5] = float("nan")
    boxes[1, 7, 2:] = boxes[1, 7, :2]  # no area
    cls = torch.randint(0, 2, (4, 150), generator=generator)
    valid = torch.rand(4, 150, generator=generator) > 0.1
    valid[0, 5] = valid[1, 7] = True
    kept, settled = _nms_without_waiting(boxes, cls, valid, 0.45)
    expected = _nms_per_class(boxes, cls, valid, 2, 0.45)
    assert settled.all() and torch.equal(kept, expected)
    assert (expected.float().mean(dim=1) < 0.8).all() and expected[1, 7]


def test_nms_without_waiting_tells_what_is_not_settled():
    """Each box overlaps the next one: every second is kept, found out one after another."""
    x = 6.0 * torch.arange(40)
    boxes = torch.stack([x, torch.zeros(40), x + 20, torch.full((40,), 10.0)], dim=-1)
    boxes = torch.stack([boxes, boxes])
    cls, valid = torch.zeros(2, 40, dtype=torch.long), torch.ones(2, 40, dtype=torch.bool)
    valid[1, 5:] = False  # a short chain
    kept, settled = _nms_without_waiting(boxes, cls, valid, 0.5)
    assert settled.tolist() == [False, True]
    assert kept[1, :5].tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_detections_of_bfloat16_are_computed_in_float32(function):
    logits, deltas, boxes = random_predictions()
    logits, deltas = logits.bfloat16(), deltas.bfloat16()
    few, full = (
        run_detect(logits.to(x), deltas.to(x), boxes, score_function=function)
        for x in (torch.bfloat16, torch.float32)
    )
    for actual, expected in zip(few, full):
        assert len(actual) == len(expected) > 5 and actual.scores.dtype == torch.float32
        assert torch.equal(actual.scores, expected.scores)
        assert torch.equal(actual.pred_boxes.tensor, expected.pred_boxes.tensor)


@pytest.mark.parametrize("compiled", [False, True])
def test_best_detections_on_a_gpu_never_wait_for_it(compiled, fake_gpu):
    """And compile as one graph."""
    find = best_detections
    if compiled:
        find = torch.compile(find, backend="eager", fullgraph=True)
    with fake_gpu:
        logits, deltas, boxes = (
            torch.empty(shape, device="cuda") for shape in [(3, 30, 5), (3, 30, 4), (30, 4)]
        )
        group = torch.empty(1, 4, dtype=torch.int64, device="cuda")
        weights, output = torch.empty(4, device="cuda"), torch.empty(3, 4, device="cuda")
        result = find(
            logits.bfloat16(), deltas.bfloat16(), boxes, SIZE, output, score_function="softmax",
            group=group, num_groups=4, score_thresh=0.02, topk_candidates=10, nms_thresh=0.45,
            detections_per_image=20, bbox_reg_weights=weights, bbox_reg_clamp="both",
        )  # fmt: skip
        found = [(tuple(x.shape), x.dtype, x.device.type) for x in result]
        with pytest.raises(DynamicOutputShapeException):
            _nms_per_class(deltas, deltas[..., 0].long(), deltas[..., 0] > 0, 4, 0.45)
    assert found == [
        ((3, 20, 4), torch.float32, "cuda"), ((3, 20), torch.float32, "cuda"),
        ((3, 20), torch.int64, "cuda"), ((3, 2), torch.int64, "cuda"),
    ]  # fmt: skip


@pytest.mark.parametrize("num_boxes, most", [(700, 512), (700, 513), (500, 4000)])
def test_never_waits_is_right(num_boxes, most, fake_gpu):
    """A CUDA graph can't hold what waits."""
    expected = never_waits(num_boxes * 4, most)
    assert expected == ((num_boxes, most) != (700, 513))
    with fake_gpu:
        logits, deltas, boxes = (
            torch.empty(shape, device="cuda")
            for shape in [(1, num_boxes, 5), (1, num_boxes, 4), (num_boxes, 4)]
        )
        settings = dict(
            group=torch.empty(1, 4, dtype=torch.int64, device="cuda"), num_groups=4,
            score_function="softmax", score_thresh=0.02, topk_candidates=10, nms_thresh=0.45,
            detections_per_image=most, bbox_reg_weights=torch.empty(4, device="cuda"),
            bbox_reg_clamp="both",
        )  # fmt: skip
        waits = contextlib.nullcontext() if expected else pytest.raises(DynamicOutputShapeException)
        with waits:
            best_detections(logits, deltas, boxes, SIZE, **settings)


def test_boxes_are_scaled_as_detectron2_does():
    logits, deltas, boxes = random_predictions()
    sizes = [(90, 120), (45, 500), (1000, 7)]
    group, num_groups = groups("class")
    settings = dict(
        group=group, num_groups=num_groups, score_function="softmax", score_thresh=0.02,
        topk_candidates=1000, nms_thresh=0.45, detections_per_image=20, bbox_reg_weights=WEIGHTS,
        bbox_reg_clamp="both",
    )  # fmt: skip
    plain = detect(logits, deltas, boxes, SIZE, **settings)
    scaled = detect(logits, deltas, boxes, SIZE, sizes, **settings)
    for one, result, size in zip(plain, scaled, sizes):
        expected = detector_postprocess(one, *size)
        assert result.image_size == size and len(result) == len(expected) > 5
        assert torch.equal(result.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(result.scores, expected.scores)
        assert torch.equal(result.pred_classes, expected.pred_classes)
