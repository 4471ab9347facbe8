"""Files of every lineage, loaded through MODEL.WEIGHTS's path, give that lineage's detections.

Each case writes a file as its source ships it, loads it into the model of the lab that reproduces
the lineage, and compares detections with those of reference.py, which evaluates the same
parameters directly.
"""

import functools
import pickle
from dataclasses import dataclass, replace
from typing import Callable

import pytest
import reference
import torch
from detectron2.modeling import build_model
from protobuf import field, varint

from ssd import model_zoo
from ssd.checkpoint import SSDCheckpointer
from ssd.config import load_config

PIXELS, SCORE = 0.01, 5e-5  # of boxes and scores; measured: 0.0006 and 1e-5


# --- Files ------------------------------------------------------------------------------------


def plain(path, state):
    torch.save(state, path)


def of_mmdet(version):
    def write(path, state):
        meta = {"mmdet_version": version, "epoch": 24, "iter": 120}
        optimizer = {"state": {}, "param_groups": []}
        torch.save({"meta": meta, "state_dict": state, "optimizer": optimizer}, path)

    return write


def of_lufficc(path, state):
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []}
    scheduler = {"milestones": [80000, 100000], "last_epoch": 120000}
    parts = {"optimizer": optimizer, "scheduler": scheduler, "iteration": 120000}
    torch.save({"model": state, **parts}, path)


def of_nvidia(path, state):
    state = {f"module.1.{name}": value for name, value in state.items()}
    torch.save({"epoch": 65, "iteration": 1, "model": state, "label_map": {}}, path)


def of_fork(path, state):
    """As Detectron2's model zoo ships weights."""
    mean, std = reference.LINEAGES["fork"].mean, (1.0, 1.0, 1.0)
    state = {"pixel_mean": torch.tensor(mean)[:, None, None], **state}
    state["pixel_std"] = torch.tensor(std)[:, None, None]
    arrays = {name: value.numpy() for name, value in state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}))


def of_caffe(old):
    """A ``.caffemodel``: NetParameter with ``layer`` (or the ``layers`` of before 2014)."""

    def blob(value):
        data = field(5, value.numpy().astype("<f4").tobytes())
        if not old:
            return field(7, field(1, b"".join(map(varint, value.shape)))) + data
        shape = [1] * (4 - value.dim()) + list(value.shape)
        return b"".join(field(i, size) for i, size in enumerate(shape, 1)) + data

    def layer(name, *blobs):
        if old:
            parts = [field(2, "in"), field(3, "out"), field(4, name), field(5, 4)]
        else:
            parts = [field(1, name), field(2, "Convolution"), field(3, "in"), field(4, "out")]
        parts += [field(6 if old else 7, blob(value)) for value in blobs]
        return field(2 if old else 100, b"".join(parts))

    def write(path, state):
        names = dict.fromkeys(name.rsplit(".", 1)[0] for name in state)
        with open(path, "wb") as file:
            file.write(field(1, "VGG_SSD_300x300") + layer("data"))
            for name in names:
                blobs = [state[f"{name}.{x}"] for x in ("weight", "bias") if f"{name}.{x}" in state]
                file.write(layer(name, *blobs) + layer(name + "_relu"))

    return write


# --- Cases ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    lineage: str
    lab: str
    write: Callable = plain
    opts: str = ""
    suffix: str = ".pth"
    double: bool = False  # evaluates in float64


VOC, MMDET = "ssd_vgg16_size300_voc0712", "ssd_vgg16_size300_120e"
NVIDIA, FORK = "ssd_resnet50_size300", "ssd_vgg16_size512"
CLIPPED = "MODEL.SSD.DEFAULT_BOXES.CLIP cxcywh "
NO_LIMIT = "MODEL.SSD.TOPK_CANDIDATES_TEST 200 TEST.DETECTIONS_PER_IMAGE 4000 "
BGR = "INPUT.FORMAT BGR MODEL.PIXEL_MEAN [104.0,117.0,123.0] "
OF_FORK = (
    "MODEL.SSD.DEFAULT_BOXES.MIN_SIZES [20.48,51.2,133.12,215.04,296.96,378.88,460.8] "
    "MODEL.SSD.DEFAULT_BOXES.MAX_SIZE 537.6 MODEL.SSD.BBOX_REG_CLAMP upper "
    "MODEL.SSD.SCORE_THRESH_TEST 0.02 MODEL.SSD.TOPK_CANDIDATES_TEST 24564 "
    "TEST.DETECTIONS_PER_IMAGE 100 MODEL.VGG.LATE_POOL True "
    "MODEL.PIXEL_MEAN [123.675,116.28,103.53]"
)

