#!/usr/bin/env python
"""Trains torchvision's SSDLite320-MobileNetV3-Large and ours side by side, and plots both.

Three contenders, each with the same seeds:

- torchvision: its own model and loss, torchvision's recipe;
- ours: this project's model with the same initial weights, the same recipe and samples;
- ours, own recipe: levels and default boxes for small objects, colour distortion, a higher rate.

All use one loader (same order and augmentation for a seed), one optimizer and one evaluator. Each
run writes OUTPUT/NAME_SEED.json; runs that are there are not repeated. Examples:

    python tools/compare_learning.py --output output/learning --iterations 500 --seeds 1 2 3
    python tools/compare_learning.py --output output/learning --plot docs/learning.png
"""

import argparse
import json
import logging
import os
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from analyze_default_boxes import default_boxes, fit, read_objects
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes, Instances
from torch import nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from ssd import load_config
from ssd.checkpoint.recognition import recognise
from ssd.data.loader import build_test_loader, build_train_loader
from ssd.evaluation import build_evaluator

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

BASE = Path(__file__).parent.parent / "labs/_base_/ssdlite_mobilenetv3.yaml"
CLASSES = ["RBC", "WBC", "Platelets"]
# The base's recipe (crop and flip only, cosine), with a batch and a rate for a small data set.
RECIPE = {
    "MODEL.SSD.NUM_CLASSES": 3,
    "DATASETS.TRAIN": "('bccd_trainval',)",
    "DATASETS.TEST": "('bccd_test',)",
    "DATASETS.REGISTER": {
        f"bccd_{split}": {"FORMAT": "voc", "ROOT": "bccd", "SPLIT": split, "CLASSES": CLASSES}
        for split in ("trainval", "test")
    },
    "DATALOADER.NUM_WORKERS": 1,
    "SOLVER.IMS_PER_BATCH": 8,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.WARMUP_ITERS": 100,
}
OWN_RECIPE = {
    # as labs/bccd_ssdlite_mobilenetv2: platelets are about 20 pixels wide
    "MODEL.SSD.IN_FEATURES": ["stage3", "stage6_expand", "conv2"],
    "MODEL.SSD.EXTRA_LAYERS": [[256, 512, 3, 2, 1], [128, 256, 3, 2, 1]],
    "MODEL.SSD.DEFAULT_BOXES.MIN_SIZES": [20.0, 40.0, 80.0, 130.0, 200.0],
    "MODEL.SSD.DEFAULT_BOXES.MAX_SIZE": 300.0,
    "MODEL.SSD.DEFAULT_BOXES.ASPECT_RATIOS": [[2.0]] * 5,
    "INPUT.PHOTOMETRIC.ENABLED": True,
    "INPUT.IOU_CROP.SAMPLER": "caffe",
    "SOLVER.BASE_LR": 0.03,
}
NAMES = {
    "torchvision": "torchvision, its recipe",
    "ours": "ours, torchvision's recipe",
    "ours_own_recipe": "ours, own recipe",
}


class TorchvisionSSD(nn.Module):
    """torchvision's detector behind Detectron2's interface for inputs and outputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batched_inputs):
        device = next(self.parameters()).device
        images = [x["image"].to(device).float() / 255 for x in batched_inputs]
        if self.training:
            instances = [x["instances"].to(device) for x in batched_inputs]
            targets = [{"boxes": x.gt_boxes.tensor, "labels": x.gt_classes + 1} for x in instances]
            losses = self.model(images, targets)
            return {
                "loss_cls": losses["classification"],
                "loss_box_reg": losses["bbox_regression"],
            }
        results = []
        for found, image, x in zip(self.model(images), images, batched_inputs):
            instances = Instances(tuple(image.shape[-2:]))
            instances.pred_boxes = Boxes(found["boxes"])
            instances.scores, instances.pred_classes = found["scores"], found["labels"] - 1
            results.append({"instances": detector_postprocess(instances, x["height"], x["width"])})
        return results


def config(name: str, device: str, *opts):
    """A contender's config with further KEY, VALUE pairs."""
    keys = {**RECIPE, **(OWN_RECIPE if name == "ours_own_recipe" else {}), "MODEL.DEVICE": device}
    return load_config(str(BASE), [*(item for pair in keys.items() for item in pair), *opts])


