"""Backbones, extra layers and heads: shapes, torchvision's outputs, and the paper's formulas."""

from pathlib import Path

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.models.vgg import cfgs, make_layers

from ssd.config import load_config
from ssd.modeling import VGG16, L2Norm, MobileNetV2, SSDBackbone, SSDHead, SSDLiteHead

BASES = Path(__file__).parents[2] / "labs/_base_"
VGG_OUTPUTS = ["conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3", "fc7"]
STAGES = [f"stage{number}" for number in range(1, 8)] + ["conv2"]


def run(backbone, height, width=None):
    """Output sizes of an image without data."""
    with torch.device("meta"):
        image = torch.empty(2, 3, height, width or height)
    return {name: tuple(x.shape) for name, x in backbone.to("meta").eval()(image).items()}


@pytest.mark.parametrize(
    "make",
    [
        lambda: VGG16(out_features=VGG_OUTPUTS),
        lambda: MobileNetV2(out_features=STAGES),
        lambda: MobileNetV2(out_features=STAGES, width_mult=0.35),
        lambda: SSDBackbone(
            bottom_up=VGG16(out_features=VGG_OUTPUTS),
            in_features=["conv3_3", "fc7"],
            extra_layers=[[8, 16, 3, 2, 1], [8, 24, 3, 2, 1]],
            l2_norm_features=["conv3_3"],
        ),
        lambda: SSDBackbone(
            bottom_up=MobileNetV2(width_mult=0.25),
            in_features=["stage5", "conv2"],
            extra_layers=[[8, 16, 3, 2, 1]],
            lite=True, norm="BN", activation="ReLU6",
        ),
    ],
    ids=["vgg", "mobilenet", "mobilenet0.35", "ssd", "ssdlite"],
)  # fmt: skip
def test_output_shape_is_true(make):
    with torch.device("meta"):
        backbone = make()
    shapes, outputs = backbone.output_shape(), run(backbone, 256, 128)
    assert list(shapes) == list(outputs)
    for name, spec in shapes.items():
        size = (256 // spec.stride, 128 // spec.stride)
        assert outputs[name] == (2, spec.channels, *size), name


def test_pools_round_up_to_the_papers_maps():
    with torch.device("meta"):
        vgg = VGG16(out_features=["conv3_3", "conv4_3", "conv5_3", "fc7"])
    sides = [shape[-1] for shape in run(vgg, 300).values()]
    assert sides == [75, 38, 19, 19]


def test_vgg_equals_torchvisions_up_to_conv5_3():
    torch.manual_seed(0)
    theirs = make_layers(cfgs["D"])[:30]  # up to the ReLU after conv5_3
    ours = VGG16(out_features=["conv5_3"]).eval()
    convolutions = {name: x for name, x in ours.state_dict().items() if name.startswith("conv")}
    ours.load_state_dict(dict(zip(convolutions, theirs.state_dict().values())), strict=False)
    image = torch.randn(1, 3, 64, 48)  # torchvision's pools round down: multiples of 16 agree
    with torch.no_grad():
        expected, actual = theirs(image), ours(image)["conv5_3"]
    assert expected.std() > 0.1 * expected.mean() > 0
    torch.testing.assert_close(actual, expected)


def test_reduced_fully_connected_layers():
    with torch.device("meta"):
        vgg = VGG16()
    assert vgg.fc6.weight.shape == (1024, 512, 3, 3)
    assert vgg.fc6.dilation == vgg.fc6.padding == (6, 6)
    assert vgg.fc7.weight.shape == (1024, 1024, 1, 1)


def test_mobilenet_equals_torchvisions():
    torch.manual_seed(0)
    theirs = mobilenet_v2().features.eval()
    for module in theirs.modules():  # statistics that matter
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    ours = MobileNetV2(out_features=["stage4", "conv2"]).eval()
    assert sum(x.numel() for x in ours.parameters()) == 2_223_872
    # the layers stand in the same order
    assert len(ours.state_dict()) == len(theirs.state_dict())
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values())))
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        outputs = ours(image)
        torch.testing.assert_close(outputs["stage4"], theirs[:11](image))
        torch.testing.assert_close(outputs["conv2"], theirs(image))
    assert outputs["conv2"].std() > 0.01


