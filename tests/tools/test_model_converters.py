"""The commands of tools/model_converters, on files as their sources write them."""

import argparse
import hashlib
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run as run_command
from detectron2.modeling import build_model
from weights import mmdet_old_name, mmdet_shapes

from ssd import model_zoo
from ssd.checkpoint import SSDCheckpointer
from ssd.checkpoint.published import PUBLISHED

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tools/model_converters"
NAMES = [f"class {number}" for number in range(80)]


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def convert():
    return load_tool("convert").main


@pytest.fixture(scope="module")
def upgrade():
    return load_tool("upgrade_ssd_version").main


@pytest.fixture(scope="module")
def publish():
    return load_tool("publish").main


@pytest.fixture(scope="module")
def new_state():
    """MMDetection 3.3.0's SSD300, in its order, with small values of the right ranks."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, (first, *others) in mmdet_shapes("ssd300").items():
        shape = [first, *(size if size <= 3 else 1 for size in others)]
        state[name] = torch.randn(shape, generator=generator)
    return state


@pytest.fixture(scope="module")
def old_state(new_state):
    """The same with 2.12's names and in its order."""
    state = {mmdet_old_name(name): value for name, value in new_state.items()}
    order = ("backbone.features", "backbone.extra", "backbone.l2", "bbox_head.reg", "bbox_head.cls")
    return {k: x for prefix in order for k, x in state.items() if k.startswith(prefix)}


def read(path):
    return torch.load(path, weights_only=True)


def message(call):
    with pytest.raises(SystemExit) as error:
        call()
    return str(error.value.code)


# --- convert.py -------------------------------------------------------------------------------


def test_convert_as_a_command(tmp_path, old_state, new_state, assert_equal):
    torch.save({"state_dict": old_state, "meta": {"mmdet_version": "2.12.0"}}, tmp_path / "old.pth")
    printed = run_command(
        FOLDER / "convert.py", "old.pth", "new.pth", "--to", "mmdet", cwd=tmp_path
    )
    assert printed.splitlines() == [
        "Found MMDetection's SSD before 2.14; wrote mmdet to new.pth",
        "It needs RGB in [0, 255] minus [123.675, 116.28, 103.53], divided by [1.0, 1.0, 1.0]; "
        "default boxes as in labs/ssd_vgg16_size300_120e",
    ]
    data = read(tmp_path / "new.pth")
    assert data["meta"] == {}
    assert_equal({name: data["state_dict"][name] for name in new_state}, new_state)
    assert sorted(os.listdir(tmp_path)) == ["new.pth", "old.pth"]


def test_convert_of_our_own_model(tmp_path, tiny_cfg, convert, capsys, assert_equal):
    cfg = tiny_cfg()
    model = build_model(cfg)
    SSDCheckpointer(model, str(tmp_path), cfg=cfg).save("model")
    ours, tensors, again = (str(tmp_path / x) for x in ("model.pth", "x.safetensors", "x.pth"))
    convert([ours, tensors, "--to", "safetensors"])
    assert capsys.readouterr().out == f"Found our own weights; wrote safetensors to {tensors}\n"
    convert([tensors, again, "--to", "detectron2"])
    assert len(read(ours)["classes"]) == 6
    assert read(again)["classes"] == read(ours)["classes"]
    assert_equal(read(again)["model"], dict(read(ours)["model"]))
    for path in (tensors, again):
        other = build_model(cfg)
        SSDCheckpointer(other, cfg=cfg, strict=True).load(path)
        assert_equal(dict(other.state_dict()), dict(model.state_dict()))

    refused = message(lambda: convert([ours, again, "--to", "torchvision"]))
    assert refused.startswith("error: torchvision has no such network: torchvision's SSD300 has no")


