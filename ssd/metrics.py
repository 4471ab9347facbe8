"""Reads OUTPUT_DIR/metrics.json, which Detectron2's JSONWriter appends to."""

import json
from typing import Any, Dict, List, Tuple

__all__ = ["read_metrics"]


def read_metrics(path: str) -> Tuple[List[Dict[str, Any]], int]:
    """What was logged, by iteration: "iteration", "loss_cls", "bbox/AP", ….

    A run logs each value at rising iterations. Where one goes back, a run was resumed or another
    one began in the same folder, and what was logged before of the same or later iterations
    doesn't count.

    Returns:
        the lines, and how many can't be read (one that a killed run has cut off).
    """
    runs: List[List[Dict[str, Any]]] = [[]]
    last: Dict[str, int] = {}  # iteration by name, in the present run
    broken = 0
    with open(path, encoding="utf-8") as file:
        for line in filter(str.strip, file):
            try:
                record = json.loads(line)
                iteration = record["iteration"] + 0
            except (ValueError, KeyError, TypeError):
                broken += 1
                continue
            # lines written together aren't in order
            if any(last.get(name, -1) >= iteration for name in record):
                runs.append([])
                last = {}
            runs[-1].append(record)
            last.update({name: iteration for name in record if name != "iteration"})
    records: List[Dict[str, Any]] = []
    for run in runs:
        first = min((record["iteration"] for record in run), default=0)
        records = [record for record in records if record["iteration"] < first] + run
    return sorted(records, key=lambda record: record["iteration"]), broken
