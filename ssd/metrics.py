"""Reads OUTPUT_DIR/metrics.json, which Detectron2's JSONWriter appends to."""

import json
import os
from typing import Any, Dict, List, Tuple

__all__ = ["START", "end_last_line", "read_metrics"]

START = "start_iter"  # what our Trainer logs first of all


def end_last_line(path: str) -> None:
    """Lets what a killed run has cut off be a line of its own, before more is appended."""
    if os.path.isfile(path) and os.path.getsize(path):
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")


def read_metrics(path: str) -> Tuple[List[Dict[str, Any]], int]:
    """What was logged, by iteration: "iteration", "loss_cls", "bbox/AP", ….

    A run that begins or goes on in the folder of an earlier one takes the place of what that one
    logged from the same iteration on. (Without our Trainer's mark all lines count.)

    Returns:
        the lines, and how many can't be read (one that a killed run has cut off).
    """
    records: List[Dict[str, Any]] = []
    broken = 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in filter(str.strip, file):
            try:
                record = json.loads(line)
                iteration = record["iteration"] + 0
            except (ValueError, KeyError, TypeError):
                broken += 1
                continue
            if START in record:
                records = [x for x in records if x["iteration"] < iteration]
            records.append(record)
    return sorted(records, key=lambda record: record["iteration"]), broken
