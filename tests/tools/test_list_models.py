"""README's table of labs is the tool's, and agrees with what torchvision publishes."""

import re
from pathlib import Path

import list_models as tool
import pytest
import torch
from torchvision.models.detection import SSD300_VGG16_Weights, SSDLite320_MobileNet_V3_Large_Weights

from ssd import model_zoo
from ssd.checkpoint.published import PUBLISHED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def lines():
    """Lab to its line of README's table."""
    _, found, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(tool._HEADER)
    assert found, "README.md holds no table with the header of tools/list_models.py"
    rows = re.match(r"(\|.*\n)*", rest)[0].splitlines(keepends=True)
    return {re.match(r"\| \[(\w+)\]", row)[1]: row for row in rows}


def test_table_has_every_lab_in_order(lines):
    assert list(lines) == model_zoo.names()


def test_links_lead_to_files(lines):
    for name, row in lines.items():
        paths = re.findall(r"\]\((?!http)(.+?)\)", row)
        assert paths[0].startswith(f"labs/{name}/")
        assert all((ROOT / path).is_file() for path in paths)


def test_published_are_the_papers_result_and_the_labs_first_weights():
    text = tool.published("ssd_vgg16_size512")
    assert text.startswith("26.8 AP, COCO test-dev (paper); [27.2 AP, COCO val2017](http://")
    assert text.endswith(" (`ssd512_coco_detectron2_fork`)")
    text = tool.published("ssd_vgg16_size512_voc0712")
    weights = PUBLISHED["ssd512_voc0712_lufficc"]
    assert text == (
        f"79.8 mAP, VOC2007 test (paper); [{weights.result}]({weights.url}) "
        "(`ssd512_voc0712_lufficc`); [1 more](docs/checkpoints.md)"
    )
    assert tool.published("quickstart") == ""


@pytest.mark.parametrize(
    "name", ["quickstart", "ssdlite_mobilenetv3_size320", "ssdlite_mobilenetv2_size300_tf"]
)
def test_table_is_what_the_tool_prints(lines, name):
    with torch.no_grad():
        assert tool.row(name) == lines[name]


@pytest.mark.parametrize(
    "name, weights",
    [
        ("ssd_vgg16_size300_torchvision", SSD300_VGG16_Weights.COCO_V1),
        ("ssdlite_mobilenetv3_size320", SSDLite320_MobileNet_V3_Large_Weights.COCO_V1),
    ],
)
def test_sizes_that_torchvision_publishes(lines, name, weights):
    _, _, parameters, gflops, *_ = [cell.strip() for cell in lines[name].strip("|\n").split("|")]
    assert parameters == f"{weights.meta['num_params'] / 1e6:.2f}"
    assert float(gflops) == pytest.approx(weights.meta["_ops"], rel=0.01)
    assert f"]({weights.url})" in lines[name]
