"""Reads any file that SSDCheckpointer reads, and writes its weights as other projects' files."""

import io
import json
import logging
from dataclasses import replace
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ssd.checkpoint import mmdet, qfgaohao, torchvision
from ssd.checkpoint.files import read_file
from ssd.checkpoint.lineage import BODY, Lineage, State, count_classes, predictors
from ssd.checkpoint.published import Weights
from ssd.checkpoint.recognition import class_names, definition, find_weights, identify, recognise

__all__ = ["FORMATS", "Detector", "encode", "read_ours", "write_as"]

logger = logging.getLogger(__name__)

_FOREIGN: Dict[str, List[Lineage]] = {
    "mmdet": [mmdet.VGG, mmdet.MOBILENETV2],
    "mmdet-old": [mmdet.OLD],
    "torchvision": torchvision.LINEAGES,
    "pytorch-ssd": qfgaohao.LINEAGES,
}
FORMATS = ("detectron2", *_FOREIGN, "safetensors")

_OURS = Lineage("detectron2", "our own weights", (), {})
# The last release that has these names; tells them from those of 1.x, which are the same.
_OLD_META = {"mmdet_version": "2.13.0"}
# Networks that the target's code fixes: six levels, and the first map inside a block or not.
_SIX_LEVELS = (
    "torchvision_vgg",
    "torchvision_mobilenetv3",
    *(lineage.key for lineage in qfgaohao.LINEAGES),
)
_WITH_L2NORM = ("torchvision_vgg", "mmdet_vgg", "mmdet_old")
_TAP_INSIDE = {
    "torchvision_mobilenetv3": True,
    "qfgaohao_mobilenetv2": True,
    "mmdet_mobilenetv2": False,
}


class Detector(NamedTuple):
    """What a file holds.

    Attributes:
        state: parameters by our names, of a model for RGB.
        classes: their names, None if unknown.
        lineage: of the file; one of key "detectron2" for our own.
        rest: the file's other entries.
    """

    state: State
    classes: Optional[List[str]] = None
    lineage: Lineage = _OURS
    rest: Dict[str, Any] = {}

    def definition(self) -> Optional[Tuple[Weights, Dict[str, Any]]]:
        """As :func:`ssd.checkpoint.recognition.definition`; None for our own and for backbones."""
        counts = count_classes(self.state)
        return definition(self.lineage.key, len(counts), counts[0]) if counts else None


def read_ours(path: str, input_format: str = "", averaged: bool = False) -> Detector:
    """A file of any lineage, by our names and for RGB images.

    Biases in front of BatchNorm, which ours hasn't, go into its means: qfgaohao's MobileNetV2,
    the only one of them that can be written, gets zeros for them. A classifier's first layer is
    scaled to MODEL.PIXEL_STD 1. What else the file holds, such as an optimizer, is in ``rest``.

    Args:
        input_format: the channels' order that the weights were trained with, if it isn't their
            lineage's; our own files don't say theirs, "" stands for RGB.
        averaged: take the averaged weights (SOLVER.EMA) of a training file of ours.

    Raises:
        ValueError: not a readable checkpoint, of no known lineage, without averaged weights, or
            with NaN or infinite values.
    """
    data = read_file(path)
    if averaged:
        if not isinstance(data.get("ema"), dict):
            raise ValueError(f"{path} holds no averaged weights (SOLVER.EMA)")
        data["model"] = data.pop("ema")
    checkpoint = find_weights(data, path)
    classes = class_names(checkpoint)
    theirs, lineage = identify(checkpoint)
    lineage = lineage or _OURS
    if lineage is _OURS and not any(name.startswith(BODY) for name in theirs):
        names = ", ".join(list(theirs)[:4])
        raise ValueError(f"{path} is of no known lineage (docs/checkpoints.md): it holds {names}")
    if input_format:
        lineage = replace(lineage, input_format=input_format)
    state = lineage.to_ours(theirs)
    if lineage.key != _OURS.key and (unknown := [name for name in state if name in theirs]):
        logger.warning("%s: left out %s", lineage.title, ", ".join(unknown))
        state = {name: value for name, value in state.items() if name not in theirs}
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values")
    checkpoint.pop("model")
    return Detector({k: _own_memory(x) for k, x in state.items()}, classes, lineage, checkpoint)