def test_convert_takes_averaged_weights_and_turns_channels(tmp_path, convert, capsys, new_state):
    path = tmp_path / "new.pth"
    torch.save({"state_dict": new_state}, path)
    convert([str(path), str(tmp_path / "ours.pth"), "--to", "detectron2"])
    model = read(tmp_path / "ours.pth")["model"]
    average = {name: 2 * value for name, value in model.items()}
    torch.save({"model": model, "ema": average, "classes": NAMES}, tmp_path / "ours.pth")

    argv = [str(tmp_path / "ours.pth"), str(tmp_path / "out.pth"), "--to", "mmdet-old", "--ema"]
    convert([*argv, "--input-format", "BGR"])
    assert "our own weights, averaged; wrote mmdet-old to " in capsys.readouterr().out
    data, first = read(tmp_path / "out.pth"), "backbone.features.0.weight"
    assert torch.equal(data["state_dict"][first], 2 * new_state[first].flip(1))
    assert data["meta"]["CLASSES"] == tuple(NAMES)
    del argv[0]
    refused = message(lambda: convert([str(path), *argv]))
    assert refused == f"error: {path} holds no averaged weights (SOLVER.EMA)"


def test_convert_of_a_classifier_says_what_its_first_layer_is_for(tmp_path, convert, capsys):
    theirs = {
        "features.0.0.weight": torch.ones(2, 3, 1, 1),
        "features.0.1.running_var": torch.ones(2),
    }
    theirs["features.0.1.running_mean"] = torch.zeros(2)
    theirs.update(
        {"features.18.0.weight": torch.ones(2, 2, 1, 1), "classifier.1.bias": torch.ones(2)}
    )
    theirs["features.1.conv.0.0.weight"] = torch.ones(2, 1, 1, 1)
    source, target = str(tmp_path / "in.pth"), str(tmp_path / "out.pth")
    torch.save(theirs, source)
    convert([source, target, "--to", "detectron2"])
    assert capsys.readouterr().out.splitlines() == [
        f"Found torchvision's mobilenet_v2; wrote detectron2 to {target}",
        "Its first layer is for RGB in [0, 255] and MODEL.PIXEL_STD [1.0, 1.0, 1.0]",
    ]
    state, first = read(target)["model"], "backbone.bottom_up.conv1."
    assert set(state) > {first + "weight"} and not any("classifier" in name for name in state)
    std = state[first + "norm.running_var"][0].sqrt() / state[first + "weight"][0].flatten()
    expected = 255 * torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(std, expected, rtol=1e-5, atol=0)  # eps is not scaled


def test_convert_never_writes_over_what_it_reads(tmp_path, convert, new_state):
    path, link = tmp_path / "new.pth", tmp_path / "link.pth"
    torch.save({"state_dict": new_state}, path)
    link.symlink_to(path)
    before = path.read_bytes()
    for target in (path, link):
        refused = message(lambda: convert([str(path), str(target), "--to", "mmdet-old"]))
        assert refused == f"error: {target} is the file to read: choose another name to write"
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content, reason",
    [(None, "No such file"), (b"", "it is empty"), (b"<html>", "it is a web page")],
)
def test_convert_of_no_checkpoint(content, reason, tmp_path, convert):
    if content is not None:
        (tmp_path / "in.pth").write_bytes(content)
    argv = [str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), "--to", "mmdet"]
    refused = message(lambda: convert(argv))
    assert refused.startswith("error: ") and reason in refused and str(tmp_path) in refused
    assert not (tmp_path / "out.pth").exists()


def test_convert_of_published_weights(tmp_path, convert, capsys, monkeypatch, old_state, new_state):
    name = "ssd300_coco_lufficc"
    weights = PUBLISHED[name]
    assert weights.sha256 is None, "another file would be refused"
    parts = {
        "backbone.features": "backbone.vgg", "backbone.extra": "backbone.extras",
        "bbox_head.cls_convs": "box_head.predictor.cls_headers",
        "bbox_head.reg_convs": "box_head.predictor.reg_headers",
    }  # fmt: skip
    theirs = {}
    for key, value in old_state.items():
        part = next((part for part in parts if key.startswith(f"{part}.")), None)
        theirs[key.replace(part, parts[part]) if part else key] = value
    monkeypatch.chdir(tmp_path)
    torch.save({"model": theirs, "iteration": 400000}, weights.file_name)
    convert([f"zoo://{name}", "out.pth", "--to", "mmdet"])
    found, needs = capsys.readouterr().out.splitlines()
    assert found == "Found lufficc's SSD; wrote mmdet to out.pth"
    assert "minus [123.0, 117.0, 104.0]" in needs and "DEFAULT_BOXES.CLIP cxcywh" in needs
    state, bias = read("out.pth")["state_dict"], "bbox_head.cls_convs.0.0.bias"
    assert state.keys() == new_state.keys()
    assert torch.equal(state[bias].view(4, 81).roll(1, 1).flatten(), new_state[bias])


