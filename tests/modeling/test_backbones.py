"""Backbones, extra layers and heads: shapes, torchvision's outputs, and the paper's formulas."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone
from torch import nn
from torchvision.models import mobilenet_v2, mobilenet_v3_large, resnet50
from torchvision.models.vgg import cfgs, make_layers

from ssd.config import load_config
from ssd.modeling import VGG16, L2Norm, SSDBackbone, SSDHead, SSDLiteHead
from ssd.modeling.blocks import InvertedResidual, pad_as_tensorflow
from ssd.modeling.vgg import _MaxPool

BASES = Path(__file__).parents[2] / "labs/_base_"
VGG_OUTPUTS = ["conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3", "fc7"]
V1_OUTPUTS = [f"stage{number}" for number in range(1, 6)]
V2_OUTPUTS = (
    "stage1 stage2_expand stage2 stage3_expand stage3 stage4_expand stage4 stage5 stage6_expand "
    "stage6 stage7 conv2"
).split()
V3_OUTPUTS = [name for name in V2_OUTPUTS if name != "stage7"]


def build(name, outputs, *opts):
    """A backbone of the registry by config keys."""
    cfg = load_config("", ["MODEL.SSD.IN_FEATURES", list(outputs), *opts])
    return BACKBONE_REGISTRY.get(f"build_{name}_backbone")(cfg, ShapeSpec(channels=3))


def mobilenet_v2_of_width(width_mult, outputs=("stage5", "conv2")):
    return build("mobilenetv2", outputs, "MODEL.MOBILENET.WIDTH_MULT", width_mult)


def resnet(*opts, outputs=("res3", "res4")):
    """ResNet-50 with the stride in the 3×3 convolution, as torchvision's."""
    names = ["MODEL.RESNETS.OUT_FEATURES", list(outputs), "MODEL.RESNETS.STRIDE_IN_1X1", False]
    return build("ssd_resnet", outputs, *names, *opts)


def run(backbone, height, width=None):
    """Output sizes of an image without data."""
    with torch.device("meta"):
        image = torch.empty(2, 3, height, width or height)
    return {name: tuple(x.shape) for name, x in backbone.to("meta").eval()(image).items()}


