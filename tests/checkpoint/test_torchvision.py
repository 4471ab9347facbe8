"""torchvision's classifiers, also by timm's names, as our backbones, and its detectors' files."""

import copy
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
from ssd.checkpoint.recognition import recognise
from ssd.config import load_config

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
V2, V3 = "ssdlite_mobilenetv2_size320_voc0712", "ssdlite_mobilenetv3_size320"
V3_VOC = "ssdlite_mobilenetv3_size320_voc0712"
RESNET = "ssd_resnet50_size300"
RESNET18 = "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64".split()
WITH_RES5 = """MODEL.RESNETS.OUT_FEATURES ['res4','res5'] MODEL.SSD.IN_FEATURES ['res4','res5']
    MODEL.SSD.EXTRA_LAYERS [[8,8,3,2,1],[8,8,3,2,1],[8,8,3,1,0],[8,8,3,1,0]]""".split()
EPS, STRIDE = "MODEL.BATCH_NORM.EPS", "MODEL.RESNETS.STRIDE_IN_1X1"
FULL_TAIL = ["MODEL.MOBILENET.REDUCED_TAIL", "False"]
NODES_V2 = {"stage5": "features.13", "conv2": "features.18"}
NODES_V3 = {"stage6_expand": "features.13.block.0", "conv2": "features.16"}
# A file: what the log calls it, the lab, further keys, and which of torchvision's nodes gives each
# feature. timm's are torchvision's networks by other names; its tf_mobilenetv3 has the same names
# as mobilenetv3_large_100, but pads as TensorFlow: nothing in such a file tells.
CLASSIFIERS = {
    "mobilenet_v2": ("torchvision's mobilenet_v2", V2, [], NODES_V2),
    "mobilenetv2_100": ("timm's MobileNetV2", V2, [], NODES_V2),
    "mobilenet_v3_large": ("torchvision's mobilenet_v3", V3, FULL_TAIL, NODES_V3),
    "mobilenetv3_large_100": (
        "timm's MobileNetV3", V3, [*FULL_TAIL, "MODEL.BATCH_NORM.EPS", "1e-5"], NODES_V3
    ),
    "resnet18": ("torchvision's resnet", RESNET, RESNET18, {"res4": "layer3"}),
    "resnet50": ("torchvision's resnet", RESNET, WITH_RES5, {"res4": "layer3", "res5": "layer4"}),
}  # fmt: skip
BLOCKS = {"mobilenetv2_100": (1, 2, 3, 4, 3, 3, 1), "mobilenetv3_large_100": (1, 2, 3, 4, 2, 3)}


def timm_layers(name):
    """{torchvision's layer: timm's} of a MobileNet."""
    v2 = name == "mobilenetv2_100"
    inside = "conv" if v2 else "block"
    places = [(stage, block) for stage, n in enumerate(BLOCKS[name]) for block in range(n)]
    layers = {"features.0.0": "conv_stem", "features.0.1": "bn1"}
    for number, (stage, block) in enumerate(places, 1):
        convs = ("conv_pw", "conv_dw", "conv_pwl") if number > 1 else ("conv_dw", "conv_pw")
        squeeze = not v2 and (4 <= number <= 6 or number >= 11)
        for index, conv in enumerate(convs):
            last = index == len(convs) - 1
            parts = (index, index + 1) if v2 and last else (f"{index}.0", f"{index}.1")
            if squeeze and last:  # one further
                parts = (f"{index + 1}.0", f"{index + 1}.1")
            for part, layer in zip(parts, (conv, f"bn{index + 1}")):
                layers[f"features.{number}.{inside}.{part}"] = f"blocks.{stage}.{block}.{layer}"
        if squeeze:
            for part, layer in (("fc1", "conv_reduce"), ("fc2", "conv_expand")):
                layers[f"features.{number}.block.2.{part}"] = f"blocks.{stage}.{block}.se.{layer}"
    if v2:
        ends = {"features.18.0": "conv_head", "features.18.1": "bn2", "classifier.1": "classifier"}
    else:
        ends = {"features.16.0": "blocks.6.0.conv", "features.16.1": "blocks.6.0.bn1"}
        ends |= {"classifier.0": "conv_head", "classifier.3": "classifier"}
    return {**layers, **ends}


def timm_state(name, state):
    layers, result = timm_layers(name), {}
    for key, value in state.items():
        layer, _, leaf = key.rpartition(".")
        is_conv = layers[layer] == "conv_head" and leaf == "weight"
        result[f"{layers[layer]}.{leaf}"] = value.view(*value.shape[:2], 1, 1) if is_conv else value
    assert len(result) == len(state)
    return result


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
    """(name, torchvision's model of random weights, state, file)."""
    torch.manual_seed(0)
    timms = {"mobilenetv2_100": "mobilenet_v2", "mobilenetv3_large_100": "mobilenet_v3_large"}
    name = request.param
    model = getattr(models, timms.get(name, name))(weights=None).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # else a MobileNet's signal would die in its first blocks
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            if name in timms:
                module.eps = 1e-5
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    state = model.state_dict()
    state = timm_state(name, state) if name in timms else state
    path = tmp_path_factory.mktemp("weights") / f"{name}.pth"
    torch.save(state, path)
    return name, model, state, str(path)


