"""Predictor: a file of any lineage and an image, to detections in the image's pixels."""

import copy

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

import ssd
from ssd import model_zoo
from ssd.checkpoint import SSDCheckpointer
from ssd.checkpoint.published import PUBLISHED
from ssd.data.datasets import register_datasets


@pytest.fixture
def image():
    """(120, 160, 3) uint8, unlike in each channel."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8) // np.uint8([1, 2, 4])
    return coarse.repeat(20, 0).repeat(20, 1)


@pytest.fixture
def cfg(tiny_cfg, tmp_path):
    """The quickstart lab's, tiny, with random weights in a file."""
    cfg = tiny_cfg("MODEL.WEIGHTS", str(tmp_path / "model.pth"))
    torch.manual_seed(0)
    SSDCheckpointer(build_model(cfg), str(tmp_path)).save("model")
    return cfg


def assert_detections_equal(actual, expected):
    assert actual.image_size == expected.image_size and len(actual) == len(expected) > 0
    torch.testing.assert_close(actual.scores, expected.scores)
    torch.testing.assert_close(actual.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(actual.pred_classes, expected.pred_classes)


@pytest.mark.parametrize("order", ["BGR", "RGB"])
@pytest.mark.parametrize("shortest", [0, 60])
def test_is_the_model_on_the_image_in_the_configs_order(cfg, image, order, shortest):
    cfg = copy.deepcopy(cfg)
    cfg.defrost()
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST = order, shortest
    predictor = ssd.Predictor(cfg)
    assert isinstance(predictor, DefaultPredictor) and not predictor.model.training
    assert predictor.metadata is MetadataCatalog.get(cfg.DATASETS.TEST[0])
    assert predictor.cfg == cfg and predictor.cfg is not cfg

    before = image.copy()
    actual = predictor(image)["instances"]
    assert (image == before).all() and not actual.scores.requires_grad
    assert (actual.scores.diff() <= 0).all()
    assert_detections_equal(actual, DefaultPredictor(cfg)(image)["instances"])
    if not shortest:
        array = image if order == "BGR" else image[:, :, ::-1]
        inputs = torch.from_numpy(array.transpose(2, 0, 1).copy())
        with torch.no_grad():
            (expected,) = predictor.model([{"image": inputs}])
        assert actual.image_size == (120, 160)
        assert_detections_equal(actual, expected["instances"])


def test_a_batch_is_each_of_its_images(cfg, image):
    predictor = ssd.Predictor(cfg)
    images = [image, image[:50, ::-1], image[20:116, 30:126]]  # the last of the network's size
    found = predictor.batch(images)
    assert len(found) == 3 and predictor.batch([]) == []
    for given, output in zip(images, found):
        assert output["instances"].image_size == given.shape[:2]
        assert_detections_equal(output["instances"], predictor(given)["instances"])
    with pytest.raises(ValueError, match="NoneType"):
        predictor.batch([image, None])


def test_class_names_are_read_from_the_test_sets_json(cfg, datasets_folder):
    cfg = cfg.clone()
    cfg.defrost()
    entry = {"FORMAT": "coco", "ROOT": "shapes", "ANNOTATIONS": "val.json", "IMAGES": "val/images"}
    cfg.DATASETS.REGISTER.t_without_classes = CfgNode(entry)
    cfg.DATASETS.TEST = ("t_without_classes",)
    register_datasets(cfg)
    assert MetadataCatalog.get("t_without_classes").get("thing_classes") is None
    metadata = ssd.Predictor(cfg).metadata
    assert metadata.thing_classes == "ellipse rectangle triangle star cross ring".split()
    assert metadata.thing_dataset_id_to_contiguous_id == {i + 1: i for i in range(6)}


def test_class_names_of_a_lab_without_a_data_set(cfg, image, tmp_path):
    cfg = cfg.clone()
    cfg.defrost()
    for names in ((), ("nowhere",)):  # neither registered
        cfg.DATASETS.TEST = names
        predictor = ssd.Predictor(cfg)
        assert len(predictor(image)["instances"])
        assert predictor.metadata.thing_classes == [f"class {i}" for i in range(6)]
    data = torch.load(tmp_path / "model.pth", weights_only=True)
    torch.save({**data, "classes": list("abcdef")}, tmp_path / "model.pth")
    assert ssd.Predictor(cfg).metadata.thing_classes == list("abcdef")


def test_class_names_of_ones_own(cfg, register):
    cfg = cfg.clone()
    cfg.defrost()
    names = list("uvwxyz")
    MetadataCatalog.get("t_named_only").thing_classes = names
    cfg.DATASETS.TEST = ("t_named_only",)  # as many demos do
    assert ssd.Predictor(cfg).metadata.thing_classes == names
    MetadataCatalog.pop("t_named_only")

    def read():
        MetadataCatalog.get("t_function").thing_classes = names
        raise KeyError("by anyone")

    DatasetCatalog.register("t_function", read)
    cfg.DATASETS.TEST = ("t_function",)
    assert ssd.Predictor(cfg).metadata.thing_classes == names
    DatasetCatalog.pop("t_function")
    MetadataCatalog.pop("t_function")


def test_the_weights_own_class_names_count(cfg, datasets_folder, tmp_path, caplog):
    """What an output means follows from what it was trained on."""
    names = MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes
    data = torch.load(tmp_path / "model.pth", weights_only=True)
    for trained_on, differ in ((names, False), (names[::-1], True)):
        caplog.clear()
        torch.save({**data, "classes": list(trained_on)}, tmp_path / "model.pth")
        assert ssd.Predictor(cfg).metadata.thing_classes == trained_on
        assert ("was trained on the classes" in caplog.text) == differ


def test_own_weights_of_twenty_classes_are_not_vocs(cfg, tmp_path):
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.SSD.NUM_CLASSES, cfg.DATASETS.TEST = 20, ()
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    assert ssd.Predictor(cfg).metadata.thing_classes[0] == "class 0"


def test_averaged_weights_are_taken_as_in_evaluation(cfg, tmp_path):
    data = torch.load(tmp_path / "model.pth", weights_only=True)
    data["ema"] = {k: x + 1 for k, x in data["model"].items()}
    torch.save(data, tmp_path / "model.pth")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.EMA.ENABLED = True
    state = ssd.Predictor(cfg).model.state_dict()
    names = [name for name in state if name.startswith("head.") and name.endswith(".1.bias")]
    assert names  # of convolutions without BatchNorm, which isn't folded into them
    for name in names:
        assert torch.equal(state[name], data["ema"][name]), name


def test_weights_must_be_there_and_fill_the_model(cfg, tmp_path):
    data = torch.load(tmp_path / "model.pth", weights_only=True)
    del data["model"]["head.cls_predictors.0.1.bias"]
    torch.save(data, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="head.cls_predictors.0.1.bias"):
        ssd.Predictor(cfg)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""
    with pytest.raises(ValueError, match="MODEL.WEIGHTS"):
        ssd.Predictor(cfg)


def test_another_lineages_published_weights_by_name(image, tmp_path, monkeypatch):
    """torchvision's model and ours, from the same file, on an image of the network's size."""
    image = image.repeat(4, 0)[:320].repeat(2, 1)
    rgb = torch.from_numpy(image[:, :, ::-1].transpose(2, 0, 1) / np.float32(255))
    torch.manual_seed(0)
    theirs = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():  # statistics with which something comes through
        theirs.head(list(theirs.backbone(torch.stack([rgb, torch.rand(3, 320, 320)])).values()))
        for module in theirs.eval().head.classification_head.module_list:
            torch.nn.init.normal_(module[-1].weight, std=0.2)
    name = "ssdlite_mobilenetv3_coco_torchvision"
    weights = PUBLISHED[name]
    monkeypatch.chdir(tmp_path)
    torch.save(theirs.state_dict(), weights.file_name)
    with pytest.raises(ValueError, match="SHA-256"):
        ssd.Predictor(name)
    monkeypatch.setitem(PUBLISHED, name, weights._replace(sha256=None))
    predictor = ssd.Predictor(name)
    assert predictor.cfg.MODEL.WEIGHTS == f"zoo://{name}"
    # the data set itself has names only when its JSON has been read
    assert predictor.metadata.thing_classes[:2] == ["person", "bicycle"]
    assert len(predictor.metadata.thing_classes) == 90
    assert predictor.metadata.thing_dataset_id_to_contiguous_id[90] == 89

    with torch.no_grad():
        (expected,) = theirs([rgb])
    expected = {key: value[:20] for key, value in expected.items()}
    actual = predictor(image)["instances"][:20]
    assert len(actual) == 20 and actual.scores.min() > 0.5
    torch.testing.assert_close(actual.scores, expected["scores"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.pred_boxes.tensor, expected["boxes"], rtol=1e-4, atol=1e-2)
    assert torch.equal(actual.pred_classes, expected["labels"] - 1)  # theirs: COCO's ids


@pytest.mark.parametrize("name", ["ssd300_coco_mmdt", "quickstart"])
def test_a_name_without_weights_is_an_error(name):
    with pytest.raises(RuntimeError, match=name):
        ssd.Predictor(name)
    assert name not in model_zoo.weights_names()


def test_what_is_no_image_is_an_error(cfg):
    predictor = ssd.Predictor(cfg)
    for value, text in (
        (None, "NoneType"),
        (np.zeros((4, 5), np.uint8), r"\(4, 5\)"),
        (np.zeros((3, 4, 5), np.uint8), r"\(3, 4, 5\)"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"),
    ):
        with pytest.raises(ValueError, match=f"BGR order, got .*{text}"):
            predictor(value)
