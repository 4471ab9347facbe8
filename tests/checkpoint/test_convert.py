"""Files of other projects to ours and back, bit by bit, and what can't be written.

Only names, ranks and the sizes that distinguish networks matter here, so parameters get one input
channel and 1x1 kernels, but for those that torchvision runs.
"""

import functools
import json
import re
import zlib

import pytest
import reference
import torch
from detectron2.modeling import build_model
from torchvision.models import detection
from weights import mmdet_old_name, mmdet_shapes

from ssd import model_zoo
from ssd.checkpoint import SSDCheckpointer, detectron2_fork
from ssd.checkpoint.convert import Detector, encode, read_ours, write_as
from ssd.config import load_config

FIRST = "backbone.bottom_up.conv1_1.weight"
CLASSES = [f"class {number}" for number in range(80)]


def fill(shapes):
    """Random values of these shapes, the same for the same name, but for the sizes above."""
    state = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        shape = [*shape[:1], *(size if size <= 3 else 1 for size in shape[1:])]
        state[name] = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1000)
    return state


# --- Other projects' parameters ---------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def mmdet(name):
    return fill(mmdet_shapes(name))


def mmdet_old(name):
    return {mmdet_old_name(name): value for name, value in mmdet(name).items()}


@functools.lru_cache(maxsize=None)
def torchvision(name):
    with torch.device("meta"):
        state = getattr(detection, name)(weights=None, weights_backbone=None).state_dict()
    return fill({name: value.shape for name, value in state.items()})


@functools.lru_cache(maxsize=None)
def qfgaohao(name):
    parameters, lineage = reference.Parameters(), reference.LINEAGES[f"qfgaohao_{name}"]
    with torch.no_grad():
        lineage.evaluate(reference.random_image(300), parameters)
    state = fill({name: value.shape for name, value in parameters.items()})
    for name, value in state.items():
        if re.search(r"headers\.\d\.0\.bias", name):
            value.zero_()  # in front of BatchNorm: becomes a part of its mean
    return state


def qfgaohao_l2norm():
    add_on = "source_layer_add_ons.0."
    state = {k: x for k, x in qfgaohao("vgg").items() if not k.startswith(add_on)}
    return {**state, add_on + "scale": torch.rand(512)}


THEIRS = {
    "mmdet-ssd300": ("mmdet", lambda: mmdet("ssd300")),
    "mmdet-ssd512": ("mmdet", lambda: mmdet("ssd512")),
    "mmdet-ssdlite": ("mmdet", lambda: mmdet("ssdlite")),
    "mmdet-old-ssd300": ("mmdet-old", lambda: mmdet_old("ssd300")),
    "mmdet-old-ssd512": ("mmdet-old", lambda: mmdet_old("ssd512")),
    "torchvision-ssd300": ("torchvision", lambda: torchvision("ssd300_vgg16")),
    "torchvision-ssdlite": ("torchvision", lambda: torchvision("ssdlite320_mobilenet_v3_large")),
    "pytorch-ssd-vgg": ("pytorch-ssd", lambda: qfgaohao("vgg")),
    "pytorch-ssd-vgg-l2norm": ("pytorch-ssd", qfgaohao_l2norm),
    "pytorch-ssd-mobilenetv1": ("pytorch-ssd", lambda: qfgaohao("v1")),
    "pytorch-ssd-mobilenetv2": ("pytorch-ssd", lambda: qfgaohao("v2")),
}


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_to_ours_and_back(name, tmp_path, assert_equal):
    format, parameters = THEIRS[name]
    theirs, file = parameters(), tmp_path / "file"
    if format.startswith("mmdet"):
        meta = {"mmdet_version": "2.12.0", "CLASSES": tuple(CLASSES)}
        torch.save({"state_dict": theirs, "meta": meta, "optimizer": {}}, file)
    else:
        torch.save(theirs, file)

    for middle in ("detectron2", "safetensors"):
        found = read_ours(str(file))
        file = tmp_path / middle
        file.write_bytes(encode(write_as(found, middle), middle))
        assert not set(found.state) & set(theirs)
    result = write_as(read_ours(str(file)), format)
    if format.startswith("mmdet"):
        assert result["meta"]["CLASSES"] == tuple(CLASSES)
        assert result["meta"]["dataset_meta"] == {"classes": tuple(CLASSES)}
        result = result["state_dict"]
    assert_equal(result, theirs)