# --- upgrade_ssd_version.py -------------------------------------------------------------------


@pytest.mark.skipif(torch.__version__ < "2.5", reason="numpy's numbers beside the weights")
def test_upgrade_keeps_what_else_is_in_the_file(
    tmp_path, upgrade, old_state, new_state, caplog, assert_equal
):
    parameters = [torch.nn.Parameter(value.clone()) for value in old_state.values()]
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    for parameter in parameters:
        parameter.grad = 3 * parameter.detach()
    optimizer.step()  # a momentum of 3 times the value
    meta = {"mmdet_version": "2.12.0", "epoch": 24, "CLASSES": ("a", "b"), "time": np.float64(1.5)}
    hooks = {"args": argparse.Namespace(lr=1), "losses": [1.0, np.float64(2)], "lr": [0.1, (1, 2)]}
    data = {"meta": meta, "state_dict": old_state, "optimizer": optimizer.state_dict()}
    old, new = str(tmp_path / "old.pth"), str(tmp_path / "new.pth")
    torch.save({**data, "hooks": hooks}, old)

    upgrade([old, new])
    result = read(new)
    assert list(result["state_dict"]) == list(new_state), "in the order of the new model"
    assert_equal(result["state_dict"], new_state)
    meta.pop("time")
    assert_equal(result["meta"], meta)
    assert result["hooks"] == {"lr": [0.1, (1, 2)]}
    assert "no plain data: meta.time, hooks.args, hooks.losses" in caplog.text

    resumed = [torch.nn.Parameter(value) for value in result["state_dict"].values()]
    optimizer = torch.optim.SGD(resumed, lr=1.0)
    optimizer.load_state_dict(result["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 0.5
    for parameter in resumed:
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], 3 * parameter)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_upgrade_of_weights_alone(prefix, tmp_path, upgrade, old_state, new_state, assert_equal):
    old, new = str(tmp_path / "old.pth"), str(tmp_path / "new.pth")
    state = dict(old_state)
    for level in range(6):  # trained: the background's biases, the last ones, are the highest
        bias = state[f"bbox_head.cls_convs.{level}.bias"].view(-1, 81).clone()
        bias[:, -1] += 9
        state[f"bbox_head.cls_convs.{level}.bias"] = bias.flatten()
    torch.save({prefix + name: value for name, value in state.items()}, old)
    upgrade([old, new])
    assert_equal(read(new), {name: state[mmdet_old_name(name)] for name in new_state})


def test_upgrade_of_version_1_moves_the_background(tmp_path, upgrade, old_state, new_state, caplog):
    old, new = str(tmp_path / "old.pth"), str(tmp_path / "new.pth")
    data = {"state_dict": old_state, "meta": {"mmdet_version": "1.2.0"}}
    torch.save({**data, "optimizer": {"state": {}, "param_groups": []}}, old)
    upgrade([old, new])
    assert set(read(new)) == {"state_dict", "meta"}
    assert "left out optimizer: the outputs of the classes have moved" in caplog.text
    for name in ("bbox_head.cls_convs.1.0.weight", "bbox_head.cls_convs.1.0.bias"):
        result = read(new)["state_dict"][name].unflatten(0, (6, 81))
        source = new_state[name].unflatten(0, (6, 81))
        assert torch.equal(result[:, 80], source[:, 0])
        assert torch.equal(result[:, :80], source[:, 1:])


