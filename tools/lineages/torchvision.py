"""The labs' models against the installed torchvision's SSD300 and SSDLite320."""

import functools
from typing import Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import ssd300_vgg16, ssdlite320_mobilenet_v3_large
from torchvision.ops import box_iou

from lineages.rows import (
    Row,
    by_level,
    compare_detections,
    detection_rows,
    images,
    in_float64,
    lab_config,
    largest,
    load_lab,
    make_instances,
    output_rows,
    outputs,
    photographs,
    randomise,
    relative,
    targets_of,
    unequal,
    watch,
    without_channels_last,
)
from ssd.checkpoint.recognition import recognise

# torchvision's function, and what is added to the logits of the background and of the first class.
MODELS = {
    "ssd_vgg16_size300_torchvision": (ssd300_vgg16, 14.0, 5.0),
    "ssdlite_mobilenetv3_size320": (ssdlite320_mobilenet_v3_large, 18.0, 8.0),
}


def make_detector(lab: str, batch: Sequence[Tensor]) -> nn.Module:
    """torchvision's model with random weights.

    About as many detections as are kept pass its threshold, and of one class more candidates than
    are taken.
    """
    make, background, first_class = MODELS[lab]
    theirs = make(weights=None, weights_backbone=None)

    def forward():
        transformed, _ = theirs.transform([batch[0] / 255])
        return theirs.head(list(theirs.backbone(transformed.tensors).values()))

    randomise(theirs, forward)
    generator = torch.Generator().manual_seed(1)
    head = theirs.head
    with torch.no_grad():
        for predictor in (*head.classification_head.module_list, *head.regression_head.module_list):
            conv = predictor[-1] if isinstance(predictor, nn.Sequential) else predictor
            conv.weight.mul_(2)
        for predictor in head.classification_head.module_list:
            conv = predictor[-1] if isinstance(predictor, nn.Sequential) else predictor
            bias = torch.randn(len(conv.bias) // 91, 91, generator=generator)
            bias[:, 0] += background
            bias[:, 1] += first_class
            conv.bias.copy_(bias.flatten())
    return theirs


def random_objects(
    defaults: Tensor, size: Tuple[int, int], low: float, high: float, count: int, seed: int
) -> Tensor:
    """(count, 4) random boxes with sides of ``low`` to ``high`` pixels whose matching doesn't
    depend on rounding: no best default box, best object or threshold is nearer than 1e-5 in IoU.
    """
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.empty(0, 4)
    while len(boxes) < count:
        side = low + (high - low) * torch.rand(2, generator=generator)
        corner = torch.rand(2, generator=generator) * (torch.tensor(size[::-1]) - side)
        more = torch.cat([boxes, torch.cat([corner, corner + side])[None]])
        if margin(more, defaults) > 1e-5:
            boxes = more
    return boxes


def margin(boxes: Tensor, defaults: Tensor) -> float:
    """The nearest decision of the matching, in IoU (float64)."""
    iou = box_iou(boxes.double(), defaults.double())
    first, second = iou.topk(2, dim=1).values.unbind(dim=1)
    margins = [float((first - second).min()), float((iou.amax(dim=0) - 0.5).abs().min())]
    if len(boxes) > 1:
        first, second = iou.topk(2, dim=0).values.unbind(dim=0)
        margins.append(float((first - second)[first > 0.4].min()) if (first > 0.4).any() else 1.0)
    return min(margins)


def same_best_box(defaults: Tensor, size: Tuple[int, int]) -> Tensor:
    """Two boxes with the same best default box, without ties."""
    for seed in range(100):
        first = random_objects(defaults, size, size[0] / 4, size[0] / 2, 1, seed)
        boxes = torch.cat([first, first + torch.tensor([[2.0, 1.0, 1.0, 2.5]])])
        best = box_iou(boxes, defaults).argmax(dim=1)
        if best[0] == best[1] and margin(boxes, defaults) > 1e-5:
            return boxes
    raise ValueError("no two boxes with the same best default box")


def targets_of_theirs(theirs: nn.Module, defaults: Tensor, boxes: Tensor, classes: Tensor):
    """torchvision's index of the ground truth, label from 1 (0: background) and offsets."""
    if not len(boxes):
        nothing = torch.full((len(defaults),), -1)
        return nothing, nothing + 1, torch.zeros(len(defaults), 4)
    matched = theirs.proposal_matcher(box_iou(boxes, defaults))
    index = matched.clamp(min=0)
    labels = torch.where(matched >= 0, classes[index], 0)
    return matched, labels, theirs.box_coder.encode_single(boxes[index], defaults)


@functools.cache
def rows_of(lab: str) -> Tuple[Row, ...]:
    """A lab's model against the installed torchvision's."""
    size = tuple(lab_config(lab).MODEL.SSD.INPUT_SIZE)
    batch = [torch.from_numpy(x.transpose(2, 0, 1).copy()) for x in images(size)]
    theirs = make_detector(lab, batch)
    model = load_lab(lab, theirs.state_dict())
    row = functools.partial(Row, lab, f"torchvision's {MODELS[lab][0].__name__}")
    detections = _detection_rows(row, theirs, model)
    without_channels_last(model)
    inputs = [{"image": image} for image in batch]
    with torch.no_grad():
        transformed, _ = theirs.transform([image / 255 for image in batch])
        features = theirs.backbone(transformed.tensors)
        predictions = theirs.head(list(features.values()))
        defaults = theirs.anchor_generator(transformed, list(features.values()))[0]
        batch_of_ours, _, *maps = outputs(model, inputs)
    rows = [
        row("input", largest(transformed.tensors, batch_of_ours), 1e-4, "",
            "2 images of the input size"),
        row("default boxes", largest(defaults, model.default_boxes), 1e-3, "px",
            f"{len(defaults)}, of its own generator"),
    ]  # fmt: skip
    rows += _target_rows(row, theirs, model, defaults)
    rows += _loss_rows(row, theirs, model, defaults, predictions, maps)
    rows += _step_rows(row, theirs, model, defaults, batch)
    return (*rows, *detections)


def _outputs(features, head, model) -> List[Sequence[Tensor]]:
    """torchvision's features, logits (background last) and offsets of each level."""
    head = [head["cls_logits"].roll(-1, dims=-1), head["bbox_regression"]]
    return [list(features.values()), *(x.split(model.boxes_per_level, dim=1) for x in head)]


def _target_rows(row, theirs, model, defaults) -> List[Row]:
    size, background = model.input_size, model.num_classes
    side = size[0]
    cases = [
        random_objects(defaults, size, side / 6, 0.9 * side, 6, seed=0),
        random_objects(defaults, size, side / 4, 0.7 * side, 3, seed=1),
        torch.zeros(0, 4),
        torch.tensor([[0.0, 0.0, side, side]]),
        same_best_box(defaults, size),
    ]
    generator = torch.Generator().manual_seed(2)

    def compare(cases):
        classes = [torch.randint(background, (len(x),), generator=generator) for x in cases]
        expected = [
            targets_of_theirs(theirs, defaults, *x) for x in zip(cases, [c + 1 for c in classes])
        ]
        expected = [torch.stack(x) for x in zip(*expected)]
        expected[1] = torch.where(expected[1] > 0, expected[1] - 1, background)
        return expected, targets_of(model, make_instances(model, cases, classes))

    expected, actual = compare(cases)
    positive = expected[0] >= 0
    count = sum(map(len, cases))
    what = f"{count} objects without ties: ordinary, none, the whole image, two with one best box"
    rows = [
        row("matched labels", unequal(expected[1], actual[1]), 0, "", f"different; {what}"),
        row("encoded targets", largest(expected[2][positive], actual[2][positive]), 1e-4, "",
            f"{int(positive.sum())} positives"),
    ]  # fmt: skip
    # Objects inside several default boxes of one size have the same IoU with all.
    tiny = torch.rand(200, 4, generator=generator)
    tiny = torch.cat([tiny[:, :2] * (side - 20), 2 + 18 * tiny[:, 2:]], dim=1)
    tiny[:, 2:] += tiny[:, :2]
    expected, actual = compare(tiny.split(1))
    overlaps = [box_iou(tiny, boxes) for boxes in (defaults, model.default_boxes)]
    reached = [
        iou.masked_fill(x[0] < 0, -1).amax(dim=1) for iou, x in zip(overlaps, (expected, actual))
    ]
    ties = [x.topk(2).values for x in overlaps[0]]
    ties = sum(float(first - second) < 1e-6 for first, second in ties)
    note = f"200 objects of 2 to 20 px, {ties} with several best default boxes"
    rows.append(row("IoU of a tiny object's match", largest(*reached), 1e-5, "", note))
    own = model.default_boxes.clone()
    model.default_boxes.copy_(defaults)
    expected, actual = compare([*cases, *tiny.split(8)])
    model.default_boxes.copy_(own)
    note = f"different; {count + len(tiny)} objects, ties included"
    wrong = sum(unequal(expected[i], actual[i]) for i in (0, 1))
    rows.append(row("matches with its default boxes copied", wrong, 0, "", note))
    return rows


def _objects(model, defaults) -> Tuple[List[Tensor], List[Tensor]]:
    """Boxes and classes of a batch of two images."""
    side = model.input_size[0]
    boxes = [
        random_objects(defaults, model.input_size, side / 6, 0.9 * side, 6, seed=0),
        random_objects(defaults, model.input_size, side / 4, 0.7 * side, 3, seed=1),
    ]
    return boxes, [torch.tensor([0, 5, 17, 40, 66, 89]), torch.tensor([2, 2, 89])]


def _loss_values(theirs: Dict[str, Tensor], ours: Dict[str, Tensor]) -> List[List[float]]:
    """Confidence and localization loss of torchvision and of this project."""
    keys = (("classification", "bbox_regression"), ("loss_cls", "loss_box_reg"))
    return [[float(x[k].detach()) for k in names] for x, names in zip((theirs, ours), keys)]


def _loss_rows(row, theirs, model, defaults, predictions, maps) -> List[Row]:
    """Both sides' losses of their own logits and offsets."""
    rows = []
    for name, kept in (("both images", 2), ("one image", 1), ("no image", 0)):
        boxes, classes = _objects(model, defaults)
        boxes = [x[: len(x) * (i < kept)] for i, x in enumerate(boxes)]
        classes = [x[: len(x) * (i < kept)] for i, x in enumerate(classes)]
        targets = [{"boxes": b, "labels": c + 1} for b, c in zip(boxes, classes)]
        matched = [targets_of_theirs(theirs, defaults, x["boxes"], x["labels"])[0] for x in targets]
        losses = [theirs.compute_loss(targets, predictions, [defaults] * 2, matched)]
        with torch.no_grad():
            instances = make_instances(model, boxes, classes)
            losses.append(model.forward_training(None, None, maps, instances))
        values = _loss_values(*losses)
        note = "loss_cls {:.3f}, loss_box_reg {:.3f}".format(*values[0])
        rows.append(row(f"losses, objects in {name}", relative(*values), 1e-5, "rel.", note))
    return rows


def _step_rows(row, theirs, model, defaults, batch) -> List[Row]:
    """One step in training mode and float64, with objects in all images."""
    in_float64(model, row.args[0])
    theirs.double()
    if not any(isinstance(x, nn.BatchNorm2d) for x in theirs.modules()):
        batch = batch[:1]  # of which BatchNorm can't make statistics
    boxes, classes = (x[: len(batch)] for x in _objects(model, defaults))
    theirs.train(), model.train()
    features, head, head_of_ours = (watch(x) for x in (theirs.backbone, theirs.head, model.head))
    targets = [{"boxes": b.double(), "labels": c + 1} for b, c in zip(boxes, classes)]
    expected = theirs([image.double() / 255 for image in batch], targets)
    instances = make_instances(model, boxes, classes)
    actual = model([{"image": x, "instances": gt} for x, gt in zip(batch, instances)])
    sum(expected.values()).backward()
    sum(actual.values()).backward()
    levels = by_level(model, *head_of_ours["args"], *head_of_ours["output"])
    with torch.no_grad():
        rows = output_rows(row, _outputs(features["output"], head["output"], model), levels,
                           ", training mode")  # fmt: skip
    difference = relative(*_loss_values(expected, actual))
    rows.append(row("training step: losses", difference, 1e-5, "rel.", "float64"))
    gradients = {name: x.grad for name, x in theirs.named_parameters()}
    lineage = recognise(theirs.state_dict())
    gradients = lineage.to_ours(gradients)
    ours = dict(model.named_parameters())
    if set(gradients) != set(ours):
        raise ValueError(f"parameters {set(gradients) ^ set(ours)} on one side only")
    norms = [[float(x.double().norm()) for x in (gradients[n], ours[n].grad)] for n in ours]
    text = f"float64, norms of {len(norms)} parameters"
    rows.append(row("training step: gradients", relative(*zip(*norms)), 1e-5, "rel.", text))
    state, ours = lineage.to_ours(theirs.state_dict()), model.state_dict()
    if statistics := [name for name in ours if name.endswith(("running_mean", "running_var"))]:
        norms = [[float(x[name].double().norm()) for x in (state, ours)] for name in statistics]
        text = f"float64, norms of {len(norms)} means and variances after the step"
        rows.append(row("training step: BatchNorm", relative(*zip(*norms)), 1e-6, "rel.", text))
    return rows


def _detection_rows(row, theirs, model) -> List[Row]:
    """From the images as they are. torchvision also returns boxes without area, which lie outside
    the image; in ours the next best take their places."""
    pictures, what = photographs()
    with torch.no_grad():
        expected = theirs([picture / 255 for picture in pictures])
        actual = [x["instances"] for x in model([{"image": picture} for picture in pictures])]
    empty = 0
    for i, x in enumerate(expected):
        has_area = (x["boxes"][:, 2:] > x["boxes"][:, :2]).all(dim=1)
        expected[i] = {name: values[has_area] for name, values in x.items()}
        expected[i]["labels"] -= 1
        if not has_area.all():
            empty += int((~has_area).sum())
            actual[i] = actual[i][: int(has_area.sum())]
    note = f"{what}; each side resizes, boxes in their pixels; {empty} boxes without area left out"
    return detection_rows(row, compare_detections(expected, actual), note)
