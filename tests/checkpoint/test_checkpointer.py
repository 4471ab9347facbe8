"""Saving and loading: round trips, foreign files, files that are broken or would run code."""

import math
import os
import pickle
import re
import resource
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from torch import nn
from trainers import in_two_processes
from weights import OLD, Hostile, mmdet_shapes, saved

from ssd.checkpoint import SSDCheckpointer, vgg
from ssd.config import load_config

ROOT = Path(__file__).parents[2]
BASES = ROOT / "labs/_base_"
SMALL = """MODEL.DEVICE cpu MODEL.WEIGHTS '' MODEL.SSD.INPUT_SIZE [96,96] MODEL.SSD.NUM_CLASSES 3
    MODEL.SSD.EXTRA_LAYERS [[16,32,3,2,1]] MODEL.SSD.DEFAULT_BOXES.STEPS []
    MODEL.SSD.DEFAULT_BOXES.MIN_SIZES [24.0,48.0,72.0] MODEL.SSD.DEFAULT_BOXES.MAX_SIZE 96.0
    MODEL.SSD.DEFAULT_BOXES.ASPECT_RATIOS [[2.0],[2.0],[2.0]]""".split()
LITE = "MODEL.SSD.IN_FEATURES ['stage2','stage3']".split()


def make_model(*opts, base="ssdlite_mobilenetv2", seed=0):
    torch.manual_seed(seed)
    lite = LITE if base == "ssdlite_mobilenetv2" else []
    return build_model(load_config(str(BASES / f"{base}.yaml"), [*SMALL, *lite, *opts]))


