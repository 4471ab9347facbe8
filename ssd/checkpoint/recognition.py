"""Which lineage a file is of, and which lab has the definition that its weights need."""

import functools
from typing import Any, Dict, List, Mapping, Optional, Tuple

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
from ssd.checkpoint.published import PUBLISHED, lab_folder
from ssd.config import read_config

__all__ = ["BACKBONES", "DETECTORS", "definition", "differences", "recognise", "unwrap"]

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
    "MODEL.RESNETS.RES4_STRIDE", "MODEL.RESNETS.STRIDE_IN_1X1",
)  # fmt: skip


def unwrap(state: State) -> State:
    """Without what data parallelism, compilation or a trainer put in front of every name."""
    names = list(state)
    while prefix := next((p for p in _WRAPPERS if all(n.startswith(p) for n in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, state.values()))


def recognise(state: State, meta: Optional[Dict[str, Any]] = None) -> Optional[Lineage]:
    """The lineage of a file's parameters; None for our own and for unknown ones."""
    return next((x for x in (*DETECTORS, *BACKBONES) if x.recognises(state, meta)), None)


def definition(
    key: str, num_levels: int, num_classes: int
) -> Optional[Tuple[str, Tuple, Dict[str, Any]]]:
    """Lab, options for it, and keys with values, of the published weights that are most alike.

    Args:
        key: of the lineage.
        num_levels, num_classes: feature maps with predictors, and K, of a file.
    """
    best = None
    for weights in PUBLISHED.values():
        if weights.lineage == key:
            cfg = read_config(str(lab_folder() / weights.lab / "config.yaml"), weights.opts)
            if len(cfg.MODEL.SSD.DEFAULT_BOXES.MIN_SIZES) == num_levels:
                found = weights.lab, weights.opts, _defining(cfg)
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
