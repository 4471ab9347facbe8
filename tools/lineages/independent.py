"""The labs' models and default boxes against independent ones (lineages.sources)."""

import functools
from typing import List, Tuple

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator
from torch import Tensor, nn

from lineages import sources
from lineages.rows import (
    Row,
    by_level,
    images,
    in_float64,
    lab_config,
    largest,
    load_lab,
    of_mean,
    output_rows,
    outputs,
    randomise,
    without_channels_last,
    worst,
)
from ssd import model_zoo
from ssd.modeling.postprocessing import class_scores


def _columns(source: sources.Network, outputs: int) -> List[int]:
    """For each of our outputs of a box, its place among the source's."""
    if outputs == 4:
        return [1, 0, 3, 2] if source.yx_first else [0, 1, 2, 3]
    return [*range(1, outputs), 0]  # the source's background is first


def _reorder(x: Tensor, source: sources.Network, count: int, outputs: int) -> Tensor:
    """A predictor's weights, biases or outputs (count · outputs, …) from the source's order to
    ours, (count, outputs, …)."""
    if source.class_major:
        x = x.unflatten(0, (outputs, count)).transpose(0, 1)
    else:
        x = x.unflatten(0, (count, outputs))
    order = sources.shape_order(count, source.square_last)
    return x[order][:, _columns(source, outputs)]


def _boxes_of_map(x: Tensor, source: sources.Network, count: int, outputs: int) -> Tensor:
    """A predictor's map (N, count · outputs, H, W) as ours, (N, H · W · count, outputs)."""
    return _reorder(x.transpose(0, 1), source, count, outputs).permute(2, 3, 4, 0, 1).flatten(1, 3)


def _predictors(network: sources.SourceDetector, source: sources.Network, outputs: int):
    """{last convolution of each predictor: (boxes per cell, outputs per box)}."""
    found = {}
    for predictors, size in ((network.confidences, outputs), (network.locations, 4)):
        for predictor, count in zip(predictors, source.counts, strict=True):
            conv = predictor[-1] if isinstance(predictor, nn.Sequential) else predictor
            found[conv] = (count, size)
    return found


@torch.no_grad()
def carry_over(network: sources.SourceDetector, model: nn.Module, source: sources.Network) -> int:
    """Copies the weights by position.

    A convolution's bias in front of a BatchNorm goes into that one's mean.

    Returns:
        how many biases did so.
    """
    kinds = (nn.Conv2d, nn.BatchNorm2d)
    ours = [layer for layer in model.modules() if isinstance(layer, kinds)]
    predictors = _predictors(network, source, model.num_classes + 1)
    bias, folded = None, 0
    for a, b in zip(sources.layers(network), ours, strict=True):
        if isinstance(a, nn.BatchNorm2d):
            if a.eps != b.eps:
                raise ValueError(f"MODEL.BATCH_NORM.EPS {b.eps}, of the source {a.eps}")
            b.load_state_dict(a.state_dict())
            if bias is not None:
                b.running_mean -= bias
                folded += len(bias)
                bias = None
            continue
        values = {"weight": a.weight, "bias": a.bias}
        if a in predictors:
            shape = predictors[a]
            values = {k: _reorder(x, source, *shape).flatten(0, 1) for k, x in values.items()}
        b.weight.copy_(values["weight"].view_as(b.weight))
        if b.bias is not None:
            b.bias.copy_(values["bias"])
        else:
            bias = values["bias"]
    return folded


@functools.cache
def network_rows(lab: str) -> Tuple[Row, ...]:
    """A lab's model against an independent network from its source's definition."""
    source = sources.NETWORKS[lab]
    model = load_lab(lab)
    without_channels_last(model)
    image = torch.from_numpy(images(model.input_size, 1)[0].transpose(2, 0, 1).copy())
    statistics = torch.tensor([source.mean, source.std], dtype=torch.float64)
    mean, std = statistics[:, :, None, None]
    batch = ((image - mean) / std)[None]
    theirs = source.make()
    randomise(theirs, lambda: theirs(batch.float()))
    row = functools.partial(Row, lab, source.source)
    difference = largest(batch, model.preprocess_image([{"image": image}]).tensor)
    rows = [row("input", difference, 1e-4, "", "1 image of the input size")]
    in_float64(model, lab)
    folded = carry_over(theirs.double(), model, source)
    with torch.no_grad():
        features, *maps = theirs(batch)
        _, *actual = outputs(model, [{"image": image}])
    expected = [features]
    for kind, size in zip(maps, (model.num_classes + 1, 4)):
        levels = zip(kind, source.counts, strict=True)
        expected.append([_boxes_of_map(x, source, count, size) for x, count in levels])
    actual = by_level(model, *actual)
    rows += output_rows(row, expected, actual)
    if source.sigmoid:
        function = model.detection["score_function"]
        difference = of_mean(
            [x[..., :-1].sigmoid() for x in expected[1]],
            [class_scores(x, function) for x in actual[1]],
        )
        rows.append(row("scores", difference, 1e-9, "of mean", "sigmoid, foreground only"))
    counts = [sum(x.numel() for x in net.parameters()) for net in (theirs, model)]
    text = f"{counts[1]:,}; {source.note}"
    if folded:
        text += f"; {folded:,} biases of the source folded into BatchNorm"
    rows.append(row("number of parameters", abs(counts[0] - folded - counts[1]), 0, "", text))
    return tuple(rows)


@functools.cache
def box_rows(lab: str) -> Tuple[Row, ...]:
    """A lab's default boxes against independent formulas."""
    rows = []
    for source in sources.BOXES[lab]:
        cfg = lab_config(lab)
        if source.zoo:  # the settings of the source's own weights, whose name ends with its owner
            owner = source.source.split("/")[0]
            weights = next(x for x in model_zoo.weights_names(lab) if x.endswith(f"_{owner}"))
            cfg = model_zoo.get_config(weights, trained=True)
        levels = list(source.make())
        generator = build_anchor_generator(cfg, [ShapeSpec()] * len(levels))
        ours = generator.per_level([size for size, _ in levels])
        difference = 0.0
        for ((height, width), boxes), actual in zip(levels, ours, strict=True):
            cells, expected = height * width, torch.tensor(boxes, dtype=torch.float64)
            if source.shape_major:
                expected = expected.view(-1, cells, 4).transpose(0, 1)
            else:
                expected = expected.view(cells, -1, 4)
            order = sources.shape_order(expected.shape[1], source.square_last)
            difference = worst(difference, largest(expected[:, order].flatten(0, 1), actual))
        text, name = f"{sum(map(len, ours))}; {source.note}", f"default boxes{source.suffix}"
        rows.append(Row(lab, source.source, name, difference, source.tolerance, "px", text))
    return tuple(rows)
