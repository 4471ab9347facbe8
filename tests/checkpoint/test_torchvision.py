"""torchvision's classifiers as our backbones, and what its detectors' files need done."""

import re

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn
from torchvision import models
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.feature_extraction import create_feature_extractor

from ssd import model_zoo
from ssd.checkpoint import SSDCheckpointer
from ssd.checkpoint import torchvision as torchvision_names
from ssd.checkpoint.layers import background_last
from ssd.config import load_config

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
V2, V3 = "ssdlite_mobilenetv2_size320_voc0712", "ssdlite_mobilenetv3_size320"
RESNET = "ssd_resnet50_size300"
RESNET18 = "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64".split()
WITH_RES5 = """MODEL.RESNETS.OUT_FEATURES ['res4','res5'] MODEL.SSD.IN_FEATURES ['res4','res5']
    MODEL.SSD.EXTRA_LAYERS [[8,8,3,2,1],[8,8,3,2,1],[8,8,3,1,0],[8,8,3,1,0]]""".split()
# torchvision's classifier: what the log calls it, the lab, further keys, and which of
# torchvision's nodes gives each feature.
CLASSIFIERS = {
    "mobilenet_v2": (
        "mobilenet_v2", V2, [], {"stage5": "features.13", "conv2": "features.18"},
    ),
    "mobilenet_v3_large": (
        "mobilenet_v3", V3, ["MODEL.MOBILENET.REDUCED_TAIL", "False"],
        {"stage6_expand": "features.13.block.0", "conv2": "features.16"},
    ),
    "resnet18": ("resnet", RESNET, RESNET18, {"res4": "layer3"}),
    "resnet50": ("resnet", RESNET, WITH_RES5, {"res4": "layer3", "res5": "layer4"}),
}  # fmt: skip


@pytest.fixture
def log(caplog):
    caplog.set_level("INFO")
    return caplog


def make_model(lab, *opts):
    """(config, model) of a lab, whose every parameter and buffer is NaN or -1."""
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *opts]
    cfg = load_config(model_zoo.get_config_file(lab), opts)
    model = build_model(cfg).eval()
    for value in model.state_dict().values():
        value.fill_(float("nan") if value.is_floating_point() else -1)
    return cfg, model


def filled(model):
    state = model.state_dict()
    return {k for k, x in state.items() if x.isfinite().all() and (x.dim() or x != -1)}


@pytest.fixture(scope="module", params=CLASSIFIERS)
def classifier(request, tmp_path_factory):
    """(name, torchvision's model with random BatchNorm statistics, its file)."""
    torch.manual_seed(0)
    model = getattr(models, request.param)(weights=None).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.pth"
    torch.save(model.state_dict(), path)
    return request.param, model, str(path)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_classifier_gives_torchvisions_features(classifier, order, log):
    name, theirs, path = classifier
    found, lab, opts, nodes = CLASSIFIERS[name]
    mean = torch.tensor(MEAN)
    ours_mean = 255 * (mean if order == "RGB" else mean.flip(0))
    opts = ["INPUT.FORMAT", order, "MODEL.PIXEL_MEAN", str(ours_mean.tolist()), *opts]
    # unlike in each channel, so that their order matters
    opts += ["MODEL.PIXEL_STD", "[1.0, 2.0, 4.0]"] if lab == V2 else []
    cfg, model = make_model(lab, *opts)

    SSDCheckpointer(model, cfg=cfg).load(path)
    assert f"Found torchvision's {found}" in log.text
    names = {k for k in model.state_dict() if k.startswith("backbone.bottom_up.")}
    assert filled(model) == names, "the bottom-up completely, and nothing else"

    rgb = torch.randint(0, 256, (1, 3, 96, 96), generator=torch.Generator().manual_seed(0))
    image = (rgb if order == "RGB" else rgb.flip(1)).float()
    expected = rgb / 255 - mean[:, None, None]
    expected = expected / torch.tensor(STD)[:, None, None]
    if lab == RESNET:  # NVIDIA's res4 keeps the resolution of res3
        first = theirs.layer3[0]
        for conv in (first.conv1, first.conv2, first.downsample[0]):
            conv.stride = (1, 1)
    extractor = create_feature_extractor(theirs, {node: key for key, node in nodes.items()})
    with torch.no_grad():
        actual = model.backbone.bottom_up((image - model.pixel_mean) / model.pixel_std)
        expected = extractor(expected)
    assert actual.keys() == expected.keys() == nodes.keys()
    for key, value in expected.items():
        tolerance = 1e-4 * float(value.abs().max())
        assert value.std() > 100 * tolerance, "something must be seen"
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=tolerance)


