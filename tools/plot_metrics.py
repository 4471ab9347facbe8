#!/usr/bin/env python
"""Draws a run's losses and evaluation results: plot_metrics.py OUTPUT/metrics.json PICTURE.png"""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from ssd.metrics import read_metrics  # noqa: E402


def plot(records: list, path: str) -> None:
    """Losses on the left, COCO's AP and AP50 over all classes and by class on the right."""
    points = {}  # of lines with the same iteration the last one counts
    for record in records:
        for name, value in record.items():
            points.setdefault(name, {})[record["iteration"]] = value
    plt.rcParams["text.parse_math"] = False  # class names may hold $
    series = {name: (list(values), list(values.values())) for name, values in points.items()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for name, style in (("loss_cls", "-"), ("loss_box_reg", "--")):
        if name in series:
            left.plot(*series[name], style, label=name)
    left.set(xlabel="iteration", ylabel="loss", ylim=(0, None), title="Training loss")
    names = sorted(name for name in series if name.startswith("bbox/AP50"))
    for name, marker in zip(["bbox/AP", *names], "os^vDPX*" * len(names)):
        if name in series:
            right.plot(*series[name], marker=marker, label=name.removeprefix("bbox/"))
    right.set(xlabel="iteration", ylabel="%", ylim=(0, 100), title="Evaluation")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", help="metrics.json of a run")
    parser.add_argument("picture", help="file to write, e.g. curve.png")
    arguments = parser.parse_args()
    records, _ = read_metrics(arguments.metrics)
    if not records:
        parser.error(f"{arguments.metrics} holds no metrics")
    plot(records, arguments.picture)
