"""VGG16 classification weights, of torchvision, amdegroot and Caffe, as those of our backbone."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.modeling import build_model
from protobuf import field, varint
from torchvision.models import vgg16

from ssd import model_zoo
from ssd.checkpoint import SSDCheckpointer, vgg
from ssd.checkpoint.recognition import recognise
from ssd.config import load_config
from ssd.modeling import VGG16

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
OURS = "backbone.bottom_up."


def shapes_of_ours():
    with torch.device("meta"):
        return {OURS + name: x.shape for name, x in VGG16().state_dict().items()}


@pytest.fixture(scope="module")
def torchvision_state():
    """Random convolutions; each weight of fc6 and fc7 is the number of its output.

    These take no memory: rows share their values.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in vgg16(weights=None).state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        if name.startswith("features."):
            state[name] = torch.randn(shape) / 30
        else:
            numbers = torch.arange(float(shape[0]))
            state[name] = numbers if len(shape) == 1 else numbers[:, None].expand(shape)
    return state


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
    lineage = recognise(state)
    assert lineage.title == "VGG16 reduced-fc"
    result = lineage.to_ours(state)
    assert set(result) == set(shapes_of_ours())
    assert torch.equal(result[OURS + "conv1_1.weight"], state[prefix + "0.weight"])
    for name, index in (("conv2_1", 5), ("conv4_3", 21), ("conv5_3", 28), ("fc6", 31), ("fc7", 33)):
        assert (result[f"{OURS}{name}.weight"] == index).all()
        assert (result[f"{OURS}{name}.bias"] == index).all()


@pytest.mark.parametrize("classifier", [(), ("pre_logits.fc1", "pre_logits.fc2", "head.fc")])
@pytest.mark.parametrize("prefix", ["", "features."])
def test_features_of_a_classifier_are_scaled_as_its_own(torchvision_state, prefix, classifier):
    """``vgg16().features`` of torchvision, and timm's VGG16."""
    state = {
        prefix + name.removeprefix("features."): x
        for name, x in torchvision_state.items()
        if name.startswith("features.")
    }
    state.update({f"{layer}.weight": torch.zeros(1) for layer in classifier})
    lineage = recognise(state)
    assert "features of a classifier" in lineage.title and "fc6 and fc7 stay fresh" in lineage.title
    expected = recognise(torchvision_state).to_ours(torchvision_state)
    found = lineage.to_ours(state)
    for layer in ("conv1_1", "conv4_3"):
        name = f"{OURS}{layer}.weight"
        assert torch.equal(found[name], expected[name])
    assert not any("fc6" in name or "fc7" in name for name in found)


def test_our_own_and_other_weights_are_not_recognised():
    assert recognise(shapes_of_ours()) is None
    for name in ("vgg11_bn", "vgg13", "vgg16_bn", "vgg19", "vgg19_bn"):
        with torch.device("meta"):
            other = getattr(torchvision.models, name)(weights=None)
        assert recognise(other.state_dict()) is None, name
        assert recognise(other.features.state_dict()) is None, name
    assert recognise({"0.weight": None, "layer.26.weight": None, "layer.28.weight": None}) is None


def test_conversion_leaves_the_files_tensors_as_they_are(assert_equal):
    state = reduced_fc("")
    copy = {name: value.clone() for name, value in state.items()}
    recognise(state).to_ours(state, "BGR", (2.0, 2.0, 2.0))
    assert_equal(state, copy)


def test_torchvision_weights_fit_the_backbone(torchvision_state):
    lineage = recognise(torchvision_state)
    assert lineage.title == "torchvision's VGG16, fc6 and fc7 subsampled"
    result = lineage.to_ours(torchvision_state, "RGB", (58.395, 57.12, 57.375))
    found = {name: x.shape for name, x in result.items() if name.startswith(OURS)}
    assert found == shapes_of_ours()
    for index, name in ((0, "conv1_1"), (2, "conv1_2"), (28, "conv5_3")):
        expected = torchvision_state[f"features.{index}.weight"]
        assert torch.equal(result[f"{OURS}{name}.weight"], expected)
    assert set(result) - set(found) == {"classifier.6.weight", "classifier.6.bias"}