def run(name: str, seed: int, args) -> dict:
    """Trains one contender; returns losses of every iteration and evaluations."""
    folder = os.path.join(args.output, f"{name}_{seed}")
    opts = ["SEED", seed, "SOLVER.MAX_ITER", args.iterations, "OUTPUT_DIR", folder]
    cfg = config(name, args.device, *opts)
    torch.manual_seed(seed)
    reference = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=len(CLASSES) + 1
    )
    if name == "torchvision":
        model = TorchvisionSSD(reference).to(args.device)
    else:
        model = build_model(cfg)
        state, own = reference.state_dict(), model.state_dict()
        state = recognise(state).to_ours(state)
        state = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
        model.load_state_dict(state, strict=name == "ours")

    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    loader = iter(build_train_loader(cfg))
    losses, evaluations, seconds = [], [], 0.0
    for iteration in range(1, args.iterations + 1):
        start = time.perf_counter()
        model.train()
        terms = model(next(loader))
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        scheduler.step()
        losses.append([float(terms["loss_cls"]), float(terms["loss_box_reg"])])
        seconds += time.perf_counter() - start
        if iteration % args.eval_period == 0 or iteration == args.iterations:
            dataset = cfg.DATASETS.TEST[0]
            results = inference_on_dataset(
                model, build_test_loader(cfg, dataset), build_evaluator(cfg, dataset)
            )
            evaluations.append({"iteration": iteration, **results["bbox"]})
            print(
                name, seed, iteration, losses[-1], {k: results["bbox"][k] for k in ("AP", "AP50")}
            )
    return {
        "name": name, "seed": seed, "iterations": args.iterations, "device": args.device,
        "seconds": seconds, "losses": losses, "evaluations": evaluations,
    }  # fmt: skip


def print_recall() -> None:
    """Of each class the best IoU that its objects have with a default box."""
    for name in ("ours", "ours_own_recipe"):  # torchvision's default boxes are those of "ours"
        cfg = config(name, "cpu")
        objects = read_objects(cfg, augmented=False, max_images=1000)
        best = fit(objects, default_boxes(cfg)).iou
        for number, label in enumerate(CLASSES):
            values = best[objects.classes == number]
            share = 100 * np.mean(values >= 0.5)
            print(
                f"{NAMES[name]}: {label}, {len(values)} objects: {share:.1f} % have an IoU of 0.5 "
                f"with a default box, the median of the best IoU is {np.median(values):.2f}"
            )


def plot(folder: str, path: str) -> None:
    """AP and AP50 of all runs in ``folder``: mean and spread (min to max) over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for name, label in NAMES.items():
        runs = [
            json.loads(file.read_text()) for file in sorted(Path(folder).glob(f"{name}_*.json"))
        ]
        runs = [x for x in runs if x["name"] == name]
        if not runs:
            continue
        iterations, *others = ([x["iteration"] for x in r["evaluations"]] for r in runs)
        if any(x != iterations for x in others):
            raise ValueError(f"{folder}: {name}'s runs were evaluated at different iterations")
        for axis, metric in zip(axes, ("AP", "AP50")):
            values = np.array([[x[metric] for x in r["evaluations"]] for r in runs])
            (line,) = axis.plot(iterations, values.mean(0), marker="o", label=label)
            axis.fill_between(
                iterations, values.min(0), values.max(0), alpha=0.2, color=line.get_color()
            )
            final = ", ".join(f"{v:.1f}" for v in values[:, -1])
            print(f"{label}: {metric} {values[:, -1].mean():.1f} ({final})")
        classes = {k for k in runs[0]["evaluations"][-1] if k.startswith("AP50-")}
        for key in sorted(classes):
            mean = np.mean([r["evaluations"][-1][key] for r in runs])
            print(f"    {key} {mean:.1f}")
    for theirs in sorted(Path(folder).glob("torchvision_*.json")):
        ours = theirs.with_name(theirs.name.replace("torchvision", "ours"))
        if ours.exists():
            a, b = (np.array(json.loads(file.read_text())["losses"]) for file in (theirs, ours))
            apart = 100 * abs(a - b) / a
            for i in (0, min(49, len(apart) - 1)):
                cls, box = apart[i]
                print(f"{ours.stem}, iteration {i + 1}: losses {cls:.3f} % and {box:.2f} % apart")
    for axis, metric in zip(axes, ("AP", "AP50")):
        axis.set(xlabel="iteration (batch 8)", ylabel=f"{metric} on BCCD test", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="output/learning", help="folder of the results")
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, default=1200)
    parser.add_argument("--eval-period", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", metavar="PNG", help="only plot the runs of --output")
    parser.add_argument("--recall", action="store_true", help="only print default boxes' IoU")
    args = parser.parse_args()
    if args.recall:
        print_recall()
        return
    if args.plot:
        plot(args.output, args.plot)
        return
    logging.basicConfig(level=logging.WARNING)
    os.makedirs(args.output, exist_ok=True)
    for seed in args.seeds:
        for name in args.contenders:
            path = Path(args.output, f"{name}_{seed}.json")
            if path.exists():
                last = json.loads(path.read_text())["evaluations"][-1]["iteration"]
                if last != args.iterations:
                    parser.error(f"{path} is of {last} iterations, not {args.iterations}")
                continue
            path.write_text(json.dumps(run(name, seed, args)))


if __name__ == "__main__":
    main()
