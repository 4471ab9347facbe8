"""Config keys and files: adding, overriding, misspelling, and YAML that would run code."""

from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.file_io import PathHandler, PathManager

from ssd.config import add_ssd_config, load_config
from ssd.modeling import SSD

ROOT = Path(__file__).parent.parent
# Models; the other bases are recipes, to be listed after one.
BASES = sorted((ROOT / "labs/_base_").glob("ssd*.yaml"))
BASE = str(ROOT / "labs/_base_/ssd300_vgg16.yaml")


def flat(node, prefix=""):
    result = {}
    for key, value in node.items():
        if isinstance(value, dict):
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[prefix + key] = value
    return result


def test_no_key_of_detectron2_is_overwritten():
    before, cfg = flat(get_cfg()), get_cfg()
    add_ssd_config(cfg)
    after = flat(cfg)
    assert {key: after[key] for key in before} == before
    assert len(after) > len(before) + 40


def test_adding_the_keys_twice_changes_nothing():
    once, twice = get_cfg(), get_cfg()
    add_ssd_config(once), add_ssd_config(twice), add_ssd_config(twice)
    assert once == twice


def test_adding_the_keys_keeps_values_that_are_set():
    cfg = get_cfg()
    add_ssd_config(cfg)
    cfg.MODEL.SSD.NUM_CLASSES = 3
    add_ssd_config(cfg)
    assert cfg.MODEL.SSD.NUM_CLASSES == 3


def test_bases_are_found():
    assert {path.stem for path in BASES} >= {
        "ssd300_vgg16", "ssd512_vgg16", "ssdlite_mobilenetv2"
    }  # fmt: skip


@pytest.mark.parametrize("path", BASES, ids=[path.stem for path in BASES])
def test_each_base_loads(path):
    cfg = load_config(str(path))
    assert cfg.is_frozen() and cfg.MODEL.META_ARCHITECTURE == "SSD"
    assert cfg.MODEL.BACKBONE.NAME == "build_ssd_backbone" and cfg.INPUT.MIN_SIZE_TEST == 0
    assert load_config(str(path)) == cfg


def test_a_base_of_a_base_is_followed():
    cfg = load_config(str(ROOT / "labs/_base_/ssd512_vgg16.yaml"))
    assert cfg.MODEL.SSD.INPUT_SIZE == [512, 512] and cfg.SOLVER.MAX_ITER == 240000


def test_options_override_the_file():
    cfg = load_config(BASE, ["MODEL.SSD.NUM_CLASSES", "20", "MODEL.SSD.INPUT_SIZE", "[320,480]"])
    assert cfg.MODEL.SSD.NUM_CLASSES == 20 and cfg.MODEL.SSD.INPUT_SIZE == [320, 480]
    assert load_config(BASE).MODEL.SSD.NUM_CLASSES == 80


def test_code_defaults_without_a_file():
    cfg = load_config("")
    assert cfg.MODEL.SSD.DEFAULT_BOXES.STEPS == [8.0, 16.0, 32.0, 64.0, 100.0, 300.0]


def write(folder, text, name="config.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_misspelt_key_in_a_file(tmp_path):
    path = write(tmp_path, "MODEL: {SSD: {NUM_CLASES: 3}}")
    with pytest.raises(KeyError) as error:
        load_config(path)
    for part in ("MODEL.SSD.NUM_CLASES", path, "did you mean MODEL.SSD.NUM_CLASSES"):
        assert part in str(error.value)


def test_misspelt_key_on_the_command_line():
    with pytest.raises(
        KeyError, match="MODEL.SSD.MATCHING.IOU_TRESHOLD.*command line.*IOU_THRESHOLD"
    ):
        load_config(BASE, ["MODEL.SSD.MATCHING.IOU_TRESHOLD", "0.4"])


def test_unknown_key_like_no_other():
    with pytest.raises(KeyError, match="XYZZY") as error:
        load_config(BASE, ["XYZZY", "1"])
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    "opts, message",
    [
        (["SOLVER.MAX_ITER", "2", "--resume"], "--resume has to stand before the KEY VALUE pairs"),
        (["SOLVER.MAX_ITER", "2", "--num-gpus", "2"], "--num-gpus has to stand before"),
        (["SOLVER.MAX_ITER=5"], r"KEY VALUE pairs, got \['SOLVER.MAX_ITER=5'\]"),
    ],
)
def test_options_that_are_no_pairs(opts, message):
    with pytest.raises(ValueError, match=message):
        load_config(BASE, opts)


def test_value_of_another_type_names_the_key():
    with pytest.raises(ValueError, match="NUM_CLASSES|MODEL.SSD"):
        load_config(BASE, ["MODEL.SSD.NUM_CLASSES", "many"])


