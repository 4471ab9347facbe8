#!/usr/bin/env python
"""How well a lab's default boxes fit the objects of its training sets, and which would fit better.

    python tools/analyze_default_boxes.py --config-file config.yaml [KEY VALUE …]

Objects are measured in pixels of the network's input, without augmentation unless --augmented.
recall: share of the objects that a default box covers with the IoU of MODEL.SSD.MATCHING, the most
that training can match without force. forced: with less IoU, and a default box only by the forced
part of the matching. unmatched: without any, as another object has taken it. positives: default
boxes per object. The suggestion keeps the lab's levels, steps and input size. It raises recall and
mean IoU, with each class weighing the same, on the objects that were measured; whether it detects
better, a training has to show.
"""

import argparse
import os
from typing import List, NamedTuple, Sequence, Tuple

import matplotlib
import numpy as np
import torch
from default_box_search import WORTH, Search, Setting, cell_shapes, reach
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.modeling import build_model
from torchvision.ops import box_iou

from ssd import load_config
from ssd.data.augmentations import ImageSize, build_augmentation
from ssd.data.boxes import xyxy_boxes
from ssd.data.datasets import check_class_count
from ssd.data.transforms import centers_inside
from ssd.modeling.multibox import match_default_boxes

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SIDES = (0, 8, 16, 32, 64, 128, 256, np.inf)  # pixels of the input: bounds of the size groups
SEARCHED = 10_000  # objects of the search at most
# Okabe and Ito's colours, which differ without colour vision, too; and markers
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
MARKERS = "os^vDPX*"


class Objects(NamedTuple):
    boxes: np.ndarray  # (M, 4) XYXY in pixels of the input
    classes: np.ndarray  # (M,)
    images: np.ndarray  # (M,) number of the image

    @property
    def sides(self) -> np.ndarray:
        return np.sqrt((self.boxes[:, 2:] - self.boxes[:, :2]).prod(1))


class Fit(NamedTuple):
    """How default boxes fit M objects."""

    iou: np.ndarray  # (M,) with the best default box
    level: np.ndarray  # (M,) of that box
    positives: np.ndarray  # (M,) default boxes that training matches
    threshold: float


class DefaultBoxes(NamedTuple):
    boxes: torch.Tensor  # (R, 4) XYXY in pixels of the input
    level: np.ndarray  # (R,)
    matching: dict  # arguments of match_default_boxes


