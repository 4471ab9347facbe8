"""Classifiers: d-li14's MobileNetV3-Large, qfgaohao's MobileNetV1 and V2, by their names."""

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from ssd.checkpoint import SSDCheckpointer
from ssd.checkpoint.recognition import differences, recognise
from ssd.config import load_config

BLOCKS = [  # hidden and output channels, kernel, squeeze width of features.1 … 15
    (16, 16, 3, 0), (64, 24, 3, 0), (72, 24, 3, 0), (72, 40, 5, 24), (120, 40, 5, 32),
    (120, 40, 5, 32), (240, 80, 3, 0), (200, 80, 3, 0), (184, 80, 3, 0), (184, 80, 3, 0),
    (480, 112, 3, 120), (672, 112, 3, 168), (672, 160, 5, 168), (960, 160, 5, 240),
    (960, 160, 5, 240),
]  # fmt: skip


def norm(name, channels):
    shapes = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    state = {f"{name}.{leaf}": mean + 0.1 * torch.rand(channels) for leaf, mean in shapes.items()}
    return {**state, f"{name}.num_batches_tracked": torch.tensor(1)}


def conv(name, outputs, inputs, kernel=1):
    return {f"{name}.weight": torch.randn(outputs, inputs, kernel, kernel) / (inputs**0.5 * kernel)}


def mobilenetv3():
    state = {**conv("features.0.0", 16, 3, 3), **norm("features.0.1", 16)}
    inputs = 16
    for number, (hidden, outputs, kernel, squeeze) in enumerate(BLOCKS, 1):
        at, name = 0, f"features.{number}.conv"
        if number > 1:
            state |= {**conv(f"{name}.0", hidden, inputs), **norm(f"{name}.1", hidden)}
            at = 3
        state |= {**conv(f"{name}.{at}", hidden, 1, kernel), **norm(f"{name}.{at + 1}", hidden)}
        for layer, shape in (("0", (squeeze, hidden)), ("2", (hidden, squeeze))):
            if squeeze:
                state[f"{name}.5.fc.{layer}.weight"] = torch.randn(shape) / shape[1] ** 0.5
                state[f"{name}.5.fc.{layer}.bias"] = torch.randn(shape[0])
        at = 7 if number > 1 else 4
        state |= {**conv(f"{name}.{at}", outputs, hidden), **norm(f"{name}.{at + 1}", outputs)}
        inputs = outputs
    state |= {**conv("conv.0", 960, 160), **norm("conv.1", 960)}
    return {**state, "classifier.0.weight": torch.zeros(1280, 960)}


def mobilenetv1():
    state = {**conv("0.0", 32, 3, 3), **norm("0.1", 32)}
    inputs = 32
    for number, outputs in enumerate([64, 128, 128, 256, 256, *[512] * 6, 1024, 1024], 1):
        state |= {**conv(f"{number}.0", inputs, 1, 3), **norm(f"{number}.1", inputs)}
        state |= {**conv(f"{number}.3", outputs, inputs), **norm(f"{number}.4", outputs)}
        inputs = outputs
    return state


def mobilenetv2(prefix=""):
    state = {**conv("0.0", 32, 3, 3), **norm("0.1", 32)}
    inputs, number = 32, 0
    for factor, outputs, count in (
        (1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1),
    ):  # fmt: skip
        for _ in range(count):
            number, hidden, at = number + 1, factor * inputs, 0
            name = f"{number}.conv."
            if factor > 1:
                state |= {**conv(name + "0", hidden, inputs), **norm(name + "1", hidden)}
                at = 3
            state |= {**conv(f"{name}{at}", hidden, 1, 3), **norm(f"{name}{at + 1}", hidden)}
            at += 3
            state |= {**conv(f"{name}{at}", outputs, hidden), **norm(f"{name}{at + 1}", outputs)}
            inputs = outputs
    state |= {**conv("18.0", 1280, 320), **norm("18.1", 1280)}
    return {prefix + name: value for name, value in state.items()}


def mobilenetv2_classifier():
    return {**mobilenetv2("features."), "classifier.0.weight": torch.zeros(1000, 1280)}


