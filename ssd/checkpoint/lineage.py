"""What all lineages have in common: their names to ours and back, and how values are laid out."""

import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor

__all__ = [
    "BODY", "IMAGENET_STD", "MAX_LEVELS", "Lineage", "State", "count_classes", "extras",
    "flat_extras", "heads", "lite_heads", "predictors",
]  # fmt: skip

State = Dict[str, Tensor]

BODY = "backbone.bottom_up."  # of our names
# By which torchvision's classifiers expect RGB in [0, 255] to be divided.
IMAGENET_STD = (255 * 0.229, 255 * 0.224, 255 * 0.225)
MAX_LEVELS = 8
_PREDICTOR_BIAS = re.compile(r"head\.(cls|box)_predictors\.(\d+)(\.\d)?\.bias")
_BEFORE_FIRST_MAP = re.compile(rf"{re.escape(BODY)}conv[1-4]_\d\.weight")  # of VGG16
_FIRST_LAYERS = (f"{BODY}conv1_1", f"{BODY}conv1", f"{BODY}stem.conv1")


@dataclass(frozen=True)
class Lineage:
    """How the files of one project name and lay out the parameters of one network.

    Attributes:
        key: short name, as in :data:`ssd.checkpoint.published.PUBLISHED`.
        title: for the log.
        signature: parameters that, together, only these files have.
        condition: what else tells these files, of parameters and the file's ``meta``.
        names: their layers to ours; a whole parameter's name goes before its layer's.
        background_first: the first output of a box is the background's; ours is the last.
        input_format: order of the input's channels.
        input_std: of a classifier, by what it expects values in [0, 255] to be divided: its first
            layers are scaled to ``MODEL.PIXEL_STD``. None: they aren't.
        config: keys of the config and the values that a classifier was trained with, if they can
            differ. A detector's stand in its lab (:data:`ssd.checkpoint.published.PUBLISHED`).
        prepare: their parameters to those that ``names`` knows.
        restore: the inverse of ``prepare``.
    """

    key: str
    title: str
    signature: Tuple[str, ...]
    names: Dict[str, str]
    background_first: bool = False
    input_format: str = "RGB"
    input_std: Optional[Tuple[float, ...]] = None
    condition: Callable[[State, Dict[str, Any]], bool] = lambda state, meta: True
    config: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[State], State] = lambda state: state
    restore: Callable[[State], State] = lambda state: state

    def recognises(self, state: State, meta: Optional[Dict[str, Any]] = None) -> bool:
        return all(name in state for name in self.signature) and self.condition(state, meta or {})

    def our_name(self, name: str) -> str:
        """Of one parameter; itself if there is no counterpart."""
        return _new_name(name, self.names)

    def to_ours(
        self, state: State, input_format: str = "RGB", pixel_std: Sequence[float] = (1.0, 1.0, 1.0)
    ) -> State:
        """Their parameters by our names, for images of this order of channels and this scale.

        A parameter without a counterpart keeps its name. The given tensors stay as they are.
        """
        result = _rename(self.prepare(state), self.names)
        for name in [name for name in result if name.endswith(".bias")]:
            if (mean := f"{name[:-5]}.norm.running_mean") in result:  # ours has no such bias
                result[mean] = result[mean] - result.pop(name)
        if self.background_first:
            _roll_classes(result, -1)
        first = next((name for name in _FIRST_LAYERS if f"{name}.weight" in result), None)
        if first:
            if input_format != self.input_format:
                result[f"{first}.weight"] = result[f"{first}.weight"].flip(1)
            if self.input_std:
                std = self.input_std[:: 1 if input_format == self.input_format else -1]
                scale = torch.tensor(pixel_std) / torch.tensor(std)
                eps = self.config.get("MODEL.BATCH_NORM.EPS", 1e-5)
                _scale_input(result, first, scale, eps)
        return result

    def from_ours(self, state: State) -> State:
        """Our parameters, of a model for RGB, as theirs.

        Raises:
            ValueError: a parameter has no counterpart: the network isn't theirs.
        """
        state = dict(state)
        for name in _FIRST_LAYERS:
            if self.input_format == "BGR" and f"{name}.weight" in state:
                state[f"{name}.weight"] = state[f"{name}.weight"].flip(1)
        if self.background_first:
            _roll_classes(state, 1)
        result = _rename(state, {ours: theirs for theirs, ours in self.names.items()})
        if unknown := [name for name in result if name in state]:
            raise ValueError(f"{self.title} has no name for {', '.join(unknown[:4])}")
        return self.restore(result)