@pytest.mark.parametrize("width_mult", [0.35, 0.5, 1.4])
def test_mobilenet_width_equals_torchvisions(width_mult):
    with torch.device("meta"):
        theirs = mobilenet_v2(width_mult=width_mult).features
        ours = MobileNetV2(width_mult=width_mult)
    expected = [x.shape for x in theirs.state_dict().values()]
    assert [x.shape for x in ours.state_dict().values()] == expected


def test_mobilenet_without_normalisation_has_biases():
    with torch.device("meta"):
        names = list(MobileNetV2(norm="").state_dict())
    assert "stage2.0.project.bias" in names and not any("norm" in name for name in names)


@pytest.mark.parametrize(
    "make, last",
    [
        (lambda: VGG16(out_features=["conv4_3"]), "conv4_3"),
        (lambda: VGG16(out_features=["conv5_3", "conv2_2"]), "conv5_3"),
        (lambda: MobileNetV2(out_features=["stage5"]), "stage5"),
        (lambda: MobileNetV2(out_features=["stage7", "stage3"]), "stage7"),
    ],
)
def test_no_layer_without_an_output(make, last):
    """DistributedDataParallel refuses parameters that get no gradient."""
    with torch.device("meta"):
        assert list(dict(make().named_children()))[-1] == last


def test_l2_norm_formula():
    layer = L2Norm(3)
    assert layer.weight.tolist() == [20.0] * 3
    layer.weight.data = torch.tensor([1.0, 2, 3])
    x = torch.tensor([2.0, 3, 6]).view(1, 3, 1, 1).repeat(2, 1, 1, 2)
    x[1, :, 0, 1] = 0  # a dead cell
    expected = torch.tensor([2 / 7, 6 / 7, 18 / 7])  # the norm of (2, 3, 6) is 7
    for n, column in ((0, 0), (0, 1), (1, 0)):
        torch.testing.assert_close(layer(x)[n, :, 0, column], expected)
    assert layer(x)[1, :, 0, 1].tolist() == [0, 0, 0]


def test_l2_norm_in_half_precision_does_not_overflow():
    x = torch.full((1, 512, 1, 1), 300.0, dtype=torch.float16)  # the sum of squares is 46 million
    expected = torch.full_like(x, 20 / 512**0.5)
    torch.testing.assert_close(L2Norm(512)(x), expected)


def test_only_the_chosen_features_are_normalised():
    """The extra layers read the map before its L2Norm, as in Caffe."""
    torch.manual_seed(0)
    bottom_up = MobileNetV2(width_mult=0.25).eval()
    backbone = SSDBackbone(
        bottom_up=bottom_up, in_features=["stage5", "conv2"], l2_norm_features=["conv2"],
        extra_layers=[[8, 16, 3, 2, 1]],
    ).eval()  # fmt: skip
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        raw, outputs = bottom_up(image), backbone(image)
        torch.testing.assert_close(outputs["stage5"], raw["stage5"])
        torch.testing.assert_close(outputs["conv2"], L2Norm(1280)(raw["conv2"]))
        torch.testing.assert_close(outputs["extra1"], backbone.extra_layers[0](raw["conv2"]))


