"""Which lineage a file is of, and which lab has the definition that its weights need."""

import functools
import json
from dataclasses import replace
from typing import Any, Collection, Dict, List, Mapping, Optional, Tuple

import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from detectron2.config import CfgNode

from ssd.checkpoint import (
    amdegroot,
    caffe,
    detectron2_fork,
    lufficc,
    mmdet,
    mobilenet,
    nvidia,
    qfgaohao,
    resnet,
    torchvision,
    vgg,
)
from ssd.checkpoint.lineage import Lineage, State
from ssd.checkpoint.published import PUBLISHED, Weights, lab_folder
from ssd.config import read_config

__all__ = [
    "BACKBONES", "DETECTORS", "class_names", "definition", "differences", "find_weights",
    "identify", "recognise", "unwrap",
]  # fmt: skip

DETECTORS: List[Lineage] = [
    *mmdet.LINEAGES,
    *torchvision.LINEAGES,
    *caffe.LINEAGES,
    *amdegroot.LINEAGES,
    *lufficc.LINEAGES,
    *qfgaohao.LINEAGES,
    *nvidia.LINEAGES,
    *detectron2_fork.LINEAGES,
]
BACKBONES: List[Lineage] = [
    *vgg.BACKBONES,
    *caffe.BACKBONES,
    *mobilenet.BACKBONES,
    *resnet.BACKBONES,
]
# Where a file may have its weights, in this order; else it is them.
_WEIGHTS = ("model", "state_dict", "model_state_dict", "net")
# What modules around a model put in front of all names; "1.": NVIDIA's, behind its normalisation.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "1.")

# What changes a network's output and can't be seen in the shapes of its parameters.
_DEFINING_KEYS = (
    "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD",
    "MODEL.SSD.INPUT_SIZE", "MODEL.SSD.DEFAULT_BOXES.MIN_SIZES",
    "MODEL.SSD.DEFAULT_BOXES.MAX_SIZE", "MODEL.SSD.DEFAULT_BOXES.ASPECT_RATIOS",
    "MODEL.SSD.DEFAULT_BOXES.STEPS", "MODEL.SSD.DEFAULT_BOXES.CLIP",
    "MODEL.SSD.DEFAULT_BOXES.FIRST_SQUARE", "MODEL.SSD.BBOX_REG_WEIGHTS",
    "MODEL.SSD.SCORE_FUNCTION", "MODEL.SSD.SAME_PADDING", "MODEL.SSD.EXTRA_ACTIVATION",
    "MODEL.SSD.IN_FEATURES", "MODEL.BATCH_NORM.EPS", "MODEL.MOBILENET.SQUEEZE_FIRST",
    "MODEL.VGG.LATE_POOL", "MODEL.RESNETS.RES4_STRIDE", "MODEL.RESNETS.STRIDE_IN_1X1",
)  # fmt: skip


def find_weights(data: Dict[str, Any], path: str) -> Dict[str, Any]:
    """What a file holds, with its weights as "model".

    Raises:
        ValueError: it holds no weights.
    """
    key = next((key for key in _WEIGHTS if key in data), None)
    state = data.pop(key) if key else data
    if not (isinstance(state, dict) and state) or not all(
        isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in state.items()
    ):
        raise ValueError(f"MODEL.WEIGHTS {path} holds no dictionary of weights")
    return {**(data if key else {}), "model": state}


def unwrap(state: State, own: Collection[str] = ()) -> State:
    """Without what data parallelism, compilation or a trainer put in front of every name, unless
    there are names of the model that the weights are for (``own``), which may begin so."""
    names = list(state)
    while (
        names
        and not any(name in own for name in names)
        and (prefix := next((p for p in _WRAPPERS if all(n.startswith(p) for n in names)), None))
    ):
        names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, state.values()))


def recognise(state: State, meta: Optional[Dict[str, Any]] = None) -> Optional[Lineage]:
    """The lineage of a file's parameters; None for our own and for unknown ones."""
    return next((x for x in (*DETECTORS, *BACKBONES) if x.recognises(state, meta)), None)


def identify(
    checkpoint: Dict[str, Any], own: Collection[str] = ()
) -> Tuple[State, Optional[Lineage]]:
    """Weights, by their own names, and lineage of what :func:`find_weights` gives. ``own``: see
    :func:`unwrap`."""
    state = unwrap(checkpoint["model"], own)
    author = checkpoint.pop("__author__", None)
    if author == "Caffe2":
        state = {k: torch.as_tensor(x) for k, x in convert_c2_detectron_names(state)[0].items()}
    meta = {"__author__": author, **_as_dict(checkpoint.get("meta"))}
    lineage = recognise(state, meta)
    order = checkpoint.get("format")  # in some of Detectron2's .pkl files
    if lineage and order in ("BGR", "RGB") and order != lineage.input_format:
        std = lineage.input_std and lineage.input_std[::-1]
        lineage = replace(lineage, input_format=order, input_std=std)
    return state, lineage


def class_names(checkpoint: Dict[str, Any]) -> Optional[List[str]]:
    """Names of the classes in a file of ours or of MMDetection's; None if it holds none."""
    meta = _as_dict(checkpoint.get("meta"))
    meta = {**meta, **_as_dict(meta.get("dataset_meta"))}
    names = checkpoint.get("classes") or meta.get("classes") or meta.get("CLASSES")
    if text := _as_dict(checkpoint.get("metadata")).get("classes"):  # of safetensors: text only
        try:
            names = json.loads(text)
        except (ValueError, TypeError, RecursionError):
            return None
    is_names = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return list(names) if names and is_names else None


def definition(
    key: str, num_levels: int, num_classes: int
) -> Optional[Tuple[Weights, Dict[str, Any]]]:
    """The published weights that are most like a file's, and keys with values of their definition.

    Args:
        key: of the lineage.
        num_levels, num_classes: feature maps with predictors, and K, of a file.
    """
    best = None
    for weights in PUBLISHED.values():
        if weights.lineage == key:
            cfg = read_config(str(lab_folder() / weights.lab / "config.yaml"), weights.opts)
            if len(cfg.MODEL.SSD.DEFAULT_BOXES.MIN_SIZES) == num_levels:
                found = weights, _defining(cfg)
                if cfg.MODEL.SSD.NUM_CLASSES == num_classes:
                    return found
                best = best or found
    return best


def differences(cfg: CfgNode, expected: Mapping[str, Any]) -> List[str]:
    """The keys of which ``cfg`` has another value than ``expected``, with both."""
    found, order = _defining(cfg), " (RGB)" if cfg.INPUT.FORMAT == "BGR" else ""
    return [
        f"{key}{order * key.startswith('MODEL.PIXEL')} {found[key]} instead of {value}"
        for key, value in expected.items()
        if found[key] != value
    ]


def _defining(cfg: CfgNode) -> Dict[str, Any]:
    values = {key: functools.reduce(getattr, key.split("."), cfg) for key in _DEFINING_KEYS}
    values = {k: list(x) if isinstance(x, (list, tuple)) else x for k, x in values.items()}
    if cfg.INPUT.FORMAT == "BGR":
        for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
            values[key] = values[key][::-1]
    return values


def _as_dict(value: Any) -> Dict[str, Any]:
    return value if isinstance(value, dict) else {}
