"""The labs' models against arrays that MMDetection's own code has computed (GOLDEN.md)."""

import copy
import functools
import os
import re
import zlib
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import box_iou

from lineages.rows import (
    ROOT,
    Row,
    compare_detections,
    detection_rows,
    images,
    lab_config,
    largest,
    load_lab,
    make_instances,
    of_mean,
    outputs,
    relative,
    targets_of,
    unequal,
    watch,
    without_channels_last,
    worst,
)
from ssd.checkpoint.recognition import recognise
from ssd.inference import optimize
from ssd.modeling.postprocessing import class_scores, decode_boxes, detect

# Folder of the golden files, and what a file's name contains to the lab.
GOLDEN = Path(os.environ.get("SSD_GOLDEN_DIR", ROOT / "tests/data/golden"))
LABS = {
    "ssd300": "ssd_vgg16_size300_120e",
    "ssd512": "ssd_vgg16_size512_120e",
    "ssdlite": "ssdlite_mobilenetv2_size320_600e",
}
SOURCE = "MMDetection 3.3"
_CASES = ("main", "empty0", "allempty", "shared", "tie")
# Arrays that hold no result: descriptions, how near decisions are, and what depends on rounding.
_NOT_COMPARED = re.compile(
    r"is_param|strides|min_sizes|det_cut_gap|mean_max_prob|.*_margins|tie_(loss|pos0)_.*"
)


class GoldenFile:
    """Arrays of a golden file; remembers which have been read."""

    def __init__(self, path: Path):
        self._arrays, self._read = np.load(path), set()

    def __getitem__(self, key: str) -> np.ndarray:
        self._read.add(key)
        return self._arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def tensor(self, key: str) -> Tensor:
        return torch.from_numpy(self[key])

    def check_all_read(self) -> None:
        left = [key for key in self._arrays if key not in self._read]
        if left := [key for key in left if not _NOT_COMPARED.fullmatch(key)]:
            raise ValueError(f"golden arrays that nothing was compared with: {left}")


def golden_weight(name: str, shape: Sequence[int]) -> Tensor:
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


def _golden_state(data: GoldenFile) -> Dict[str, Tensor]:
    state = {}
    for name, shape in zip(data["names"], data["shapes"]):
        shape = [int(n) for n in str(shape).split("x") if n]
        state[str(name)] = golden_weight(str(name), shape)
    sums = [float(value.double().sum()) for value in state.values()]
    np.testing.assert_allclose(sums, data["weight_sum"], rtol=1e-9, atol=1e-9)
    return state


def _golden_inputs(data: GoldenFile) -> List[Dict]:
    bgr = images((int(data["image_size"]),) * 2)
    np.testing.assert_array_equal(bgr.sum((1, 2, 3), dtype=np.int64), data["image_sum"])
    np.testing.assert_array_equal(bgr[:, :2, :2], data["image_corner"])
    return [{"image": torch.from_numpy(x[:, :, ::-1].transpose(2, 0, 1).copy())} for x in bgr]


def lab_of(path: Path) -> str:
    """The lab that a golden file is for, by the file's name."""
    for kind, lab in LABS.items():
        if kind in path.stem:
            return lab
    raise ValueError(f"a golden file's name must hold one of {list(LABS)}, got {path.name}")


@functools.cache
def rows_of(path: Path) -> Tuple[Row, ...]:
    """A lab's model against all arrays of a golden file, at least as strictly as GOLDEN.md says."""
    lab = lab_of(path)
    row = functools.partial(Row, lab, SOURCE)
    data = GoldenFile(path)
    model = load_lab(lab, _golden_state(data))
    inputs = _golden_inputs(data)

    # as inference runs, and boxes in the sizes of the original images
    fast = optimize(model, lab_config(lab))
    head = watch(fast.head)
    with torch.no_grad():
        sizes = [{"height": int(h), "width": int(w)} for h, w in data["detori_hw"]]
        original = [x["instances"] for x in fast([{**x, **y} for x, y in zip(inputs, sizes)])]
    in_inference = [*head["args"], *head["output"]]
    # as a training runs
    in_training = _golden_training(row, data, copy.deepcopy(model), inputs)

    without_channels_last(model)
    with torch.no_grad():
        batch, *plain = outputs(model, inputs)
    difference = worst(*(of_mean(a, b) for a, b in zip(plain, in_inference)))
    rows = _golden_outputs(row, data, batch, plain)
    text = "features, logits, offsets: channels last, BatchNorm folded, against neither"
    rows.append(row("inference path", difference, 1e-3, "of mean", text))
    difference = worst(*(x.difference for x in in_training))
    text = "in channels last: " + ", ".join(x.quantity for x in in_training)
    # with these weights float32's own gradients are 0.008 from float64's, where there is BatchNorm
    tolerance = 1e-2 if "train_bn_names" in data else 1e-3
    rows.append(row("training path", difference, tolerance, "rel.", text))
    rows += _golden_boxes(row, data, model, plain[0])
    rows += _golden_detections(row, data, model, plain[1:], original)
    rows += _golden_targets(row, data, model, plain[1:])
    rows += _golden_training(row, data, model, inputs)
    data.check_all_read()
    return tuple(rows)


