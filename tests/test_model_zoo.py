import functools
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from ssd import model_zoo
from ssd.checkpoint import SSDCheckpointer
from ssd.checkpoint.published import PUBLISHED, Weights
from ssd.config import load_config

# A wheel's labs: names and configs, as JSON; zoo:// after importing the package alone, and again.
LIST_LABS = """
import importlib, json, sys
import ssd
from detectron2.utils.file_io import PathManager
files = [PathManager.get_local_path("zoo://ssd300_coco_caffe")]
from ssd import model_zoo
importlib.reload(model_zoo)
files.append(PathManager.get_local_path("zoo://ssd300_coco_caffe"))
configs = {name: model_zoo.get_config(name).dump() for name in model_zoo.names()}
found = {"file": ssd.__file__, "configs": configs, "weights": files}
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.fixture(autouse=True)
def empty_folders(tmp_path, monkeypatch):
    """An empty current folder and an empty cache."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")


@pytest.fixture
def checkpoint(tmp_path):
    """(file, state) of weights for the quickstart lab."""
    torch.manual_seed(7)
    cfg = model_zoo.get_config("quickstart")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    DetectionCheckpointer(model, str(tmp_path)).save("published")
    return tmp_path / "published.pth", model.state_dict()


@pytest.fixture
def publish(monkeypatch):
    """A function (url, hash prefix) that publishes "shapes_tests" for the quickstart lab."""

    def add(url, sha256=None):
        weights = Weights("tests", "quickstart", url, "0 AP", sha256)
        monkeypatch.setitem(PUBLISHED, "shapes_tests", weights)
        return url

    return add


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(address, paths asked for) of a server of ``tmp_path`` on this machine."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("no_proxy", "*")
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def prefix(path, digits=8):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:digits]


def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_names_are_the_labs(repo):
    labs = {path.name for path in (repo / "labs").iterdir() if (path / "config.yaml").exists()}
    assert set(model_zoo.names()) == labs and "quickstart" in labs and "_base_" not in labs


@pytest.mark.parametrize("name", model_zoo.names())
def test_config_is_the_labs_and_can_be_changed(name, repo):
    cfg = model_zoo.get_config(name)
    expected = load_config(str(repo / "labs" / name / "config.yaml"))
    assert cfg == expected and not cfg.is_frozen()
    assert model_zoo.get_config_file(f"{name}/config.yaml") == model_zoo.get_config_file(name)


@pytest.mark.parametrize("name", ["ssd_vgg16_size301", "../labs/quickstart", "_base_", ""])
def test_an_unknown_name_is_an_error_that_lists_all(name):
    calls = (
        model_zoo.get_config_file, model_zoo.get_config, model_zoo.get_checkpoint_url,
        model_zoo.get, functools.partial(model_zoo.get_config, trained=True),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(RuntimeError) as error:
            call(name)
        for text in (repr(name), ", ".join(model_zoo.names()), ", ".join(PUBLISHED)):
            assert text in str(error.value)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(RuntimeError, match="did you mean ssd_vgg16_size300 or "):
        model_zoo.get("ssd_vgg16_size30")
    with pytest.raises(RuntimeError, match="did you mean ssd512_coco_mmdet or "):
        model_zoo.get_checkpoint_url("ssd512_coco_mmdt")
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="MODEL.WEIGHTS zoo://ssd300_coco_mmdt: .*ssd300_coco_m"):
        SSDCheckpointer(model).load("zoo://ssd300_coco_mmdt")


def test_a_lab_without_published_weights_says_so():
    assert model_zoo.weights_names("quickstart") == []
    for call in (model_zoo.get_checkpoint_url, functools.partial(model_zoo.get, trained=True)):
        with pytest.raises(RuntimeError, match="no weights are published for 'quickstart'"):
            call("quickstart")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_have_a_lab_and_the_hash_of_their_name(name):
    weights = PUBLISHED[name]
    assert name in model_zoo.weights_names(weights.lab) and name not in model_zoo.names()
    assert model_zoo.get_config_file(name) == model_zoo.get_config_file(weights.lab)
    url = model_zoo.get_checkpoint_url(name)
    assert url == weights.url and url.startswith("http")
    cfg = model_zoo.get_config(name, trained=True)
    assert cfg.MODEL.WEIGHTS == f"zoo://{name}"
    assert cfg == load_config(
        model_zoo.get_config_file(weights.lab), ["MODEL.WEIGHTS", f"zoo://{name}", *weights.opts]
    )
    assert model_zoo.get_config(name) == model_zoo.get_config(weights.lab)
    in_name = weights.file_name.rpartition("-")[2].removesuffix(".pth")
    if len(in_name) == 8 and set(in_name) <= set("0123456789abcdef"):
        assert (weights.sha256 or "").startswith(in_name)