# --- Our parameters ---------------------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def ours(lab, *opts):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *opts]
    model = build_model(load_config(model_zoo.get_config_file(lab), opts))
    return fill({name: value.shape for name, value in model.state_dict().items()})


VGG, QFGAOHAO = "ssd_vgg16_size300_120e", "ssd_vgg16_size300_qfgaohao"
V2, V3 = "ssdlite_mobilenetv2_size300_voc0712", "ssdlite_mobilenetv3_size320"
MMDET_V2, TF_V2 = "ssdlite_mobilenetv2_size320_600e", "ssdlite_mobilenetv2_size300_tf"
LUFFICC_V2 = "ssdlite_mobilenetv2_size320_voc0712"
FIT = {
    VGG: ("mmdet", "mmdet-old", "torchvision", "pytorch-ssd"),
    MMDET_V2: ("mmdet",),
    V3: ("torchvision",),
    QFGAOHAO: ("pytorch-ssd",),
    "ssd_mobilenetv1_size300_voc0712": ("pytorch-ssd",),
    V2: ("pytorch-ssd",),
}


@pytest.mark.parametrize("lab, format", [(lab, x) for lab, formats in FIT.items() for x in formats])
def test_ours_to_theirs_and_back(lab, format, tmp_path, assert_equal):
    state, file = ours(lab), str(tmp_path / "file")
    names = CLASSES if lab in (VGG, MMDET_V2) else None
    torch.save({"model": state, **({"classes": names} if names else {})}, file)
    data = write_as(read_ours(file), format)
    weights = data["state_dict"] if format.startswith("mmdet") else data
    assert not set(weights) & set(state) and len(weights) >= len(state)
    torch.save(data, file)
    found = read_ours(file)
    assert_equal(found.state, state)
    assert found.lineage.key.split("_")[0] == {"pytorch-ssd": "qfgaohao"}.get(
        format, format.split("-")[0]
    )
    assert found.classes == (names if format.startswith("mmdet") else None)


REFUSED = [
    (MMDET_V2, "torchvision", "torchvision's SSDLite320 has no name for backbone.bottom_up.stage"),
    (MMDET_V2, "mmdet-old", "before 2.14 has no name for backbone.bottom_up.conv1.weight"),
    (MMDET_V2, "pytorch-ssd", "no name for backbone.extra_layers.0.0.weight"),
    (V3, "mmdet", "MMDetection's SSDLite has no name for"),
    (QFGAOHAO, "mmdet", "MMDetection's SSD has L2Norm, not BatchNorm, on conv4_3"),
    (QFGAOHAO, "mmdet-old", "has L2Norm, not BatchNorm, on conv4_3"),
    (QFGAOHAO, "torchvision", "has no name for backbone.l2_norm.conv4_3.bias"),
    (LUFFICC_V2, "pytorch-ssd", "takes its first map inside a block, this one, of 96 channels"),
    (TF_V2, "mmdet", "takes its first map behind a block, this one, of 576 channels"),
    ("ssd_vgg16_size512_120e", "pytorch-ssd", "has predictors on 6 levels, not on 7"),
    ("ssd_vgg16_size512_120e", "torchvision", "has predictors on 6 levels, not on 7"),
    ("ssd_resnet50_size300", "torchvision", "has no name for backbone.bottom_up.stem.conv1"),
]


@pytest.mark.parametrize("lab, format, reason", REFUSED)
def test_what_the_target_has_no_network_for_is_refused(lab, format, reason):
    with pytest.raises(ValueError, match=f"{format} has no such network: .*{re.escape(reason)}"):
        write_as(Detector(ours(lab)), format)


def test_a_backbone_alone_is_no_detector_but_becomes_ours(tmp_path):
    theirs = {f"{i}.weight": torch.rand(4, 3, 1, 1) for i in (0, 26, 28)}
    torch.save(theirs, tmp_path / "vgg.pth")
    found = read_ours(str(tmp_path / "vgg.pth"))
    assert found.definition() is None
    scale = 255 * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    first = write_as(found, "detectron2")["model"][FIRST] * scale
    torch.testing.assert_close(first, theirs["0.weight"])
    for format in ("mmdet", "mmdet-old", "torchvision", "pytorch-ssd"):
        with pytest.raises(ValueError, match="has no such network"):
            write_as(found, format)


