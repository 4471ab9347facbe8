"""Every golden file of MMDetection's SSD is reproduced: see GOLDEN.md's tolerances in the code.

Takes each ``*.npz`` in ``tests/data/golden`` or in the folder that ``SSD_GOLDEN_DIR`` names. The
file's name says the model: ssd300, ssd512 or ssdlite.
"""

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, pairwise_iou

from ssd.checkpoint import mmdet
from ssd.config import load_config
from ssd.modeling.multibox import encode_boxes, match_default_boxes
from ssd.modeling.postprocessing import decode_boxes, detect

ROOT = Path(__file__).parent.parent
FOLDER = Path(os.environ.get("SSD_GOLDEN_DIR", ROOT / "tests/data/golden"))
FILES = sorted(FOLDER.glob("*.npz"))
# MMDetection's recipe on the labs' models
MMDET = """MODEL.WEIGHTS '' MODEL.PIXEL_MEAN [123.675,116.28,103.53] MODEL.SSD.MATCHING.BEST argmax
    MODEL.SSD.LOSS.NORMALIZER image MODEL.SSD.BBOX_REG_CLAMP both MODEL.SSD.SCORE_THRESH_TEST 0.02
    MODEL.SSD.TOPK_CANDIDATES_TEST 1000 MODEL.SSD.TOPK_PER level MODEL.DEVICE cpu
    MODEL.SSD.CHANNELS_LAST False""".split()
BASES = {
    "ssd300": "ssd300_vgg16.yaml",
    "ssd512": "ssd512_vgg16.yaml",
    "ssdlite": "ssdlite_mobilenetv2.yaml",
}
WEIGHTS = [10.0, 10.0, 5.0, 5.0]