def test_a_labs_own_weights_are_the_first_that_can_be_downloaded():
    lab = "ssd_vgg16_size300_voc0712"
    first, *others = model_zoo.weights_names(lab)
    assert first == "ssd300_voc0712_lufficc"  # Caffe's can't be downloaded by a program
    assert others == ["ssd300_voc0712_amdegroot", "ssd300_voc0712_caffe"]
    assert model_zoo.get_config(lab, trained=True).MODEL.WEIGHTS == f"zoo://{first}"
    assert model_zoo.get_checkpoint_url(f"{lab}/config.yaml") == PUBLISHED[first].url
    assert model_zoo.weights_names() == list(PUBLISHED)
    # all have settings of their own
    assert model_zoo.weights_names("ssd_vgg16_size512") == ["ssd512_coco_detectron2_fork"]


def test_weights_bring_their_settings():
    lab = model_zoo.get_config("ssd_vgg16_size300_120e", trained=True)
    cfg = model_zoo.get_config("ssd300_voc0712_mmdet", trained=True)
    assert lab.MODEL.SSD.NUM_CLASSES == 80 and lab.MODEL.WEIGHTS == "zoo://ssd300_coco_mmdet"
    assert cfg.MODEL.SSD.NUM_CLASSES == 20 and cfg.DATASETS.TEST == ("voc_2007_test",)
    assert cfg.MODEL.SSD.DEFAULT_BOXES.MIN_SIZES[0] == 30.0


@pytest.mark.parametrize("name", ["shapes_tests", "quickstart", "quickstart/config.yaml"])
def test_a_published_file_in_the_current_folder_is_used(name, checkpoint, publish):
    file, state = checkpoint
    publish("https://nowhere.invalid/a/weights-1234.pth", prefix(file))
    shutil.copy(file, "weights-1234.pth")
    expected = os.path.abspath("weights-1234.pth")
    assert PathManager.get_local_path(f"zoo://{name}") == expected
    model = model_zoo.get(name, trained=True, device="cpu")
    assert same(model, state) and model.training


def test_a_published_file_is_found_where_detectron2_caches_it(checkpoint, publish, tmp_path):
    file, state = checkpoint
    url = publish("https://nowhere.invalid/a/b/weights.pth")
    cached = tmp_path / "cache" / "a" / "b" / "weights.pth"
    cached.parent.mkdir(parents=True)
    shutil.copy(file, cached)
    for address in (url, "zoo://shapes_tests"):
        assert PathManager.get_local_path(address) == str(cached)
    assert same(model_zoo.get("shapes_tests", trained=True, device="cpu"), state)


def test_only_loading_downloads_and_only_once(checkpoint, publish, server, caplog):
    file, state = checkpoint
    address, asked = server
    url = publish(f"{address}/published.pth", prefix(file))
    assert model_zoo.get_checkpoint_url("quickstart") == url
    cfg = model_zoo.get_config("shapes_tests", trained=True)
    assert not asked
    with caplog.at_level("INFO"):
        assert same(model_zoo.get("shapes_tests", trained=True, device="cpu"), state)
    assert "zoo://shapes_tests: 0 AP, published for quickstart" in caplog.text
    assert same(model_zoo.get("quickstart", trained=True, device="cpu"), state)
    cfg.MODEL.DEVICE = "cpu"
    for checkpointer in (DetectionCheckpointer, SSDCheckpointer):
        model = build_model(cfg)
        checkpointer(model).load(cfg.MODEL.WEIGHTS)
        assert same(model, state)
    assert asked == ["/published.pth"]


def test_a_failed_download_says_what_to_do(publish, server):
    url = publish(f"{server[0]}/elsewhere/published.pth")
    with pytest.raises(OSError, match="404.*put published.pth into the current folder") as error:
        PathManager.get_local_path("zoo://shapes_tests")
    assert url in str(error.value)