@pytest.mark.parametrize("classifier, order", [
    *((name, "BGR") for name in CLASSIFIERS), ("mobilenet_v2", "RGB"), ("resnet50", "RGB"),
], indirect=["classifier"])  # fmt: skip
def test_classifier_gives_torchvisions_features(classifier, order, log):
    name, theirs, _, path = classifier
    found, lab, opts, nodes = CLASSIFIERS[name]
    mean = torch.tensor(MEAN)
    ours_mean = 255 * (mean if order == "RGB" else mean.flip(0))
    opts = ["INPUT.FORMAT", order, "MODEL.PIXEL_MEAN", str(ours_mean.tolist()), *opts]
    # unlike in each channel, so that their order matters
    opts += ["MODEL.PIXEL_STD", "[1.0, 2.0, 4.0]"]
    cfg, model = make_model(lab, *opts)

    SSDCheckpointer(model, cfg=cfg).load(path)
    turned = ", first layer turned from RGB to BGR" if order == "BGR" else ""
    assert f"Found {found}{turned}" in log.messages
    assert "instead of" not in log.text
    names = {k for k in model.state_dict() if k.startswith("backbone.bottom_up.")}
    assert filled(model) == names, "the bottom-up completely, and nothing else"

    rgb = torch.randint(0, 256, (1, 3, 96, 96), generator=torch.Generator().manual_seed(0))
    image = (rgb if order == "RGB" else rgb.flip(1)).float()
    expected = rgb / 255 - mean[:, None, None]
    expected = expected / torch.tensor(STD)[:, None, None]
    theirs = copy.deepcopy(theirs).double()  # these networks enlarge rounding errors
    if lab == RESNET:  # NVIDIA's res4 keeps the resolution of res3
        first = theirs.layer3[0]
        for conv in (first.conv1, first.conv2, first.downsample[0]):
            conv.stride = (1, 1)
    extractor = create_feature_extractor(theirs, {node: key for key, node in nodes.items()})
    image, expected = ((image - model.pixel_mean) / model.pixel_std).double(), expected.double()
    with torch.no_grad():
        actual = model.backbone.bottom_up.double()(image)
        expected, turned = extractor(expected), extractor(expected.flip(1))
    assert actual.keys() == expected.keys() == nodes.keys()
    for key, value in expected.items():
        tolerance = 1e-4 * float(value.abs().max())
        assert (value - turned[key]).abs().max() > 100 * tolerance, "the order must be seen"
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=tolerance)


def test_parameters_that_we_do_not_know_keep_their_names(classifier):
    state = {**classifier[2], "auxiliary.0.weight": torch.ones(2)}
    result = recognise(state).to_ours(state)
    kept = {key for key in result if not key.startswith("backbone.bottom_up.")}
    of_classifier = ("classifier.", "fc.")
    if classifier[0] == "mobilenetv3_large_100":
        of_classifier += ("conv_head.",)  # of MobileNetV2 it's the last layer before
    own = {key for key in state if key.startswith(of_classifier)}
    assert own and kept == own | {"auxiliary.0.weight"}
    assert len(result) == len(state)


def test_the_files_own_tensors_stay_as_they_are(classifier, assert_equal):
    state = {name: x.clone() for name, x in classifier[2].items()}
    recognise(state).to_ours(state, "BGR", (2.0, 2.0, 2.0))
    assert_equal(state, dict(classifier[2]))


@pytest.mark.parametrize(
    "classifier, lab, expected",
    [
        (
            "mobilenet_v3_large",
            V3_VOC,
            f"{EPS} 1e-05 instead of 0.001; MODEL.MOBILENET.SQUEEZE_FIRST True instead of False",
        ),
        ("mobilenetv3_large_100", V3, f"{EPS} 0.001 instead of 1e-05"),
        ("mobilenet_v2", "ssdlite_mobilenetv2_size320_600e", f"{EPS} 0.001 instead of 1e-05"),
        ("mobilenetv2_100", "ssdlite_mobilenetv2_size320_600e", f"{EPS} 0.001 instead of 1e-05"),
        ("resnet50", f"{RESNET} {STRIDE} True", f"{STRIDE} True instead of False"),
    ],
    indirect=["classifier"],
)
def test_another_eps_or_place_of_squeeze_or_stride_is_warned_of(classifier, lab, expected, log):
    cfg, model = make_model(*lab.split())
    SSDCheckpointer(model, cfg=cfg).load(classifier[3])
    (text,) = (message for message in log.messages if "instead of" in message)
    assert text.endswith(f": {expected}")


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
    text = "Found torchvision's SSDLite320, 5 classes, background moved from first to last"
    assert text in log.messages
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