@pytest.mark.parametrize("format", ["torchvision", "mmdet", "mmdet-old"])
@pytest.mark.parametrize("opts, reason", [
    ("MODEL.SSD.L2_NORM_FEATURES []", "has L2Norm on conv4_3"),
    ("MODEL.SSD.IN_FEATURES ['conv4_3','conv5_3','fc7'] "
     "MODEL.SSD.EXTRA_LAYERS [[256,512,3,2,1],[128,256,3,2,1],[128,256,3,1,0]] "
     "MODEL.SSD.DEFAULT_BOXES.STEPS []",
     "predicts from conv4_3, fc7 and the extra layers: 5 levels, not 6"),
])  # fmt: skip
def test_a_vgg_with_other_maps_is_refused(format, opts, reason):
    with pytest.raises(ValueError, match=reason):
        write_as(Detector(ours(VGG, *opts.split())), format)


def test_a_network_with_another_order_of_pools_is_refused():
    fork = Detector(ours("ssd_vgg16_size512"), lineage=detectron2_fork.LINEAGES[0])
    with pytest.raises(ValueError, match="mmdet has no VGG16 that pools as that of an earlier"):
        write_as(fork, "mmdet")


def test_a_format_that_does_not_exist():
    with pytest.raises(ValueError, match="format 'tf', expected one of detectron2, mmdet, "):
        write_as(Detector({}), "tf")


# --- Reading ----------------------------------------------------------------------------------


def save(path, **data):
    torch.save(data, path)
    return str(path)


def test_order_of_channels(tmp_path):
    state = ours(VGG)
    path = save(tmp_path / "file", model=state)
    assert torch.equal(read_ours(path, "RGB").state[FIRST], state[FIRST])
    found = read_ours(path, "BGR")
    assert torch.equal(found.state[FIRST], state[FIRST].flip(1))
    theirs = write_as(found, "mmdet")["state_dict"]
    assert torch.equal(theirs["backbone.features.0.weight"], state[FIRST].flip(1))

    path = save(tmp_path / "mmdet", state_dict=theirs)  # of a config with bgr_to_rgb=False
    assert torch.equal(read_ours(path).state[FIRST], state[FIRST].flip(1))
    assert torch.equal(read_ours(path, "BGR").state[FIRST], state[FIRST])


def test_averaged_weights(tmp_path):
    state = ours(VGG)
    average = {name: 2 * value for name, value in state.items()}
    path = save(tmp_path / "file", model=state, ema=average, iteration=7, classes=CLASSES)
    trained, averaged = read_ours(path), read_ours(path, averaged=True)
    assert torch.equal(trained.state[FIRST], state[FIRST]) and set(trained.rest) > {"ema"}
    assert torch.equal(averaged.state[FIRST], average[FIRST]) and averaged.rest["iteration"] == 7
    assert averaged.classes == CLASSES
    with pytest.raises(ValueError, match=r"holds no averaged weights \(SOLVER.EMA\)"):
        read_ours(save(tmp_path / "other", model=state), averaged=True)


def test_mmdetection_1_has_the_background_first(tmp_path):
    theirs, name = mmdet_old("ssd300"), "bbox_head.cls_convs.0.bias"
    path = save(tmp_path / "file", state_dict=theirs, meta={"mmdet_version": "1.0rc1"})
    data = write_as(read_ours(path), "mmdet-old")
    result, source = data["state_dict"][name].view(4, 81), theirs[name].view(4, 81)
    assert torch.equal(result[:, -1], source[:, 0]) and torch.equal(result[:, :-1], source[:, 1:])
    path = save(tmp_path / "again", **data)
    assert torch.equal(write_as(read_ours(path), "mmdet-old")["state_dict"][name], result.flatten())


def test_biases_in_front_of_batchnorm_go_into_its_means(tmp_path):
    layer, level = "classification_headers.0.", 0
    theirs = {**qfgaohao("v2"), layer + "0.bias": torch.rand(576)}
    torch.save(theirs, tmp_path / "file")
    found = read_ours(str(tmp_path / "file"))
    mean = theirs[layer + "1.running_mean"] - theirs[layer + "0.bias"]
    assert torch.equal(found.state[f"head.cls_predictors.{level}.0.norm.running_mean"], mean)
    result = write_as(found, "pytorch-ssd")
    assert torch.equal(result[layer + "1.running_mean"], mean)
    assert torch.equal(result[layer + "0.bias"], torch.zeros(576))


