#!/usr/bin/env python
"""Draws training data: as annotated, as the network gets it, or with the default boxes it matches.

In a lab::

    VISUALIZE="python ../../tools/visualize_data.py --config-file config.yaml --output-dir pictures"
    $VISUALIZE --source annotation
    $VISUALIZE --source dataloader SEED 1
    $VISUALIZE --source dataloader --matches SEED 1
"""

import argparse
import io
import os
import sys
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.modeling import build_model
from torchvision.ops import box_iou

from ssd import load_config
from ssd.data.boxes import find_box_defects, xyxy_boxes
from ssd.data.loader import build_train_loader
from ssd.data.mapper import read_image
from ssd.drawing import draw_boxes, write_image
from ssd.modeling.multibox import match_default_boxes
from ssd.predict import can_show

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from matplotlib.patheffects import withStroke  # noqa: E402

_SIDE = 640  # of a picture, at least, in pixels
# Okabe and Ito's colours, told apart without colour vision
_COLORS = ["#56B4E9", "#F0E442", "#D55E00", "#CC79A7", "#009E73", "#E69F00", "#0072B2"]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        choices=["annotation", "dataloader"],
        required=True,
        help="files with their annotations, or augmented samples in the order of the training, "
        "which is the same in each run if the key SEED isn't negative",
    )
    parser.add_argument("--config-file", metavar="FILE", required=True)
    parser.add_argument("--output-dir", default="./", help="folder for the pictures")
    parser.add_argument("--show", action="store_true", help="show them in a window instead")
    parser.add_argument(
        "--num-images",
        type=int,
        default=20,
        help="with --source annotation they are spread over the data set (default: 20)",
    )
    parser.add_argument(
        "--matches",
        action="store_true",
        help="with --source dataloader: draw the default boxes that are matched to each object",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="config overrides as KEY VALUE pairs"
    )
    return parser