def _golden_outputs(row, data, batch, levels) -> List[Row]:
    sample = batch.contiguous().flatten()[data["input_idx"]]
    difference = largest(data.tensor("input_val"), sample)
    rows = [row("input", difference, 1e-4, "", f"{len(sample)} samples of 2 images")]
    for kind, name, maps in zip(("feat", "cls", "reg"), ("features", "logits", "offsets"), levels):
        if f"{kind}{len(maps)}_idx" in data:
            raise ValueError(f"the golden file has more than our {len(maps)} levels")
        difference, count = 0.0, 0
        for level, x in enumerate(maps):
            key, x = f"{kind}{level}_", x.contiguous()
            if list(x.shape) != data[key + "shape"].tolist():
                raise ValueError(f"{key}: shape {list(x.shape)} != {data[key + 'shape']}")
            mean = float(data[key + "meanabs"])
            sample = x.flatten()[data[key + "idx"]]
            of_sample = largest(data.tensor(key + "val"), sample)
            of_means = abs(float(x.double().abs().mean()) - mean)
            difference = worst(difference, of_sample / mean, of_means / mean)
            count += len(sample)
        text = f"{count} samples of {len(maps)} levels, and each level's mean"
        rows.append(row(name, difference, 1e-4, "of mean", text))
    return rows


def _golden_boxes(row, data, model, features) -> List[Row]:
    boxes, counts = model.default_boxes, model.boxes_per_level
    sizes = [list(x.shape[-2:]) for x in features]
    if (len(boxes), counts, sizes) != (
        int(data["num_anchors"]), data["anchors_per_level"].tolist(), data["level_hw"].tolist()
    ):  # fmt: skip
        raise ValueError(f"default boxes: {len(boxes)}, {counts} of maps {sizes}")
    starts = np.cumsum([0, *counts[:-1]])
    first = [boxes[s : s + a] for s, a in zip(starts, data["anchors_per_cell"])]
    first, shapes = torch.cat(first), data.tensor("base_anchors")
    difference = worst(
        largest(data.tensor("anchor_box"), boxes[data["anchor_idx"]]),
        largest(shapes[:, 2:] - shapes[:, :2], first[:, 2:] - first[:, :2]),
    )
    text = f"{len(boxes)}; {len(data['anchor_idx'])} samples, all sizes"
    rows = [row("default boxes", difference, 1e-3, "px", text)]

    deltas, anchors = data.tensor("decode_delta"), data.tensor("anchor_box")
    clamp = model.detection["bbox_reg_clamp"]
    decoded = decode_boxes(deltas, anchors, model.bbox_reg_weights, clamp)
    clipped = Boxes(decoded.clone())
    clipped.clip(model.input_size)
    # a side at the clamp is 62 times that of its default box
    expected = data.tensor("decode_noclip")
    scale = 1 + expected.abs() / 5000
    difference = worst(
        largest(expected / scale, decoded / scale),
        largest(data.tensor("decode_clip"), clipped.tensor),
    )
    text = f"{len(deltas)} with offsets up to the clamp, clipped and not"
    return [*rows, row("decoded boxes", difference, 1e-3, "px", text)]


def _golden_detections(row, data, model, predictions, original) -> List[Row]:
    logits, offsets = model.head.flatten(*predictions)
    over = (class_scores(logits, "softmax") > model.detection["score_thresh"]).sum((1, 2))
    # one may lie within float32's rounding of the threshold
    difference = largest(data.tensor("num_over_thr"), over)
    rows = [row("candidates over the threshold", difference, 1, "", f"{over.tolist()} pairs")]
    settings = {
        **model.detection, "group": model.candidate_group, "num_groups": model.num_groups,
        "score_thresh": 0.05, "topk_candidates": 50, "nms_thresh": 0.3,
        "detections_per_image": 100, "bbox_reg_weights": model.bbox_reg_weights,
    }  # fmt: skip
    _, _, *first = model.find(logits, offsets)
    actual = {
        "det": model.detect(logits, offsets, first=first),
        "detori": original,
        "detalt": detect(logits, offsets, model.default_boxes, model.input_size, **settings),
    }
    parts = ("boxes", "scores", "labels")
    expected = {
        key: [{part: data.tensor(f"{key}{i}_{part}") for part in parts} for i in range(2)]
        for key in actual
    }
    result = compare_detections(sum(expected.values(), []), sum(actual.values(), []))
    text = "2 images; in input pixels, in two original sizes, and with other settings"
    return rows + detection_rows(row, result, text)


