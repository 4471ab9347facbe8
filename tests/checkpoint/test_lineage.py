"""Name tables: one to one, complete for the lab that fits, and exact in both directions."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from torchvision.models.detection import ssd300_vgg16, ssdlite320_mobilenet_v3_large
from weights import mmdet_shapes

from ssd import model_zoo
from ssd.checkpoint.lineage import BODY, Lineage, _scale_input, heads
from ssd.checkpoint.published import PUBLISHED
from ssd.checkpoint.recognition import BACKBONES, DETECTORS, recognise
from ssd.config import load_config

LABS = {weights.lineage: (weights.lab, weights.opts) for weights in PUBLISHED.values()}
LABS["qfgaohao_vgg_l2norm"] = ("ssd_vgg16_size300_voc0712", ())  # no longer published
# Backbones to a lab that they fill.
BODIES = {
    "torchvision_vgg16": "ssd_vgg16_size300",
    "torchvision_vgg16_features": "",  # no lab is without fc6 and fc7
    "vgg16_reducedfc": "ssd_vgg16_size300",
    "vgg16_features": "",
    "caffe_vgg16": "ssd_vgg16_size300",
    "caffe_vgg16_reducedfc": "ssd_vgg16_size300",
    "torchvision_mobilenetv2": "ssdlite_mobilenetv2_size320_voc0712",
    "torchvision_mobilenetv3_classifier": "ssdlite_mobilenetv3_size320",
    "timm_mobilenetv2": "ssdlite_mobilenetv2_size320_voc0712",
    "timm_mobilenetv3": "ssdlite_mobilenetv3_size320",
    "d-li14_mobilenetv3": "ssdlite_mobilenetv3_size320_voc0712",
    "qfgaohao_mobilenetv1_classifier": "ssd_mobilenetv1_size300_voc0712",
    "qfgaohao_mobilenetv2_classifier": "ssdlite_mobilenetv2_size300_voc0712",
    "torchvision_resnet": "ssd_resnet50_size300",
    "detectron2_resnet": "ssd_resnet50_size300",
    **{
        f"detectron2_{place}resnet_{kind}": "ssd_resnet50_size300"
        for place in ("", "fpn_", "c4_")
        for kind in ("msra", "resnext")
    },
}
# Their tables include another project's, whose names for these layers such files don't have.
TWICE = {"torchvision_vgg16": {"fc6", "fc7"}, "d-li14_mobilenetv3": {"conv2", "conv2.norm"}}


def title(lineage):
    return lineage.title.replace(" ", "_")


def shapes_of(lab, opts=()):
    """The lab's model's parameters, without values."""
    cfg = load_config(model_zoo.get_config_file(lab), ["MODEL.DEVICE", "meta", *opts])
    with torch.device("meta"):
        return build_model(cfg).state_dict()


shapes_of_lab = functools.lru_cache(maxsize=None)(shapes_of)


def numbered(shapes):
    """Values unlike one another, in tensors made small but for their outputs and RGB."""
    state = {}
    for number, (name, x) in enumerate(shapes.items()):
        small = (*x.shape[:1], *(min(size, 3) for size in x.shape[1:]))
        values = torch.arange(torch.Size(small).numel(), dtype=x.dtype)
        state[name] = values.view(small) + 10 * number
    return state


@pytest.fixture(scope="module", params=DETECTORS, ids=title)
def detector(request):
    """(lineage, the fitting lab's parameters without values)."""
    lab, opts = LABS[request.param.key]
    return request.param, shapes_of(lab, opts)


@pytest.mark.parametrize("lineage", [*DETECTORS, *BACKBONES], ids=title)
def test_each_of_our_layers_has_one_name(lineage):
    ours = list(lineage.names.values())
    twice = {name.removeprefix(BODY) for name in ours if ours.count(name) > 1}
    assert twice == TWICE.get(lineage.key, set())


def test_round_trip_is_exact(detector, assert_equal):
    lineage, shapes = detector
    state = numbered(shapes)
    theirs = lineage.from_ours(state)
    assert not theirs.keys() & state.keys()
    assert set(map(lineage.our_name, theirs)) >= set(state)
    assert_equal(lineage.to_ours(theirs), state)


def test_a_file_is_recognised_by_its_names(detector):
    lineage, shapes = detector
    state = numbered(shapes)
    assert recognise(state) is None, "ours"
    # of mmdet_old both lineages have these names; here the background's biases are the highest
    assert recognise(lineage.from_ours(state)) is lineage


def test_conversion_changes_no_tensor_of_the_file(detector, assert_equal):
    lineage, shapes = detector
    theirs = lineage.from_ours(numbered(shapes))
    copy = {name: x.clone() for name, x in theirs.items()}
    lineage.to_ours(theirs, "BGR", (2.0, 3.0, 4.0))
    assert_equal(theirs, copy)
    ours = numbered(shapes)
    copy = {name: x.clone() for name, x in ours.items()}
    lineage.from_ours(ours)
    assert_equal(ours, copy)


def test_detectors_follow_the_order_of_channels_but_no_scale(detector, assert_equal):
    lineage, shapes = detector
    theirs = lineage.from_ours(numbered(shapes))
    rgb = lineage.to_ours(theirs)
    assert_equal(lineage.to_ours(theirs, "RGB", (2.0, 3.0, 4.0)), rgb)
    bgr = lineage.to_ours(theirs, "BGR")
    (first,) = (name for name, x in shapes.items() if x.dim() == 4 and x.shape[1] == 3)
    bgr[first] = bgr[first].flip(1)
    assert_equal(bgr, rgb)


def test_a_network_of_another_lineage_has_no_names(detector):
    lineage, shapes = detector
    with pytest.raises(ValueError, match=rf"{re.escape(lineage.title)} has no name for student\.w"):
        lineage.from_ours({**numbered(shapes), "student.weight": torch.ones(1)})


def test_a_parameter_that_we_do_not_know_keeps_its_name(detector):
    lineage, shapes = detector
    theirs = {**lineage.from_ours(numbered(shapes)), "teacher.weight": torch.ones(1)}
    result = lineage.to_ours(theirs)
    assert set(result) == {*shapes, "teacher.weight"}
    assert result["teacher.weight"] is theirs["teacher.weight"]


@pytest.mark.parametrize("lineage", BACKBONES, ids=title)
def test_a_backbones_names_fill_the_lab_that_fits(lineage):
    lab = BODIES[lineage.key]
    assert all(name.startswith(BODY) for name in lineage.names.values())
    if lab:
        layers = {n.rpartition(".")[0] for n in shapes_of_lab(lab) if n.startswith(BODY)}
        assert layers <= set(lineage.names.values())


def test_a_scaled_first_layer_has_the_same_output_behind_its_norm():
    """Also where a variance is as small as epsilon."""
    torch.manual_seed(0)
    state = {"c.weight": torch.rand(4, 3, 1, 1), "c.norm.running_mean": torch.rand(4)}
    state["c.norm.running_var"] = torch.tensor([1e-3, 1e-2, 0.1, 1.0])
    scale = torch.tensor([0.02, 0.025, 0.03])
    scaled = dict(state)
    _scale_input(scaled, "c", scale, 1e-3)

    def output(x, state):
        norm = (state["c.norm.running_mean"], state["c.norm.running_var"])
        return F.batch_norm(F.conv2d(x, state["c.weight"]), *norm, eps=1e-3)

    x = torch.rand(2, 3, 5, 5) * 255
    expected = output(x * scale[:, None, None], state)
    torch.testing.assert_close(output(x, scaled), expected, rtol=1e-4, atol=1e-4)


def by_key(key):
    return next(lineage for lineage in DETECTORS if lineage.key == key)


def shapes_by_name(state):
    return {name: tuple(x.shape) for name, x in state.items()}


GOLDEN = {
    "ssd300": ("mmdet_vgg", "ssd_vgg16_size300_120e"),
    "ssd512": ("mmdet_vgg", "ssd_vgg16_size512_120e"),
    "ssdlite": ("mmdet_mobilenetv2", "ssdlite_mobilenetv2_size320_600e"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_names_and_shapes_are_mmdetections(name):
    key, lab = GOLDEN[name]
    ours = shapes_of_lab(lab)
    assert shapes_by_name(by_key(key).from_ours(ours)) == mmdet_shapes(name)
    theirs = {n: torch.empty(s, device="meta") for n, s in mmdet_shapes(name).items()}
    assert recognise(theirs) is by_key(key)
    assert shapes_by_name(by_key(key).to_ours(theirs)) == shapes_by_name(ours)


@pytest.mark.parametrize("name", ["ssd300", "ssd512"])
def test_old_names_are_those_that_mmdetection_upgrades(name):
    """By the rules of its tools/model_converters/upgrade_ssd_version.py."""

    def upgraded(name):
        if "l2_norm" in name:
            return "neck.l2_norm.weight"
        if match := re.fullmatch(r"backbone\.extra\.(\d+)\.(\w+)", name):
            number = int(match[1])
            return f"neck.extra_layers.{number // 2}.{number % 2}.conv.{match[2]}"
        return re.sub(r"(bbox_head\.(?:cls|reg)_convs\.\d)\.", r"\1.0.", name)

    old = by_key("mmdet_old").from_ours(shapes_of_lab(GOLDEN[name][1]))
    assert {upgraded(n): tuple(x.shape) for n, x in old.items()} == mmdet_shapes(name)


@pytest.mark.parametrize(
    "key, make",
    [
        ("torchvision_vgg", ssd300_vgg16),
        ("torchvision_mobilenetv3", ssdlite320_mobilenet_v3_large),
    ],
)
def test_names_and_shapes_are_torchvisions(key, make):
    with torch.device("meta"):
        theirs = make(weights=None, weights_backbone=None, num_classes=91).state_dict()
    lab, opts = LABS[key]
    ours = shapes_of(lab, [*opts, "MODEL.SSD.NUM_CLASSES", "90"])
    assert shapes_by_name(by_key(key).from_ours(ours)) == shapes_by_name(theirs)
    assert recognise(theirs) is by_key(key)
    assert shapes_by_name(by_key(key).to_ours(theirs)) == shapes_by_name(ours)


# --- A lineage of this test -------------------------------------------------------------------

NAMES = {**dict(heads("cls.{}", "box.{}")), "conv": BODY + "conv1", "bn": BODY + "conv1.norm"}


def make(**kwargs):
    return Lineage("test", "a test's", ("cls.0.weight",), NAMES, **kwargs)


def test_background_goes_from_first_to_last_and_back():
    """Two default boxes of two classes: background, a, b → a, b, background."""
    bias = torch.tensor([0.0, 1, 2, 10, 11, 12])
    weight = bias[:, None, None, None] + torch.tensor([0.0, 100])[:, None, None]
    theirs = {"cls.0.bias": bias, "cls.0.weight": weight, "box.0.bias": torch.zeros(8)}
    result = make(background_first=True).to_ours(theirs)
    assert result["head.cls_predictors.0.bias"].tolist() == [1, 2, 0, 11, 12, 10]
    assert result["head.cls_predictors.0.weight"].shape == (6, 2, 1, 1)
    first = result["head.cls_predictors.0.weight"][:, 1, 0, 0]
    assert first.tolist() == [101, 102, 100, 111, 112, 110]
    back = make(background_first=True).from_ours(result)
    assert torch.equal(back["cls.0.bias"], bias) and torch.equal(back["cls.0.weight"], weight)
    unmoved = make().to_ours(theirs)
    assert torch.equal(unmoved["head.cls_predictors.0.bias"], bias)


def test_background_of_one_default_box_and_one_class():
    theirs = {"cls.0.bias": torch.tensor([5.0, 6]), "box.0.bias": torch.zeros(4)}
    theirs["cls.0.weight"] = torch.tensor([5.0, 6])[:, None, None, None]
    result = make(background_first=True).to_ours(theirs)
    assert result["head.cls_predictors.0.bias"].tolist() == [6, 5]


def batch_norm(x, state, name):
    names = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state[f"{name}.{leaf}"] for leaf in names))


def conv_and_norm():
    torch.manual_seed(0)
    state = {"conv.weight": torch.randn(4, 3, 3, 3), "conv.bias": torch.randn(4)}
    state |= {f"bn.{leaf}": torch.randn(4) for leaf in ("running_mean", "weight", "bias")}
    return {**state, "bn.running_var": torch.rand(4) + 0.5}


def test_a_bias_in_front_of_batch_norm_goes_into_its_mean():
    state, image = conv_and_norm(), torch.randn(1, 3, 8, 8)
    result = make().to_ours(state)
    assert f"{NAMES['conv']}.bias" not in result
    expected = batch_norm(F.conv2d(image, state["conv.weight"], state["conv.bias"]), state, "bn")
    actual = F.conv2d(image, result[NAMES["conv"] + ".weight"])
    torch.testing.assert_close(batch_norm(actual, result, NAMES["bn"]), expected)


@pytest.mark.parametrize("theirs, ours", [("RGB", "RGB"), ("RGB", "BGR"), ("BGR", "RGB")])
@pytest.mark.parametrize("with_norm", [False, True])
def test_first_layer_for_another_scale_and_order(theirs, ours, with_norm):
    """Their input: in their order, divided by 2, 3, 4; ours: in ours, divided by 5, 6, 7."""
    state = {n: x for n, x in conv_and_norm().items() if with_norm or n.startswith("conv")}
    lineage = make(input_format=theirs, input_std=(2.0, 3.0, 4.0))
    result = lineage.to_ours(state, ours, (5.0, 6.0, 7.0))
    image = 20 * torch.randn(1, 3, 8, 8)  # in their order, without its mean

    def std(*values):
        return torch.tensor(values)[:, None, None]

    expected = F.conv2d(image / std(2.0, 3, 4), state["conv.weight"], state["conv.bias"])
    image = (image if theirs == ours else image.flip(1)) / std(5.0, 6, 7)
    name = NAMES["conv"]
    actual = F.conv2d(image, result[f"{name}.weight"], result.get(f"{name}.bias"))
    if with_norm:
        # the common part of the scale is in the statistics: eps weighs otherwise
        expected = batch_norm(expected, state, "bn")
        actual = batch_norm(actual, result, NAMES["bn"])
        ratio = result[f"{name}.weight"].norm() / state["conv.weight"].norm()
        assert 0.8 < ratio < 1.25, "of the scales' ratio 2"
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