CASES = {
    "mmdet": Case("mmdet", MMDET, of_mmdet("2.14.0")),
    "mmdet-old": Case("mmdet_old", MMDET, of_mmdet("2.12.0")),
    "mmdet-1.x": Case("mmdet_1x", MMDET, of_mmdet("1.0rc0")),
    "caffe-voc": Case("caffe_voc", VOC, of_caffe(old=False), suffix=".caffemodel"),
    "caffe-voc-bgr": Case("caffe_voc", VOC, of_caffe(old=False), BGR, ".caffemodel"),
    "caffe-coco": Case(
        "caffe_coco", "ssd_vgg16_size300_expand_aug", of_caffe(old=True), suffix=".caffemodel"
    ),
    "amdegroot": Case("amdegroot", VOC, opts=CLIPPED + NO_LIMIT),
    "lufficc-vgg": Case(
        "lufficc_vgg", VOC, of_lufficc,
        CLIPPED + "MODEL.SSD.TOPK_CANDIDATES_TEST 8732 TEST.DETECTIONS_PER_IMAGE 100",
    ),
    "lufficc-mobilenetv2": Case("lufficc_v2", "ssdlite_mobilenetv2_size320_voc0712", of_lufficc),
    "lufficc-mobilenetv3": Case(
        "lufficc_v3", "ssdlite_mobilenetv3_size320_voc0712", of_lufficc, double=True
    ),
    "qfgaohao-vgg": Case("qfgaohao_vgg", "ssd_vgg16_size300_qfgaohao"),
    "qfgaohao-mobilenetv1": Case("qfgaohao_v1", "ssd_mobilenetv1_size300_voc0712"),
    "qfgaohao-mobilenetv2": Case("qfgaohao_v2", "ssdlite_mobilenetv2_size300_voc0712"),
    "nvidia": Case("nvidia", NVIDIA, of_nvidia),
    "fork": Case("fork", FORK, of_fork, OF_FORK, ".pkl"),
}  # fmt: skip


# --- Comparison -------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)  # cases of a lineage follow each other
def expected_detections(name, double=False):
    """(image, parameters, network outputs, detections) of a lineage."""
    lineage, parameters = reference.LINEAGES[name], reference.Parameters()
    image = reference.random_image(lineage.default_boxes.size)
    with torch.no_grad():
        output = lineage.evaluate(image, parameters, torch.float64 if double else torch.float32)
    return image, dict(parameters), output, lineage.detect(**output)


def without_partner(first, second):
    """How many detections, of either, the other one doesn't have."""
    box = (first["boxes"][:, None].double() - second["boxes"].double()).abs().amax(2)
    score = (first["scores"][:, None].double() - second["scores"].double()).abs()
    same = first["classes"][:, None] == second["classes"]
    same &= (box < PIXELS) & (score < SCORE)
    return int((~same.any(0)).sum() + (~same.any(1)).sum())


@pytest.mark.parametrize("name", CASES)
def test_detections_are_the_sources(name, tmp_path):
    case = CASES[name]
    image, state, _, expected = expected_detections(case.lineage, case.double)
    maps = reference.LINEAGES[case.lineage].default_boxes.maps
    assert set(expected["levels"].tolist()) == set(range(len(maps))), "each level must be seen"

    path = tmp_path / ("weights" + case.suffix)
    case.write(path, state)
    opts = ["MODEL.DEVICE", "cpu", *case.opts.split()]
    cfg = load_config(model_zoo.get_config_file(case.lab), opts)
    model = build_model(cfg).eval()
    SSDCheckpointer(model, cfg=cfg, strict=True).load(str(path))
    if case.double:
        model.double()
    with torch.no_grad():
        (result,) = model([{"image": image if cfg.INPUT.FORMAT == "RGB" else image.flip(0)}])
    result = result["instances"]
    actual = {
        "boxes": result.pred_boxes.tensor,
        "scores": result.scores,
        "classes": result.pred_classes,
    }
    assert len(result) == len(expected["scores"])
    assert without_partner(actual, expected) == 0


BOXES = reference.LINEAGES["lufficc_v2"].default_boxes
MISTAKES = {
    "order of classes": {"background_last": True},
    "order of channels": {"order": "BGR"},
    "order of a predictor's outputs": {"class_major": True},
    "mean": {"mean": (123.675, 116.28, 103.53)},
    "std": {"std": (1.0, 1.0, 1.01)},
    "steps": {"default_boxes": replace(BOXES, steps=(16, 32, 64, 100, 150, 300))},
    "min sizes": {"default_boxes": replace(BOXES, min_sizes=(60, 105, 150, 195, 240, 288))},
    "clipping of default boxes": {"default_boxes": replace(BOXES, clip=False)},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_show(mistake):
    image, state, _, expected = expected_detections("lufficc_v2")
    lineage = replace(reference.LINEAGES["lufficc_v2"], **MISTAKES[mistake])
    with torch.no_grad():
        actual = lineage.detect(**lineage.evaluate(image, reference.Parameters(state)))
    assert without_partner(actual, expected) >= 10