def copied(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def others(model):
    """Other values for each of its parameters."""
    return {name: x + 1 for name, x in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_round_trip_is_exact(tmp_path):
    model, other = make_model(), make_model(seed=1)
    state = model.state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    saver = SSDCheckpointer(model, str(tmp_path), optimizer=optimizer)
    saver.save("model_0000004", iteration=4)
    assert saver.has_checkpoint()
    assert saver.get_checkpoint_file() == str(tmp_path / "model_0000004.pth")

    fresh = torch.optim.SGD(other.parameters(), lr=1.0)
    loader = SSDCheckpointer(other, str(tmp_path), strict=True, optimizer=fresh)
    extra = loader.resume_or_load("", resume=True)
    assert extra["iteration"] == 4 and fresh.param_groups[0]["lr"] == 0.125
    assert same(other.state_dict(), state)
    assert set(os.listdir(tmp_path)) == {"model_0000004.pth", "last_checkpoint"}


def test_what_load_returns_is_what_nobody_has_processed(tmp_path):
    model = make_model()
    SSDCheckpointer(model, str(tmp_path)).save("model", iteration=4)
    assert SSDCheckpointer(model).load(str(tmp_path / "model.pth")) == {"iteration": 4}


def test_a_save_without_tag_leaves_the_last_checkpoint(tmp_path):
    checkpointer = SSDCheckpointer(make_model(), str(tmp_path))
    checkpointer.save("first")
    checkpointer.save("best", tag=False)
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "first.pth")
    assert (tmp_path / "best.pth").is_file()


def test_only_the_process_that_writes_to_disk_saves(tmp_path):
    SSDCheckpointer(make_model(), str(tmp_path), save_to_disk=False).save("model")
    assert not os.listdir(tmp_path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    checkpointer = SSDCheckpointer(model := make_model(), str(tmp_path))
    checkpointer.save("model_0000001")
    next(x for name, x in model.named_buffers() if "running_var" in name).fill_(math.inf)
    with pytest.raises(FloatingPointError, match="model_0000002.pth is not saved: .*running_var"):
        checkpointer.save("model_0000002")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert set(os.listdir(tmp_path)) == {"model_0000001.pth", "last_checkpoint"}


def test_resuming_where_one_process_has_no_checkpoint(tmp_path):
    """As on two machines without a common folder; the second would begin with other weights."""

    def resume(rank):
        folder = tmp_path / f"machine{rank}"
        folder.mkdir(exist_ok=True)
        checkpointer = SSDCheckpointer(make_model(), str(folder))
        if rank == 0:
            checkpointer.save("model_0000004", iteration=4)
        with pytest.raises(ValueError, match="different checkpoints, model_0000004.pth, none;"):
            checkpointer.resume_or_load("", resume=True)
        checkpointer.resume_or_load("", resume=False)

    in_two_processes(resume, tmp_path)


def test_resuming_another_model_is_an_error(tmp_path):
    SSDCheckpointer(make_model(), str(tmp_path)).save("model_0000001")
    other = make_model("MODEL.SSD.NUM_CLASSES", "5")
    checkpointer = SSDCheckpointer(other, str(tmp_path))
    with pytest.raises(ValueError, match="--resume: .*model_0000001.pth doesn't fill the model"):
        checkpointer.resume_or_load("", resume=True)


def test_detectron2s_checkpointer_reads_our_files(tmp_path):
    model, other = make_model(), make_model(seed=1)
    SSDCheckpointer(model, str(tmp_path)).save("model")
    DetectionCheckpointer(other).load(str(tmp_path / "model.pth"))
    assert same(other.state_dict(), model.state_dict())


def failing_save(checkpointer, room):
    if room is None:
        checkpointer.save("model", extra=lambda: 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # as a full disk
    try:
        checkpointer.save("model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [None, 100, 20_000, 100_000])  # bytes; None: what can't be saved
def test_a_failing_save_leaves_the_earlier_file_whole(tmp_path, room):
    checkpointer = SSDCheckpointer(make_model(), str(tmp_path))
    checkpointer.save("model")
    before = (tmp_path / "model.pth").read_bytes()
    assert len(before) > 200_000
    errors = OSError if room else (pickle.PicklingError, AttributeError)
    with pytest.raises(errors, match="what was saved before is whole" if room else None):
        failing_save(checkpointer, room)
    assert (tmp_path / "model.pth").read_bytes() == before
    assert set(os.listdir(tmp_path)) == {"model.pth", "last_checkpoint"}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_mmdetection_file_fills_the_model(tmp_path, prefix):
    state = mmdetections()
    path = str(tmp_path / "ssdlite.pth")
    stored = {prefix + name: value for name, value in state.items()}
    torch.save({"state_dict": stored, "meta": {"epoch": 120, "CLASSES": ("a", "b")}}, path)
    cfg = load_config(str(BASES / "ssdlite_mobilenetv2.yaml"), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    SSDCheckpointer(model, cfg=cfg, strict=True).load(path)
    ours = model.state_dict()
    for theirs, name in {
        "backbone.conv1.conv.weight": "backbone.bottom_up.conv1.weight",
        "neck.extra_layers.2.1.depthwise_conv.bn.bias": "backbone.extra_layers.2.1.norm.bias",
        "bbox_head.reg_convs.0.1.bias": "head.box_predictors.0.1.bias",
    }.items():
        assert torch.equal(ours[name], state[theirs]), name


def mmdetections():
    """Random parameters of its SSDLite."""
    generator, shapes = torch.Generator().manual_seed(0), mmdet_shapes("ssdlite")
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def test_mmdetections_averages_are_those_that_it_evaluates(tmp_path, log):
    """Its plain names; MMCV's hook leaves ema_… beside them, MMEngine's an ema_state_dict."""
    state = mmdetections()
    extra = {"ema_" + name.replace(".", "_"): -x for name, x in state.items()}
    average = {"steps": torch.tensor(7), **{f"module.{n}": -x for n, x in state.items()}}
    path = str(tmp_path / "epoch_1.pth")
    torch.save({"state_dict": {**extra, **state}, "ema_state_dict": average}, path)
    cfg = load_config(str(BASES / "ssdlite_mobilenetv2.yaml"), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    SSDCheckpointer(model, cfg=cfg, strict=True).load(path)
    expected = state["bbox_head.reg_convs.0.1.bias"]
    assert torch.equal(model.state_dict()["head.box_predictors.0.1.bias"], expected)
    assert "ema_backbone_conv1_conv_weight" in log.text, "not used, and named"


def test_another_class_count_in_training_keeps_the_rest_and_says_so(tmp_path, log):
    source, target = make_model(), make_model("MODEL.SSD.NUM_CLASSES", "5", seed=1)
    fresh = copied(target)
    SSDCheckpointer(source, str(tmp_path)).save("model")
    SSDCheckpointer(target).load(str(tmp_path / "model.pth"))
    for name, value in target.state_dict().items():
        of_classes = re.match(r"head\.cls_predictors\.\d\.1\.", name) is not None
        expected = fresh[name] if of_classes else source.state_dict()[name]
        assert torch.equal(value, expected), name
        assert not of_classes or name in log.text


def test_another_class_count_in_evaluation_is_an_error(tmp_path):
    SSDCheckpointer(make_model(), str(tmp_path)).save("model")
    target = make_model("MODEL.SSD.NUM_CLASSES", "5")
    with pytest.raises(ValueError, match=r"head\.cls_predictors.*MODEL\.SSD\.NUM_CLASSES"):
        SSDCheckpointer(target, strict=True).load(str(tmp_path / "model.pth"))


def test_few_fitting_weights_are_kept_in_training(tmp_path):
    model, source = make_model(), make_model(seed=1).state_dict()
    half = len(source) * 3 // 5
    state = {
        name: torch.zeros(7, 7) if number < half else value
        for number, (name, value) in enumerate(source.items())
    }
    torch.save({"model": state}, tmp_path / "model.pth")
    SSDCheckpointer(model).load(str(tmp_path / "model.pth"))
    assert all(torch.equal(model.state_dict()[n], source[n]) for n in list(source)[half:])


@pytest.mark.parametrize("strict", [False, True])
def test_weights_of_something_else(tmp_path, strict):
    torch.save({"state_dict": {"layer.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS.*layer\.weight.*backbone\."):
        SSDCheckpointer(make_model(), strict=strict).load(str(tmp_path / "other.pth"))


def test_a_missing_weight_in_evaluation_is_named(tmp_path):
    state = make_model().state_dict()
    del state["head.box_predictors.1.1.bias"]
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"missing head\.box_predictors\.1\.1\.bias"):
        SSDCheckpointer(make_model(), strict=True).load(str(tmp_path / "model.pth"))


@pytest.mark.parametrize(
    "prefix", ["module.", "module.1.", "_orig_mod.", "model.", "_orig_mod.module."]
)
def test_names_of_a_wrapped_model(tmp_path, prefix):
    model = make_model()
    source = others(model)
    torch.save({"model": {prefix + n: x for n, x in source.items()}}, tmp_path / "model.pth")
    SSDCheckpointer(model, strict=True).load(str(tmp_path / "model.pth"))
    assert same(model.state_dict(), source)


def test_a_model_that_is_a_wrapper_itself(tmp_path):
    class Wrapper(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.model = make_model(seed=seed)

    first, second = Wrapper(0), Wrapper(1)
    SSDCheckpointer(first, str(tmp_path)).save("model_0000004", iteration=4)
    SSDCheckpointer(second, str(tmp_path), strict=True).resume_or_load("", resume=True)
    assert same(second.state_dict(), first.state_dict())


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "net"])
def test_weights_by_any_usual_key(tmp_path, key):
    model = make_model()
    source = others(model)
    torch.save({key: source, "epoch": 3}, tmp_path / "model.pth")
    result = SSDCheckpointer(model, strict=True).load(str(tmp_path / "model.pth"))
    assert same(model.state_dict(), source) and result == {"epoch": 3}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_parameter_that_is_not_finite_is_an_error(tmp_path, strict, value):
    model = make_model()
    state, before = others(model), copied(model)
    state["head.box_predictors.1.1.bias"][2] = value
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS.*head\.box_predictors\.1\.1\.bias.*NaN"):
        SSDCheckpointer(model, strict=strict).load(str(tmp_path / "model.pth"))
    assert same(model.state_dict(), before)


def test_nan_in_what_is_not_used_is_no_error(tmp_path):
    model = make_model()
    source = others(model)
    state = {**source, "teacher.weight": torch.full((3,), float("nan"))}
    torch.save({"model": state}, tmp_path / "model.pth")
    SSDCheckpointer(model, strict=True).load(str(tmp_path / "model.pth"))
    assert same(model.state_dict(), source)


def test_weights_without_a_dictionary_around(tmp_path):
    model = make_model()
    source = others(model)
    torch.save(source, tmp_path / "model.pth")
    SSDCheckpointer(model, strict=True).load(str(tmp_path / "model.pth"))
    assert same(model.state_dict(), source)


def test_missing_file_names_the_key(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS.*absent\.pth.*current folder"):
        SSDCheckpointer(nn.Linear(2, 2)).load(str(tmp_path / "absent.pth"))


def test_missing_vgg_file_says_where_it_is_published():
    with pytest.raises(FileNotFoundError, match="https://.*/vgg16_reducedfc.pth"):
        SSDCheckpointer(nn.Linear(2, 2)).load("vgg16_reducedfc.pth")


def test_evaluation_without_weights():
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        SSDCheckpointer(nn.Linear(2, 2), strict=True).load("")
    assert SSDCheckpointer(nn.Linear(2, 2)).load("") == {}


WEIGHTS = {"model": {"a.weight": torch.zeros(1000)}}
BROKEN = {  # tests/checkpoint/test_files.py has all files that can't be read
    "empty": b"",
    "empty dictionary": saved({}),
    "no weights": saved({"model": {}}),
    "model is a list": saved({"model": [1, 2]}),
    "model is a number": saved({"model": 3}),
    "weights are strings": saved({"model": {"a": "b"}}),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file_is_one_clear_error(tmp_path, kind):
    path = tmp_path / "model.pth"
    path.write_bytes(BROKEN[kind])
    model = nn.Linear(2, 2)
    before = copied(model)
    with pytest.raises(ValueError, match=r"^MODEL\.WEIGHTS .*model\.pth") as error:
        SSDCheckpointer(model).load(str(path))
    assert "weights_only" not in str(error.value), "advises to read it unsafely"
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("name", ["model.pth", "model.pkl", "model.pyth", "model"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "torch old", "beside weights"])
def test_file_that_would_run_code_is_refused(tmp_path, name, kind):
    mark, path = tmp_path / "made", tmp_path / name
    hostile = Hostile(mark)
    path.write_bytes(
        {
            "pickle": lambda: pickle.dumps(hostile, protocol=2),
            "torch": lambda: saved({"model": hostile}),
            "torch old": lambda: saved({"model": hostile}, **OLD),
            "beside weights": lambda: saved({**WEIGHTS, "optimizer": hostile}),
        }[kind]()
    )
    with pytest.raises(ValueError, match=r"^MODEL\.WEIGHTS ") as error:
        SSDCheckpointer(nn.Linear(2, 2)).load(str(path))
    assert not mark.exists()
    assert "weights_only" not in str(error.value), "advises to read it unsafely"


def test_a_checkpointer_can_be_used_after_an_error(tmp_path):
    model = make_model()
    checkpointer = SSDCheckpointer(model, str(tmp_path))
    checkpointer.save("good")
    (tmp_path / "bad.pth").write_bytes(b"")
    with pytest.raises(ValueError):
        checkpointer.load(str(tmp_path / "bad.pth"))
    checkpointer.load(str(tmp_path / "good.pth"))


def vgg_state(model):
    """VGG's weights by their names in vgg16_reducedfc.pth."""
    state = model.backbone.bottom_up.state_dict()
    indices = {name: index for index, name in vgg.CONV_NAMES.items()}
    parts = (name.split(".") for name in state)
    return {f"{indices[layer]}.{leaf}": state[f"{layer}.{leaf}"] for layer, leaf in parts}


def test_vgg_file_fills_the_backbone_alone(tmp_path):
    model, source = (make_model(base="ssd300_vgg16", seed=seed) for seed in (0, 1))
    state = vgg_state(source)
    path = str(tmp_path / "vgg16_reducedfc.pth")
    torch.save(state, path)
    head = {name: x.clone() for name, x in model.head.state_dict().items()}
    SSDCheckpointer(model).load(path)
    assert same(model.backbone.bottom_up.state_dict(), source.backbone.bottom_up.state_dict())
    assert same(model.head.state_dict(), head)
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS doesn't fill the model.*l2_norm"):
        SSDCheckpointer(model, strict=True).load(path)


def test_entries_that_are_not_used_are_named(tmp_path, log):
    """amdegroot's whole SSD has VGG16's names too."""
    model = make_model(base="ssd300_vgg16")
    state = {f"vgg.{name}": value for name, value in vgg_state(model).items()}
    torch.save({**state, "loc.0.weight": torch.zeros(3)}, tmp_path / "ssd300.pth")
    SSDCheckpointer(model).load(str(tmp_path / "ssd300.pth"))
    assert "loc.0.weight" in log.text


# --- Fine-tuning from other classes -----------------------------------------------------------

# Where VOC's aeroplane, bicycle, …, tvmonitor are among COCO's 80 classes.
VOC_IN_COCO = [4, 1, 14, 8, 39, 5, 2, 15, 56, 19, 60, 16, 17, 3, 0, 58, 18, 57, 6, 62]
BACKGROUND = -1
FINE_TUNED = {  # source and target classes: for each target class its source
    "another order": ("abc", "cab", [2, 0, 1]),
    "fewer": ("abc", "cb", [2, 1]),
    "more": ("abc", "cxaby", [2, None, 0, 1, None]),
    "another order and name": ("abc", "cay", [2, 0, None]),
}


def by_class(state, name="head.cls_predictors.0.1", leaf="bias", num_anchors=4):
    """(A, K + 1, …) of the lite predictor of a level, background last."""
    return state[f"{name}.{leaf}"].unflatten(0, (num_anchors, -1))


def assert_rows(model, source, fresh, rows):
    """``rows``: of each target class the source's, or None for a fresh one."""
    state = model.state_dict()
    for level in range(3):
        for leaf in ("weight", "bias"):
            name = f"head.cls_predictors.{level}.1"
            actual, theirs, own = (by_class(x, name, leaf) for x in (state, source, fresh))
            for cls, row in enumerate([*rows, BACKGROUND]):
                index = BACKGROUND if row == BACKGROUND else cls
                expected = own[:, index] if row is None else theirs[:, row]
                assert torch.equal(actual[:, index], expected), (name, leaf, cls)
    of_classes = re.compile(r"head\.cls_predictors\.\d\.1\.")
    rest = [name for name in state if not of_classes.match(name)]
    assert all(torch.equal(state[name], source[name]) for name in rest)


@pytest.fixture
def classed(register):
    """A function (class names, seed, KEY, VALUE, …) → (config, model) with random biases."""

    def make(names, seed=0, *opts):
        train = ["DATASETS.TRAIN", (register([], names),), "DATASETS.TEST", ()]
        opts = [*SMALL, *LITE, *train, "MODEL.SSD.NUM_CLASSES", len(names), *opts]
        cfg = load_config(str(BASES / "ssdlite_mobilenetv2.yaml"), opts)
        torch.manual_seed(seed)
        model = build_model(cfg)
        for name, value in model.head.state_dict().items():
            if name.endswith(".1.bias"):
                value.normal_()
        return cfg, model

    return make


@pytest.mark.parametrize("kind", FINE_TUNED)
def test_own_classes_are_matched_by_name(tmp_path, classed, register, log, kind):
    theirs, ours, rows = FINE_TUNED[kind]
    test = ["DATASETS.TEST", (register([], theirs[::-1]), register([], ours[::-1]))]  # don't count
    cfg, source = classed(theirs, 0, *test)
    SSDCheckpointer(source, str(tmp_path), cfg=cfg).save("model")
    cfg, model = classed(ours, 1, *test)
    fresh = copied(model)
    assert SSDCheckpointer(model, cfg=cfg).load(str(tmp_path / "model.pth")) == {}
    assert_rows(model, source.state_dict(), fresh, rows)
    known = len(rows) - rows.count(None)
    text = f"{known} of {len(rows)} classes start from those of weights"
    fresh = [name for name, row in zip(ours, rows) if row is None]
    assert text + (f"; fresh: {', '.join(fresh)}" if fresh else "") in log.messages


@pytest.mark.parametrize("names", ["abcd", "uvwx", ["A", "a", "B", "b"]])
def test_a_layer_of_other_default_boxes_stays_fresh(tmp_path, classed, names, log):
    """(2 + 1) classes of 4 boxes are as many outputs as (1 + 1) of 6."""
    cfg, source = classed(names[:2])
    SSDCheckpointer(source, str(tmp_path), cfg=cfg).save("model")
    ratios = ["MODEL.SSD.DEFAULT_BOXES.ASPECT_RATIOS", [[2.0, 3.0], [2.0], [2.0]]]
    cfg, model = classed(names[:1], 1, *ratios)
    fresh = copied(model)
    SSDCheckpointer(model, cfg=cfg).load(str(tmp_path / "model.pth"))
    name = "head.cls_predictors.{}.1.bias"
    state = model.state_dict()
    assert fresh[name.format(0)].shape == source.state_dict()[name.format(0)].shape
    assert torch.equal(state[name.format(0)], fresh[name.format(0)])
    assert not torch.equal(state[name.format(1)], fresh[name.format(1)])
    ratios[1] = [[2.0, 3.0]] * 3
    cfg, model = classed(names[:1], 1, *ratios)
    log.clear()
    SSDCheckpointer(model, cfg=cfg).load(str(tmp_path / "model.pth"))
    assert "classes start from" not in log.text


def test_classes_that_differ_by_case_are_kept(tmp_path, classed):
    cfg, source = classed(["A", "a", "B"])
    SSDCheckpointer(source, str(tmp_path), cfg=cfg).save("model")
    cfg, model = classed(["A", "a", "B"], 1)
    SSDCheckpointer(model, cfg=cfg).load(str(tmp_path / "model.pth"))
    assert same(model.state_dict(), source.state_dict())


def test_renamed_classes_of_equal_number_are_kept(tmp_path, classed):
    cfg, source = classed("abc")
    SSDCheckpointer(source, str(tmp_path), cfg=cfg).save("model")
    cfg, model = classed("axc", 1)
    SSDCheckpointer(model, cfg=cfg).load(str(tmp_path / "model.pth"))
    assert same(model.state_dict(), source.state_dict())


def test_classes_of_nobodys_name_stay_fresh_and_are_named(tmp_path, classed, log):
    cfg, source = classed("abc")
    SSDCheckpointer(source, str(tmp_path), cfg=cfg).save("model")
    cfg, model = classed("xy", 1)
    fresh = copied(model)
    SSDCheckpointer(model, cfg=cfg).load(str(tmp_path / "model.pth"))
    name = "head.cls_predictors.0.1.bias"
    assert torch.equal(model.state_dict()[name], fresh[name]) and name in log.text


@pytest.mark.parametrize(
    "class_map, rows",
    [([1, -1, 0], [1, None, 0]), (["b", "", "A"], [1, None, 0]), (["c", 2, -1], [2, 2, None])],
)
def test_classes_by_class_map(tmp_path, classed, class_map, rows):
    cfg, source = classed("abc")
    SSDCheckpointer(source, str(tmp_path), cfg=cfg).save("model")
    cfg, model = classed("abc", 1, "MODEL.SSD.CLASS_MAP", class_map)
    fresh = copied(model)
    SSDCheckpointer(model, cfg=cfg).load(str(tmp_path / "model.pth"))
    assert_rows(model, source.state_dict(), fresh, rows)


def test_a_class_map_that_does_not_fit_is_an_error(tmp_path, classed):
    cfg, source = classed("abc")
    SSDCheckpointer(source, str(tmp_path), cfg=cfg).save("model")
    cfg, model = classed("xy", 1, "MODEL.SSD.CLASS_MAP", ["a", "d"])
    with pytest.raises(ValueError, match=r"MODEL\.SSD\.CLASS_MAP\[1\] is 'd'"):
        SSDCheckpointer(model, cfg=cfg).load(str(tmp_path / "model.pth"))


def test_saving_reads_no_data(tmp_path, classed, register):
    """A checkpoint isn't lost because of a data set's function."""
    cfg, model = classed("abc")
    name = "t_unreadable"
    DatasetCatalog.register(name, lambda: 1 / 0)
    cfg.defrost()
    cfg.DATASETS.TRAIN = (name,)
    SSDCheckpointer(model, str(tmp_path), cfg=cfg).save("model")
    DatasetCatalog.pop(name)
    assert "classes" not in torch.load(tmp_path / "model.pth", weights_only=True)


def test_own_weights_without_names_are_nobodys(tmp_path, classed, log):
    """Twenty classes of one's own aren't VOC's."""
    names = ["person", "car", *map(str, range(18))]
    _, source = classed(names)
    torch.save(source.state_dict(), tmp_path / "model.pth")
    cfg, model = classed(["car", "person", "x"], 1)
    fresh = copied(model)
    SSDCheckpointer(model, cfg=cfg).load(str(tmp_path / "model.pth"))
    name = "head.cls_predictors.0.1.bias"
    assert torch.equal(model.state_dict()[name], fresh[name])
    assert "names of the 20 classes of MODEL.WEIGHTS aren't known" in log.text


def test_resuming_maps_no_classes(tmp_path, classed, log):
    cfg, source = classed("abc")
    SSDCheckpointer(source, str(tmp_path), cfg=cfg).save("model")
    cfg, model = classed("cab", 1, "MODEL.SSD.CLASS_MAP", [2, 1, 0])
    SSDCheckpointer(model, str(tmp_path), cfg=cfg).resume_or_load("", resume=True)
    assert same(model.state_dict(), source.state_dict())
    assert "was trained on the classes a, b, c, but the data set's are c, a, b" in log.text


def test_fine_tuning_in_the_folder_of_the_weights_maps_classes(tmp_path, classed):
    cfg, source = classed("abc")
    SSDCheckpointer(source, str(tmp_path), cfg=cfg).save("model")
    cfg, model = classed("cab", 1)
    checkpointer = SSDCheckpointer(model, str(tmp_path), cfg=cfg)
    checkpointer.resume_or_load(str(tmp_path / "model.pth"), resume=False)
    bias = "head.cls_predictors.0.1.bias"
    found, given = (x.state_dict()[bias].view(-1, 4) for x in (model, source))
    assert torch.equal(found, given[:, [2, 0, 1, 3]])


@pytest.mark.parametrize("class_map", [[], [2, 1]])
def test_evaluation_maps_no_classes(tmp_path, classed, register, class_map, log):
    cfg, source = classed("abc")
    SSDCheckpointer(source, str(tmp_path), cfg=cfg).save("model")
    cfg, model = classed("cb", 1, "MODEL.SSD.CLASS_MAP", class_map)
    with pytest.raises(ValueError, match=r"head\.cls_predictors.*MODEL\.SSD\.NUM_CLASSES"):
        SSDCheckpointer(model, cfg=cfg, strict=True).load(str(tmp_path / "model.pth"))
    assert "was trained on" not in log.text
    for names, test in (("abc", ""), ("cab", "abc"), ("cab", ""), ("abc", "cab")):
        log.clear()
        cfg, model = classed(names, 1, *(["DATASETS.TEST", (register([], test),)] if test else []))
        SSDCheckpointer(model, cfg=cfg, strict=True).load(str(tmp_path / "model.pth"))
        assert same(model.state_dict(), source.state_dict())
        assert ("was trained on the classes a, b, c" in log.text) == ((test or names) == "cab")


@pytest.mark.parametrize("classes", [["a", "b"], list("dbca"), 3, "abc", [1, 2, 3], {"a": 1}])
def test_class_names_that_do_not_fit_the_file_are_not_used(tmp_path, classed, log, classes):
    cfg, model = classed("ab")
    fresh = copied(model)
    _, source = classed("abc", 1)
    torch.save({"model": source.state_dict(), "classes": classes}, tmp_path / "model.pth")
    SSDCheckpointer(model, cfg=cfg).load(str(tmp_path / "model.pth"))
    name = "head.cls_predictors.0.1.bias"
    assert torch.equal(model.state_dict()[name], fresh[name]) and name in log.text


@pytest.mark.parametrize("named", [False, True])
def test_vocs_classes_start_from_cocos(tmp_path, log, named):
    """MMDetection's file with names of classes; or without: 80 are COCO's."""
    state = mmdetections()
    source = [f"class {number}" for number in range(80)]
    for coco, name in ((4, "aeroplane"), (62, "TV"), (2, "car"), (0, "person")):
        source[coco] = name
    meta = {"CLASSES": tuple(source)} if named else {}
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "ssdlite.pth")
    opts = ["MODEL.DEVICE", "cpu", "MODEL.SSD.NUM_CLASSES", 20]
    opts += ["DATASETS.TRAIN", ("voc_2007_trainval",), "DATASETS.TEST", ("voc_2007_test",)]
    cfg = load_config(str(BASES / "ssdlite_mobilenetv2.yaml"), opts)
    model = build_model(cfg)
    fresh = copied(model)
    SSDCheckpointer(model, cfg=cfg).load(str(tmp_path / "ssdlite.pth"))
    carried = {0: 4, 19: 62, 6: 2, 14: 0} if named else dict(enumerate(VOC_IN_COCO))
    assert f"{len(carried)} of 20 classes start from those of MMDetection's SSDLite" in log.text
    for level in range(6):
        for leaf in ("weight", "bias"):
            name = f"head.cls_predictors.{level}.1"
            ours, own = (by_class(x, name, leaf, 6) for x in (model.state_dict(), fresh))
            theirs = by_class(state, f"bbox_head.cls_convs.{level}.1", leaf, 6)
            assert theirs.shape[1] == 81
            assert torch.equal(ours[:, 20], theirs[:, 80]), "background"
            for voc in range(20):
                expected = theirs[:, carried[voc]] if voc in carried else own[:, voc]
                assert torch.equal(ours[:, voc], expected), (level, leaf, voc)