def annotated(cfg, count: int):
    """(name, picture) of ``count`` annotated images of DATASETS.TRAIN, evenly apart, RGB."""
    dicts = [(name, x) for name in cfg.DATASETS.TRAIN for x in DatasetCatalog.get(name)]
    count = min(count, len(dicts))
    for number in (i * len(dicts) // count for i in range(count)):
        name, record = dicts[number]
        names = MetadataCatalog.get(name).thing_classes
        try:
            image = read_image(record["file_name"], "RGB", (record["height"], record["width"]))
        except (OSError, ValueError) as error:
            print(f"Left out: {error}", file=sys.stderr)
            continue
        for line in find_box_defects([record], names):
            print(f"Box defect: {line}", file=sys.stderr)
        objects = record.get("annotations", [])
        classes = [x["category_id"] for x in objects]
        labels = [names[x["category_id"]] + " (crowd)" * x.get("iscrowd", 0) for x in objects]
        boxes = np.nan_to_num(xyxy_boxes(objects), posinf=0, neginf=0)
        picture = draw_boxes(image, boxes, classes, labels, _scale(image))
        yield f"{number:05d}_{Path(record['file_name']).stem}", picture


def samples(cfg, count: int):
    """(name, image as the network gets it, RGB, its instances) of a training's first samples."""
    stream = build_train_loader(cfg).dataset
    for number in range(count):
        sample = stream[number]
        image = convert_image_to_rgb(sample["image"].permute(1, 2, 0), cfg.INPUT.FORMAT)
        name = f"{number:05d}_{Path(sample['file_name']).stem}"
        yield name, np.ascontiguousarray(image), sample["instances"]


def loaded(cfg, count: int):
    """(name, picture) of a training's first ``count`` samples, RGB."""
    for name, image, instances in samples(cfg, count):
        labels = _class_names(cfg, instances)
        boxes, classes = instances.gt_boxes.tensor.numpy(), instances.gt_classes.tolist()
        yield name, draw_boxes(image, boxes, classes, labels, _scale(image))


def matched(cfg, count: int):
    """As :func:`loaded`, with the matched default boxes; prints how many each object has."""
    model = build_model(cfg)
    all_counts, all_forced = [], []
    for name, image, instances in samples(cfg, count):
        labels = _class_names(cfg, instances)
        matches = Matches(model, instances)
        counts = matches.counts()
        all_counts.append(counts)
        all_forced.append(matches.counts(matches.forced))
        print(f"{name}: {len(labels)} objects, {counts.sum()} positives")
        print(matches.table(labels), end="")
        yield name, matches.draw(image, labels)
    counts, forced = np.concatenate(all_counts), np.concatenate(all_forced)
    positives = counts.sum(axis=1)
    print(
        f"{count} images, {len(counts)} objects, {positives.sum() / max(len(counts), 1):.1f} "
        f"positives per object, by level {' '.join(map(str, counts.sum(axis=0)))}; "
        f"{((positives > 0) & (positives == forced.sum(axis=1))).sum()} objects have only those "
        f"of forced matching, {(positives == 0).sum()} have none"
    )


class Matches:
    """The positives of a sample, as the loss takes them.

    Attributes:
        boxes: (P, 4) default boxes, XYXY in pixels of the network's input.
        level: (P,) of the feature map.
        gt: (P,) index of the object.
        forced: (P,) bool; an IoU below the threshold: the object's best one, matched all the same.
        best_iou: (M,) of each object with any default box.
    """

    def __init__(self, model, instances):
        objects, default_boxes = instances.gt_boxes.tensor, model.default_boxes
        # the loss pads its batch to at least one object
        padded = torch.cat([objects, torch.zeros(1, 4)])[None]
        valid = torch.arange(len(objects) + 1)[None] < len(objects)
        (match,) = match_default_boxes(padded, valid, default_boxes, **model.matching)
        index = (match >= 0).nonzero().flatten()
        self.objects, self.default_boxes = objects, default_boxes.split(model.boxes_per_level)
        self.boxes, self.gt = default_boxes[index], match[index]
        sizes = torch.tensor(model.boxes_per_level)
        self.level = torch.arange(len(sizes)).repeat_interleave(sizes)[index]
        iou = box_iou(objects, default_boxes)
        self.forced = iou[self.gt, index] < model.matching["iou_threshold"]
        self.best_iou = iou.amax(dim=1)

    def counts(self, chosen=slice(None)) -> np.ndarray:
        """(M, levels) positives of each object."""
        counts = np.zeros((len(self.objects), len(self.default_boxes)), int)
        np.add.at(counts, (self.gt[chosen].numpy(), self.level[chosen].numpy()), 1)
        return counts

    def table(self, labels) -> str:
        lines = ["  positives  best IoU  object, positives by level\n"] if labels else []
        for label, box, counts, iou in zip(labels, self.objects, self.counts(), self.best_iou):
            width, height = (box[2:] - box[:2]).tolist()
            lines.append(
                f"  {counts.sum():9d}  {iou:8.2f}  {label} {width:.0f}x{height:.0f}, "
                f"{' '.join(map(str, counts))}\n"
            )
        return "".join(lines)

    def draw(self, image: np.ndarray, labels) -> np.ndarray:
        height, width = image.shape[:2]
        figure, axes = plt.subplots(figsize=(9, 9 * height / width), dpi=100)
        axes.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
        for box, level, forced in zip(self.boxes, self.level, self.forced):
            color, line = _COLORS[level % len(_COLORS)], "--" if forced else "-"
            axes.add_patch(_rectangle(box, lw=1.6, ec=color, ls=line, path_effects=_outline(3)))
        for label, box, counts in zip(labels, self.objects, self.counts()):
            axes.add_patch(_rectangle(box, lw=3, ec="white", path_effects=_outline(6), zorder=3))
            axes.text(
                box[0], box[1], f"{label}: {counts.sum()}", color="white", zorder=4, size=9,
                parse_math=False,
                va="bottom" if box[1] > height / 20 else "top",
                bbox={"facecolor": "black", "alpha": 0.8, "pad": 1, "edgecolor": "none"},
            )  # fmt: skip
        # default boxes may reach out of the image
        corners = torch.cat([self.boxes, torch.tensor([[0.0, 0, width, height]])])
        margin = max(height, width) / 4
        left, top = corners[:, :2].amin(dim=0).clamp(min=-margin).tolist()
        right, bottom = corners[:, 2:].amax(dim=0).tolist()
        axes.set(xlim=(left, min(right, width + margin)), ylim=(min(bottom, height + margin), top))
        axes.set(xticks=[], yticks=[], facecolor="#303030")
        axes.legend(
            handles=self._legend(), loc="upper center", bbox_to_anchor=(0.5, -0.01), ncol=2,
            fontsize=9,
        )  # fmt: skip
        file = io.BytesIO()
        figure.savefig(file, bbox_inches="tight")
        plt.close(figure)
        return cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]

    def _legend(self) -> list:
        lines = []
        for level, (boxes, count) in enumerate(zip(self.default_boxes, self.counts().sum(axis=0))):
            sides = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()
            label = f"level {level}, {sides.min():.0f} to {sides.max():.0f} px: {count} positives"
            lines.append(_line(label, color=_COLORS[level % len(_COLORS)]))
        lines.append(_line("object, and how many positives it has", color="white", lw=3))
        return [*lines, _line("forced: IoU below the threshold", color="white", ls="--")]


def _line(label: str, **style) -> Line2D:
    return Line2D([], [], label=label, path_effects=_outline(style.get("lw", 1.5) + 3), **style)


def _outline(width: float) -> list:
    """Black edges make a line seen on any image."""
    return [withStroke(linewidth=width, foreground="black")]


def _rectangle(box: torch.Tensor, **style) -> Rectangle:
    x1, y1, x2, y2 = box.tolist()
    return Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style)


def _class_names(cfg, instances) -> list:
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes
    return [names[label] for label in instances.gt_classes.tolist()]


def _scale(image: np.ndarray) -> float:
    return max(_SIDE / max(image.shape[:2]), 1)


def main(argv=None) -> int:
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.matches and args.source != "dataloader":
        parser.error("--matches needs --source dataloader")
    if args.num_images < 1:
        parser.error(f"--num-images must be at least 1, got {args.num_images}")
    if args.show and not can_show():
        parser.error("no display, or OpenCV without windows: use --output-dir without --show")
    cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])
    pictures = {"annotation": annotated, "dataloader": matched if args.matches else loaded}
    count = 0
    for name, picture in pictures[args.source](cfg, args.num_images):
        count += 1
        if args.show:
            cv2.imshow("Esc ends", picture[:, :, ::-1])
            if cv2.waitKey(0) == 27:
                break
        else:
            write_image(os.path.join(args.output_dir, f"{name}.png"), picture[:, :, ::-1])
    print(f"{count} pictures{'' if args.show else f' in {args.output_dir}'}")
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main())