def extras(prefix: str, layers: Dict[str, str], first: int = 0) -> Iterator[Tuple[str, str]]:
    """Extra layers.

    Args:
        prefix: in front of a layer's position, with a "{}" for the level's number.
        layers: positions within a level, to ours.
        first: their number of the first level.
    """
    for level in range(MAX_LEVELS):
        for theirs, ours in layers.items():
            yield prefix.format(first + level) + theirs, f"backbone.extra_layers.{level}.{ours}"


def flat_extras(prefix: str) -> Iterator[Tuple[str, str]]:
    """Extra layers of two convolutions each, numbered throughout."""
    for number in range(2 * MAX_LEVELS):
        yield f"{prefix}{number}", f"backbone.extra_layers.{number // 2}.{number % 2}"


def heads(cls: str, box: str) -> Iterator[Tuple[str, str]]:
    """Predictors of one convolution; ``cls`` and ``box`` are names with a "{}" for the level."""
    for theirs, ours in ((cls, "head.cls_predictors.{}"), (box, "head.box_predictors.{}")):
        for level in range(MAX_LEVELS):
            yield theirs.format(level), ours.format(level)


def lite_heads(
    cls: str, box: str, depthwise: str, norm: str, pointwise: str, last_1x1: bool = False
) -> Iterator[Tuple[str, str]]:
    """Predictors of a depthwise and a 1×1 convolution, of which the last of six may be 1×1 only."""
    for theirs, ours in heads(cls, box):
        if last_1x1 and ours.endswith(".5"):
            yield theirs, f"{ours}.0"
            continue
        yield f"{theirs}{depthwise}", f"{ours}.0"
        yield f"{theirs}{norm}", f"{ours}.0.norm"
        yield f"{theirs}{pointwise}", f"{ours}.1"


def predictors(state: State) -> Dict[str, int]:
    """Of our parameters: {layer that predicts classes: A, the level's default boxes per cell}."""
    found: Dict[str, Dict[str, str]] = {"cls": {}, "box": {}}
    for name in state:
        if match := _PREDICTOR_BIAS.fullmatch(name):
            found[match[1]][match[2]] = name.removesuffix(".bias")
    return {
        layer: len(state[f"{found['box'][level]}.bias"]) // 4
        for level, layer in found["cls"].items()
        if level in found["box"]
    }


def count_classes(state: State) -> List[int]:
    """K of each of :func:`predictors`."""
    return [len(state[f"{cls}.bias"]) // a - 1 for cls, a in predictors(state).items()]


def _rename(state: State, names: Dict[str, str]) -> State:
    return {_new_name(name, names): value for name, value in state.items()}


def _new_name(name: str, names: Dict[str, str]) -> str:
    layer, _, leaf = name.rpartition(".")
    return names.get(name) or (f"{names[layer]}.{leaf}" if layer in names else name)


def _roll_classes(state: State, by: int) -> None:
    """Moves the background of each default box from first to last (by -1) or back (by 1)."""
    for cls, num_anchors in predictors(state).items():
        for name in (f"{cls}.weight", f"{cls}.bias"):
            value = state[name].unflatten(0, (num_anchors, -1))
            state[name] = value.roll(by, dims=1).flatten(0, 1)


def _scale_input(state: State, first: str, scale: Tensor, eps: float) -> None:
    """Multiplies what the first convolution expects its input's channels to be divided by.

    The channels' common part doesn't stay in its weights: at 1 / 58 of their size their gradient is
    58 times as large, and the first step of training would undo them. It goes into the statistics
    of the BatchNorm behind it, or over VGG16's convolutions up to conv4_3, an SSD's first map.
    """
    common = float(scale.mean())
    state[f"{first}.weight"] = state[f"{first}.weight"].float() * (scale / common)[:, None, None]
    if f"{first}.norm.running_var" in state:
        # float32: half precision's variances could overflow
        mean, var = (state[f"{first}.norm.running_{x}"].float() for x in ("mean", "var"))
        state[f"{first}.norm.running_mean"] = mean / common
        state[f"{first}.norm.running_var"] = ((var + eps) / common**2 - eps).clamp(min=0)
        return
    layers = sorted(name[:-7] for name in state if _BEFORE_FIRST_MAP.fullmatch(name)) or [first]
    for number, layer in enumerate(layers, 1):  # ReLU and max-pooling keep a factor
        for leaf, factor in (("weight", 1 / len(layers)), ("bias", number / len(layers) - 1)):
            if (name := f"{layer}.{leaf}") in state:
                state[name] = state[name].float() * common**factor
