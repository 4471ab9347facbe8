"""Hooks that Detectron2 lacks: the best checkpoint across a resume, a stop that loses nothing."""

import json
import logging
import math
import os
import signal
import threading
from typing import Dict

from detectron2.engine import HookBase
from detectron2.utils import comm

from ssd.checkpoint import SSDCheckpointer

__all__ = ["BestCheckpoint", "GracefulStop"]

logger = logging.getLogger(__name__)


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
