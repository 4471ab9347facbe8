"""Configs of data sets, and a catalog that forgets them after each test."""

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from ssd.config import add_ssd_config
from ssd.data import datasets

# entries of DATASETS.REGISTER
VOC = {"FORMAT": "voc", "ROOT": "v", "SPLIT": "train", "CLASSES": ["cat", "dog"]}
COCO = {"FORMAT": "coco", "ROOT": "c", "ANNOTATIONS": "train.json", "IMAGES": "images"}
YOLO = {"FORMAT": "yolo", "ROOT": "y", "IMAGES": "images/train", "CLASSES": ["cat", "dog"]}


@pytest.fixture(autouse=True)
def clean_catalog(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    yield
    for name in list(datasets._registered):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
        del datasets._registered[name]


def make_cfg(entries, train=(), test=(), num_classes=2):
    cfg = get_cfg()
    add_ssd_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "SSD"
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    cfg.MODEL.SSD.NUM_CLASSES = num_classes
    cfg.merge_from_other_cfg(CfgNode({"DATASETS": {"REGISTER": entries}}))
    return cfg
