"""tools/analyze_model.py: its totals are the published ones."""

import re
from pathlib import Path

import analyze_model as tool
import pytest
import torch
from commands import run
from detectron2.modeling import build_model
from torchvision.models.detection import SSD300_VGG16_Weights, SSDLite320_MobileNet_V3_Large_Weights

from ssd.config import read_config

ROOT = Path(__file__).resolve().parents[2]


def network(lab):
    cfg = read_config(str(ROOT / "labs" / lab / "config.yaml"), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg).eval()
    return tool.Network(model), torch.zeros(1, 3, *model.input_size)


@pytest.mark.parametrize(
    "lab, weights",
    [
        ("ssd_vgg16_size300_torchvision", SSD300_VGG16_Weights.COCO_V1),
        ("ssdlite_mobilenetv3_size320", SSDLite320_MobileNet_V3_Large_Weights.COCO_V1),
    ],
)
def test_totals_are_those_that_torchvision_publishes(lab, weights):
    model, image = network(lab)
    with torch.no_grad():
        flops = tool.count_flops(model, image, 1)
    assert float(re.search(r"GFLOPs: conv ([\d.]+)", flops)[1]) == pytest.approx(
        weights.meta["_ops"], rel=0.01
    )
    assert "batch_norm" not in flops
    parameters = tool.count_parameters(model, image, 1)
    assert f"parameters: {weights.meta['num_params'] / 1e6:.2f} M" in parameters


def test_activations_are_the_outputs_of_convolutions():
    """The head has 4 * (7 classes + 4 offsets) outputs for each cell, twice in its lite form."""
    model, image = network("quickstart")
    with torch.no_grad():
        text = tool.count_activations(model, image, 1)
        features = list(model.backbone(image).values())
    cells = [feature[0, 0].numel() for feature in features]
    # depthwise 3x3 over the input's channels and 1x1 to the outputs, for classes and for offsets
    channels = [feature.shape[1] for feature in features]
    head = sum(n * (2 * c + 4 * (7 + 4)) for n, c in zip(cells, channels))
    assert re.search(rf"head +{head / 1e6:.2f} M", text)
    assert "head.cls_predictors" not in text  # depth 2


def test_command():
    command = [ROOT / "tools/analyze_model.py", "--tasks", *tool.TASKS]
    command += ["--config-file", ROOT / "labs/quickstart/config.yaml"]
    printed = run(*command, "MODEL.SSD.NUM_CLASSES", "80")
    for line in (
        "backbone.bottom_up",
        "GFLOPs: conv",
        "outputs of convolutions",
        "(head): SSDLite",
    ):
        assert line in printed
    assert ", 324, kernel_size=(1, 1)" in printed  # 4 boxes of 81 scores