def fully_connected(number_inputs, shape6=(4096, 25088), shape7=(4096, 4096)):
    """fc6 and fc7 whose every weight is the number of its input, or of its output."""
    state = {}
    for name, shape in (("fc6", shape6), ("fc7", shape7)):
        numbers = torch.arange(float(shape[-1] if number_inputs else shape[-2]))
        state[f"{name}.weight"] = (numbers if number_inputs else numbers[:, None]).expand(shape)
        state[f"{name}.bias"] = torch.arange(4096.0)
    return state


def caffe(fully_connected):
    """Caffe's VGG16 with small convolutions."""
    state = {}
    for index, name in vgg.CONV_NAMES.items():
        state[f"{name}.weight"] = torch.full((2, 3, 3, 3), float(index))
        state[f"{name}.bias"] = torch.full((2,), float(index))
    return {**state, **fully_connected}


def torchvisions(fully_connected):
    places = {"fc6": "classifier.0", "fc7": "classifier.3"}
    state = {f"features.{index}.weight": torch.zeros(2, 3, 3, 3) for index in vgg.CONV_NAMES}
    for name, value in fully_connected.items():
        layer, leaf = name.split(".")
        state[f"{places[layer]}.{leaf}"] = value
    return state


OLD_BLOBS = ((1, 1, 4096, 25088), (1, 1, 4096, 4096))  # Caffe's before it had shapes


@pytest.mark.parametrize("make, shapes", [(torchvisions, ()), (caffe, ()), (caffe, OLD_BLOBS)])
def test_fully_connected_layers_are_subsampled(make, shapes):
    """Every fourth output and input, of fc6's 7×7 every third row and column."""
    by_output, by_input = (make(fully_connected(inputs, *shapes)) for inputs in (False, True))
    result = recognise(by_output).to_ours(by_output)
    fc6, fc7 = result[OURS + "fc6.weight"], result[OURS + "fc7.weight"]
    assert (fc6.shape, fc7.shape) == ((1024, 512, 3, 3), (1024, 1024, 1, 1))
    fourth = torch.arange(0.0, 4096, 4)
    for weight in (fc6, fc7):
        assert torch.equal(weight, fourth[:, None, None, None].expand_as(weight))
    for name in ("fc6", "fc7"):
        assert torch.equal(result[f"{OURS}{name}.bias"], fourth)

    result = recognise(by_input).to_ours(by_input)
    fc6, fc7 = result[OURS + "fc6.weight"], result[OURS + "fc7.weight"]
    for out, channel, row, column in ((0, 0, 0, 0), (5, 17, 2, 1), (1023, 511, 1, 2)):
        # inputs of fc6 are (channel, row, column) of 512×7×7
        assert fc6[out, channel, row, column] == channel * 49 + 3 * row * 7 + 3 * column
    assert torch.equal(fc7, fourth[None, :, None, None].expand_as(fc7))


def test_caffes_full_and_reduced_files_are_told_apart():
    full = caffe(fully_connected(False))
    reduced = caffe({"fc6.weight": torch.zeros(1024, 512, 3, 3)})
    for state, title in ((full, "VGG16, fc6 and fc7 subsampled"), (reduced, "VGG16 reduced-fc")):
        lineage = recognise(state)
        assert lineage.title == f"Caffe's {title}"
        state["conv1_1.weight"] = torch.ones(2, 3, 3, 3)  # for an input that nothing divides
        first = lineage.to_ours(state, "BGR", (2.0, 3.0, 4.0))[f"{OURS}conv1_1.weight"]
        assert (2 * first[0, :, 0, 0] / first[0, 0, 0, 0]).tolist() == pytest.approx([2, 3, 4])


