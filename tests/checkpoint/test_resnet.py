"""The ResNets of Detectron2's model zoo: Caffe2's of MSRA, and torchvision's as it converts them.

Compared with torchvision's ResNet-50 of the same numbers, up to res3.
"""

import pickle
import re

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn
from torchvision.models import resnet50

from ssd import model_zoo
from ssd.checkpoint import SSDCheckpointer
from ssd.checkpoint.recognition import recognise
from ssd.config import load_config

LAB = "ssd_resnet50_size300"
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB
BODY = "backbone.bottom_up."


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.fixture
def theirs():
    """torchvision's, with a bias in the first convolution, as Caffe2's has, and no layer3."""
    torch.manual_seed(0)
    model = resnet50(weights=None).eval()
    model.conv1.bias = nn.Parameter(torch.randn(64))
    for norm in norms(model):
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
    model.layer3 = model.layer4 = nn.Identity()
    return model


@pytest.fixture
def msra(theirs):
    """With statistics of inputs of 58 times the size: eps, which isn't scaled, must stay small."""
    theirs.conv1.bias.data *= 58
    theirs.bn1.running_mean *= 58
    theirs.bn1.running_var *= 58**2
    return theirs


def load(path, *opts):
    """The lab's model up to res3 with a file's weights."""
    features = ["MODEL.RESNETS.OUT_FEATURES", ["res3"], "MODEL.SSD.IN_FEATURES", ["res3"]]
    opts = ["MODEL.DEVICE", "cpu", "MODEL.SSD.NUM_CLASSES", "1", *features, *opts]
    cfg = load_config(model_zoo.get_config_file(LAB), opts)
    model = build_model(cfg).eval()
    for name, value in model.state_dict().items():
        if name.startswith(BODY) and "num_batches" not in name and "running" not in name:
            value.fill_(float("nan"))
    SSDCheckpointer(model, cfg=cfg).load(str(path))
    return model


def assert_features_equal(model, theirs, std, bgr, stride_in_1x1):
    """``std``, ``bgr``: of the input that the numbers of ``theirs`` were trained with."""
    rgb = torch.randint(0, 256, (1, 3, 96, 96), generator=torch.Generator().manual_seed(0)).float()
    mean, ours_std = torch.tensor(MEAN)[:, None, None], model.pixel_std
    x = (rgb - mean) / torch.tensor(std)[:, None, None]
    x = x.flip(1) if bgr else x
    if stride_in_1x1:
        theirs.layer2[0].conv1.stride, theirs.layer2[0].conv2.stride = (2, 2), (1, 1)
    with torch.no_grad():
        actual = model.backbone.bottom_up((rgb - mean) / ours_std)["res3"]
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        expected = theirs.layer2(theirs.layer1(x))
    tolerance = 1e-4 * float(expected.abs().max())
    assert expected.std() > 100 * tolerance, "something must be seen"
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=tolerance)


def caffe2_layer(name):
    """ "layer2.0.bn1" to "res3_0_branch2a_bn" and so on."""
    if name in ("conv1", "bn1"):
        return {"conv1": "conv1", "bn1": "res_conv1_bn"}[name]
    stage, block, part = re.fullmatch(r"layer(\d)\.(\d)\.(.+)", name).groups()
    branches = {"downsample.0": "branch1", "downsample.1": "branch1_bn"}
    for index, letter in enumerate("abc", 1):
        branches[f"conv{index}"] = f"branch2{letter}"
        branches[f"bn{index}"] = f"branch2{letter}_bn"
    return f"res{int(stage) + 1}_{block}_{branches[part]}"


def caffe2(model, fused=False):
    """Names and arrays as in R-50.pkl; ``fused``: as in Detectron's, without statistics."""
    leaves = {"weight": "s" if fused else "gamma", "bias": "b" if fused else "beta"}
    blobs = {"pred_w": torch.ones(10, 2048), "pred_b": torch.ones(10)}
    for name, value in model.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if layer == "fc" or leaf == "num_batches_tracked" or (fused and "running" in leaf):
            continue
        name = caffe2_layer(layer)
        leaf = leaves.get(leaf, leaf) if name.endswith("bn") else leaf[0]
        blobs[f"{name}_{leaf}"] = value
    return {name: value.numpy() for name, value in blobs.items()}