def write_as(detector: Detector, format: str) -> Dict[str, Any]:
    """What a file of this format holds.

    - detectron2, safetensors: our names, "model" and "classes".
    - mmdet, mmdet-old (2.0 to 2.13): "state_dict", and "meta" with the class names.
    - torchvision, pytorch-ssd (qfgaohao's): just the parameters.

    Reading the result again gives the same parameters, bit by bit; for foreign formats this is
    checked. What isn't a parameter isn't converted: default boxes, normalisation and thresholds
    are the target's.

    Raises:
        ValueError: the target has no such network; says why.
    """
    state, classes = detector.state, detector.classes
    if format not in FORMATS:
        raise ValueError(f"format {format!r}, expected one of {', '.join(FORMATS)}")
    if format not in _FOREIGN:
        return {"model": state, **({"classes": classes} if classes else {})}
    if (found := detector.definition()) and found[1]["MODEL.VGG.LATE_POOL"]:
        raise ValueError(f"{format} has no VGG16 that pools as that of {detector.lineage.title}")
    meta: Dict[str, Any] = dict(_OLD_META) if format == "mmdet-old" else {}
    if classes:  # of 2.x, of 3.x
        meta.update(CLASSES=tuple(classes), dataset_meta={"classes": tuple(classes)})
    problems = []
    for lineage in _FOREIGN[format]:
        try:
            theirs = _by_their_names(state, lineage, meta)
        except ValueError as error:
            problems.append(str(error))
            continue
        return {"state_dict": theirs, "meta": meta} if format.startswith("mmdet") else theirs
    raise ValueError(f"{format} has no such network: {'; '.join(problems)}")


def encode(data: Dict[str, Any], format: str = "detectron2") -> bytes:
    """A file with what :func:`write_as` gives; the same bytes for the same content."""
    if format == "safetensors":
        from safetensors.torch import save

        names = {"classes": json.dumps(data["classes"])} if "classes" in data else None
        return save(data["model"], names)
    file = io.BytesIO()  # in a file torch would write the file's name, too
    torch.save(data, file)
    return file.getvalue()


def _by_their_names(state: State, lineage: Lineage, meta: Dict[str, Any]) -> State:
    theirs = {name: _own_memory(x) for name, x in lineage.from_ours(state).items()}
    _check_network(state, lineage)
    if recognise(theirs, meta) is not lineage:
        raise ValueError(f"{lineage.title} needs {', '.join(lineage.signature)}")
    back = lineage.to_ours(theirs)
    changed = [k for k in {**state, **back} if k not in state or not _same(state[k], back.get(k))]
    if changed:
        raise ValueError(f"{lineage.title} can't hold {', '.join(changed[:4])}")
    return theirs


def _check_network(state: State, lineage: Lineage) -> None:
    """Differences that names don't show."""
    if "backbone.l2_norm.conv4_3.running_mean" in state and lineage.key != "qfgaohao_vgg":
        raise ValueError(f"{lineage.title} has L2Norm, not BatchNorm, on conv4_3")
    levels = predictors(state)
    if lineage.key in _WITH_L2NORM and levels:
        if "backbone.l2_norm.conv4_3.weight" not in state:
            raise ValueError(f"{lineage.title} has L2Norm on conv4_3")
        extra = {name.split(".")[2] for name in state if name.startswith("backbone.extra_layers.")}
        if len(levels) != len(extra) + 2:
            raise ValueError(
                f"{lineage.title} predicts from conv4_3, fc7 and the extra layers: "
                f"{len(extra) + 2} levels, not {len(levels)}"
            )
    if lineage.key in _SIX_LEVELS and len(levels) != 6:
        raise ValueError(f"{lineage.title} has predictors on 6 levels, not on {len(levels)}")
    first = state.get("head.cls_predictors.0.0.weight")
    expand = state.get(f"{BODY}stage6.0.expand.weight")
    if lineage.key in _TAP_INSIDE and first is not None and expand is not None:
        inside = _TAP_INSIDE[lineage.key]
        if (len(first) == len(expand)) != inside:
            raise ValueError(
                f"{lineage.title} takes its first map {'inside' if inside else 'behind'} a block, "
                f"this one, of {len(first)} channels, doesn't"
            )


def _own_memory(value: Tensor) -> Tensor:
    """Without gradient, contiguous and not a view: a file would hold all that a view is of."""
    return value.detach().clone(memory_format=torch.contiguous_format)


def _same(a: Tensor, b: Optional[Tensor]) -> bool:
    return b is not None and a.dtype == b.dtype and torch.equal(a, b)