def test_upgrade_keeps_an_optimizer_of_several_groups(tmp_path, upgrade, old_state, caplog):
    old, new = str(tmp_path / "old.pth"), str(tmp_path / "new.pth")
    groups = [{"params": [number]} for number in range(len(old_state))]
    optimizer = {"state": {}, "param_groups": groups}
    meta = {"mmdet_version": "2.12.0"}
    other = {"ema_backbone_extra_0_weight": torch.ones(2)}
    state = {**old_state, **other}
    torch.save({"state_dict": state, "optimizer": optimizer, "meta": meta}, old)
    upgrade([old, new])
    assert read(new)["optimizer"] == optimizer
    assert "optimizer kept as it is: not one group of all parameters" in caplog.text
    assert "kept as they are: ema_backbone_extra_0_weight" in caplog.text
    assert torch.equal(read(new)["state_dict"]["ema_backbone_extra_0_weight"], torch.ones(2))

    optimizer["param_groups"] = [{"params": list(range(len(old_state)))}]
    torch.save({"state_dict": state, "optimizer": optimizer, "meta": meta}, old)
    upgrade([old, new])
    (group,) = read(new)["optimizer"]["param_groups"]
    order = [name for name in read(new)["state_dict"] if name not in other]
    assert group["params"] == [list(old_state).index(mmdet_old_name(name)) for name in order]


def test_upgrade_refuses_what_is_not_old(tmp_path, upgrade, old_state, new_state):
    old, new = str(tmp_path / "old.pth"), str(tmp_path / "new.pth")

    def refused(data):
        torch.save(data, old)
        text = message(lambda: upgrade([old, new]))
        assert not os.path.exists(new)
        return text

    text = refused({"state_dict": new_state, "meta": {}})
    assert text == f"error: {old} has the names since 2.14 already"
    text = refused({"state_dict": {"rpn.weight": torch.ones(1)}})
    assert "is not an SSD of MMDetection before 2.14: it is of rpn.weight" in text
    text = refused({"conv.weight": torch.ones(1), "stem.bias": torch.ones(1)})
    assert "it is of conv.weight, stem.bias" in text
    text = refused({f"{i}.weight": torch.ones(1, 3, 1, 1) for i in (0, 26, 28)})
    assert "before 2.14: it is VGG16 features" in text
    assert "holds no dictionary of weights" in refused({"state_dict": []})
    torch.save({"state_dict": old_state}, old)
    assert "is the file to read" in message(lambda: upgrade([old, old]))