@pytest.mark.parametrize("std", [(1.0, 1.0, 1.0), (58.0, 57.0, 56.0)])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_maps_are_torchvisions(torchvision_state, order, std):
    """On (image - mean) / PIXEL_STD as on torchvision's input."""
    rgb = torch.randint(0, 256, (1, 3, 48, 48), generator=torch.Generator().manual_seed(0)).float()
    theirs = (rgb / 255 - MEAN[:, None, None]) / STD[:, None, None]
    with torch.device("meta"):
        features = vgg16(weights=None).features
    names = [name for name in torchvision_state if name.startswith("features.")]
    state = {name.removeprefix("features."): torchvision_state[name] for name in names}
    features.load_state_dict(state, assign=True)

    image, mean = rgb, 255 * MEAN
    if order == "BGR":
        image, mean = image.flip(1), mean.flip(0)
    image = (image - mean[:, None, None]) / torch.tensor(std)[:, None, None]
    maps = backbone(torchvision_state, order, std)(image)
    for name, layers in (("conv4_3", 23), ("conv5_3", 30)):
        with torch.no_grad():
            expected = features[:layers](theirs)
        assert expected.std() > 1e-3, "something must be seen"
        torch.testing.assert_close(maps[name], expected, rtol=1e-3, atol=1e-5)


def backbone(state, order, std):
    model = VGG16(out_features=("conv4_3", "conv5_3"))
    result = recognise(state).to_ours(state, order, std)
    model.load_state_dict({name: result[OURS + name] for name in model.state_dict()})
    return model


def test_another_scale_of_the_input_leaves_no_layer_alone_in_its_step(torchvision_state):
    """A step of training, by the size of what it changes, grows by the same factor in each layer:
    with all of the scale in conv1_1 it would there be 58² times as large."""
    torch.manual_seed(0)
    image, steps = torch.randn(1, 3, 32, 32), []
    for scale in (1.0, 58.0):
        model = backbone(torchvision_state, "RGB", (255 * STD / scale).tolist())
        maps = model(scale * image)
        sum(x.square().sum() for x in maps.values()).backward()
        steps.append(
            {
                name: (x.grad.norm() / x.norm()).item()
                for name, x in model.named_parameters()
                if name.endswith("weight") and name.startswith("conv")
            }
        )
    own, scaled = steps
    for name, step in own.items():
        factor = 1.0 if name.startswith("conv5") else 58**0.2
        assert scaled[name] / step == pytest.approx(factor, rel=1e-2), name


def test_reduced_fc_for_bgr_and_another_scale():
    state = reduced_fc("")
    state["0.weight"] = state["0.weight"] + 1.0  # none is 0
    result = recognise(state).to_ours(state, "BGR", (2.0, 3.0, 4.0))
    first, theirs = result[OURS + "conv1_1.weight"], state["0.weight"]
    # our blue, channel 0, is divided by 2; the file's blue is channel 2
    factors = [first[:, ours] / theirs[:, channel] for ours, channel in ((0, 2), (1, 1), (2, 0))]
    for factor, scale in zip(factors, (2, 3, 4)):
        torch.testing.assert_close(factor, scale / 3 * torch.full_like(factor, 3**0.1))


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_torchvisions_features_for_ssd_are_scaled_by_pixel_std_alone(features_state, order):
    lineage = recognise(features_state)
    assert "features for SSD" in lineage.title and "fc6 and fc7 stay fresh" in lineage.title
    result = lineage.to_ours(features_state, order)
    names = {name for name in shapes_of_ours() if not name.startswith(OURS + "fc")}
    assert {name for name in result if name.startswith(OURS)} == names
    # the rest is left to be named as unused
    classifier = {name for name in features_state if name.startswith("classifier.")}
    assert set(result) == names | classifier
    first, theirs = result[OURS + "conv1_1.weight"], features_state["features.0.weight"]
    assert torch.equal(first, theirs if order == "RGB" else theirs.flip(1))
    assert torch.equal(result[OURS + "conv5_3.bias"], features_state["features.28.bias"])


def make_model(lab, *opts):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.SSD.NUM_CLASSES", "1", *opts]
    cfg = load_config(model_zoo.get_config_file(lab), opts)
    return cfg, build_model(cfg).eval()