def _golden_instances(data, model, case) -> List[Instances]:
    boxes = [data.tensor(f"{case}_gt{i}_boxes") for i in range(2)]
    return make_instances(model, boxes, [data.tensor(f"{case}_gt{i}_labels") for i in range(2)])


def _golden_targets(row, data, model, predictions) -> List[Row]:
    wrong = positives = 0
    difference = loss_difference = 0.0
    for case in _CASES:
        instances = _golden_instances(data, model, case)
        matched, labels, targets = targets_of(model, instances)
        count = (matched >= 0).sum(dim=1)
        wrong += unequal(data.tensor(f"{case}_num_pos"), count)
        wrong += int(data[f"{case}_avg_factor"]) != int(count.clamp(min=1).sum())
        for i in range(2):
            overlap = box_iou(instances[i].gt_boxes.tensor, model.default_boxes)
            if f"{case}_gt{i}_best" in data:
                best = overlap.amax(dim=1).double()
                difference = worst(difference, largest(data.tensor(f"{case}_gt{i}_best"), best))
            if case == "tie" and i == 0:
                continue  # which of equal default boxes wins depends on rounding
            wrong += unequal(data.tensor(f"{case}_labels")[i].long(), labels[i])
            positive = torch.nonzero(matched[i] >= 0).squeeze(1)
            wrong += unequal(data.tensor(f"{case}_pos{i}_idx").long(), positive)
            expected = data.tensor(f"{case}_pos{i}_target").reshape(-1, 4)
            difference = worst(difference, largest(expected, targets[i][positive]))
            positives += len(positive)
        if case != "tie":
            losses = model.forward_training(None, None, predictions, instances)
            keys = {"loss_cls": "loss_cls", "loss_bbox": "loss_box_reg"}
            expected = [data[f"{case}_{key}"].astype(np.float64).sum() for key in keys]
            actual = [float(losses[key]) for key in keys.values()]
            loss_difference = worst(loss_difference, relative(expected, actual))
    text = "different, also in number; objects in both, in one, in no image, two with one best box"
    return [
        row("matched labels", wrong, 0, "", text),
        row("encoded targets", difference, 1e-4, "", f"{positives} positives; IoU of each object"),
        row("losses", loss_difference, 1e-5, "rel.", "loss_cls and loss_box_reg of the same cases"),
    ]


def _our_names(data, key: str) -> List[str]:
    lineage = recognise(dict.fromkeys(str(name) for name in data["names"]))
    return [lineage.our_name(str(name)) for name in data[key]]


def _golden_training(row, data, model, inputs) -> List[Row]:
    """Changes the model's gradients and BatchNorm's statistics."""
    rows = [_golden_gradients(row, data, model, outputs(model, inputs)[2:])]
    if "train_bn_names" in data:
        rows += _golden_batch_norm(row, data, model, inputs)
    return rows


def _golden_gradients(row, data, model, predictions) -> Row:
    losses = model.forward_training(None, None, predictions, _golden_instances(data, model, "main"))
    model.zero_grad()
    sum(losses.values()).backward()
    parameters = dict(model.named_parameters())
    ours = _our_names(data, "grad_names")
    if set(parameters) != set(ours):
        raise ValueError(f"parameters {set(parameters) ^ set(ours)} on one side only")
    grads = [parameters[name].grad for name in ours]
    norms = [0.0 if x is None else float(x.double().norm()) for x in grads]
    difference = relative(data["grad_norm"].tolist(), norms)
    return row("gradients", difference, 1e-3, "rel.", f"norms of {len(norms)} parameters")


def _golden_batch_norm(row, data, model, inputs) -> List[Row]:
    model.train()
    instances = _golden_instances(data, model, "main")
    with torch.no_grad():
        losses = model([dict(x, instances=gt) for x, gt in zip(inputs, instances)])
    model.eval()
    expected = [data[f"train_{x}"].astype(np.float64).sum() for x in ("loss_cls", "loss_bbox")]
    actual = [float(losses[x]) for x in ("loss_cls", "loss_box_reg")]
    buffers = dict(model.named_buffers())
    ours = _our_names(data, "train_bn_names")
    norms = [float(buffers[name].double().norm()) for name in ours]
    difference = relative(data["train_bn_norm"].tolist(), norms)
    text = f"norms of {len(norms)} means and variances after a step"
    return [
        row("losses in training mode", relative(expected, actual), 1e-5, "rel.", "main case"),
        row("BatchNorm in training mode", difference, 1e-4, "rel.", text),
    ]


def golden_file(kind: str) -> Optional[Path]:
    """The golden file of "ssd300", "ssd512" or "ssdlite", or None."""
    return next(iter(sorted(GOLDEN.glob(f"*{kind}.npz"))), None)
