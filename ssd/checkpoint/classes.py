"""Which classes of a detector's weights a model with other classes starts from.

SSD's authors fine-tune their COCO models on VOC so: the confidence layers keep the rows of VOC's 20
classes and of the background (weiliu89/caffe, examples/convert_model.ipynb; paper, section 3.1).
"""

import collections
import difflib
import logging
import re
from typing import List, Optional, Sequence, Union

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES
from torch import Tensor

__all__ = [
    "carry_rows",
    "dataset_classes",
    "known_classes",
    "match_classes",
    "parse_class_map",
    "same_classes",
]

logger = logging.getLogger(__name__)

# Names of one class in VOC, COCO, Objects365, Open Images, LVIS, BDD, …, misspelt as they are
# there. Only what surely means the same: a pedestrian or a rider isn't any person.
_SYNONYMS = (
    ("airplane", "aeroplane", "plane"),
    ("bicycle", "bike"),
    ("bus", "bus (vehicle)"),
    ("car", "automobile", "car (automobile)"),
    ("cell phone", "cellular phone", "cellular telephone", "mobile phone"),
    ("couch", "sofa"),
    ("dining table", "dinning table", "kitchen & dining room table"),
    ("donut", "doughnut"),
    ("fire hydrant", "fireplug", "hydrant"),
    ("frisbee", "flying disc"),
    ("hair drier", "hair dryer"),
    ("keyboard", "computer keyboard"),
    ("laptop", "laptop computer"),
    ("microwave", "microwave oven"),
    ("motorcycle", "motorbike"),
    ("mouse", "computer mouse", "mouse (computer equipment)"),
    ("orange", "orange (fruit)"),
    ("person", "human"),
    ("refrigerator", "fridge"),
    ("remote", "remote control"),
    ("skis", "ski"),
    ("tie", "necktie"),
    ("train", "train (railroad vehicle)"),
    ("tv", "moniter/tv", "monitor/tv", "television", "television set", "tv monitor", "tv set"),
)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


_FIRST = {_plain(name): _plain(group[0]) for group in _SYNONYMS for name in group}


def _key(name: str) -> str:
    """Equal for names of the same class; "" for no name."""
    return _FIRST.get(_plain(name), _plain(name))


def known_classes(count: int) -> Optional[List[str]]:
    """Class names of weights with ``count`` foreground outputs, for the usual data sets.

    Returns:
        80: COCO's in their contiguous order; 90: COCO's category ids 1-90, "" where an id is
        unused; 20: VOC's in alphabetical order; else None.
    """
    names = {c["id"]: c["name"] for c in COCO_CATEGORIES if c["isthing"]}
    if count == 80:
        return [names[number] for number in sorted(names)]
    if count == 90:
        return [names.get(number, "") for number in range(1, 91)]
    return list(VOC_CLASSES) if count == 20 else None


def dataset_classes(name: str, read: bool = False) -> Optional[List[str]]:
    """``thing_classes`` of a data set.

    Args:
        read: reads a registered data set whose names aren't known before.

    Returns:
        None if it has no names, or can't be read.
    """
    known = MetadataCatalog.get(name).get("thing_classes") if name in MetadataCatalog else None
    if known is None and read and name in DatasetCatalog:
        try:
            DatasetCatalog.get(name)
        except Exception as error:  # its files may be elsewhere, its function may be anyone's
            logger.info("No class names of %s: %s", name, error)
        known = MetadataCatalog.get(name).get("thing_classes")
    return list(known) if known else None