@pytest.mark.parametrize("text, message", [
    ("", "config.yaml or a _BASE_ of it holds no KEY: VALUE"),
    ("- MODEL", "config.yaml or a _BASE_ of it holds no KEY: VALUE"),
    ("_BASE_: config.yaml", "the _BASE_ of .*config.yaml leads back to it"),
])  # fmt: skip
def test_file_without_keys_and_its_own_base(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(str(tmp_path / "config.yaml"))


def test_missing_file(tmp_path):
    path = str(tmp_path / "absent.yaml")
    with pytest.raises(FileNotFoundError, match="--config-file.*absent.yaml.*current folder"):
        load_config(path)


@pytest.mark.parametrize("in_base", [False, True])
@pytest.mark.parametrize("tag", ["os.mkdir", "subprocess.check_output"])
def test_yaml_that_would_run_code_is_refused(tmp_path, tag, in_base):
    mark = tmp_path / "made"
    argument = f"[mkdir, {mark}]" if tag.startswith("subprocess") else str(mark)
    path = write(tmp_path, f"OUTPUT_DIR: !!python/object/apply:{tag} [{argument}]")
    yaml.unsafe_load((tmp_path / "config.yaml").read_text())  # it would run
    assert mark.exists()
    mark.rmdir()
    if in_base:
        path = write(tmp_path, "_BASE_: config.yaml\nSEED: 1", "lab.yaml")
    with pytest.raises(yaml.constructor.ConstructorError):
        load_config(path)
    assert not mark.exists()


def test_keys_without_effect_are_named(repo, caplog):
    quickstart = str(repo / "labs/quickstart/config.yaml")
    load_config(quickstart)
    assert "Without effect" not in caplog.text
    load_config(quickstart, ["MODEL.RETINANET.NUM_CLASSES", 5, "INPUT.CROP.ENABLED", True])
    assert (
        "on an SSD and its own loaders: MODEL.RETINANET.NUM_CLASSES, INPUT.CROP.ENABLED"
        in caplog.text
    )
    caplog.clear()
    load_config("", ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 5])
    assert "Without effect" not in caplog.text


def test_keys_without_a_value(tmp_path):
    with pytest.raises(ValueError, match="config key SOLVER.STEPS has no value"):
        load_config(write(tmp_path, "SOLVER:\n  STEPS:"))
    load_config(write(tmp_path, "SOLVER:\n  WEIGHT_DECAY_BIAS:"))  # Detectron2's own is None


def test_keys_of_resnets_have_no_effect_on_other_backbones(repo, caplog):
    opts = ["MODEL.BACKBONE.FREEZE_AT", 5, "MODEL.RESNETS.DEPTH", 101]
    load_config(str(repo / "labs/ssd_resnet50_size300/config.yaml"), opts)
    assert "Without effect" not in caplog.text
    load_config(str(repo / "labs/ssd_vgg16_size300/config.yaml"), opts)
    assert "loaders: MODEL.BACKBONE.FREEZE_AT, MODEL.RESNETS.DEPTH" in caplog.text


def test_any_gpu_is_replaced_where_there_is_none(repo, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = load_config(str(repo / "labs/quickstart/config.yaml"), ["MODEL.DEVICE", "cuda:1"])
    assert cfg.MODEL.DEVICE == "cpu" and "MODEL.DEVICE is cpu, not cuda:1" in caplog.text


def test_files_behind_a_handler(tmp_path):
    class Handler(PathHandler):
        def _get_supported_prefixes(self):
            return ["own://"]

        def _isfile(self, path, **kwargs):
            return True

        def _open(self, path, mode="r", **kwargs):
            return open(path.replace("own:/", str(tmp_path)), mode)

    write(tmp_path, "SEED: 5")
    PathManager.register_handler(Handler(), allow_override=True)
    assert load_config("own://config.yaml").SEED == 5


def test_keys_of_ones_own(tmp_path):
    path = write(tmp_path, "MODEL: {FOCAL: {GAMMA: 3.0}}")
    with pytest.raises(KeyError, match="unknown config key MODEL.FOCAL"):
        load_config(path)
    own = get_cfg()
    add_ssd_config(own)
    own.MODEL.FOCAL = CfgNode({"GAMMA": 2.0, "ALPHA": 0.25})
    own.freeze()
    cfg = load_config(path, ["MODEL.FOCAL.ALPHA", 0.5], own)
    assert cfg.MODEL.FOCAL == {"GAMMA": 3.0, "ALPHA": 0.5} and cfg.is_frozen()
    assert own.MODEL.FOCAL.GAMMA == 2.0


def test_subclasses_are_ssds_too(repo, caplog, monkeypatch):
    class OwnSSD(SSD):
        pass

    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "OwnSSD", OwnSSD)
    opts = ["MODEL.META_ARCHITECTURE", "OwnSSD", "MODEL.MASK_ON", True]
    load_config(str(repo / "labs/quickstart/config.yaml"), opts)
    assert "loaders: MODEL.MASK_ON" in caplog.text
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "own_model", lambda cfg: None)
    for name in ("not imported yet", "own_model"):
        load_config("", ["MODEL.META_ARCHITECTURE", name])


def test_home_in_paths(monkeypatch, repo):
    monkeypatch.setenv("HOME", "/home/me")
    opts = ["OUTPUT_DIR", "~/runs", "MODEL.WEIGHTS", "~/a.pth"]
    cfg = load_config(str(repo / "labs/quickstart/config.yaml"), opts)
    assert (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS) == ("/home/me/runs", "/home/me/a.pth")