def test_what_only_a_browser_can_download_is_put_into_the_current_folder():
    name = "ssd300_voc0712_caffe"
    weights = PUBLISHED[name]
    with pytest.raises(FileNotFoundError, match=f"MODEL.WEIGHTS zoo://{name} can't") as error:
        PathManager.get_local_path(f"zoo://{name}")
    for text in (weights.url, weights.file, os.getcwd()):
        assert text in str(error.value)
    with open(weights.file, "wb") as file:
        file.write(b"weights")
    assert PathManager.get_local_path(f"zoo://{name}") == os.path.abspath(weights.file)


def test_a_downloaded_file_of_another_hash_is_an_error(checkpoint, publish, server, tmp_path):
    publish(f"{server[0]}/published.pth", "01234567")
    with pytest.raises(ValueError, match=f"starts with {prefix(checkpoint[0])}, expected 01234567"):
        model_zoo.get("quickstart", trained=True, device="cpu")
    publish(f"{server[0]}/published.pth", prefix(checkpoint[0]))
    (tmp_path / "cache" / "published.pth").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="delete it and try again"):
        PathManager.get_local_path("zoo://shapes_tests")
    (tmp_path / "cache" / "published.pth").unlink()
    assert same(model_zoo.get("shapes_tests", trained=True, device="cpu"), checkpoint[1])


def test_a_local_file_of_another_hash_is_an_error():
    name, weights = next(item for item in PUBLISHED.items() if item[1].sha256)
    with open(weights.file_name, "wb") as other:
        other.write(b"something else")
    with pytest.raises(ValueError, match="delete it") as error:
        PathManager.get_local_path(f"zoo://{name}")
    found = hashlib.sha256(b"something else").hexdigest()[: len(weights.sha256)]
    for text in (os.path.abspath(weights.file_name), found, weights.sha256, weights.url):
        assert text in str(error.value)


def test_published_weights_must_fill_the_model(checkpoint, publish):
    state = checkpoint[1]
    del state["head.cls_predictors.0.1.bias"]
    torch.save(state, "weights.pth")
    publish("https://nowhere.invalid/weights.pth")
    with pytest.raises(ValueError, match="missing head.cls_predictors.0.1.bias"):
        model_zoo.get("quickstart", trained=True, device="cpu")


def test_without_trained_the_configs_own_weights_are_loaded():
    assert model_zoo.get("quickstart", device="cpu").training  # its MODEL.WEIGHTS is empty
    with pytest.raises(FileNotFoundError, match="vgg16_reducedfc.pth"):
        model_zoo.get("ssd_vgg16_size300")


def test_a_wheel_carries_the_labs_and_nothing_they_leave(repo, tmp_path):
    source, target = tmp_path / "source", tmp_path / "installed"
    for folder in ("ssd", "labs"):
        ignore = shutil.ignore_patterns("output", "datasets", "__pycache__")
        shutil.copytree(repo / folder, source / folder, ignore=ignore)
    for file in ("setup.py", "pyproject.toml"):
        shutil.copy(repo / file, source)
    for file in ("output/config.yaml", "output/model_final.pth", "datasets/a.yaml", "a.pth"):
        left = source / "labs" / "quickstart" / file
        left.parent.mkdir(exist_ok=True)
        left.write_text("left")

    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps"]
    run([*pip, "--no-build-isolation", "-w", tmp_path, "."], source)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(target)

    configs = {f"ssd/labs/{name}/config.yaml" for name in model_zoo.names()}
    bases = {f"ssd/labs/_base_/{path.name}" for path in (repo / "labs/_base_").glob("*.yaml")}
    packed = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert {p for p in packed if p.startswith("ssd/") and not p.endswith(".py")} == configs | bases
    assert all(p.startswith(("ssd/", "ssd_detectron2-")) for p in packed)

    weights = tmp_path / "current" / PUBLISHED["ssd300_coco_caffe"].file
    weights.write_bytes(b"weights")
    run([sys.executable, "-c", LIST_LABS, tmp_path / "labs.json"], tmp_path / "current", target)
    found = json.loads((tmp_path / "labs.json").read_text())
    assert found["file"] == str(target / "ssd" / "__init__.py")
    expected = {name: model_zoo.get_config(name).dump() for name in model_zoo.names()}
    assert found["configs"] == expected and found["weights"] == [str(weights)] * 2


def run(command, folder, first_on_path=""):
    path = os.pathsep.join(filter(None, [str(first_on_path), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
