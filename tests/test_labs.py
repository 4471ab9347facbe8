import copy
import logging
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from ssd.config import add_ssd_config, load_config
from ssd.data.mapper import read_image
from ssd.modeling import vgg

LABS = sorted(path.parent.name for path in Path(__file__).parent.parent.glob("labs/*/config.yaml"))


@pytest.fixture(params=LABS)
def lab(request, repo):
    return repo / "labs" / request.param / "config.yaml"


def read(path):
    return yaml.safe_load(path.read_text()) or {}


def merged(path):
    cfg = get_cfg()
    add_ssd_config(cfg)
    cfg.merge_from_file(str(path), allow_unsafe=False)
    return cfg


def leaves(node, prefix=()):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key)


def without(node, path):
    node = copy.deepcopy(node)
    inner = node
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return node


def bases(path):
    """The files that a config lists in _BASE_."""
    names = read(path).get("_BASE_", [])
    return [path.parent / name for name in ([names] if isinstance(names, str) else names)]


def hops(path):
    return max((1 + hops(base) for base in bases(path)), default=0)


def test_lab_has_at_most_two_base_hops_within_labs(lab):
    assert 1 <= hops(lab) <= 2
    for base in bases(lab):
        assert base.resolve().parent == lab.parent.parent / "_base_"


def test_lab_begins_with_a_model_and_goes_on_with_recipes(lab):
    first, *recipes = bases(lab)
    assert first.name.startswith("ssd")
    for recipe in recipes:
        assert not recipe.name.startswith("ssd") and not bases(recipe)


def test_each_base_is_used(repo):
    files = {path.resolve() for path in (repo / "labs/_base_").glob("*.yaml")}
    configs = [*files, *repo.glob("labs/*/config.yaml")]
    assert files == {base.resolve() for path in configs for base in bases(path)}


def test_lab_holds_only_differences(lab, tmp_path):
    data = read(lab)
    data["_BASE_"] = [str(base.resolve()) for base in bases(lab)]
    expected = merged(lab)
    shorter = tmp_path / "config.yaml"
    for path in leaves(data):
        if path == ("_BASE_",):
            continue
        shorter.write_text(yaml.safe_dump(without(data, path)))
        assert merged(shorter) != expected, f"{'.'.join(path)} says what holds without it"


def test_lab_loads_with_its_own_data_sets(lab):
    cfg = load_config(str(lab), ["MODEL.DEVICE", "cpu"])
    assert cfg.is_frozen() and cfg.MODEL.META_ARCHITECTURE == "SSD"
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        # Detectron2 knows all parts of COCO but calls the largest by its old name
        assert name in DatasetCatalog, name


def test_each_model_of_the_labs_trains_a_step_and_detects(repo, monkeypatch):
    # A VGG16 with fewer channels takes a tenth of the time. tests/tools/test_fidelity.py trains
    # steps with all, tests/checkpoint/test_lineages.py detects with all.
    narrow = ((8, 8), (16, 16), (32, 32, 32), (64, 64, 64), (64, 64, 512))
    assert [len(stage) for stage in narrow] == [len(stage) for stage in vgg._STAGES]
    monkeypatch.setattr(vgg, "_STAGES", narrow)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    cfgs = {}
    for lab in LABS:
        cfg = load_config(str(repo / "labs" / lab / "config.yaml"), opts)
        cfgs.setdefault(network(cfg.MODEL), cfg)
    assert len(cfgs) > 10
    for cfg in cfgs.values():
        train_a_step_and_detect(cfg)


def network(model):
    """What chooses the code that runs; sizes of boxes, means and thresholds don't."""
    ssd = model.SSD
    return str([
        ssd.BOTTOM_UP, ssd.IN_FEATURES, ssd.L2_NORM_FEATURES, ssd.L2_NORM, len(ssd.EXTRA_LAYERS),
        ssd.EXTRA_BLOCK, ssd.EXTRA_ACTIVATION, ssd.HEAD, ssd.SCORE_FUNCTION, ssd.SAME_PADDING,
        ssd.MATCHING.BEST, ssd.LOSS.NORMALIZER, ssd.BBOX_REG_CLAMP, ssd.TOPK_PER, ssd.CLIP_TEST,
        model.MOBILENET, model.RESNETS.RES4_STRIDE,
    ])  # fmt: skip