@pytest.mark.parametrize(
    "make",
    [
        lambda: VGG16(out_features=VGG_OUTPUTS),
        lambda: build("mobilenetv1", V1_OUTPUTS),
        lambda: build("mobilenetv2", V2_OUTPUTS),
        lambda: mobilenet_v2_of_width(0.35, V2_OUTPUTS),
        lambda: build("mobilenetv3", V3_OUTPUTS),
        lambda: build("mobilenetv3", V3_OUTPUTS, "MODEL.MOBILENET.REDUCED_TAIL", True),
        lambda: resnet(outputs=["res2", "res3", "res4", "res5"]),
        lambda: resnet("MODEL.RESNETS.RES4_STRIDE", 1, outputs=["res3", "res4", "res5"]),
        lambda: build("regnet", ["stem", "s1", "s2", "s3", "s4"]),
        lambda: SSDBackbone(
            bottom_up=VGG16(out_features=VGG_OUTPUTS),
            in_features=["conv3_3", "fc7"],
            extra_layers=[[8, 16, 3, 2, 1], [8, 24, 3, 2, 1]],
            l2_norm_features=["conv3_3"],
        ),
        lambda: SSDBackbone(
            bottom_up=mobilenet_v2_of_width(0.25),
            in_features=["stage5", "conv2"],
            extra_layers=[[8, 16, 3, 2, 1]],
            block="separable", norm="BN", activation="ReLU6",
        ),
    ],
    ids="vgg v1 v2 v2x0.35 v3 v3-reduced resnet resnet-res4 regnet ssd ssdlite".split(),
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


def test_tensorflows_padding_keeps_the_map_sizes():
    with torch.device("meta"):
        backbone = SSDBackbone(
            bottom_up=build("mobilenetv2", ["stage1", "stage2", "stage3", "stage5", "stage7"]),
            in_features=["stage1", "stage2", "stage3", "stage5", "stage7"],
            extra_layers=[[8, 16, 3, 2, 1]] * 4, block="separable",
        )  # fmt: skip
    sides = [150, 75, 38, 19, 10, 5, 3, 2, 1]
    assert [shape[-1] for shape in run(backbone, 300).values()] == sides
    pad_as_tensorflow(backbone)
    assert [shape[-1] for shape in run(backbone, 300).values()] == sides


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


def make_alive(network):
    """Weights that keep the signal's size, and statistics that matter."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def assert_outputs_equal(ours, theirs, modules, weights=None):
    """Each of ``ours``' outputs against the one of a module of ``theirs``, {name: module}.

    The layers stand in the same order, unless ``weights`` gives those of each of ``ours``.
    """
    make_alive(theirs)
    if weights is None:
        assert len(ours.state_dict()) == len(theirs.state_dict())
        weights = dict(zip(ours.state_dict(), theirs.state_dict().values()))
    ours.eval().load_state_dict(weights)
    expected = {}

    def keep(name):
        return lambda module, args, output: expected.update({name: output.clone()})

    for name, module in modules.items():
        module.register_forward_hook(keep(name))
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        theirs(image)
        outputs = ours(image)
    assert set(outputs) == set(expected)
    for name, output in outputs.items():
        assert output.std() > 0.01, name
        torch.testing.assert_close(output, expected[name], msg=lambda text: f"{name}: {text}")


def test_mobilenetv1_equals_table_1():
    def conv(inputs, outputs, kernel, stride=1, groups=1):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )

    theirs, channels = nn.Sequential(conv(3, 32, 3, 2)), 32
    rows = [(1, 64), (2, 128), (1, 128), (2, 256), (1, 256), (2, 512)] + [(1, 512)] * 5
    for stride, width in [*rows, (2, 1024), (1, 1024)]:
        theirs.append(conv(channels, channels, 3, stride, groups=channels))
        theirs.append(conv(channels, width, 1))
        channels = width
    ours = build("mobilenetv1", V1_OUTPUTS)
    assert sum(x.numel() for x in ours.parameters()) == 3_206_976
    assert_outputs_equal(
        ours, theirs, {f"stage{n}": theirs[i] for n, i in enumerate((2, 6, 10, 22, 26), 1)}
    )


def test_mobilenetv2_equals_torchvisions():
    theirs = mobilenet_v2().features
    ours = build("mobilenetv2", V2_OUTPUTS)
    assert sum(x.numel() for x in ours.parameters()) == 2_223_872
    assert ours.output_shape()["stage6_expand"] == ShapeSpec(channels=576, stride=16)
    modules = {f"stage{n}": theirs[i] for n, i in enumerate((1, 3, 6, 10, 13, 16, 17), 1)}
    modules |= {f"stage{n}_expand": theirs[i].conv[0] for n, i in {2: 2, 3: 4, 4: 7, 6: 14}.items()}
    assert_outputs_equal(ours, theirs, {**modules, "conv2": theirs[18]})


@pytest.mark.parametrize("reduced, channels", [(False, (160, 960)), (True, (80, 480))])
def test_mobilenetv3_equals_torchvisions(reduced, channels):
    theirs = mobilenet_v3_large(norm_layer=nn.BatchNorm2d, reduced_tail=reduced).features
    ours = build("mobilenetv3", V3_OUTPUTS, "MODEL.MOBILENET.REDUCED_TAIL", reduced)
    shapes = ours.output_shape()
    assert shapes["stage6_expand"] == ShapeSpec(channels=672, stride=16)
    assert [shapes[name].channels for name in ("stage6", "conv2")] == list(channels)
    modules = {f"stage{n}": theirs[i] for n, i in enumerate((1, 3, 6, 10, 12, 15), 1)}
    modules |= {
        f"stage{n}_expand": theirs[i].block[0] for n, i in {2: 2, 3: 4, 4: 7, 6: 13}.items()
    }
    assert_outputs_equal(ours, theirs, {**modules, "conv2": theirs[16]})


def test_late_pool_gives_conv5_the_resolution_of_conv4():
    with torch.device("meta"):
        vgg = VGG16(out_features=["conv4_3", "conv5_3", "fc7"], late_pool=True)
        sizes = {name: x.shape[-1] for name, x in vgg(torch.empty(1, 3, 300, 300)).items()}
    assert sizes == {"conv4_3": 38, "conv5_3": 38, "fc7": 19}
    assert {name: x.stride for name, x in vgg.output_shape().items()} == {
        "conv4_3": 8, "conv5_3": 8, "fc7": 16,
    }  # fmt: skip


@pytest.mark.parametrize("args", [(2, 2, 0, 1, True), (3, 1, 1)])
def test_pools_for_gpus_keep_no_indices_and_have_the_same_gradients(args):
    x, found = torch.randn(2, 4, 9, 13, requires_grad=True), []
    for pool in (_MaxPool.apply, F.max_pool2d):
        kept = set()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.add(x.dtype) or x, lambda x: x
        ):
            y = pool(x, *args)
        assert (torch.int64 in kept) == (pool is F.max_pool2d)
        (gradient,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        found.append((y, gradient, *torch.autograd.grad(gradient.square().sum(), x)))
    assert all(map(torch.equal, *found))


def test_squeeze_first_reaches_every_block_that_squeezes():
    with torch.device("meta"):
        network = build("mobilenetv3", ["conv2"], "MODEL.MOBILENET.SQUEEZE_FIRST", True)
    blocks = [block for block in network.modules() if isinstance(block, InvertedResidual)]
    squeezes = [not isinstance(block.squeeze, nn.Identity) for block in blocks]
    assert squeezes == [False] * 3 + [True] * 3 + [False] * 4 + [True] * 5
    assert [block.depthwise.activation is None for block in blocks] == squeezes


@pytest.mark.parametrize("width_mult", [0.35, 0.5, 1.4])
@pytest.mark.parametrize(
    "name, make", [("mobilenetv2", mobilenet_v2), ("mobilenetv3", mobilenet_v3_large)]
)
def test_mobilenet_width_equals_torchvisions(name, make, width_mult):
    with torch.device("meta"):
        theirs = make(width_mult=width_mult).features
        ours = build(name, ["conv2"], "MODEL.MOBILENET.WIDTH_MULT", width_mult)
    expected = [x.shape for x in theirs.state_dict().values()]
    assert [x.shape for x in ours.state_dict().values()] == expected


@pytest.mark.parametrize("name", ["mobilenetv1", "mobilenetv2", "mobilenetv3"])
def test_mobilenet_without_normalisation_has_biases(name):
    with torch.device("meta"):
        network = build(name, ["stage3"], "MODEL.MOBILENET.NORM", "")
    assert not any("norm" in key for key in network.state_dict())
    assert all(m.bias is not None for m in network.modules() if isinstance(m, nn.Conv2d))


def test_resnet_with_res4_of_stride_1_equals_torchvisions():
    theirs = resnet50()
    for layer in (theirs.layer3[0].conv2, theirs.layer3[0].downsample[0]):
        layer.stride = (1, 1)
    ours = resnet("MODEL.RESNETS.RES4_STRIDE", 1, "MODEL.RESNETS.NORM", "BN")
    weights = {}
    for name in ours.state_dict():
        source = re.sub(r"conv(\d)\.norm", r"bn\1", name.removeprefix("stem."))
        source = re.sub(r"res(\d)", lambda match: f"layer{int(match[1]) - 1}", source)
        source = source.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
        weights[name] = theirs.state_dict()[source]
    assert_outputs_equal(ours, theirs, {"res3": theirs.layer2, "res4": theirs.layer3}, weights)


@pytest.mark.parametrize("stride, side", [(1, 38), (2, 19)])
def test_resnet_stride_of_res4(stride, side):
    with torch.device("meta"):
        network = resnet("MODEL.RESNETS.RES4_STRIDE", stride)
    assert network.output_shape() == {
        "res3": ShapeSpec(channels=512, stride=8),
        "res4": ShapeSpec(channels=1024, stride=8 * stride),
    }
    assert run(network, 300) == {"res3": (2, 512, 38, 38), "res4": (2, 1024, side, side)}


def test_regnet_is_the_papers_regnetx_200mf():
    with torch.device("meta"):
        network = build("regnet", ["s1", "s2", "s3", "s4"])
    stages = [getattr(network, f"s{number}") for number in range(1, 5)]
    # depths and widths in arXiv 2003.13678
    assert [len(list(stage.children())) for stage in stages] == [1, 1, 4, 7]
    assert [spec.channels for spec in network.output_shape().values()] == [24, 56, 152, 368]


@pytest.mark.parametrize(
    "make, last",
    [
        (lambda: VGG16(out_features=["conv4_3"]), "conv4_3"),
        (lambda: VGG16(out_features=["conv5_3", "conv2_2"]), "conv5_3"),
        (lambda: build("mobilenetv2", ["stage5"]), "stage5"),
        (lambda: build("mobilenetv2", ["stage7", "stage6_expand"]), "stage7"),
        (lambda: build("mobilenetv1", ["stage4"]), "stage4"),
        (lambda: build("mobilenetv3", ["stage6_expand", "stage6"]), "stage6"),
        (lambda: build("regnet", ["s3", "s2"]), "s3"),
        (lambda: build("regnet", ["stem"]), "stem"),
    ],
)
def test_no_layer_without_an_output(make, last):
    """DistributedDataParallel refuses parameters that get no gradient."""
    with torch.device("meta"):
        assert list(dict(make().named_children()))[-1] == last


def fan_out(outputs, inputs, area):  # He et al., 2015
    return (2 / (outputs * area)) ** 0.5


def xavier(outputs, inputs, area):
    return (2 / ((outputs + inputs) * area)) ** 0.5


def normal(*_):
    return 0.03


def extra_layers(**kwargs):
    bottom_up = VGG16(out_features=["conv1_2"])
    row = [32, 48, 3, 2, 1]
    backbone = SSDBackbone(
        bottom_up=bottom_up, in_features=["conv1_2"], extra_layers=[row], **kwargs
    )
    return backbone.extra_layers


@pytest.mark.parametrize("make, std", [
    (lambda: VGG16(out_features=["conv2_2"]), fan_out),
    (lambda: mobilenet_v2_of_width(0.25, ["stage5"]), fan_out),
    (extra_layers, xavier),
    (lambda: extra_layers(block="separable", norm="BN", activation="ReLU6"), normal),
    (lambda: SSDHead([32], [4], 20), xavier),
    (lambda: SSDLiteHead([64], [4], 20), normal),
])  # fmt: skip
def test_weights_start_as_in_the_lineages(make, std):
    torch.manual_seed(0)
    convolutions = [x for x in make().modules() if isinstance(x, nn.Conv2d)]
    assert all(x.bias is None or not x.bias.any() for x in convolutions)
    large = [x.weight for x in convolutions if x.weight.numel() > 1000]
    assert large
    for weight in large:
        expected = std(*weight.shape[:2], weight[0, 0].numel())
        assert weight.std().item() == pytest.approx(expected, rel=0.1)


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


@pytest.mark.parametrize("kind", ["L2Norm", "BN"])
def test_only_the_chosen_features_are_normalised(kind):
    """The extra layers read the map before it's normalised, as in Caffe."""
    torch.manual_seed(0)
    bottom_up = mobilenet_v2_of_width(0.25).eval()
    backbone = SSDBackbone(
        bottom_up=bottom_up, in_features=["stage5", "conv2"], l2_norm_features=["conv2"],
        l2_norm=kind, extra_layers=[[8, 16, 3, 2, 1]],
    ).eval()  # fmt: skip
    normalise = L2Norm(1280)
    if kind == "BN":
        normalise = make_alive(nn.BatchNorm2d(1280))
        backbone.l2_norm.load_state_dict(
            {f"conv2.{k}": x for k, x in normalise.state_dict().items()}
        )
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        raw, outputs = bottom_up(image), backbone(image)
        torch.testing.assert_close(outputs["stage5"], raw["stage5"])
        torch.testing.assert_close(outputs["conv2"], normalise(raw["conv2"]))
        torch.testing.assert_close(outputs["extra1"], backbone.extra_layers[0](raw["conv2"]))


def extra_layer(block, row=(8, 16, 3, 2, 1), norm="BN", activation="ReLU6"):
    with torch.device("meta"):
        backbone = SSDBackbone(
            bottom_up=mobilenet_v2_of_width(0.25), in_features=["conv2"], extra_layers=[row],
            block=block, norm=norm, activation=activation,
        )  # fmt: skip
    (layer,) = backbone.extra_layers
    return layer


@pytest.mark.parametrize("block, norm", [("conv", ""), ("conv", "BN"), ("separable", "BN")])
def test_kinds_of_extra_layers(block, norm):
    activation = "ReLU6" if norm else "Hardswish"
    layer = extra_layer(block, norm=norm, activation=activation)
    shapes = [tuple(conv.weight.shape) for conv in layer]
    if block == "separable":
        assert shapes == [(8, 1280, 1, 1), (8, 1, 3, 3), (16, 8, 1, 1)] and layer[1].groups == 8
    else:
        assert shapes == [(8, 1280, 1, 1), (16, 8, 3, 3)]
    assert [conv.stride for conv in layer][1] == (2, 2)
    assert all(isinstance(conv.activation, getattr(nn, activation)) for conv in layer)
    assert all(
        (conv.bias is None) == isinstance(conv.norm, nn.BatchNorm2d) == bool(norm) for conv in layer
    )


@pytest.mark.parametrize("block", ["inverted", "inverted_se"])
def test_inverted_extra_layers(block):
    layer = extra_layer(block)
    convs = [layer.expand, layer.depthwise, layer.project]
    shapes = [tuple(conv.weight.shape) for conv in convs]
    assert shapes == [(8, 1280, 1, 1), (8, 1, 3, 3), (16, 8, 1, 1)]
    assert layer.depthwise.stride == (2, 2) and layer.project.activation is None
    if block == "inverted":
        assert isinstance(layer.depthwise.activation, nn.ReLU6)
        assert isinstance(layer.squeeze, nn.Identity)
    else:  # lufficc squeezes before the activation
        assert layer.depthwise.activation is None
        assert type(layer.squeeze).__name__ == "SqueezeExcitation"
        assert isinstance(layer.activate, nn.ReLU6)


def test_inverted_extra_layers_that_shrink_without_a_stride():
    """SSD300's last layers, from 5 to 3 to 1: as many channels, but no shortcut."""
    with torch.device("meta"):
        backbone = ssd_vgg(
            extra_layers=[[8, 1024, 3, 1, 0], [8, 1024, 3, 1, 0]], block="inverted", norm="BN"
        )
    shapes = run(backbone, 80)
    assert [shapes[f"extra{n}"][1:] for n in (1, 2)] == [(1024, 3, 3), (1024, 1, 1)]


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: VGG16(out_features=["conv6"]), "MODEL.SSD.IN_FEATURES.*'conv6'.*conv4_3"),
        (lambda: VGG16(out_features=[]), "MODEL.SSD.IN_FEATURES"),
        (lambda: build("mobilenetv2", ["stage8"]), "MODEL.SSD.IN_FEATURES.*'stage8'.*'stage7'"),
        # a block without expansion, and one that isn't strided
        (lambda: build("mobilenetv2", ["stage1_expand"]), "IN_FEATURES.*'stage1_expand'"),
        (lambda: build("mobilenetv3", ["stage5_expand", "conv2"]), "IN_FEATURES.*'stage5_expand'"),
        (lambda: build("mobilenetv1", ["conv2"]), "MODEL.SSD.IN_FEATURES.*'conv2'"),
        (
            lambda: build("mobilenetv2", ["stage3", "stage6_expand"]),
            "MODEL.SSD.IN_FEATURES: stage6_expand must be followed by .*stage6",
        ),
        (lambda: mobilenet_v2_of_width(0.0), "MODEL.MOBILENET.WIDTH_MULT must be positive, got 0"),
        (lambda: build("mobilenetv2", ["conv2"], "MODEL.MOBILENET.NORM", "bn"), "NORM.*'bn'"),
        (lambda: build("regnet", ["s5"]), "MODEL.SSD.IN_FEATURES.*'s5'.*'s4'"),
        (lambda: resnet("MODEL.RESNETS.RES4_STRIDE", 3), "MODEL.RESNETS.RES4_STRIDE.*got 3"),
        (lambda: ssd_vgg(in_features=["res4"]), "MODEL.SSD.IN_FEATURES.*'res4'.*'fc7'"),
        (lambda: ssd_vgg(in_features=[]), r"MODEL\.SSD\.IN_FEATURES: \[\]; choose from"),
        (lambda: ssd_vgg(l2_norm_features=["conv4_3"]), "MODEL.SSD.L2_NORM_FEATURES.*'conv4_3'"),
        (
            lambda: ssd_vgg(l2_norm="GN"),
            r"MODEL.SSD.L2_NORM must be one of \['L2Norm', 'BN'\], got 'GN'",
        ),
        (lambda: ssd_vgg(extra_layers=[[8, 16]]), r"MODEL.SSD.EXTRA_LAYERS.*got \[8, 16\]"),
        (lambda: ssd_vgg(extra_layers=[8, 16, 3, 2, 1]), "MODEL.SSD.EXTRA_LAYERS.*got 8"),
        (lambda: ssd_vgg(extra_layers=[[0, 16, 3, 2, 1]]), r"EXTRA_LAYERS.*got \[0, 16"),
        (lambda: ssd_vgg(extra_layers=[[8, 16.5, 3, 2, 1]]), r"EXTRA_LAYERS.*got \[8, 16.5"),
        (lambda: ssd_vgg(activation="Relu"), "MODEL.SSD.EXTRA_ACTIVATION.*'Relu'"),
        (lambda: ssd_vgg(activation="Linear"), "MODEL.SSD.EXTRA_ACTIVATION.*'Linear'"),
        (lambda: ssd_vgg(block="residual"), "MODEL.SSD.EXTRA_BLOCK.*'inverted'.*'residual'"),
    ],
)
def test_errors_name_the_key(make, key):
    with torch.device("meta"), pytest.raises(ValueError, match=key):
        make()


