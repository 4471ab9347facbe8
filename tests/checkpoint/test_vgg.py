"""VGG16 classification weights as those of our backbone."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from torchvision.models import vgg16

from ssd import model_zoo
from ssd.checkpoint import SSDCheckpointer, vgg
from ssd.config import load_config
from ssd.modeling import VGG16

ONES = (1.0, 1.0, 1.0)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
OURS = "backbone.bottom_up."


@pytest.fixture(scope="module")
def torchvision_state():
    torch.manual_seed(0)
    return vgg16(weights=None, init_weights=False).state_dict()


@pytest.fixture(scope="module")
def features_state(torchvision_state):
    """As torchvision's IMAGENET1K_FEATURES: the classifier is there, and NaN."""
    nan = torch.tensor(float("nan"))
    return {
        name: nan.expand(x.shape) if name.startswith("classifier.") else x
        for name, x in torchvision_state.items()
    }


def reduced_fc(prefix):
    """The first layer real, the others of one value: their number."""
    state = {}
    for index in vgg.CONV_NAMES:
        state[f"{prefix}{index}.weight"] = torch.full((2, 2, 3, 3), float(index))
        state[f"{prefix}{index}.bias"] = torch.full((2,), float(index))
    state[f"{prefix}0.weight"] = torch.arange(2 * 3 * 9.0).view(2, 3, 3, 3)
    return state


@pytest.mark.parametrize("prefix", ["", "vgg.", "features."])
def test_reduced_fc_names(prefix):
    state = reduced_fc(prefix)
    assert vgg.recognises(state)
    result, found = vgg.convert(state, ONES, "RGB")
    assert "reduced-fc" in found
    with torch.device("meta"):
        assert set(result) == {OURS + name for name in VGG16().state_dict()}
    assert torch.equal(result[OURS + "conv1_1.weight"], state[prefix + "0.weight"])
    for name, index in (("conv2_1", 5), ("conv4_3", 21), ("conv5_3", 28), ("fc6", 31), ("fc7", 33)):
        assert (result[f"{OURS}{name}.weight"] == index).all()
        assert (result[f"{OURS}{name}.bias"] == index).all()


def test_our_own_and_other_weights_are_not_recognised():
    with torch.device("meta"):
        names = dict.fromkeys(OURS + name for name in VGG16().state_dict())
    assert not vgg.recognises(names)
    assert not vgg.recognises({"0.weight": None, "layer.28.weight": None})


def test_conversion_leaves_the_files_tensors_as_they_are():
    state = reduced_fc("")
    copy = {name: value.clone() for name, value in state.items()}
    result, _ = vgg.convert(state, (2.0, 2.0, 2.0), "BGR")
    for value in result.values():
        value.zero_()
    assert all(torch.equal(state[name], copy[name]) for name in state)


def test_torchvision_weights_fit_the_backbone(torchvision_state):
    result, found = vgg.convert(torchvision_state, ONES, "RGB")
    assert "torchvision" in found
    with torch.device("meta"):
        shapes = {OURS + name: x.shape for name, x in VGG16().state_dict().items()}
    found = {name: x.shape for name, x in result.items() if name.startswith(OURS)}
    assert found == shapes
    for index, name in ((2, "conv1_2"), (28, "conv5_3")):
        expected = torchvision_state[f"features.{index}.weight"]
        assert torch.equal(result[f"{OURS}{name}.weight"], expected)


def test_fully_connected_layers_are_subsampled(torchvision_state):
    result, _ = vgg.convert(torchvision_state, ONES, "RGB")
    fc6, fc7 = torchvision_state["classifier.0.weight"], torchvision_state["classifier.3.weight"]
    for out, channel, row, column in ((0, 0, 0, 0), (5, 17, 2, 1), (1023, 511, 1, 2)):
        # inputs of fc6 are (channel, row, column) of 512×7×7
        index = channel * 49 + 3 * row * 7 + 3 * column
        assert result[OURS + "fc6.weight"][out, channel, row, column] == fc6[4 * out, index]
    for out, channel in ((0, 0), (3, 700), (1023, 1023)):
        assert result[OURS + "fc7.weight"][out, channel, 0, 0] == fc7[4 * out, 4 * channel]
    for name, index in (("fc6", 0), ("fc7", 3)):
        bias = torchvision_state[f"classifier.{index}.bias"]
        assert result[f"{OURS}{name}.bias"][9] == bias[36]