def train_a_step_and_detect(cfg):
    torch.manual_seed(0)
    model = build_model(cfg)
    # one image: BatchNorm on a 1×1 map must bear it
    batch = [{"image": torch.randint(0, 256, (3, 48, 64)).byte()}]
    batch[0]["instances"] = Instances(
        (48, 64),
        gt_boxes=Boxes(torch.tensor([[8.0, 8.0, 40.0, 40.0]])),
        gt_classes=torch.tensor([cfg.MODEL.SSD.NUM_CLASSES - 1]),
    )
    with EventStorage():
        losses = model.train()(batch)
    sum(losses.values()).backward()
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    for name, parameter in model.named_parameters():  # an unused one would stop several processes
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    with torch.no_grad():
        instances = model.eval()(batch[:1])[0]["instances"]
    assert instances.image_size == (48, 64)
    boxes = instances.pred_boxes.tensor
    assert len(boxes) <= cfg.TEST.DETECTIONS_PER_IMAGE
    assert (boxes[:, 0::2] <= 64).all() and (boxes[:, 1::2] <= 48).all() and (boxes >= 0).all()


def test_git_ignores_what_runs_leave_in_a_lab(repo):
    if not (repo / ".git").exists():
        pytest.skip("not a git checkout")
    for lab in LABS:
        for path in (f"labs/{lab}/output/model_final.pth", f"labs/{lab}/datasets/x.jpg"):
            assert subprocess.run(["git", "check-ignore", "-q", path], cwd=repo).returncode == 0
        path = f"labs/{lab}/config.yaml"
        assert subprocess.run(["git", "check-ignore", "-q", path], cwd=repo).returncode == 1


@pytest.fixture
def bccd_cfg(repo, bccd, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(bccd))
    lab = repo / "labs" / "bccd_ssdlite_mobilenetv2" / "config.yaml"
    return load_config(str(lab), ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])


def test_bccd_reads_all_photographs_and_names_two_boxes_without_area(bccd_cfg, caplog):
    with caplog.at_level(logging.WARNING):
        counts = {split: len(DatasetCatalog.get(f"bccd_{split}")) for split in ("train", "val")}
        named = [line for line in caplog.text.splitlines() if "zero" in line]
        trainval, test = (DatasetCatalog.get(f"bccd_{split}") for split in ("trainval", "test"))
    assert len(trainval) == sum(counts.values()) and len(trainval) + len(test) == 364
    assert counts == {"train": 205, "val": 87}
    assert len(named) == 2 and all("BloodImage_" in line for line in named)
    assert {a["category_id"] for record in trainval for a in record["annotations"]} == {0, 1, 2}


def test_detectron2s_predictor_detects_in_pixels_of_a_photograph(bccd_cfg, tmp_path):
    cfg = bccd_cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.manual_seed(0)
    DetectionCheckpointer(build_model(cfg), str(tmp_path)).save("model")
    record = DatasetCatalog.get("bccd_test")[0]
    image = read_image(record["file_name"], "BGR")
    instances = DefaultPredictor(cfg)(image)["instances"]
    assert image.shape[:2] == instances.image_size == (480, 640)
    boxes = instances.pred_boxes.tensor
    assert len(boxes) and (boxes >= 0).all()
    assert 480 < boxes[:, 2].max() <= 640 and 320 < boxes[:, 3].max() <= 480
    assert instances.scores.min() > cfg.MODEL.SSD.SCORE_THRESH_TEST
    assert set(instances.pred_classes.tolist()) <= {0, 1, 2}
