"""OUTPUT_DIR/README.md: what was trained or evaluated, with what, how long, and the results."""

import json
import logging
import os
import platform
import shlex
import sys
from datetime import timedelta
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import detectron2
import torch
import torchvision
from detectron2.data import DatasetCatalog
from detectron2.utils import comm

from ssd.data.loader import num_images

__all__ = ["holds_training", "write_summary"]

logger = logging.getLogger(__name__)


def holds_training(folder: str) -> bool:
    """Whether OUTPUT_DIR is a training's, whose records an evaluation leaves alone."""
    signs = [os.path.join(folder, name) for name in ("last_checkpoint", "metrics.json")]
    return any(os.path.isfile(path) and os.path.getsize(path) for path in signs)


def write_summary(cfg, results: Dict, trainer=None) -> Optional[str]:
    """Writes OUTPUT_DIR/README.md: model, data, command, schedule, time, machine, results.

    In a training's folder an evaluation writes nothing.

    Args:
        results: of ``Trainer.train`` or ``Trainer.test``, by task or by data set and task.
        trainer: the :class:`Trainer` after its training; None: an evaluation.

    Returns:
        the file's name, or None if it was left alone.
    """
    path = os.path.join(cfg.OUTPUT_DIR, "README.md")
    if trainer is None and holds_training(cfg.OUTPUT_DIR):
        return None
    tests = ", ".join(_with_size(name) for name in cfg.DATASETS.TEST)
    facts = [("command", f"`{shlex.join(sys.argv)}`"), ("config", "config.yaml beside this file")]
    facts += [("model", _model(cfg))]
    if trainer:
        title = f"# Training on {', '.join(cfg.DATASETS.TRAIN)}"
        facts += _training(trainer)
    else:
        title = f"# Evaluation on {', '.join(cfg.DATASETS.TEST)}"
        facts += [("weights", f"`{cfg.MODEL.WEIGHTS}`")]
    facts += [("evaluated on", tests), ("machine", _machine(cfg)), ("versions", _versions())]
    lines = [title, "", *_table(["", ""], facts)]
    for name, metrics in _tasks(results):
        lines += ["", f"## {name}", "", *_metrics(metrics)]
    with open(path, "w") as file:
        file.write("\n".join(lines) + "\n")
    logger.info("Wrote the results to %s", path)
    return path


def _model(cfg) -> str:
    ssd = cfg.MODEL.SSD
    height, width = ssd.INPUT_SIZE
    return f"SSD on {ssd.BOTTOM_UP}, input {width}x{height}, {ssd.NUM_CLASSES} classes"


def _training(trainer) -> List[Tuple[str, str]]:
    cfg = trainer.cfg
    images = num_images(trainer.data_loader)
    batch = cfg.SOLVER.IMS_PER_BATCH
    time = str(timedelta(seconds=round(trainer.seconds)))
    if trainer.start_iter:
        time += f" for those from {trainer.start_iter} on, after a resume"
    count = max(trainer.start_iter, trainer.max_iter)  # a resume may find more than MAX_ITER
    iterations, trained_on = f"{count} of batch {batch}", ", ".join(cfg.DATASETS.TRAIN)
    if images:
        iterations += f" (epochs: {count * batch / images:.1f})"
        trained_on += f" ({images} images)"
    if trainer.max_iter < cfg.SOLVER.MAX_ITER:
        iterations += f", stopped early; planned: {cfg.SOLVER.MAX_ITER}"
    facts = [
        ("trained on", trained_on),
        ("started from", f"`{cfg.MODEL.WEIGHTS}`" if cfg.MODEL.WEIGHTS else "random weights"),
        ("iterations", iterations),
        ("learning rate", f"{cfg.SOLVER.BASE_LR:g}, {cfg.SOLVER.LR_SCHEDULER_NAME}"),
        ("time with evaluations", time),
    ]
    path = os.path.join(cfg.OUTPUT_DIR, "model_best.json")
    if cfg.TEST.BEST_METRIC and os.path.isfile(path):
        with open(path) as file:
            best = json.load(file)
        text = f"model_best.pth: {best['metric']} {best['value']:.2f}"
        facts.append(("best checkpoint", f"{text}, iteration {best['iteration']}"))
    average = ", the averaged weights (SOLVER.EMA)" if cfg.SOLVER.EMA.ENABLED else ""
    return [*facts, ("results below are of", f"model_final.pth{average}")]


def _with_size(name: str) -> str:
    return f"{name} ({len(DatasetCatalog.get(name))} images)"


def _machine(cfg) -> str:
    processes = comm.get_world_size()
    if cfg.MODEL.DEVICE.startswith("cuda"):
        return f"{processes} × {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    return f"CPU, {name}, {os.cpu_count()} cores, processes: {processes}"


def _versions() -> str:
    modules = (torch, torchvision, detectron2)
    versions = [f"{module.__name__} {module.__version__}" for module in modules]
    return ", ".join([f"Python {platform.python_version()}", *versions])


def _tasks(results: Dict, path: Sequence[str] = ()) -> Iterator[Tuple[str, Dict[str, float]]]:
    """(title, metrics) of each task, for results by task or by data set and task."""
    if results and all(isinstance(value, dict) for value in results.values()):
        for name, value in results.items():
            yield from _tasks(value, (*path, name))
    elif results:
        yield ", ".join(path), results


def _metrics(metrics: Dict[str, float]) -> List[str]:
    """A table of the metrics, and one of those by class ("AP-<class>", "AP50-<class>" …)."""
    whole = {key: value for key, value in metrics.items() if "-" not in key}
    by_class: Dict[str, Dict[str, float]] = {}
    for key in metrics.keys() - whole.keys():
        metric, name = key.split("-", 1)
        by_class.setdefault(name, {})[metric] = metrics[key]
    lines = _table(list(whole), [[_number(value) for value in whole.values()]])
    if by_class:
        columns = sorted({metric for values in by_class.values() for metric in values})
        rows = [
            [name, *(_number(values.get(metric, float("nan"))) for metric in columns)]
            for name, values in sorted(by_class.items())
        ]
        lines += ["", *_table(["class", *columns], rows)]
    return lines


def _number(value: float) -> str:
    return "–" if value != value else f"{value:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    rows = [[str(cell).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]