def test_parameters_that_we_do_not_know_keep_their_names(classifier):
    name, theirs, _ = classifier
    state = {**theirs.state_dict(), "auxiliary.0.weight": torch.ones(2)}
    result = torchvision_names.convert_backbone(state, (1.0, 1.0, 1.0), "RGB")
    kept = {key for key in result if not key.startswith("backbone.bottom_up.")}
    own = {key for key in state if key.startswith(("classifier.", "fc."))}
    assert own and kept == own | {"auxiliary.0.weight"}
    assert len(result) == len(state)


def test_the_files_own_tensors_stay_as_they_are(classifier):
    state = {name: x.clone() for name, x in classifier[1].state_dict().items()}
    torchvision_names.convert_backbone(state, (2.0, 2.0, 2.0), "BGR")
    for name, value in classifier[1].state_dict().items():
        assert torch.equal(state[name], value), name


def test_full_tail_in_a_reduced_one_stays_fresh_and_is_named(tmp_path, log):
    """torchvision too has no published classifier for the reduced tail."""
    torch.manual_seed(0)
    torch.save(models.mobilenet_v3_large(weights=None).state_dict(), tmp_path / "v3.pth")
    cfg, model = make_model(V3)
    assert cfg.MODEL.MOBILENET.REDUCED_TAIL
    SSDCheckpointer(model, cfg=cfg).load(str(tmp_path / "v3.pth"))
    names = filled(model)
    assert "backbone.bottom_up.stage6.0.expand.weight" in names  # of full width in both
    for name in ("stage6.0.project.weight", "stage6.2.expand.weight", "conv2.norm.bias"):
        assert f"backbone.bottom_up.{name}" not in names
        assert f"backbone.bottom_up.{name}" in log.text


def test_background_goes_from_first_to_last():
    """Two default boxes of two classes: background, a, b → a, b, background."""
    bias = torch.tensor([0.0, 1, 2, 10, 11, 12])
    assert background_last(bias, 2).tolist() == [1, 2, 0, 11, 12, 10]
    weight = bias[:, None, None, None] + torch.tensor([0.0, 100])[:, None, None]
    result = background_last(weight, 2)
    assert result.shape == (6, 2, 1, 1)
    assert result[:, 1, 0, 0].tolist() == [101, 102, 100, 111, 112, 110]
    assert background_last(torch.tensor([5.0, 6]), 1).tolist() == [6, 5]


def test_unknown_parameters_of_a_detector_keep_their_names():
    state = {
        "head.classification_head.module_list.0.bias": torch.tensor([0.0, 1, 2]),
        "head.regression_head.module_list.0.bias": torch.zeros(4),
        "teacher.weight": torch.ones(1),
    }
    assert torchvision_names.recognises(state)
    result = torchvision_names.convert(state)
    assert set(result) == {
        "head.cls_predictors.0.bias", "head.box_predictors.0.bias", "teacher.weight",
    }  # fmt: skip
    assert result["head.cls_predictors.0.bias"].tolist() == [1, 2, 0]
    assert result["teacher.weight"] is state["teacher.weight"]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """(state, file) of torchvision's SSDLite for background and five classes."""
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=6)
    path = tmp_path_factory.mktemp("weights") / "ssdlite.pth"
    torch.save(model.state_dict(), path)
    return model.state_dict(), str(path)


def test_another_class_count_in_training_leaves_the_class_predictors_fresh(detector, log):
    state, path = detector
    cfg, model = make_model(V3, "MODEL.SSD.NUM_CLASSES", "3")
    SSDCheckpointer(model, cfg=cfg).load(path)
    of_classes = {
        name for name in model.state_dict() if re.match(r"head\.cls_predictors\.\d\.1\.", name)
    }
    assert len(of_classes) == 12  # weight and bias of six levels
    assert filled(model) == set(model.state_dict()) - of_classes
    assert all(name in log.text for name in of_classes)
    assert "Found a torchvision SSD" in log.text
    theirs = state["head.regression_head.module_list.2.1.bias"]
    assert torch.equal(model.state_dict()["head.box_predictors.2.1.bias"], theirs)


def test_another_class_count_in_evaluation_is_an_error(detector):
    cfg, model = make_model(V3, "MODEL.SSD.NUM_CLASSES", "3")
    message = r"of another shape head\.cls_predictors.*\(36,.*expected \(24,.*NUM_CLASSES"
    with pytest.raises(ValueError, match=message):
        SSDCheckpointer(model, cfg=cfg, strict=True).load(detector[1])


def test_the_right_class_count_fills_the_model(detector):
    cfg, model = make_model(V3, "MODEL.SSD.NUM_CLASSES", "5")
    SSDCheckpointer(model, cfg=cfg, strict=True).load(detector[1])
    assert filled(model) == set(model.state_dict())
