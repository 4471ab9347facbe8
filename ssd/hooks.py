"""Hooks that Detectron2 lacks: averaged weights, the best checkpoint, a stop that loses nothing."""

import copy
import json
import logging
import math
import os
import signal
import threading
from typing import Dict

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from ssd.checkpoint import SSDCheckpointer

__all__ = ["BestCheckpoint", "GracefulStop", "WeightAverage"]

logger = logging.getLogger(__name__)


class WeightAverage(HookBase):
    """Exponential moving average of a model's weights, updated after each step.

    BatchNorm's running statistics are averaged like the weights: those of the last few batches
    belong to the last weights, not to weights averaged over thousands of iterations. Counters are
    copied. (torch's AveragedModel averages lists of tensors only from torch 2.1 on, and reads its
    counter on the device.)

    Attributes:
        model: the averaged model, in evaluation mode; valid once the training has begun.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        """
        Args:
            model: the trained model, not wrapped for several processes. Each process averages its
                own, with the same result.
            decay: part of the average that stays in an iteration, at most; after t iterations it
                is (1 + t) / (10 + t) if that is less (TensorFlow's ExponentialMovingAverage).

        Raises:
            ValueError: for a decay outside [0, 1).
        """
        if not 0 <= decay < 1:
            raise ValueError(f"SOLVER.EMA.DECAY must be at least 0 and less than 1, got {decay}")
        self.model = copy.deepcopy(model).eval()
        self._trained, self._decay = model, decay
        self._count = 0

    def before_train(self) -> None:
        if not self._count:  # nothing was resumed
            self.model.load_state_dict(self._trained.state_dict())

    @torch.no_grad()
    def after_step(self) -> None:
        decay = min(self._decay, (1 + self._count) / (10 + self._count))
        values = self._trained.state_dict()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                average.lerp_(values[name], 1 - decay)
            else:
                average.copy_(values[name])
        self._count += 1

    def state_dict(self) -> Dict:
        return {"count": self._count}  # the weights are the checkpoint's "ema"

    def load_state_dict(self, state_dict: Dict) -> None:
        self._count = state_dict["count"]


class BestCheckpoint(HookBase):
    """Keeps ``model_best.pth`` by an evaluation metric, also across a resume.

    Unlike Detectron2's BestCheckpointer it leaves ``last_checkpoint`` alone and remembers the best
    value, in ``model_best.json``.
    """

    def __init__(self, period: int, checkpointer: SSDCheckpointer, metric: str):
        """``metric``: a key of the evaluation, e.g. "bbox/AP50"; higher is better."""
        self._period, self._checkpointer, self._metric = period, checkpointer, metric
        self._path = os.path.join(checkpointer.save_dir, "model_best.json")
        self._best = -math.inf

    def before_train(self) -> None:
        if self.trainer.start_iter > 0 and os.path.isfile(self._path):
            with open(self._path) as file:
                best = json.load(file)
            if best["metric"] == self._metric:
                self._best = best["value"]

    def after_step(self) -> None:
        step = self.trainer.iter + 1
        if self._period > 0 and step % self._period == 0 and step != self.trainer.max_iter:
            self._keep_if_best()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # not after a failure
            self._keep_if_best()

    def _keep_if_best(self) -> None:
        latest = self.trainer.storage.latest()
        if self._metric not in latest:
            raise ValueError(
                f"TEST.BEST_METRIC {self._metric!r} is not evaluated; there are "
                f"{[name for name in latest if '/' in name]}"
            )
        value = float(latest[self._metric][0])
        if value > self._best:  # False for nan
            self._best = value
            iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
            self._checkpointer.save("model_best", tag=False, iteration=iteration)
            with open(self._path, "w") as file:
                json.dump({"metric": self._metric, "value": value, "iteration": iteration}, file)
            logger.info("Best %s so far: %.3f, saved as model_best.pth", self._metric, value)


class GracefulStop(HookBase):
    """On Ctrl-C or SIGTERM finishes the iteration, saves, and exits with 128 + the signal's number.

    A second signal interrupts at once.
    """

    PERIOD = 10  # iterations between agreements, if there are several processes

    def __init__(self, checkpointer: SSDCheckpointer):
        self._checkpointer = checkpointer
        self._signal = 0
        self._handlers: Dict[int, object] = {}

    def before_train(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self._signal = number
        self._restore()
        logger.warning("Stopping after this iteration; once more to stop at once")

    def after_step(self) -> None:
        stop = self._signal
        if comm.get_world_size() > 1:
            due = (self.trainer.iter + 1) % self.PERIOD == 0
            stop = max(comm.all_gather(stop)) if due else 0
        if stop:
            iteration = self.trainer.iter
            self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            logger.info("Stopped after iteration %d; continue with --resume", iteration)
            comm.synchronize()  # the first process to end makes the launcher end the others
            raise SystemExit(128 + stop)

    def after_train(self) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler if callable(handler) else signal.SIG_DFL)
        self._handlers = {}
