#!/usr/bin/env python
"""Makes a training file of ours ready to publish: publish.py IN OUT_PREFIX

Writes OUT_PREFIX-xxxxxxxx.pth, only the weights and the class names, where xxxxxxxx are the first
digits of the file's SHA-256, and beside it OUT_PREFIX-xxxxxxxx.json, the metrics of the evaluation
that belongs to IN: that of IN's iteration in metrics.json. Equal weights give an equal file.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import sys
from typing import Any, Dict, Optional

from ssd.checkpoint.checkpointer import write_atomically
from ssd.checkpoint.convert import Detector, encode, read_ours, write_as
from ssd.metrics import read_metrics

HASH_DIGITS = 8  # as in PyTorch's and MMDetection's published names


def last_evaluation(path: str, iteration: Optional[int] = None) -> Dict[str, Any]:
    """An evaluation in Detectron2's ``metrics.json``: "iteration", "bbox/AP", …

    Args:
        iteration: of the weights. None: unknown, the last evaluation is taken.

    Returns:
        {} if there is none; None for values that aren't numbers, such as a missing class's AP.
    """
    found: Dict[str, Any] = {}
    for record in read_metrics(path)[0]:
        # the evaluation after the last step is one iteration later
        fits = iteration is None or record["iteration"] in (iteration, iteration + 1)
        metrics = {k: x for k, x in record.items() if "/" in k and k.split("/")[0] != "validation"}
        if fits and metrics:
            found = {"iteration": record["iteration"], **metrics}
    return {k: None if isinstance(x, float) and math.isnan(x) else x for k, x in found.items()}


def publish(source: str, prefix: str, metrics: Optional[str] = None, averaged: bool = False) -> str:
    """Writes the files and returns the weights' path."""
    detector = read_ours(source, averaged=averaged)
    if detector.lineage.key != "detectron2":
        raise ValueError(
            f"{source} is {detector.lineage.title}; first: convert.py {source} OUT --to detectron2"
        )
    values = _metrics_of(detector, metrics, os.path.join(os.path.dirname(source), "metrics.json"))
    content = encode(write_as(detector, "detectron2"))
    base = f"{prefix}-{hashlib.sha256(content).hexdigest()[:HASH_DIGITS]}"
    write_atomically(f"{base}.pth", lambda file: file.write(content))
    print(f"Wrote {base}.pth")
    if values:
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        write_atomically(f"{base}.json", lambda file: file.write(text.encode()))
        print(f"Wrote {base}.json, metrics of iteration {values.get('iteration')}")
    return f"{base}.pth"


def _metrics_of(detector: Detector, given: Optional[str], beside: str) -> Dict[str, Any]:
    """Of the file given, or of the training's; says if there are none."""
    path = given or beside
    if not given and not os.path.isfile(path):
        print(f"No metrics: there is no {path} (--metrics)")
        return {}
    if not given and "ema" in detector.rest:  # they are what a training evaluates
        print(f"No metrics: those in {path} are of the averaged weights (--ema)")
        return {}
    iteration = detector.rest.get("iteration")
    values = last_evaluation(path, iteration if isinstance(iteration, int) else None)
    if not values:
        print(f"No metrics: {path} has no evaluation of these weights")
    return values


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN")
    parser.add_argument("prefix", metavar="OUT_PREFIX")
    parser.add_argument("--ema", action="store_true", help="publish the averaged weights")
    parser.add_argument("--metrics", metavar="FILE", help="default: metrics.json beside IN")
    args = parser.parse_args(argv)
    try:
        publish(args.source, args.prefix, args.metrics, args.ema)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    main()
