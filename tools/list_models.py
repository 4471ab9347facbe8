#!/usr/bin/env python
"""Prints README's table of all labs: list_models.py [--check README.md]

Parameters and floating-point operations are those of the network at the lab's input size: backbone,
extra layers and head. As torchvision counts, the latter are the convolutions' multiply-adds.
"""

import argparse
import sys
from pathlib import Path

import torch
from detectron2.modeling import build_model
from fvcore.nn import FlopCountAnalysis, parameter_count
from torch import nn

from ssd import model_zoo
from ssd.checkpoint.published import PUBLISHED
from ssd.config import load_config

# The paper's results of the lab's definition, and others whose weights can't be read.
_RESULTS = {
    "ssd_vgg16_size300": "23.2 AP, COCO test-dev (paper)",
    "ssd_vgg16_size300_expand_aug": "25.1 AP, COCO test-dev (paper)",
    "ssd_vgg16_size300_voc0712": "77.2 mAP, VOC2007 test (paper)",
    "ssd_vgg16_size512": "26.8 AP, COCO test-dev (paper)",
    "ssd_vgg16_size512_expand_aug": "28.8 AP, COCO test-dev (paper)",
    "ssd_vgg16_size512_voc0712": "79.8 mAP, VOC2007 test (paper)",
    "ssdlite_mobilenetv2_size300_tf": "22 AP, COCO minival2014 (TensorFlow)",
}
# Results measured here; a lab's README says how.
_MEASURED = {
    "quickstart": "47.6 AP, 73.7 AP50, rendered shapes",
    "bccd_ssd_vgg16_size300": "53.6 AP, 90.1 AP50, BCCD test",
    "bccd_ssdlite_mobilenetv2": "56.8 AP, 89.2 AP50, BCCD test",
}
# Which outputs docs/fidelity.md compares the lab's model with.
_EQUAL_TO = {
    "ssd_mobilenetv1_size300_voc0712": "its definition",
    "ssd_resnet50_size300": "its definition",
    "ssd_vgg16_size300": "Caffe's formulas",
    "ssd_vgg16_size300_120e": "MMDetection",
    "ssd_vgg16_size300_expand_aug": "Caffe's formulas",
    "ssd_vgg16_size300_qfgaohao": "its definition",
    "ssd_vgg16_size300_torchvision": "torchvision",
    "ssd_vgg16_size300_voc0712": "Caffe's formulas",
    "ssd_vgg16_size512": "Caffe's formulas",
    "ssd_vgg16_size512_120e": "MMDetection",
    "ssd_vgg16_size512_expand_aug": "Caffe's formulas",
    "ssd_vgg16_size512_voc0712": "Caffe's formulas",
    "ssdlite_mobilenetv2_size300_tf": "its definition",
    "ssdlite_mobilenetv2_size300_voc0712": "its definition",
    "ssdlite_mobilenetv2_size320_600e": "MMDetection",
    "ssdlite_mobilenetv2_size320_voc0712": "its definition",
    "ssdlite_mobilenetv3_size320": "torchvision",
    "ssdlite_mobilenetv3_size320_voc0712": "its definition",
}
_HEADER = (
    "| lab | default boxes | parameters, M | GFLOPs | published | equal to | measured here |\n"
    "|---|---|---|---|---|---|---|\n"
)


class Network(nn.Module):
    """What costs time: images to logits and offsets, without targets or post-processing."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.backbone, self.head = model.backbone, model.head

    def forward(self, images):
        return self.head(list(self.backbone(images).values()))


def published(lab: str) -> str:
    """The result of a lab's definition, and its weights, the first of them by address and name."""
    cell = [_RESULTS[lab]] if lab in _RESULTS else []
    if names := model_zoo.weights_names(lab):
        weights = PUBLISHED[names[0]]
        cell.append(f"[{weights.result}]({weights.url}) (`{names[0]}`)")
    if names[1:]:
        cell.append(f"[{len(names) - 1} more](docs/checkpoints.md)")
    return "; ".join(cell)


def row(name: str) -> str:
    """A lab's line of the table."""
    config_file = model_zoo.get_config_file(name)
    cfg = load_config(config_file, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    model = build_model(cfg).eval()
    network = Network(model)
    flops = FlopCountAnalysis(network, torch.zeros(1, 3, *model.input_size))
    flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    cells = [
        f"[{name}](labs/{name}/{'README.md' if name in _MEASURED else 'config.yaml'})",
        len(model.default_boxes),
        f"{parameter_count(network)[''] / 1e6:.2f}",
        f"{flops.by_operator()['conv'] / 1e9:.2f}",
        published(name) or "–",
        _EQUAL_TO.get(name, "–"),
        _MEASURED.get(name, "not trained"),
    ]
    return f"| {' | '.join(map(str, cells))} |\n"


def table() -> str:
    return _HEADER + "".join(row(name) for name in model_zoo.names())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", metavar="FILE", help="fail unless the file holds the table")
    args = parser.parse_args()
    with torch.no_grad():
        lines = table()
    print(lines, end="")
    if args.check and lines not in Path(args.check).read_text(encoding="utf-8"):
        sys.exit(f"{args.check} doesn't hold this table")