def ssd_vgg(**kwargs):
    kwargs = {"in_features": ["fc7"], "extra_layers": [[8, 16, 3, 2, 1]], **kwargs}
    return SSDBackbone(bottom_up=VGG16(), **kwargs)


def test_an_unknown_bottom_up_names_the_key():
    cfg = load_config("", ["MODEL.SSD.BOTTOM_UP", "build_vgg_backbone"])
    with pytest.raises(ValueError, match=r"MODEL\.SSD\.BOTTOM_UP.*'build_vgg_backbone'"):
        SSDBackbone(cfg, ShapeSpec(channels=3))


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


@pytest.mark.parametrize("last_1x1", [False, True])
def test_ssdlite_head_is_depthwise_separable(last_1x1):
    head = SSDLiteHead([8, 8], [6, 6], 3, norm="BN", last_1x1=last_1x1)
    for predictor, outputs in ((head.cls_predictors[0], 24), (head.box_predictors[0], 24)):
        depthwise, pointwise = predictor
        assert depthwise.weight.shape == (8, 1, 3, 3) and depthwise.groups == 8
        assert isinstance(depthwise.norm, nn.BatchNorm2d) and depthwise.bias is None
        assert isinstance(depthwise.activation, nn.ReLU6)
        assert pointwise.weight.shape == (outputs, 8, 1, 1) and pointwise.bias is not None
    for predictor in (head.cls_predictors[1], head.box_predictors[1]):
        kernels = [conv.kernel_size for conv in predictor]
        assert kernels == ([(1, 1)] if last_1x1 else [(3, 3), (1, 1)])
    logits, deltas = head([torch.randn(2, 8, 3, 3), torch.randn(2, 8, 2, 2)])
    assert [x.shape for x in logits] == [x.shape for x in deltas] == [(2, 24, 3, 3), (2, 24, 2, 2)]