def _weight(name: str, shape: tuple) -> torch.Tensor:
    """GOLDEN.md, section 1."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.tensor(0)
    if leaf in ("bias", "running_mean"):
        value = 0.1 * noise
    elif leaf == "running_var":
        value = 1 + 0.1 * abs(noise)
    elif len(shape) == 1:
        value = 20 + noise if "l2_norm" in name else 1 + 0.1 * noise
    else:
        gain = np.sqrt(2)
        if name == "backbone.features.0.weight":
            gain = 0.02
        elif "linear_conv" in name or name.startswith("bbox_head."):
            gain = 1.0
        elif name.startswith(("backbone.layer", "backbone.conv")):
            gain = 1.8
        value = gain * noise / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def _images(size: int) -> np.ndarray:
    """GOLDEN.md, section 2: (2, S, S, 3) BGR."""
    r = np.random.RandomState(2026)
    coarse = r.randint(0, 256, (2, 8, 8, 3))
    k = -(-size // 8)
    big = np.repeat(np.repeat(coarse, k, 1), k, 2)[:, :size, :size]
    return np.clip(big + r.randint(-40, 41, (2, size, size, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module", params=FILES, ids=[path.stem for path in FILES])
def golden(request):
    data = np.load(request.param)
    kind = next(kind for kind in BASES if kind in request.param.stem)
    cfg = load_config(str(ROOT / "labs/_base_" / BASES[kind]), MMDET)
    model = build_model(cfg)
    state = {}
    for name, shape in zip(data["names"], data["shapes"]):
        name = str(name)
        state[name] = _weight(name, tuple(int(n) for n in str(shape).split("x") if n))
    sums = [float(value.double().sum()) for value in state.values()]
    np.testing.assert_allclose(sums, data["weight_sum"], rtol=1e-9, atol=1e-9)
    missing, unexpected = model.load_state_dict(mmdet.convert(state), strict=False)
    assert not missing and not unexpected
    model.eval()
    images = _images(int(data["image_size"]))
    np.testing.assert_array_equal(images.sum((1, 2, 3), dtype=np.int64), data["image_sum"])
    np.testing.assert_array_equal(images[:, :2, :2], data["image_corner"])
    inputs = [{"image": torch.from_numpy(x[:, :, ::-1].transpose(2, 0, 1).copy())} for x in images]
    with torch.no_grad():
        batch = model.preprocess_image(inputs)
        features = model.backbone(batch.tensor)
        features = [features[name] for name in model.head_in_features]
        logits, deltas = model.head(features)
    return {
        "data": data, "model": model, "inputs": inputs, "batch": batch.tensor,
        "feat": features, "cls": logits, "reg": deltas, "names": list(state),
    }  # fmt: skip


def test_files_are_there():
    assert FILES, f"no golden file in {FOLDER}"


def test_input(golden):
    data = golden["data"]
    actual = golden["batch"].contiguous().numpy().reshape(-1)[data["input_idx"]]
    np.testing.assert_allclose(actual, data["input_val"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["feat", "cls", "reg"])
def test_outputs(golden, kind):
    data = golden["data"]
    assert len(golden[kind]) == len([key for key in data if key.startswith(kind) and "_idx" in key])
    for level, output in enumerate(golden[kind]):
        prefix = f"{kind}{level}_"
        assert list(output.shape) == list(data[prefix + "shape"])
        actual = output.contiguous().numpy().reshape(-1)
        mean = float(data[prefix + "meanabs"])
        np.testing.assert_allclose(
            actual[data[prefix + "idx"]], data[prefix + "val"], rtol=0, atol=1e-4 * mean
        )
        assert abs(np.abs(actual).mean(dtype=np.float64) - mean) < 1e-4 * mean


def test_default_boxes(golden):
    data, model = golden["data"], golden["model"]
    boxes = model.default_boxes.numpy()
    assert len(boxes) == int(data["num_anchors"])
    assert model.boxes_per_level == list(data["anchors_per_level"])
    hw = [tuple(x.shape[-2:]) for x in golden["feat"]]
    assert hw == [tuple(x) for x in data["level_hw"]]
    np.testing.assert_allclose(boxes[data["anchor_idx"]], data["anchor_box"], rtol=0, atol=1e-3)
    start = np.cumsum([0] + model.boxes_per_level[:-1])
    first = [boxes[s : s + a] for s, a in zip(start, data["anchors_per_cell"])]
    # base_anchors: "all shapes for cell (0, 0)", centred there or at the origin
    first, expected = np.concatenate(first), data["base_anchors"]
    np.testing.assert_allclose(
        first[:, 2:] - first[:, :2], expected[:, 2:] - expected[:, :2], rtol=0, atol=1e-3
    )


def test_decode(golden):
    data = golden["data"]
    boxes = decode_boxes(
        torch.from_numpy(data["decode_delta"]),
        torch.from_numpy(data["anchor_box"]),
        WEIGHTS,
        "both",
    )
    # relative as well: boxes decoded at the clamp are 62 times as large as their default box
    np.testing.assert_allclose(boxes.numpy(), data["decode_noclip"], rtol=2e-7, atol=1e-3)
    clipped = Boxes(boxes.clone())
    clipped.clip((int(data["image_size"]), int(data["image_size"])))
    np.testing.assert_allclose(clipped.tensor.numpy(), data["decode_clip"], rtol=0, atol=1e-3)


def _same_detections(boxes, scores, labels, actual: Instances):
    """Same labels, IoU > 0.99, scores within 1e-4; ties in score may swap."""
    assert len(actual) == len(boxes)
    iou = pairwise_iou(Boxes(torch.from_numpy(boxes)), actual.pred_boxes).numpy()
    same = labels[:, None] == actual.pred_classes.numpy()[None]
    near = np.abs(scores[:, None] - actual.scores.numpy()[None]) < 1e-4
    matches = (iou > 0.99) & same & near
    assert matches.any(axis=1).all() and matches.any(axis=0).all()
    np.testing.assert_allclose(actual.scores.numpy(), scores, rtol=0, atol=1e-4)


def test_detections(golden):
    data, model = golden["data"], golden["model"]
    with torch.no_grad():
        results = model(golden["inputs"])
        sized = [
            dict(x, height=int(h), width=int(w))
            for x, (h, w) in zip(golden["inputs"], data["detori_hw"])
        ]
        original = model(sized)
        scores, deltas = model.head.flatten(golden["cls"], golden["reg"])
        scores = scores.softmax(-1)[..., :-1]
        alternative = detect(
            scores, deltas, model.default_boxes, model.input_size,
            group=model.candidate_group, num_groups=model.num_groups, score_thresh=0.05,
            topk_candidates=50, nms_thresh=0.3, detections_per_image=100,
            bbox_reg_weights=WEIGHTS, bbox_reg_clamp="both",
        )  # fmt: skip
    over = (scores > 0.02).sum((1, 2)).numpy()
    # one may lie within float32's rounding of the threshold on other hardware
    np.testing.assert_allclose(over, data["num_over_thr"], rtol=0, atol=1)
    for i in range(2):
        for key, result in (
            ("det", results[i]["instances"]),
            ("detori", original[i]["instances"]),
            ("detalt", alternative[i]),
        ):
            arrays = [data[f"{key}{i}_{part}"] for part in ("boxes", "scores", "labels")]
            _same_detections(*arrays, result)


def _ground_truth(golden, case):
    data, size = golden["data"], golden["model"].input_size
    instances = []
    for i in range(2):
        x = Instances(size)
        x.gt_boxes = Boxes(torch.from_numpy(data[f"{case}_gt{i}_boxes"]).float().reshape(-1, 4))
        x.gt_classes = torch.from_numpy(data[f"{case}_gt{i}_labels"]).long()
        instances.append(x)
    return instances


CASES = ["main", "empty0", "allempty", "shared", "tie"]


@pytest.mark.parametrize("case", CASES)
def test_targets_and_losses(golden, case):
    data, model = golden["data"], golden["model"]
    instances = _ground_truth(golden, case)
    boxes, classes, valid = model._pad_ground_truth(instances)
    matched = match_default_boxes(boxes, valid, model.default_boxes, 0.5, "argmax")
    np.testing.assert_array_equal((matched >= 0).sum(1).numpy(), data[f"{case}_num_pos"])
    losses = model.forward_training(None, None, (golden["cls"], golden["reg"]), instances)
    for i in range(2):
        if case == "tie" and i == 0:
            continue  # which of equal default boxes wins depends on rounding
        index = matched[i].clamp(min=0)
        labels = torch.where(matched[i] >= 0, classes[i][index], model.num_classes)
        np.testing.assert_array_equal(labels.numpy(), data[f"{case}_labels"][i])
        positive = torch.nonzero(matched[i] >= 0).squeeze(1)
        np.testing.assert_array_equal(positive.numpy(), data[f"{case}_pos{i}_idx"])
        if len(positive):
            targets = encode_boxes(boxes[i][index], model.default_boxes, WEIGHTS)[positive]
            np.testing.assert_allclose(
                targets.numpy(), data[f"{case}_pos{i}_target"], rtol=0, atol=1e-4
            )
    if case != "tie":
        for name, key in (("loss_cls", "loss_cls"), ("loss_box_reg", "loss_bbox")):
            expected = float(data[f"{case}_{key}"].astype(np.float64).sum())
            assert float(losses[name]) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_channels_last(golden):
    """The labs' memory format: outputs within the same tolerance.

    Not gradients and BatchNorm in training: they depend on which of nearly equal negatives are
    mined and on torch's less exact sums in that format; MMDetection's own float32 gradients are
    up to 0.8 % away from those in float64.
    """
    model = golden["model"]
    model.to(memory_format=torch.channels_last)
    try:
        batch = golden["batch"].contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            features = model.backbone(batch)
            features = [features[name] for name in model.head_in_features]
            logits, deltas = model.head(features)
        for name, outputs in (("feat", features), ("cls", logits), ("reg", deltas)):
            for expected, actual in zip(golden[name], outputs):
                assert (actual - expected).abs().max() < 1e-4 * expected.abs().mean()
    finally:
        model.to(memory_format=torch.contiguous_format)


def test_gradients(golden):
    data, model = golden["data"], golden["model"]
    model.zero_grad()
    features = model.backbone(golden["batch"])
    predictions = model.head([features[name] for name in model.head_in_features])
    losses = model.forward_training(None, None, predictions, _ground_truth(golden, "main"))
    sum(losses.values()).backward()
    parameters = dict(model.named_parameters())
    assert set(parameters) == {mmdet.map_name(str(name)) for name in data["grad_names"]}
    for name, expected in zip(data["grad_names"], data["grad_norm"]):
        grad = parameters[mmdet.map_name(str(name))].grad
        norm = 0.0 if grad is None else float(grad.double().norm())
        assert norm == pytest.approx(float(expected), rel=1e-3, abs=1e-7), name


def test_batch_norm_in_training_mode(golden):
    data, model = golden["data"], golden["model"]
    if "train_bn_names" not in data:
        pytest.skip("no BatchNorm in this model")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    try:
        instances = _ground_truth(golden, "main")
        losses = model([dict(x, instances=gt) for x, gt in zip(golden["inputs"], instances)])
        for name, key in (("loss_cls", "train_loss_cls"), ("loss_box_reg", "train_loss_bbox")):
            expected = float(data[key].astype(np.float64).sum())
            assert float(losses[name]) == pytest.approx(expected, rel=1e-5)
        buffers = dict(model.named_buffers())
        for name, expected in zip(data["train_bn_names"], data["train_bn_norm"]):
            value = buffers[mmdet.map_name(str(name))]
            assert float(value.double().norm()) == pytest.approx(float(expected), rel=1e-4), name
    finally:
        model.load_state_dict(state, strict=False)
        model.eval()