@pytest.mark.parametrize(
    "lab, make, title",
    [
        ("ssdlite_mobilenetv3_size320_voc0712", mobilenetv3, "a MobileNetV3 classifier (d-li14)"),
        ("ssd_mobilenetv1_size300_voc0712", mobilenetv1, "a MobileNetV1 classifier (qfgaohao)"),
        ("ssdlite_mobilenetv2_size300_voc0712", mobilenetv2, "a MobileNetV2 classifier (qfgaohao)"),
        (
            "ssdlite_mobilenetv2_size300_voc0712",
            mobilenetv2_classifier,
            "a MobileNetV2 classifier (qfgaohao)",
        ),
    ],
)
def test_a_classifier_fills_the_bottom_up(repo, tmp_path, caplog, lab, make, title):
    torch.manual_seed(0)
    state = make()
    torch.save(state, tmp_path / "weights.pth")
    caplog.set_level("INFO")
    cfg = load_config(str(repo / f"labs/{lab}/config.yaml"), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    bottom_up = model.backbone.bottom_up
    with torch.no_grad():
        for value in bottom_up.state_dict().values():
            value.fill_(-7)
    SSDCheckpointer(model, cfg=cfg).load(str(tmp_path / "weights.pth"))
    assert f"Found {title}" in caplog.messages
    assert "instead of" not in caplog.text
    # each of the file's values is there once, in the order of the layers
    expected = [x for name, x in state.items() if not name.startswith("classifier")]
    for (name, value), source in zip(bottom_up.state_dict().items(), expected, strict=True):
        if make is mobilenetv3 and name.startswith("conv1"):
            assert value.shape == source.shape and not (value == -7).any()  # adapted, see below
        else:
            assert torch.equal(value.reshape(source.shape), source), name
    cfg.defrost()
    cfg.MODEL.BATCH_NORM.EPS, cfg.MODEL.MOBILENET.SQUEEZE_FIRST = 2e-3, False
    others = ["MODEL.BATCH_NORM.EPS 0.002 instead of 1e-05"]
    if make is mobilenetv3:
        others.append("MODEL.MOBILENET.SQUEEZE_FIRST False instead of True")
    assert differences(cfg, recognise(state).config) == others


def test_the_first_layer_keeps_its_output_and_its_size():
    """Inputs of std 1 into weights for inputs of unit variance, with BatchNorm behind."""
    torch.manual_seed(0)
    state = mobilenetv3()
    converted = recognise(state).to_ours(state, "BGR", (1.0, 1.0, 1.0))
    prefix = "backbone.bottom_up.conv1"
    image = 100 * torch.randn(2, 3, 16, 16)  # RGB, without its mean
    std = 255 * torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def forward(x, state, conv, norm):
        names = ("running_mean", "running_var", "weight", "bias")
        x = nn.functional.conv2d(x, state[f"{conv}.weight"])
        return nn.functional.batch_norm(x, *(state[f"{norm}.{name}"] for name in names))

    expected = forward(image / std, state, "features.0.0", "features.0.1")
    actual = forward(image.flip(1), converted, prefix, f"{prefix}.norm")
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    ratio = converted[f"{prefix}.weight"].norm() / state["features.0.0.weight"].norm()
    assert 0.9 < ratio < 1.1


def test_squeeze_and_excitation_is_a_convolution_in_both():
    """Of rank 2 in the file, 1×1 in ours, in the same order: reduction, expansion."""
    torch.manual_seed(0)
    state = mobilenetv3()
    prefix = "backbone.bottom_up.stage3.0.squeeze."
    result = recognise(state).to_ours(state)
    for ours, theirs in (("fc1", "0"), ("fc2", "2")):
        for leaf in ("weight", "bias"):
            value = state[f"features.4.conv.5.fc.{theirs}.{leaf}"]
            assert torch.equal(result[f"{prefix}{ours}.{leaf}"].view_as(value), value)
            assert result[f"{prefix}{ours}.weight"].dim() == 4


def test_other_files_are_not_taken_for_these():
    assert recognise(mobilenetv1()).key == "qfgaohao_mobilenetv1_classifier"
    assert recognise(mobilenetv2()).key == "qfgaohao_mobilenetv2_classifier"
    assert recognise(mobilenetv2_classifier()).key == "qfgaohao_mobilenetv2_classifier"
    assert recognise(mobilenetv3()).key == "d-li14_mobilenetv3"
    assert recognise({"features.0.0.weight": 0, "features.1.conv.0.0.weight": 0}) is None