# --- publish.py -------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, tiny_cfg):
    """(config, model, training file after iteration 99), with metrics beside it."""
    cfg = tiny_cfg()
    model = build_model(cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    checkpointer = SSDCheckpointer(model, str(tmp_path), cfg=cfg, optimizer=optimizer)
    checkpointer.save("model", iteration=99)
    lines = [
        {"iteration": 19, "loss_cls": 3.0, "lr": 0.1},
        {"iteration": 50, "bbox/AP": 10.0, "voc/mAP": 30.0},
        {"iteration": 99, "loss_cls": 2.0},
        {"iteration": 100, "bbox/AP": 12.5, "bbox/AP-ring": float("nan"), "loss_cls": 2.0},
        {"iteration": 100, "validation/loss_cls": 3.0},
        {"iteration": 150, "bbox/AP": 20.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.json").write_text(text + '{"iteration": 160, "bbox/A')
    return cfg, model, str(tmp_path / "model.pth")


def published(folder):
    return sorted(path.name for path in folder.iterdir())


def test_publish(run, tmp_path, publish, capsys, assert_equal):
    cfg, model, source = run
    (tmp_path / "out").mkdir()
    publish([source, str(tmp_path / "out/tiny")])
    metrics, weights = published(tmp_path / "out")
    path = tmp_path / "out" / weights
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    assert (metrics, weights) == (f"tiny-{digest}.json", f"tiny-{digest}.pth")
    assert json.loads((tmp_path / "out" / metrics).read_text()) == {
        "iteration": 100, "bbox/AP": 12.5, "bbox/AP-ring": None,
    }  # fmt: skip
    out = capsys.readouterr().out
    assert f"{metrics}, metrics of iteration 100\n" in out and f"Wrote {path}\n" in out

    data = read(path)
    assert data.keys() == {"model", "classes"} and len(data["classes"]) == 6
    other = build_model(cfg)
    SSDCheckpointer(other, cfg=cfg, strict=True).load(str(path))
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))
    entry = PUBLISHED["ssd300_coco_mmdet"]._replace(sha256=digest)
    assert model_zoo._check_hash(str(path), entry) == str(path)


def test_publish_gives_the_same_file_for_the_same_weights(run, tmp_path, publish):
    cfg, model, source = run
    names = []
    for folder, name in (("a", "x"), ("b", "longer_name")):
        (tmp_path / folder).mkdir()
        if folder == "a":
            run_command(FOLDER / "publish.py", source, tmp_path / folder / name)
        else:
            model.to(memory_format=torch.contiguous_format)
            SSDCheckpointer(model, str(tmp_path / "b"), cfg=cfg).save("other", iteration=3)
            publish([str(tmp_path / "b/other.pth"), str(tmp_path / folder / name)])
        (path,) = (tmp_path / folder).glob(f"{name}-*.pth")
        names.append(path.name.removeprefix(name))
    assert names[0] == names[1]
    model.state_dict()["head.cls_predictors.0.1.bias"] += 1
    SSDCheckpointer(model, str(tmp_path), cfg=cfg).save("changed")
    publish([str(tmp_path / "changed.pth"), str(tmp_path / "a/x")])
    assert len(list((tmp_path / "a").glob("x-*.pth"))) == 2


def test_publish_says_that_there_are_no_metrics(run, tmp_path, publish, capsys):
    source, out = run[2], tmp_path / "out"
    out.mkdir()
    where = tmp_path / "metrics.json"
    lines = ['{"iteration": 100, "bbox/AP": 1.0}', '{"iteration": 0, "start_iter": 0}']
    lines += ['{"iteration": 19, "loss_cls": 3.0}', '{"iteration": 50, "bbox/AP": 1.0}']
    where.write_text("\n".join(lines))
    publish([source, str(out / "x")])
    text = f"No metrics: {where} has no evaluation of these weights"
    assert text in capsys.readouterr().out
    where.unlink()
    publish([source, str(out / "x")])
    assert f"No metrics: there is no {where} (--metrics)" in capsys.readouterr().out
    assert [name.rpartition(".")[2] for name in published(out)] == ["pth"]

    (tmp_path / "other.json").write_text('{"iteration": 99, "voc/mAP": 3}\n')
    publish([source, str(out / "x"), "--metrics", str(tmp_path / "other.json")])
    found = json.loads(next(out.glob("*.json")).read_text())
    assert found == {"iteration": 99, "voc/mAP": 3}


def test_publish_of_averaged_weights(run, tmp_path, publish, capsys, assert_equal):
    source, out = run[2], tmp_path / "out"
    out.mkdir()
    data = read(source)
    data["ema"] = {name: 2 * value for name, value in data["model"].items()}
    torch.save(data, source)
    publish([source, str(out / "x")])
    text = "are of the averaged weights (--ema)"  # what is evaluated with SOLVER.EMA
    assert text in capsys.readouterr().out and len(published(out)) == 1
    publish([source, str(out / "x"), "--ema"])
    (metrics,) = out.glob("*.json")
    assert json.loads(metrics.read_text())["bbox/AP"] == 12.5
    assert_equal(read(metrics.with_suffix(".pth"))["model"], data["ema"])


def test_publish_refuses_what_is_not_ours(tmp_path, publish, new_state):
    path = str(tmp_path / "new.pth")
    torch.save({"state_dict": new_state}, path)
    refused = message(lambda: publish([path, str(tmp_path / "x")]))
    assert refused == (
        f"error: {path} is MMDetection's SSD; first: convert.py {path} OUT --to detectron2"
    )
    refused = message(lambda: publish([str(tmp_path / "none.pth"), str(tmp_path / "x")]))
    assert refused.startswith("error: [Errno 2]") and os.listdir(tmp_path) == ["new.pth"]


def test_publish_with_metrics_that_do_not_exist_writes_nothing(run, tmp_path, publish):
    argv = [run[2], str(tmp_path / "x"), "--metrics", str(tmp_path / "none.json")]
    assert "none.json" in message(lambda: publish(argv))
    assert not list(tmp_path.glob("x-*"))