def same_classes(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether two lists name the same classes in the same order, see :func:`match_classes`."""
    count = collections.Counter(map(_key, first))
    return len(first) == len(second) and all(
        a == b or (_key(a) == _key(b) and count[_key(a)] == 1) for a, b in zip(first, second)
    )


def match_classes(source: Sequence[str], target: Sequence[str]) -> List[int]:
    """For each target class the number of the source class of the same name, or -1.

    If there is none, the first one whose name differs by case, spaces, underscores and hyphens
    only, or is a synonym ("sofa", "couch"). "" never matches. Two target classes may have the same
    source class.

    Returns:
        one number for each target class; empty without targets.
    """
    exact, alike = {}, {}
    for number, name in enumerate(source):
        if _key(name):
            exact.setdefault(name, number)
            alike.setdefault(_key(name), number)
    return [exact.get(name, alike.get(_key(name), -1)) for name in target]


def carry_rows(value: Tensor, fresh: Tensor, num_anchors: int, rows: Sequence[int]) -> Tensor:
    """A confidence layer's weights or biases for other classes than it was trained on.

    The background's row is always carried. So carried classes and the background keep their logits
    exactly, and with them their order; their probabilities grow by what the softmax loses in other
    classes, as in the authors' conversion.

    Args:
        value: (A * (Ks + 1), …), the file's, background last.
        fresh: (A * (Kt + 1), …), the model's own initial values, background last.
        num_anchors: A, default boxes per cell.
        rows: for each of the Kt target classes its source class in [0, Ks), or -1.

    Returns:
        (A * (Kt + 1), …) of ``fresh``'s dtype and device: target class t has the source's row
        ``rows[t]``, or the fresh one where that is -1. Neither input is changed.

    Raises:
        ValueError: if the shapes don't fit together, or a row is out of range.
    """
    num_source, rest = divmod(len(value) if value.dim() else 0, num_anchors)
    num_source -= 1
    if (
        rest
        or num_source < 0
        or value.shape[1:] != fresh.shape[1:]
        or len(fresh) != num_anchors * (len(rows) + 1)
    ):
        raise ValueError(
            f"a confidence layer of shape {tuple(value.shape)} can't be carried to one of shape "
            f"{tuple(fresh.shape)} with {num_anchors} default boxes per cell and {len(rows)} "
            "classes: expected equal shapes but for the first dimension, default boxes times "
            "(classes + 1)"
        )
    if outside := [row for row in rows if not -1 <= row < num_source]:
        raise ValueError(f"source class {outside[0]}, expected -1 or 0 to {num_source - 1}")
    source = torch.tensor([*rows, num_source], device=fresh.device)
    known = source >= 0
    result = fresh.unflatten(0, (num_anchors, -1)).clone()
    result[:, known] = value.to(result).unflatten(0, (num_anchors, -1))[:, source[known]]
    return result.flatten(0, 1)


def parse_class_map(
    class_map: Sequence[Union[int, str]],
    source: Optional[Sequence[str]],
    num_source: int,
    num_target: int,
) -> List[int]:
    """``MODEL.SSD.CLASS_MAP``, as given in a config, as rows for :func:`carry_rows`.

    Args:
        class_map: for each target class the source class's number (from 0, without background),
            its name (compared as in :func:`match_classes`), or -1 or "" to start fresh.
        source: names of the ``num_source`` classes of the weights, or None if not known.
        num_target: ``MODEL.SSD.NUM_CLASSES``.

    Returns:
        ``num_target`` numbers in [-1, num_source).

    Raises:
        ValueError: names ``MODEL.SSD.CLASS_MAP``, the entry, and what is expected.
    """
    if len(class_map) != num_target:
        raise ValueError(
            f"MODEL.SSD.CLASS_MAP has {len(class_map)} entries, expected {num_target}: one for "
            "each of MODEL.SSD.NUM_CLASSES"
        )
    return [
        _row(entry, f"MODEL.SSD.CLASS_MAP[{number}] is {entry!r}", source, num_source)
        for number, entry in enumerate(class_map)
    ]


def _row(entry, found: str, source: Optional[Sequence[str]], num_source: int) -> int:
    numbers, hint = f"a number from 0 to {num_source - 1}, or -1 for a fresh class", ""
    if isinstance(entry, str):
        if entry == "":
            return -1
        if source is None:
            raise ValueError(
                f"{found}, but the names of the {num_source} classes of MODEL.WEIGHTS aren't "
                f"known: expected {numbers}"
            )
        (row,) = match_classes(source, [entry])
        if row >= 0:
            return row
        names = {name.casefold(): name for name in source if name}
        if nearest := difflib.get_close_matches(entry.casefold(), names, n=1):
            hint = f" (did you mean {names[nearest[0]]!r}?)"
    # YAML reads an unquoted no, off or yes as a bool, which Python counts as a number
    elif isinstance(entry, int) and not isinstance(entry, bool) and -1 <= entry < num_source:
        return entry
    raise ValueError(f"{found}{hint}, expected the name of a class of MODEL.WEIGHTS, {numbers}")