def test_lab_that_starts_with_torchvisions_features(features_state, tmp_path, log):
    path = str(tmp_path / "vgg16_features-amdegroot-88682ab5.pth")
    # the classifier made small: tensors that share memory are refused, larger than their file
    state = {n: x[:1].clone() if n[0] == "c" else x for n, x in features_state.items()}
    torch.save(state, path)
    cfg, model = make_model("ssd_vgg16_size300_torchvision")
    fresh = {name: x.clone() for name, x in model.state_dict().items()}

    SSDCheckpointer(model, cfg=cfg).load(path)
    index = {name: number for number, name in vgg.CONV_NAMES.items()}
    for name, value in model.state_dict().items():
        is_conv = name.startswith(OURS) and ".fc" not in name
        layer, leaf = name.split(".")[-2:]
        theirs = features_state[f"features.{index[layer]}.{leaf}"] if is_conv else fresh[name]
        assert torch.equal(value, theirs), name
    assert "Found torchvision's VGG16 features for SSD" in log.text
    with pytest.raises(ValueError, match=r"missing .*fc6\.weight"):
        SSDCheckpointer(model, cfg=cfg, strict=True).load(path)


# --- Caffe's file -----------------------------------------------------------------------------


def caffemodel(layers):
    """NetParameter: ``layer`` (100) with name (1) and blobs (7) of data (5) and shape (7)."""
    content = field(1, "VGG_ILSVRC_16_layers")
    for name, blobs in layers.items():
        layer = field(1, name) + field(2, "Convolution")
        for blob in blobs:
            shape = field(7, field(1, b"".join(map(varint, blob.shape))))
            layer += field(7, field(5, blob.numpy().tobytes()) + shape)
        content += field(100, layer)
    return content


@pytest.fixture(scope="module")
def reduced_layers():
    """{Caffe's name: (weight, bias)} of VGG_ILSVRC_16_layers_fc_reduced, for BGR."""
    generator, layers = torch.Generator().manual_seed(0), {}
    for name, shape in shapes_of_ours().items():
        layer = name.removeprefix(OURS).split(".")[0]
        scale = (2 / shape[1:].numel()) ** 0.5 if len(shape) > 1 else 0.1
        layers.setdefault(layer, []).append(scale * torch.randn(shape, generator=generator))
    return layers


def caffes_features(layers, x):
    """conv4_3 and fc7 of a BGR image without its mean."""
    maps = {}
    for name, (weight, bias) in layers.items():
        if name.endswith("_1") and name != "conv1_1":
            x = F.max_pool2d(x, 2, ceil_mode=True)
        if name == "fc6":
            x = F.relu(F.conv2d(F.max_pool2d(x, 3, 1, 1), weight, bias, padding=6, dilation=6))
        else:
            x = F.relu(F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2))
        maps[name] = x
    return {name: maps[name] for name in ("conv4_3", "fc7")}


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_caffes_reduced_file_gives_its_features(reduced_layers, tmp_path, log, order):
    path = tmp_path / "VGG_ILSVRC_16_layers_fc_reduced.caffemodel"
    path.write_bytes(caffemodel(reduced_layers))
    mean = [123.0, 117.0, 104.0] if order == "RGB" else [104.0, 117.0, 123.0]
    cfg, model = make_model(
        "ssd_vgg16_size300", "INPUT.FORMAT", order, "MODEL.PIXEL_MEAN", mean,
        "MODEL.PIXEL_STD", [1.0, 1.0, 1.0] if order == "BGR" else [2.0, 4.0, 8.0],
    )  # fmt: skip
    SSDCheckpointer(model, cfg=cfg).load(str(path))
    turned = ", first layer turned from BGR to RGB" if order == "RGB" else ""
    assert f"Found Caffe's VGG16 reduced-fc{turned}" in log.messages
    assert "instead of" not in log.text

    bgr = torch.randint(0, 256, (1, 3, 48, 48), generator=torch.Generator().manual_seed(0)).float()
    image = bgr if order == "BGR" else bgr.flip(1)
    with torch.no_grad():
        actual = model.backbone.bottom_up((image - model.pixel_mean) / model.pixel_std)
        mean = torch.tensor([104.0, 117.0, 123.0])[:, None, None]
        expected = caffes_features(reduced_layers, bgr - mean)
    for name, value in expected.items():
        tolerance = 1e-4 * float(value.abs().max())
        assert value.std() > 100 * tolerance, "something must be seen"
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=tolerance)