def test_what_is_no_parameter_of_the_network_is_left_out(tmp_path, caplog):
    theirs = {**mmdet("ssd300"), "ema_backbone_features_0_weight": torch.ones(2)}
    found = read_ours(save(tmp_path / "file", state_dict=theirs))
    assert "MMDetection's SSD: left out ema_backbone_features_0_weight" in caplog.text
    assert write_as(found, "mmdet")["state_dict"].keys() == mmdet("ssd300").keys()


def test_files_that_are_refused(tmp_path):
    path = save(tmp_path / "file", model={"fpn.weight": torch.ones(1), "rpn": torch.ones(1)})
    with pytest.raises(ValueError, match="of no known lineage .*: it holds fpn.weight, rpn"):
        read_ours(path)
    bad = {**ours(VGG), FIRST: torch.full((64, 3, 1, 1), float("nan"))}
    with pytest.raises(ValueError, match=f"{FIRST} holds NaN or infinite values"):
        read_ours(save(tmp_path / "file", model=bad))
    with pytest.raises(ValueError, match="holds no dictionary of weights"):
        read_ours(save(tmp_path / "file", model={"a": 1}))


def test_safetensors_with_other_metadata(tmp_path):
    from safetensors.torch import save_file

    for text, expected in ((json.dumps(["a"]), ["a"]), ("{", None), ("[1]", None)):
        save_file(ours(MMDET_V2), tmp_path / "file", {"format": "pt", "classes": text})
        assert read_ours(str(tmp_path / "file")).classes == expected


# --- Bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["detectron2", "safetensors"])
def test_equal_weights_give_equal_bytes(format, tmp_path):
    state = ours(V2)
    path = save(tmp_path / "first", model=state, classes=["a", "b"], optimizer={"lr": 1})
    first = encode(write_as(read_ours(path), format), format)
    # other memory: one tensor's views, another order of dimensions
    store = torch.cat([value.flatten().float() for value in state.values()])
    parts = store.split([value.numel() for value in state.values()])
    views = {k: part.view_as(x).to(x.dtype) for (k, x), part in zip(state.items(), parts)}
    views = {
        k: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for k, x in views.items()
    }
    path = save(tmp_path / "second", iteration=3, model=views, classes=["a", "b"])
    assert encode(write_as(read_ours(path), format), format) == first
    size = sum(value.numel() * value.element_size() for value in state.values())
    assert len(first) < 2 * size


# --- torchvision's own code -------------------------------------------------------------------


@pytest.mark.parametrize(
    "lab, function",
    [
        ("ssd_vgg16_size300_torchvision", detection.ssd300_vgg16),
        (V3, detection.ssdlite320_mobilenet_v3_large),
    ],
)
def test_torchvision_computes_the_same_from_the_written_file(lab, function, tmp_path):
    torch.manual_seed(0)
    cfg = load_config(model_zoo.get_config_file(lab), ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    model = build_model(cfg).eval()
    for name, value in model.state_dict().items():
        if name.endswith(("bias", "running_mean")):
            value.normal_(std=0.5)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    SSDCheckpointer(model, str(tmp_path)).save("model")
    data = write_as(read_ours(str(tmp_path / "model.pth")), "torchvision")
    (tmp_path / "theirs.pth").write_bytes(encode(data))
    with torch.device("meta"):  # initialisation takes seconds
        theirs = function(weights=None, weights_backbone=None)
    theirs.to_empty(device="cpu").eval()
    theirs.load_state_dict(torch.load(tmp_path / "theirs.pth", weights_only=True), strict=True)

    x = torch.randn(1, 3, *model.input_size)
    with torch.no_grad():
        found = theirs.head(list(theirs.backbone(x).values()))
        logits, deltas = model.head.flatten(*model.head(list(model.backbone(x).values())))
    assert logits.std() > 0.3 and deltas.std() > 0.3
    torch.testing.assert_close(found["cls_logits"], logits.roll(1, dims=2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["bbox_regression"], deltas, rtol=1e-4, atol=1e-4)