def write(path, data):
    path.write_bytes(pickle.dumps(data, protocol=2))
    return path


IN_1X1 = ["MODEL.RESNETS.STRIDE_IN_1X1", "True"]


def test_msras_features(msra, tmp_path, log):
    blobs = caffe2(msra)
    assert {"conv1_w", "conv1_b", "res_conv1_bn_gamma", "res2_0_branch2a_w"} <= set(blobs)
    assert {"res3_3_branch2c_bn_running_var", "res2_0_branch1_bn_beta"} <= set(blobs)
    model = load(write(tmp_path / "R-50.pkl", blobs), *IN_1X1)
    assert_features_equal(model, msra, (1.0, 1.0, 1.0), bgr=True, stride_in_1x1=True)
    assert "Found Detectron2's ResNet of MSRA, first layer turned from BGR to RGB" in log.text
    assert "instead of" not in log.text
    assert "linear.{bias, weight}" in log.text, "what isn't used is named"


@pytest.mark.parametrize("prefix, others", [
    ("backbone.bottom_up.", ["backbone.fpn_lateral4.weight", "roi_heads.box_head.fc1.weight"]),
    ("backbone.", ["proposal_generator.rpn_head.conv.weight"]),
])  # fmt: skip
def test_detectors_of_detectron2s_zoo(msra, tmp_path, log, prefix, others):
    """A file of its model zoo has these names, for BGR that nothing divides."""
    source = load(write(tmp_path / "R-50.pkl", caffe2(msra)), *IN_1X1).state_dict()
    weights = {prefix + k.removeprefix(BODY): x for k, x in source.items() if k.startswith(BODY)}
    first = source[f"{BODY}stem.conv1.weight"]
    weights[f"{prefix}stem.conv1.weight"] = msra.conv1.weight.detach()
    weights[f"{prefix}stem.conv1.norm.running_mean"] = msra.bn1.running_mean - msra.conv1.bias.data
    weights[f"{prefix}stem.conv1.norm.running_var"] = msra.bn1.running_var
    weights.update({name: torch.ones(4, 4, 1, 1) for name in others})
    data = {"model": {k: x.numpy() for k, x in weights.items()}}
    path = write(tmp_path / "model.pkl", {**data, "__author__": "Detectron2 Model Zoo"})
    model = load(path, *IN_1X1)
    assert torch.equal(model.backbone.bottom_up.stem.conv1.weight, first)
    assert_features_equal(model, msra, (1.0, 1.0, 1.0), bgr=True, stride_in_1x1=True)
    assert "Found a Detectron2 detector's ResNet" in log.text and "instead of" not in log.text
    load(path)
    assert "MODEL.RESNETS.STRIDE_IN_1X1 False instead of True" in log.text


def test_resnexts_of_the_zoo_divide_their_input():
    state = {"stem.conv1.weight": torch.ones(2, 3, 1, 1), "res2.0.conv1.weight": torch.ones(2)}
    bgr_std = torch.tensor(STD).flip(0)
    for inputs, title, std in ((8, "ResNet (ResNeXt)", bgr_std), (256, "ResNet of MSRA", 1)):
        state["res2.0.conv2.weight"] = torch.ones(256, inputs, 1, 1)
        lineage = recognise(state, {"__author__": "Caffe2"})
        assert lineage.title == f"Detectron2's {title}"
        first = lineage.to_ours(state, "BGR", (2.0, 3.0, 4.0))[f"{BODY}stem.conv1.weight"]
        torch.testing.assert_close(first[0, :, 0, 0], torch.tensor([2.0, 3.0, 4.0]) / std)
    assert recognise(state).title == "Detectron2's ResNet, as torchvision's"


