"""Which lineage a file is of, which lab it needs, and what is said where the config differs."""

import logging

import pytest
import torch
from detectron2.modeling import build_model
from torchvision import models

from ssd import model_zoo
from ssd.checkpoint import SSDCheckpointer
from ssd.checkpoint.published import PUBLISHED
from ssd.checkpoint.recognition import (
    BACKBONES,
    DETECTORS,
    definition,
    differences,
    recognise,
    unwrap,
)
from ssd.config import load_config, read_config

VOC_LAB = "ssd_vgg16_size300_voc0712"


@pytest.mark.parametrize(
    "prefix",
    ["module.", "module.1.", "_orig_mod.", "model.", "_orig_mod.module.", "module._orig_mod."],
)
def test_what_wraps_a_model_is_taken_off(prefix):
    state = {"conf.0.weight": torch.ones(1), "loc.0.weight": torch.zeros(2)}
    assert unwrap({prefix + name: x for name, x in state.items()}) == state


def test_names_that_only_some_have_stay():
    state = {"module.weight": torch.ones(1), "weight": torch.ones(1), "model.weight": 0}
    assert unwrap(state) == state
    assert unwrap({}) == {}


# torchvision's classifiers, by their names alone; nobody shall take one for another.
CLASSIFIERS = {
    "vgg16": "torchvision_vgg16",
    "mobilenet_v2": "torchvision_mobilenetv2",
    "mobilenet_v3_large": "torchvision_mobilenetv3_classifier",
    "resnet18": "torchvision_resnet",
    "resnet50": "torchvision_resnet",
    "vgg11": None,
    "vgg16_bn": None,
    "vgg19": None,
    "mobilenet_v3_small": None,
    "efficientnet_b0": None,
    "densenet121": None,
    "squeezenet1_0": None,
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_torchvisions_classifiers(name):
    with torch.device("meta"):
        state = getattr(models, name)(weights=None).state_dict()
    state = {name: torch.zeros(1) for name in state}
    lineage = recognise(state)
    assert (lineage and lineage.key) == CLASSIFIERS[name]


def test_published_weights_are_of_known_lineages():
    known = {lineage.key for lineage in DETECTORS}
    assert {weights.lineage for weights in PUBLISHED.values()} <= known
    assert known - {weights.lineage for weights in PUBLISHED.values()} == {"qfgaohao_vgg_l2norm"}
    files = [weights.file_name for weights in PUBLISHED.values()]
    assert len(set(files)) == len(files)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_fit_their_lab_with_its_options(name):
    """What is expected of a config for them is what their lab with their options has."""
    weights = PUBLISHED[name]
    cfg = read_config(model_zoo.get_config_file(weights.lab), weights.opts)
    levels, classes = len(cfg.MODEL.SSD.DEFAULT_BOXES.MIN_SIZES), cfg.MODEL.SSD.NUM_CLASSES
    found, expected = definition(weights.lineage, levels, classes)
    assert (found.lab, found.opts) == (weights.lab, weights.opts)
    assert differences(cfg, expected) == []


def test_definition_of_other_classes_and_levels():
    """Of an own training: as the published weights with as many levels."""
    weights, expected = definition("mmdet_vgg", 7, 3)
    assert weights.lab == "ssd_vgg16_size512_120e"
    assert expected["MODEL.SSD.INPUT_SIZE"] == [512, 512]
    assert definition("mmdet_vgg", 5, 80) is None
    assert definition("qfgaohao_vgg_l2norm", 6, 20) is None, "nothing is published"


@pytest.mark.parametrize("lineage", BACKBONES, ids=lambda x: x.key)
def test_a_backbones_keys_are_compared(lineage):
    cfg = read_config(model_zoo.get_config_file(VOC_LAB))
    for key, value in lineage.config.items():
        cfg.merge_from_list([key, value])
        assert differences(cfg, {key: value}) == []
        assert [text.split()[0] for text in differences(cfg, {key: "another"})] == [key]


def test_differences_of_bgr_are_told_as_rgb():
    expected = {"MODEL.PIXEL_MEAN": [123.0, 117.0, 104.0], "MODEL.SSD.DEFAULT_BOXES.CLIP": "none"}
    opts = ["INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", [104.0, 117.0, 123.0]]
    cfg = read_config(model_zoo.get_config_file(VOC_LAB), opts)
    assert differences(cfg, expected) == []
    cfg.MODEL.PIXEL_MEAN = (123.0, 117.0, 104.0)
    assert differences(cfg, expected) == [
        "MODEL.PIXEL_MEAN (RGB) [104.0, 117.0, 123.0] instead of [123.0, 117.0, 104.0]"
    ]


# --- Warnings at loading ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def lufficc_voc(tmp_path_factory):
    """A file with some layers of lufficc's SSD300 on VOC, and the model that it's loaded into."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vgg_ssd300_voc0712.pth"
    state = {"backbone.vgg.0.weight": torch.randn(64, 3, 3, 3)}
    state["backbone.l2_norm.weight"] = torch.full((512,), 20.0)
    for level, (count, inputs) in enumerate(
        zip((4, 6, 6, 6, 4, 4), (512, 1024, 512, 256, 256, 256))
    ):
        for kind, outputs in (("cls", 21 * count), ("reg", 4 * count)):
            name = f"box_head.predictor.{kind}_headers.{level}."
            state[name + "weight"] = torch.randn(outputs, inputs, 3, 3)
            state[name + "bias"] = torch.randn(outputs)
    torch.save({"model": state, "iteration": 120000}, path)
    cfg = load_config(model_zoo.get_config_file(VOC_LAB), ["MODEL.DEVICE", "cpu"])
    return str(path), build_model(cfg)


@pytest.fixture
def warnings(lufficc_voc, caplog):
    """A function (KEY, VALUE, …) → what is warned when the file is loaded into this config."""

    def load(*opts):
        path, model = lufficc_voc
        opts = ["MODEL.DEVICE", "cpu", *opts]
        cfg = load_config(model_zoo.get_config_file(VOC_LAB), opts)
        caplog.clear()
        with caplog.at_level("WARNING", "ssd"):
            SSDCheckpointer(model, cfg=cfg).load(path)
        found = [record for record in caplog.records if record.name.startswith("ssd.")]
        assert all(record.levelno == logging.WARNING for record in found)
        return [record.getMessage() for record in found]

    return load


def test_other_default_boxes_are_warned_of_once(warnings):
    (text,) = warnings()
    assert text.startswith("lufficc's SSD was made with other values than the config's: ")
    assert "MODEL.SSD.DEFAULT_BOXES.CLIP none instead of cxcywh" in text
    assert f"the lab of lufficc's SSD is {VOC_LAB} with MODEL.SSD.DEFAULT_BOXES.CLIP cxcywh" in text
    assert text.count("instead of") == 1


def test_the_published_settings_are_not_warned_of(warnings):
    opts = PUBLISHED["ssd300_voc0712_lufficc"].opts
    assert warnings(*opts) == []
    bgr = ["INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", [104.0, 117.0, 123.0]]
    assert warnings(*opts, *bgr) == []
    (text,) = warnings(*opts, *bgr[:2])  # the mean left in the order of RGB
    assert text.count("instead of") == 1 and "MODEL.PIXEL_MEAN (RGB) [104.0" in text


def test_sizes_of_coco_for_weights_of_voc_are_warned_of(warnings):
    opts = PUBLISHED["ssd300_voc0712_lufficc"].opts
    sizes = [21.0, 45.0, 99.0, 153.0, 207.0, 261.0]
    (text,) = warnings(*opts, "MODEL.SSD.DEFAULT_BOXES.MIN_SIZES", sizes)
    assert f"MODEL.SSD.DEFAULT_BOXES.MIN_SIZES {sizes} instead of [30.0, 60.0" in text
    assert text.count("instead of") == 1


def test_without_a_config_nothing_is_compared(lufficc_voc, caplog):
    path, model = lufficc_voc
    SSDCheckpointer(model).load(path)
    assert "instead of" not in caplog.text


def test_the_error_of_evaluation_names_the_lab(lufficc_voc):
    path, model = lufficc_voc
    cfg = load_config(model_zoo.get_config_file(VOC_LAB), ["MODEL.DEVICE", "cpu"])
    with pytest.raises(ValueError, match=rf"missing backbone.*; the lab of .* is {VOC_LAB} with "):
        SSDCheckpointer(model, cfg=cfg, strict=True).load(path)