@pytest.mark.parametrize("std", [ONES, (58.0, 57.0, 56.0)])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_first_layer_gives_torchvisions_output(torchvision_state, order, std):
    """On (image - mean) / PIXEL_STD as on torchvision's input, away from the padded border."""
    rgb = torch.randint(0, 256, (1, 3, 12, 12), generator=torch.Generator().manual_seed(0)).float()
    theirs = (rgb / 255 - MEAN[:, None, None]) / STD[:, None, None]
    expected = F.conv2d(theirs, torchvision_state["features.0.weight"])

    image, mean = rgb, 255 * MEAN
    if order == "BGR":
        image, mean = image.flip(1), mean.flip(0)
    image = (image - mean[:, None, None]) / torch.tensor(std)[:, None, None]
    result, _ = vgg.convert(torchvision_state, std, order)
    actual = F.conv2d(image, result[OURS + "conv1_1.weight"])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_first_layer_of_reduced_fc_for_bgr_and_another_scale():
    state = reduced_fc("")
    result, found = vgg.convert(state, (2.0, 3.0, 4.0), "BGR")
    assert "BGR" in found
    first, theirs = result[OURS + "conv1_1.weight"], state["0.weight"]
    # our blue, channel 0, is divided by 2; the file's blue is channel 2
    for ours, scale, channel in ((0, 2, 2), (1, 3, 1), (2, 4, 0)):
        assert torch.equal(first[:, ours], scale * theirs[:, channel])


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_torchvisions_features_for_ssd_are_scaled_by_pixel_std_alone(features_state, order):
    result, found = vgg.convert(features_state, (2.0, 3.0, 4.0), order)
    assert "features for SSD" in found and "fc6 and fc7 stay fresh" in found
    with torch.device("meta"):
        names = {OURS + name for name in VGG16().state_dict() if not name.startswith("fc")}
    assert {name for name in result if name.startswith(OURS)} == names
    # the rest is left to be named as unused
    classifier = {name for name in features_state if name.startswith("classifier.")}
    assert set(result) == names | classifier
    first, theirs = result[OURS + "conv1_1.weight"], features_state["features.0.weight"]
    for ours, scale in enumerate((2, 3, 4)):
        assert torch.equal(first[:, ours], scale * theirs[:, ours if order == "RGB" else 2 - ours])
    assert torch.equal(result[OURS + "conv5_3.bias"], features_state["features.28.bias"])


def test_lab_that_starts_with_torchvisions_features(features_state, tmp_path, caplog):
    caplog.set_level("INFO")
    path = str(tmp_path / "vgg16_features-amdegroot-88682ab5.pth")
    torch.save(features_state, path)
    config_file = model_zoo.get_config_file("ssd_vgg16_size300_torchvision")
    cfg = load_config(config_file, ["MODEL.DEVICE", "cpu", "MODEL.SSD.NUM_CLASSES", "1"])
    model = build_model(cfg)
    fresh = {name: x.clone() for name, x in model.state_dict().items()}

    SSDCheckpointer(model, cfg=cfg).load(path)
    index = {name: number for number, name in vgg.CONV_NAMES.items()}
    for name, value in model.state_dict().items():
        is_conv = name.startswith(OURS) and ".fc" not in name
        layer, leaf = name.split(".")[-2:]
        theirs = features_state[f"features.{index[layer]}.{leaf}"] if is_conv else fresh[name]
        assert torch.equal(value, theirs), name
    assert "Found torchvision VGG16 features for SSD" in caplog.text
    with pytest.raises(ValueError, match=r"missing .*fc6\.weight"):
        SSDCheckpointer(model, cfg=cfg, strict=True).load(path)