def test_half_precision_holds_the_statistics_of_any_scale():
    names = ("conv1.weight", "layer1.0.conv1.weight", "bn1.running_mean", "bn1.running_var")
    state = {name: torch.full((2, 3, 1, 1), 50.0).half() for name in names[:2]}
    state.update({name: torch.full((2,), 50.0).half() for name in names[2:]})
    result = recognise(state).to_ours(state)
    assert result[f"{BODY}stem.conv1.norm.running_var"].isfinite().all()


def test_msras_features_in_their_own_order(msra, tmp_path, log):
    bgr = ["INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", MEAN[::-1], "MODEL.PIXEL_STD", [1.0] * 3]
    model = load(write(tmp_path / "R-50.pkl", caffe2(msra)), *IN_1X1, *bgr)
    stem = model.backbone.bottom_up.stem.conv1
    assert torch.equal(stem.weight, msra.conv1.weight)
    assert torch.equal(stem.norm.running_mean, msra.bn1.running_mean - msra.conv1.bias)
    assert torch.equal(stem.norm.running_var, msra.bn1.running_var)
    assert "turned" not in log.text


def test_msras_stride_is_warned_of(msra, tmp_path, log):
    """Shapes are equal, so that only the file's origin tells."""
    model = load(write(tmp_path / "R-50.pkl", caffe2(msra)))
    (text,) = (r.getMessage() for r in log.records if "instead of" in r.getMessage())
    assert "MODEL.RESNETS.STRIDE_IN_1X1 False instead of True" in text
    assert_features_equal(model, msra, (1.0, 1.0, 1.0), bgr=True, stride_in_1x1=False)


@pytest.mark.parametrize("in_blobs", [False, True])
def test_detectrons_fused_norms(theirs, tmp_path, in_blobs):
    """Scale and shift alone: their statistics are those of a fresh BatchNorm."""
    theirs.conv1.bias = None
    for norm in norms(theirs):
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
    blobs = caffe2(theirs, fused=True)
    assert {"res_conv1_bn_s", "res2_0_branch2a_bn_b"} <= set(blobs)
    if in_blobs:  # of a detector's file
        blobs |= {f"{name}_momentum": value for name, value in blobs.items()}
        blobs = {"blobs": blobs, "cfg": "MODEL: {TYPE: generalized_rcnn}"}
    model = load(write(tmp_path / "R-50.pkl", blobs), *IN_1X1)
    assert_features_equal(model, theirs, (1.0, 1.0, 1.0), bgr=True, stride_in_1x1=True)


def converted(model):
    """As Detectron2's tools/convert-torchvision-to-d2.py writes it."""
    state = {}
    for name, value in model.state_dict().items():
        if "layer" not in name:
            name = f"stem.{name}"
        name = re.sub(r"layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
        name = re.sub(r"bn(\d)", r"conv\1.norm", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        state[name] = value.numpy()
    return {"model": state, "__author__": "torchvision", "matching_heuristics": True}


@pytest.mark.parametrize("opts", [[], [*IN_1X1, "MODEL.PIXEL_STD", "[1.0, 2.0, 4.0]"]])
def test_torchvisions_features(theirs, tmp_path, log, opts):
    theirs.conv1.bias = None
    data = converted(theirs)
    assert {"stem.conv1.norm.bias", "res3.0.shortcut.norm.weight", "stem.fc.bias"} <= set(
        data["model"]
    )
    model = load(write(tmp_path / "R-50.pkl", data), *opts)
    assert_features_equal(model, theirs, STD, bgr=False, stride_in_1x1=bool(opts))
    assert "Found Detectron2's ResNet, as torchvision's" in log.text
    assert "turned" not in log.text and "stem.fc" in log.text
    warned = "MODEL.RESNETS.STRIDE_IN_1X1 True instead of False" in log.text
    assert warned == bool(opts)
