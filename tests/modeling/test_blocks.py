"""The blocks that backbones, extra layers and heads share, by hand."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torchvision.ops import SqueezeExcitation

from ssd.modeling.blocks import (
    BatchNorm2d,
    InvertedResidual,
    ReLU6,
    check_out_features,
    conv_block,
    pad_as_tensorflow,
    round_to_8,
)


def trained_norm(make=BatchNorm2d, channels=3):
    """A layer that has seen data of mean 5."""
    torch.manual_seed(0)
    layer = make(channels)
    nn.init.uniform_(layer.weight, 0.5, 2)
    nn.init.normal_(layer.bias)
    layer(torch.randn(8, channels, 4, 4) * 3 + 5)
    return layer.train()


def test_batch_norm_of_a_single_value_uses_the_running_statistics():
    layer = trained_norm()
    state = {name: x.clone() for name, x in layer.state_dict().items()}
    x = torch.tensor([4.0, -1, 9]).view(1, 3, 1, 1).requires_grad_()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        trained_norm(nn.BatchNorm2d)(x)

    output = layer(x)

    scale = (layer.running_var + layer.eps).sqrt()
    expected = (x.flatten() - layer.running_mean) / scale * layer.weight + layer.bias
    torch.testing.assert_close(output.flatten(), expected)
    torch.testing.assert_close(output, trained_norm().eval()(x))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name]), name
    output.square().sum().backward()
    for tensor in (x, layer.weight, layer.bias):
        assert tensor.grad.isfinite().all() and tensor.grad.all()


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 1, 2), (1, 3, 2, 1), (4, 3, 5, 5)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_equals_torchs_where_there_is_a_variance(shape, training):
    ours, theirs = trained_norm().train(training), trained_norm(nn.BatchNorm2d).train(training)
    x = torch.randn(shape)
    assert torch.equal(ours(x), theirs(x))
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


@pytest.mark.parametrize(
    "norm, kind, bias",
    [
        ("", type(None), True),
        ("BN", BatchNorm2d, False),
        ("FrozenBN", FrozenBatchNorm2d, False),
        ("SyncBN", nn.SyncBatchNorm, False),
        ("GN", nn.GroupNorm, False),
    ],
)
def test_conv_block(norm, kind, bias):
    layer = conv_block(32, 64, 5, norm=norm, activation="Hardswish", stride=2, groups=4)
    assert isinstance(layer.norm, kind) and (layer.bias is not None) == bias
    assert isinstance(layer.activation, nn.Hardswish)
    assert layer.weight.shape == (64, 8, 5, 5)
    assert layer.eval()(torch.randn(1, 32, 9, 8)).shape == (1, 64, 5, 4)
    assert conv_block(32, 64, 3, norm=norm, padding=0).activation is None


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"norm": "bn"}, r"MODEL\.SSD\.NORM or MODEL\.MOBILENET\.NORM.*'bn'"),
        ({"norm": "GN"}, r"MODEL\.SSD\.NORM.*'GN' for 24 channels"),  # 32 groups
        ({"norm": "", "activation": "relu"}, r"MODEL\.SSD\.EXTRA_ACTIVATION.*'relu'"),
        ({"norm": "", "activation": "GELU"}, r"MODEL\.SSD\.EXTRA_ACTIVATION.*in place.*'GELU'"),
    ],
)
def test_conv_block_errors_name_the_key(kwargs, message):
    with pytest.raises(ValueError, match=message):
        conv_block(8, 24, **kwargs)


@pytest.mark.parametrize(
    "args, kwargs, shortcut",
    [
        ((8, 16, 8, 3), {}, True),
        ((8, 16, 8, 5), {"padding": 2}, True),
        ((8, 8, 8, 3), {}, True),  # without an expansion
        ((8, 16, 8, 3), {"stride": 2}, False),
        ((8, 16, 12, 3), {}, False),
        ((8, 16, 8, 3), {"padding": 0}, False),  # from 3×3 to 1×1
    ],
)
def test_shortcut_where_the_shape_is_kept(args, kwargs, shortcut):
    torch.manual_seed(0)
    block, x = InvertedResidual(*args, norm="", **kwargs), torch.randn(2, 8, 3, 3)
    y = block.project(block.depthwise(block.expand(x)))
    assert (y.shape == x.shape) == shortcut
    assert torch.equal(block(x), x + y if shortcut else y)


@pytest.mark.parametrize("first", [False, True])
def test_squeeze_and_excitation_before_or_after_the_activation(first):
    torch.manual_seed(0)
    block = InvertedResidual(
        8, 72, 12, 5, stride=2, norm="", activation="Hardswish", squeeze=True, squeeze_first=first
    )
    (squeeze,) = [layer for layer in block.modules() if isinstance(layer, SqueezeExcitation)]
    assert squeeze.fc1.out_channels == 24  # 72 / 4 = 18, and 16 would be below 90 % of it
    x = torch.randn(2, 8, 9, 7) * 3

    y = F.hardswish(F.conv2d(x, block.expand.weight, block.expand.bias))
    y = F.conv2d(y, block.depthwise.weight, block.depthwise.bias, stride=2, padding=2, groups=72)
    y = y if first else F.hardswish(y)
    scale = y.mean(dim=(2, 3))
    scale = F.linear(scale, squeeze.fc1.weight.flatten(1), squeeze.fc1.bias).relu()
    scale = F.linear(scale, squeeze.fc2.weight.flatten(1), squeeze.fc2.bias)
    y = y * F.hardsigmoid(scale)[:, :, None, None]
    y = F.hardswish(y) if first else y
    y = F.conv2d(y, block.project.weight, block.project.bias)

    torch.testing.assert_close(block(x), y)
    assert y.shape == (2, 12, 5, 4)


# {(size, kernel): padding before and after} for ceil(size / 2) outputs at stride 2: in all
# (outputs - 1) · 2 + kernel - size
SAME = {
    (6, 3): (0, 1), (7, 3): (1, 1), (1, 3): (1, 1),
    (6, 5): (1, 2), (7, 5): (2, 2), (1, 5): (2, 2),
}  # fmt: skip


@pytest.mark.parametrize("height, width", [(6, 7), (7, 6), (6, 6), (1, 1)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_pad_as_tensorflow(height, width, kernel):
    torch.manual_seed(0)
    conv = conv_block(4, 4, kernel, stride=2, groups=4, norm="BN", activation="ReLU6").eval()
    x = torch.randn(2, 4, height, width)
    pads = *SAME[width, kernel], *SAME[height, kernel]  # left, right, top, bottom
    expected = F.conv2d(F.pad(x, pads), conv.weight, stride=2, groups=4)
    expected = F.relu6(conv.norm(expected))
    before = conv(x)
    pad_as_tensorflow(conv)
    torch.testing.assert_close(conv(x), expected)
    assert expected.shape[2:] == (-(-height // 2), -(-width // 2)) == before.shape[2:]
    odd = height % 2 == width % 2 == 1
    assert torch.allclose(before, expected) == odd  # an odd size is padded evenly


def test_pad_as_tensorflow_leaves_other_convolutions():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),  # not strided
        nn.Conv2d(4, 4, 3, stride=2),  # not padded
        nn.Conv2d(4, 4, 1, stride=2),
    )
    x = torch.randn(1, 3, 8, 10)
    expected = network(x)
    pad_as_tensorflow(network)
    assert torch.equal(network(x), expected)


def test_round_to_8():
    # 9 and 19 would lose more than a tenth
    values = {1: 8, 8.8: 8, 9: 16, 12: 16, 16: 16, 17.7: 16, 19: 24, 20: 24, 88.8: 88, 100: 104}
    assert {channels: round_to_8(channels) for channels in values} == values


def test_check_out_features():
    assert check_out_features(("b", "a"), {"a": 1, "b": 2}) == ["b", "a"]
    for names in ([], ["a", "c"]):
        with pytest.raises(ValueError, match=r"MODEL\.SSD\.IN_FEATURES.*choose from \['a', 'b'\]"):
            check_out_features(names, ["a", "b"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu6_equals_torchs_and_keeps_no_copy(dtype):
    values = torch.tensor([-1, -0.0, 0, 1e-3, 3, 5.96875, 6, 7, float("nan")], dtype=dtype)
    upstream = torch.arange(1.0, 10).to(dtype)
    results = []
    for layer in (ReLU6(inplace=True), nn.ReLU6(inplace=True)):
        kept = []
        x = values.clone().requires_grad_()
        hidden = x * 1
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            output = layer(hidden)
        assert output.data_ptr() == hidden.data_ptr()
        output.backward(upstream)
        results.append((output.detach(), x.grad, kept[0].data_ptr() == output.data_ptr()))
    (ours, our_grad, shared), (theirs, their_grad, their_shared) = results
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(our_grad, their_grad, rtol=0, atol=0, equal_nan=True)
    assert shared and not their_shared


@pytest.mark.parametrize("kernel, padding, size", [(3, 1, 9), (5, 2, 8), (3, 0, 8)])
def test_bfloat16_gradients_of_a_strided_depthwise_convolution(kernel, padding, size):
    torch.manual_seed(0)
    layer = conv_block(16, 16, kernel, norm="BN", groups=16, stride=2, padding=padding)
    layer.norm = None
    x = torch.randn(2, 16, size, size).to(torch.bfloat16, memory_format=torch.channels_last)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    upstream = torch.randn(output.shape).bfloat16()
    output.backward(upstream)
    assert output.dtype == torch.bfloat16 and x.grad.is_contiguous(
        memory_format=torch.channels_last
    )

    inputs = [x.detach().float().requires_grad_(), layer.weight.detach().bfloat16().float()]
    inputs[1].requires_grad_()
    expected = F.conv2d(*inputs, None, 2, padding, groups=16)
    grads = torch.autograd.grad(expected, inputs, upstream.float())
    torch.testing.assert_close(output, expected.bfloat16())
    # a sum in bfloat16 would be off by more
    torch.testing.assert_close(x.grad, grads[0].bfloat16(), rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad, grads[1], rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("kernel, stride, padding", [
    (3, 2, 1), (5, 2, 2), (1, 2, 0), (2, 2, 1), (4, 2, 2), (3, 3, 1), (3, 4, 1),
])  # fmt: skip
@pytest.mark.parametrize("groups", [1, 64])
@pytest.mark.parametrize("height", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # LayerNorm's is the latter
def test_bfloat16_gradients_of_a_map_narrower_than_the_stride(
    kernel, stride, padding, groups, height, dtype
):
    torch.manual_seed(0)
    layer = conv_block(64, 64, kernel, norm="", groups=groups, stride=stride, padding=padding)
    x = torch.randn(8, 64, height, stride - 1).to(dtype, memory_format=torch.channels_last)
    weight = layer.weight.detach().bfloat16().float().requires_grad_()
    expected = F.conv2d(x.float(), weight, layer.bias, stride, padding, groups=groups)
    upstream = torch.randn(expected.shape)
    expected.backward(upstream)
    # what a gradient that isn't written would hold
    unset = [torch.full((n * weight.numel(),), float("nan")) for n in (1, 2) for _ in range(50)]
    del unset
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x.requires_grad_())
    output.backward(upstream.to(dtype))
    torch.testing.assert_close(output.float(), expected, rtol=2**-6, atol=2e-2)
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=2**-6, atol=5e-2)