def default_boxes(cfg: CfgNode) -> DefaultBoxes:
    """Those of the model that the config builds."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    model = build_model(cfg)
    level = np.repeat(np.arange(len(model.boxes_per_level)), model.boxes_per_level)
    return DefaultBoxes(model.default_boxes, level, model.matching)


def read_objects(cfg: CfgNode, augmented: bool, max_images: int) -> Objects:
    """The objects of DATASETS.TRAIN as the network gets them; no image file is read.

    Args:
        max_images: that many at most, drawn at random.
    """
    check_class_count(cfg)
    filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=filter_empty)
    rng = np.random.default_rng(0)
    if len(records) > max_images:
        records = [records[i] for i in rng.permutation(len(records))[:max_images]]
    np.random.seed(0)  # of the augmentations
    augmentation = build_augmentation(cfg, augmented)
    height, width = cfg.MODEL.SSD.INPUT_SIZE
    boxes, classes, images = [np.zeros((0, 4))], [], []
    for number, record in enumerate(records):
        annotations = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
        size = (record["height"], record["width"])
        own = np.clip(xyxy_boxes(annotations), 0, [size[1], size[0]] * 2)
        keep = (own[:, 2:] > own[:, :2]).all(1)
        own, labels = own[keep], np.array([a["category_id"] for a in annotations], int)[keep]
        sample = ImageSize(size, own)
        augmentation(sample)
        own = sample.boxes
        inside = centers_inside(own, (height, width))
        own, labels = np.clip(own[inside], 0, [width, height] * 2), labels[inside]
        keep = (own[:, 2:] > own[:, :2]).all(1)
        boxes.append(own[keep])
        classes += labels[keep].tolist()
        images += [number] * int(keep.sum())
    return Objects(np.concatenate(boxes), np.array(classes, int), np.array(images, int))


def fit(objects: Objects, default: DefaultBoxes) -> Fit:
    """Compares every object with every default box, and matches as training does."""
    iou, level, positives = [], [], []
    starts = np.flatnonzero(np.diff(objects.images, prepend=-1))
    for boxes in np.split(objects.boxes, starts[1:]) if len(starts) else []:
        boxes = torch.from_numpy(boxes).float()
        best = box_iou(boxes, default.boxes).max(dim=1)
        valid = torch.ones(1, len(boxes), dtype=torch.bool)
        matched = match_default_boxes(boxes[None], valid, default.boxes, **default.matching)[0]
        iou += best.values.tolist()
        level += default.level[best.indices.numpy()].tolist()
        positives += torch.bincount(matched[matched >= 0], minlength=len(boxes)).tolist()
    threshold = default.matching["iou_threshold"]
    return Fit(np.array(iou), np.array(level, int), np.array(positives, int), threshold)


def table(objects: Objects, found: Fit, names: Sequence[str], min_sizes: Sequence) -> List[str]:
    """Lines by class, by size and by level of the best default box; groups without objects lack."""
    groups = [("all", np.ones(len(objects.classes), bool))]
    groups += [(name, objects.classes == label) for label, name in enumerate(names)]
    for low, high, group in _by_size(objects):
        groups.append((f"side {low} to {high} px" if high < np.inf else f"side {low} px …", group))
    for level, size in enumerate(min_sizes):
        groups.append((f"best on level {level}, {size:g} px", found.level == level))
    lines = [f"{'':24} objects  recall  mean IoU  forced  unmatched  positives: 10 %  median  90 %"]
    for name, group in groups:
        if group.any():
            low = found.iou[group] < found.threshold
            free = found.positives[group] == 0
            quantiles = np.quantile(found.positives[group], [0.1, 0.5, 0.9])
            lines.append(
                f"{name[:24]:24} {group.sum():7} {1 - low.mean():7.1%} "
                f"{found.iou[group].mean():9.2f} {(low & ~free).mean():7.1%} {free.mean():10.1%} "
                f"{quantiles[0]:16.0f} {quantiles[1]:7.0f} {quantiles[2]:5.0f}"
            )
    return lines


def _by_size(objects: Objects) -> List[tuple]:
    """(low, high, which objects), sides in pixels of the input."""
    bounds = zip(SIDES, SIDES[1:])
    return [(a, b, (objects.sides >= a) & (objects.sides < b)) for a, b in bounds]


def suggest(cfg: CfgNode, objects: Objects, levels: Sequence, ratios: int = -1) -> Setting:
    """The best setting that the search finds, from the lab's own and from the objects' sizes.

    Args:
        levels: see :func:`cell_centers`.
        ratios: aspect ratios of each level; -1: as many as the lab has.
    """
    lab = lab_setting(cfg)
    if ratios >= 0:
        lab = lab._replace(aspect_ratios=[[2.0, 3.0, 1.5, 4.0, 2.5][:ratios]] * len(lab.min_sizes))
    choice = np.random.default_rng(0).permutation(len(objects.classes))[:SEARCHED]
    search = Search(
        objects.boxes[choice],
        objects.classes[choice],
        levels,
        cfg.MODEL.SSD.MATCHING.IOU_THRESHOLD,
        **_generator_args(cfg),
    )
    largest = (np.quantile(objects.sides, 0.99), lab.max_size)
    best, best_score = search.improve(lab)
    for start in (search.spread(lab, size) for size in largest):
        found, score = search.improve(start)
        if score > best_score + WORTH:
            best, best_score = found, score
    return best


def lab_setting(cfg: CfgNode) -> Setting:
    boxes = cfg.MODEL.SSD.DEFAULT_BOXES
    ratios = [[float(ratio) for ratio in level] for level in boxes.ASPECT_RATIOS]
    return Setting([float(size) for size in boxes.MIN_SIZES], float(boxes.MAX_SIZE), ratios)


def _generator_args(cfg: CfgNode) -> dict:
    first_square = cfg.MODEL.SSD.DEFAULT_BOXES.FIRST_SQUARE
    return {"input_size": cfg.MODEL.SSD.INPUT_SIZE, "first_square": first_square}


def cell_centers(cfg: CfgNode) -> List[Tuple[np.ndarray, np.ndarray]]:
    """x of the columns and y of the rows of each level's cells."""
    default = default_boxes(with_keys(cfg, {"CLIP": "none"}))
    centers = ((default.boxes[:, :2] + default.boxes[:, 2:]) / 2).double().numpy().round(3)
    levels = (centers[default.level == level] for level in np.unique(default.level))
    return [(np.unique(level[:, 0]), np.unique(level[:, 1])) for level in levels]


def with_keys(cfg: CfgNode, keys: dict) -> CfgNode:
    """A copy of the config with other MODEL.SSD.DEFAULT_BOXES."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.SSD.DEFAULT_BOXES.update(keys)
    return cfg


def as_keys(setting: Setting) -> dict:
    return {name.upper(): value for name, value in setting._asdict().items()}


def as_yaml(setting: Setting, lab: Setting) -> str:
    """Lines for a lab's config.yaml."""
    note = "# for a new training; the head keeps its channels"
    if [len(r) for r in setting.aspect_ratios] != [len(r) for r in lab.aspect_ratios]:
        note = "# for a new training; other numbers of ratios: the head gets other channels"
    lines = [f"      {key}: {value}" for key, value in as_keys(setting).items()]
    return "\n".join([note, "MODEL:", "  SSD:", "    DEFAULT_BOXES:", *lines])


