#!/usr/bin/env python
"""Renames an SSD of MMDetection before 2.14: upgrade_ssd_version.py OLD_MODEL_PATH NEW_MODEL_PATH

As MMDetection's script of that name: the parameters get the names since 2.14, and what else the
file holds is kept. Unlike there, the optimizer's parameters get the new model's order, so that
training can be resumed, and a file of 1.x gets the background's outputs last. The file is read as
data only: entries of other packages' types can't be kept and are named.
"""

import argparse
import logging
import os
import sys
from typing import Any, Dict, List, Tuple

import torch

from ssd.checkpoint import mmdet
from ssd.checkpoint.checkpointer import write_atomically
from ssd.checkpoint.convert import encode
from ssd.checkpoint.files import read_file
from ssd.checkpoint.lineage import State
from ssd.checkpoint.recognition import recognise, unwrap

logger = logging.getLogger("upgrade_ssd_version")

_PLAIN = (type(None), bool, int, float, str, bytes, torch.Tensor, torch.Size, torch.dtype)
_NOTHING = object()
# In which the modules of the new model stand.
_ORDER = ("backbone.", "neck.l2_norm.", "neck.extra_layers.", "bbox_head.cls", "bbox_head.reg")


def upgrade(data: Dict[str, Any], path: str) -> Dict[str, Any]:
    """What an old file holds, as a new one does.

    Raises:
        ValueError: no SSD of MMDetection's, or it has the new names already.
    """
    state = data.get("state_dict", data)
    if not (isinstance(state, dict) and state) or not all(
        isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in state.items()
    ):
        raise ValueError(f"{path} holds no dictionary of weights")
    state, meta = unwrap(state), data.get("meta")
    lineage = recognise(state, meta if isinstance(meta, dict) else {})
    if lineage in (mmdet.VGG, mmdet.MOBILENETV2):
        raise ValueError(f"{path} has the names since 2.14 already")
    if lineage is None or lineage.key != mmdet.OLD.key:
        found = lineage.title if lineage else f"of {', '.join(list(state)[:4])}"
        raise ValueError(f"{path} is not an SSD of MMDetection before 2.14: it is {found}")
    new, names = _rename(state, lineage)
    if "state_dict" not in data:
        return new
    result = {**data, "state_dict": new}
    if isinstance(optimizer := data.get("optimizer"), dict):
        if lineage.background_first:  # and the rows of its momentum haven't
            logger.warning("left out optimizer: the outputs of the classes have moved")
            del result["optimizer"]
        else:
            result["optimizer"] = _reorder(optimizer, list(names), list(new), names)
    return result


def _rename(state: State, lineage) -> Tuple[State, Dict[str, str]]:
    """New parameters in the new model's order, and old names, in their order, to new ones."""
    known = {name: x for name, x in state.items() if lineage.our_name(name) != name}
    if other := [name for name in state if name not in known]:
        logger.warning("kept as they are: %s", ", ".join(other))
    new = mmdet.VGG.from_ours(lineage.to_ours(known))
    names = dict(zip(known, new))
    order = sorted(new, key=lambda k: next(i for i, x in enumerate(_ORDER) if k.startswith(x)))
    return {**{name: new[name] for name in order}, **{k: state[k] for k in other}}, names


def _reorder(optimizer: Dict, before: List[str], after: List[str], names: Dict) -> Dict:
    """The optimizer's state, which torch finds by the parameters' order."""
    groups = optimizer.get("param_groups")
    group = groups[0] if isinstance(groups, list) and len(groups) == 1 else None
    if not isinstance(group, dict) or len(group.get("params", ())) != len(before):
        logger.warning("optimizer kept as it is: not one group of all parameters, don't resume")
        return optimizer
    numbers = {names[name]: number for name, number in zip(before, group["params"])}
    params = [numbers[name] for name in after if name in numbers]
    return {**optimizer, "param_groups": [{**group, "params": params}]}


def plain(value: Any, where: str, dropped: List[str]) -> Any:
    """``value`` without what can't be saved again; the names of that are added to ``dropped``.

    Of a list nothing is left out: its places may count. It is dropped as a whole.
    """
    if isinstance(value, dict):
        items = {k: plain(x, f"{where}.{k}" if where else k, dropped) for k, x in value.items()}
        return {k: x for k, x in items.items() if x is not _NOTHING}
    if type(value) in (list, tuple):
        inside: List[str] = []
        items = [plain(x, where, inside) for x in value]
        if not inside:
            return type(value)(items)
    elif type(value) in _PLAIN or isinstance(value, torch.Tensor):
        return value
    dropped.append(where)
    return _NOTHING


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", metavar="OLD_MODEL_PATH")
    parser.add_argument("new", metavar="NEW_MODEL_PATH")
    args = parser.parse_args(argv)
    try:
        if os.path.exists(args.new) and os.path.samefile(args.old, args.new):
            raise ValueError(f"{args.new} is the file to read: choose another name to write")
        dropped = []
        data = plain(upgrade(read_file(args.old), args.old), "", dropped)
        content = encode(data)
        write_atomically(args.new, lambda file: file.write(content))
    except (ValueError, OSError, RecursionError) as error:
        sys.exit(f"error: {error}")
    if dropped:
        logger.warning("left out, of types that are no plain data: %s", ", ".join(dropped))
    print(f"Wrote the names since 2.14 to {args.new}")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    main()