@pytest.mark.parametrize("lite", [False, True])
def test_kinds_of_extra_layers(lite):
    with torch.device("meta"):
        bottom_up = MobileNetV2(width_mult=0.25)
        backbone = SSDBackbone(
            bottom_up=bottom_up, in_features=["conv2"], extra_layers=[[8, 16, 3, 2, 1]], lite=lite,
            norm="BN" if lite else "", activation="ReLU6" if lite else "ReLU",
        )  # fmt: skip
    (layer,) = backbone.extra_layers
    shapes = [tuple(conv.weight.shape) for conv in layer]
    if lite:
        assert shapes == [(8, 1280, 1, 1), (8, 1, 3, 3), (16, 8, 1, 1)] and layer[1].groups == 8
    else:
        assert shapes == [(8, 1280, 1, 1), (16, 8, 3, 3)]
    activation = nn.ReLU6 if lite else nn.ReLU
    assert all(isinstance(conv.activation, activation) for conv in layer)
    assert all(
        (conv.bias is None) == isinstance(conv.norm, nn.BatchNorm2d) == lite for conv in layer
    )


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: VGG16(out_features=["conv6"]), "MODEL.SSD.IN_FEATURES.*'conv6'.*conv4_3"),
        (lambda: VGG16(out_features=[]), "MODEL.SSD.IN_FEATURES"),
        (lambda: MobileNetV2(out_features=["stage8"]), "MODEL.SSD.IN_FEATURES.*'stage8'"),
        (lambda: MobileNetV2(width_mult=0), "MODEL.MOBILENET.WIDTH_MULT must be positive, got 0"),
        (lambda: ssd_vgg(in_features=["res4"]), "MODEL.SSD.IN_FEATURES.*'res4'.*'fc7'"),
        (lambda: ssd_vgg(in_features=[]), "MODEL.SSD.IN_FEATURES is empty"),
        (lambda: ssd_vgg(l2_norm_features=["conv4_3"]), "MODEL.SSD.L2_NORM_FEATURES.*'conv4_3'"),
        (lambda: ssd_vgg(extra_layers=[[8, 16]]), r"MODEL.SSD.EXTRA_LAYERS.*got \[8, 16\]"),
        (lambda: ssd_vgg(activation="Relu"), "MODEL.SSD.ACTIVATION.*'Relu'"),
    ],
)
def test_errors_name_the_key(make, key):
    with torch.device("meta"), pytest.raises(ValueError, match=key):
        make()


def ssd_vgg(**kwargs):
    kwargs = {"in_features": ["fc7"], "extra_layers": [[8, 16, 3, 2, 1]], **kwargs}
    return SSDBackbone(bottom_up=VGG16(), **kwargs)


def test_a_detectron2_resnet_by_config_alone():
    opts = """MODEL.SSD.BOTTOM_UP build_resnet_backbone MODEL.RESNETS.OUT_FEATURES ['res3','res4']
        MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.SSD.IN_FEATURES
        ['res3','res4'] MODEL.SSD.L2_NORM_FEATURES ['res3']""".split()
    backbone = build_backbone(load_config(str(BASES / "ssd300_vgg16.yaml"), opts))
    sides = {name: shape[1:3] for name, shape in run(backbone, 300).items()}
    assert sides == {
        "res3": (128, 38), "res4": (256, 19), "extra1": (512, 10), "extra2": (256, 5),
        "extra3": (256, 3), "extra4": (256, 1),
    }  # fmt: skip
    assert backbone.output_shape()["res4"] == ShapeSpec(channels=256, stride=16)


def test_head_outputs_are_flattened_in_the_default_boxes_order():
    head = SSDHead([8, 16], [4, 6], num_classes=3)
    logits, deltas = head([torch.randn(2, 8, 4, 5), torch.randn(2, 16, 2, 3)])
    assert [x.shape[1] for x in logits] == [4 * 4, 6 * 4]
    assert [x.shape[1] for x in deltas] == [4 * 4, 6 * 4]
    flat_logits, flat_deltas = head.flatten(logits, deltas)
    assert flat_logits.shape == flat_deltas.shape == (2, 4 * 5 * 4 + 2 * 3 * 6, 4)
    # second level, row 1, column 2, shape 5: outputs 5·4 … 5·4 + 3 of that cell
    row = 4 * 5 * 4 + (1 * 3 + 2) * 6 + 5
    assert flat_logits[1, row].tolist() == logits[1][1, 20:24, 1, 2].tolist()
    assert flat_deltas[1, row].tolist() == deltas[1][1, 20:24, 1, 2].tolist()


def test_ssdlite_head_is_depthwise_separable():
    head = SSDLiteHead([8], [6], 3, norm="BN", activation="ReLU6")
    for predictor, outputs in ((head.cls_predictors[0], 24), (head.box_predictors[0], 24)):
        depthwise, pointwise = predictor
        assert depthwise.weight.shape == (8, 1, 3, 3) and depthwise.groups == 8
        assert isinstance(depthwise.norm, nn.BatchNorm2d) and depthwise.bias is None
        assert isinstance(depthwise.activation, nn.ReLU6)
        assert pointwise.weight.shape == (outputs, 8, 1, 1) and pointwise.bias is not None