def plot(path: str, objects: Objects, fits: dict, settings: dict, names: Sequence[str]) -> None:
    """Writes a PNG: sizes of objects and default boxes, recall by class and by size.

    Args:
        fits: name of a setting ("lab", "suggested") to how it fits.
        settings: the same name to the (width, height) of all default boxes of a cell.
    """
    plt.rcParams["text.parse_math"] = False  # class names may hold $
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), width_ratios=(1.3, 1, 1), layout="tight")
    wh = objects.boxes[:, 2:] - objects.boxes[:, :2]
    order = np.argsort(-np.bincount(objects.classes, minlength=len(names)), kind="stable")
    for rank, label in enumerate(order[: len(COLORS)]):
        own = wh[objects.classes == label][:2000]
        axes[0].plot(*own.T, MARKERS[rank], ms=4, alpha=0.5, mew=0, color=COLORS[rank],
                     label=names[label])  # fmt: skip
    for (name, shapes), marker in zip(settings.items(), "sx"):
        style = {"mfc": "none", "mec": "black", "ms": 8 if marker == "s" else 6, "mew": 1.3}
        axes[0].plot(*np.array(shapes).T, marker, label=f"default boxes, {name}", **style)
    axes[0].set(xscale="log", yscale="log", xlabel="width, px of the input", ylabel="height, px")
    axes[0].set_title("Objects and default boxes")
    ticks = [t for t in (4, 8, 16, 32, 64, 128, 256, 512, 1024) if wh.min() / 2 < t < 2 * wh.max()]
    for axis in (axes[0].xaxis, axes[0].yaxis):
        axis.set_ticks(ticks, labels=map(str, ticks))
        axis.minorticks_off()
    axes[0].legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4)

    by_class = [(names[i], objects.classes == i) for i in order[:12]]
    by_size = [
        (f"{low}–{high}" if high < np.inf else f"≥ {low}", group)
        for low, high, group in _by_size(objects)
    ]  # fmt: skip
    for axis, groups, title in (
        (axes[1], by_class, "Recall by class"),
        (axes[2], by_size, "Recall by side, px of the input"),
    ):
        groups = [(name, group) for name, group in groups if group.any()]
        for k, (name, found) in enumerate(fits.items()):
            recall = [100 * (found.iou[group] >= found.threshold).mean() for _, group in groups]
            place = np.arange(len(groups)) + (k - (len(fits) - 1) / 2) * 0.38
            bars = axis.bar(place, recall, 0.36, label=name, color=("#BBBBBB", "#0072B2")[k],
                            hatch=("//", "")[k], edgecolor="white")  # fmt: skip
            axis.bar_label(bars, fmt="%.0f", fontsize="small")
        turned = {"rotation": 40, "ha": "right"} if len(groups) > 4 else {}
        axis.set_xticks(range(len(groups)), [name for name, _ in groups], **turned)
        axis.set(ylim=(0, 118), ylabel="% of the objects", title=title)
        axis.legend(fontsize="small", loc="upper center", ncols=2)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of a lab")
    parser.add_argument("--augmented", action="store_true", help="one augmentation of each image")
    parser.add_argument("--max-images", type=int, default=5000, help="drawn at random")
    parser.add_argument(
        "--ratios", type=int, default=-1, choices=range(6), metavar="N",
        help="of each level in the suggestion, 0 to 5; default: the lab's",
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="FILE.png", help="default: default_boxes.png in OUTPUT_DIR"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE … for the config")
    args = parser.parse_args()
    cfg = load_config(args.config_file, args.opts)
    objects = read_objects(cfg, args.augmented, args.max_images)
    if not len(objects.classes):
        raise ValueError(f"DATASETS.TRAIN {cfg.DATASETS.TRAIN} holds no object that can be learnt")
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes
    height, width = cfg.MODEL.SSD.INPUT_SIZE
    default = default_boxes(cfg)
    fits = {"lab": fit(objects, default)}
    how = f"{width}x{height}, {'augmented' if args.augmented else 'without augmentation'}"
    print(f"{', '.join(cfg.DATASETS.TRAIN)}: {len(objects.classes)} objects at {how}")
    print(f"the lab's {len(default.boxes)} default boxes, IoU threshold {fits['lab'].threshold:g}")
    print(*table(objects, fits["lab"], names, cfg.MODEL.SSD.DEFAULT_BOXES.MIN_SIZES), sep="\n")

    levels = cell_centers(cfg)
    step = max(np.diff(axis).min(initial=np.inf) for axis in levels[0])
    small = (objects.sides < reach(step)).mean()
    print(
        f"\nThe finest level's cells are {step:g} px apart: of squares under {reach(step):.0f} px "
        f"(of the objects {small:.1%}) some lie where no equal square reaches IoU 0.5."
    )
    setting = suggest(cfg, objects, levels, args.ratios)
    suggested = with_keys(cfg, as_keys(setting))
    fits["suggested"] = fit(objects, default_boxes(suggested))
    print("\nsuggested:")
    print(*table(objects, fits["suggested"], names, setting.min_sizes), sep="\n")
    print(f"\n{as_yaml(setting, lab_setting(cfg))}")
    shapes = {
        name: sum(cell_shapes(value, **_generator_args(cfg)), [])
        for name, value in (("lab", lab_setting(cfg)), ("suggested", setting))
    }
    path = args.output or os.path.join(cfg.OUTPUT_DIR, "default_boxes.png")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    plot(path, objects, fits, shapes, names)
    print(f"# picture: {path}")


if __name__ == "__main__":
    main()
