"""What Detectron2 lacks around a training step: averaged weights, validation losses, the best
checkpoint, early stopping, pictures, Weights & Biases, a stop that loses nothing."""

import copy
import json
import logging
import math
import os
import signal
import threading
import time
from typing import Dict, Iterable, List, Optional

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import inference_context
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage

from ssd.checkpoint import SSDCheckpointer
from ssd.checkpoint.checkpointer import write_atomically
from ssd.drawing import class_name, draw_boxes
from ssd.launch import stop_signals
from ssd.modeling import SSD

__all__ = [
    "BestCheckpoint",
    "EarlyStop",
    "EarlyStopping",
    "Evaluation",
    "GracefulStop",
    "TrainingPictures",
    "WandbWriter",
    "WeightAverage",
    "validation_losses",
]

logger = logging.getLogger(__name__)


class WeightAverage(HookBase):
    """Exponential moving average of a model's weights, updated after each step.

    BatchNorm's running statistics are averaged like the weights: those of the last few batches
    belong to the last weights, not to weights averaged over thousands of iterations. Counters are
    copied. (torch's AveragedModel reads its counter on the device at every update.)

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
        # each once, also if it stands in several places
        averages = {id(x): (k, x) for k, x in self.model.state_dict(keep_vars=True).items()}
        for name, average in averages.values():
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

    Attributes:
        iteration: of the best value so far, from 0; -1 if there is none.
    """

    iteration = -1

    def __init__(self, period: int, checkpointer: SSDCheckpointer, metric: str):
        """``metric``: a key of the evaluation, e.g. "bbox/AP50"; higher is better."""
        self._period, self._checkpointer, self._metric = period, checkpointer, metric
        self._path = os.path.join(checkpointer.save_dir, "model_best.json")
        self._best = -math.inf

    def before_train(self) -> None:
        if not os.path.isfile(self._path):
            return
        if self.trainer.start_iter == 0:
            os.remove(self._path)  # of an earlier training in this folder
            return
        with open(self._path) as file:
            best = json.load(file)
        if best["metric"] == self._metric:
            self._best, self.iteration = best["value"], best["iteration"]

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
            self.iteration = iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
            self._checkpointer.save("model_best", tag=False, iteration=iteration)
            best = {"metric": self._metric, "value": value, "iteration": iteration}
            write_atomically(self._path, lambda file: file.write(json.dumps(best).encode()))
            logger.info("Best %s so far: %.3f, saved as model_best.pth", self._metric, value)


def validation_losses(model: SSD, loader: Iterable[List[Dict]]) -> Dict[str, float]:
    """The losses of a whole data set, in evaluation mode.

    They are divided as in training (``MODEL.SSD.LOSS.NORMALIZER``), but over all images instead of
    a batch's: neither batches nor processes, each with its share of the images, change them.

    Args:
        loader: batches as in training, with ``instances``.

    Returns:
        what :meth:`SSD.losses` gives, ``loss_cls`` and ``loss_box_reg``, and ``total_loss``; 0 each
        without images.
    """
    sums = {"divisor": 0.0}
    with inference_context(model), torch.no_grad():
        for batch in loader:
            features = model.backbone(model.preprocess_image(batch).tensor)
            predictions = model.head([features[name] for name in model.head_in_features])
            losses, divisor = model.losses(predictions, [x["instances"] for x in batch])
            if divisor.dim():  # a mean over images, of losses divided by each image's own
                losses = {name: loss / divisor * len(batch) for name, loss in losses.items()}
                divisor = torch.tensor(len(batch))
            for name, value in {**losses, "divisor": divisor}.items():
                sums[name] = sums.get(name, 0.0) + value.double().sum()
    parts = comm.all_gather({name: float(value) for name, value in sums.items()})
    divisor = max(1.0, sum(part.pop("divisor") for part in parts))
    names = dict.fromkeys(name for part in parts for name in part) or ("loss_cls", "loss_box_reg")
    values = {name: sum(part.get(name, 0.0) for part in parts) / divisor for name in names}
    return {**values, "total_loss": sum(values.values())}


class Evaluation(EvalHook):
    """EvalHook that notes for a resume what is evaluated, as checkpoints are saved before.

    After a failure in the last iteration there is no final evaluation: a process that failed alone
    would wait for the others there, and they for it.
    """

    def after_step(self) -> None:
        super().after_step()
        self.trainer.evaluated = self.trainer.iter + 1

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class EarlyStop(BaseException):
    """Leaves the training loop. No Exception: Detectron2 would log it as a failure."""


class EarlyStopping(HookBase):
    """Ends the training after ``patience`` evaluations in a row without a new best value.

    Then all is done as after the last iteration: final checkpoint, evaluation. The best value and
    its iteration are :class:`BestCheckpoint`'s, which outlive a crash: a resumed run stops where
    the uninterrupted one would. Resuming a run that was stopped trains on only with more patience.
    """

    def __init__(
        self,
        period: int,
        patience: int,
        checkpointer: SSDCheckpointer,
        best: Optional[BestCheckpoint],
    ):
        """
        Args:
            period: iterations between evaluations.
            best: in the main process, which decides for all; its hook comes before this one.
        """
        self._period, self._patience = period, patience
        self._checkpointer, self._best = checkpointer, best
        self._stopped = False

    def before_train(self) -> None:
        if self._stopped:
            self._stop_if_due(self.trainer.start_iter)

    def after_step(self) -> None:
        step = self.trainer.iter + 1
        if step % self._period == 0 and step != self.trainer.max_iter:
            self._stop_if_due(step)

    def _stop_if_due(self, step: int) -> None:
        since = step - (self._best.iteration + 1) if self._best else 0
        evaluations = max(comm.all_gather(math.ceil(since / self._period)))
        self._stopped = evaluations >= self._patience
        if not self._stopped:
            return
        logger.info("Early stop: no new best in the last %d evaluations", evaluations)
        if self.trainer.iter < step:
            self._checkpointer.save("model_final", iteration=self.trainer.iter)
        self.trainer.iter = self.trainer.max_iter = step  # as in the end of a whole training
        raise EarlyStop

    def state_dict(self) -> Dict:
        return {"stopped": True} if self._stopped else {}

    def load_state_dict(self, state_dict: Dict) -> None:
        self._stopped = state_dict["stopped"]


class TrainingPictures(HookBase):
    """Pictures for TensorBoard: what the network gets in training, and what it makes of it.

    Each row is an augmented image of the last batch, on the left with its ground truth, on the
    right with the detections whose score is over ``SCORE``, at most ``DETECTIONS``. Boxes of a
    class have one colour.
    """

    ROWS, WIDTH, GAP = 4, 480, 8  # images, pixels
    SCORE, DETECTIONS = 0.3, 20

    def __init__(self, period: int, model: torch.nn.Module, metadata: Metadata):
        """
        Args:
            period: iterations.
            model: an SSD whose detections are drawn.
            metadata: with ``thing_classes``.
        """
        self._period, self._model, self._metadata = period, model, metadata

    def after_step(self) -> None:
        batch = getattr(self.trainer._trainer, "batch", [])  # a step of one's own may keep none
        if batch and (self.trainer.iter + 1) % self._period == 0:
            picture = self.draw(batch[: self.ROWS])
            self.trainer.storage.put_image("inputs: ground truth, detections", picture)

    def draw(self, batch: List[Dict]) -> np.ndarray:
        """(3, H, W) uint8 RGB picture of a training batch."""
        with inference_context(self._model), torch.no_grad():
            outputs = self._model([{"image": x["image"]} for x in batch])
        rows = []
        for given, output in zip(batch, outputs):
            truth, found = given["instances"], output["instances"].to("cpu")
            found = found[found.scores > self.SCORE][: self.DETECTIONS]
            image = given["image"].permute(1, 2, 0)
            image = convert_image_to_rgb(image, self._model.input_format)
            left = self._draw(image, truth.gt_boxes, truth.gt_classes)
            right = self._draw(image, found.pred_boxes, found.pred_classes, found.scores)
            gap = np.full((len(left), self.GAP, 3), 255, np.uint8)
            row = np.hstack([left, gap, right])
            rows += [row, np.full((self.GAP, row.shape[1], 3), 255, np.uint8)]
        return np.vstack(rows[:-1]).transpose(2, 0, 1)

    def _draw(self, image: np.ndarray, boxes, classes, scores=None) -> np.ndarray:
        classes = classes.tolist()
        labels = [class_name(self._metadata, label) for label in classes]
        if scores is not None:
            labels = [f"{label} {score:.0%}" for label, score in zip(labels, scores.tolist())]
        scale = self.WIDTH / image.shape[1]
        return draw_boxes(image, boxes.tensor.numpy(), classes, labels, scale)


class WandbWriter(EventWriter):
    """Sends a training's scalars and pictures to Weights & Biases, each at its iteration.

    Pictures are taken away by Detectron2's TensorBoard writer, which has to come after this one.
    """

    def __init__(self, folder: str, project: str, name: str, config: Dict):
        """
        Args:
            folder: where W&B keeps its files.
            name: of the run; "": W&B invents one.

        Raises:
            ImportError: without the package wandb.
        """
        try:
            import wandb
        except ImportError:
            raise ImportError("WANDB.ENABLED needs the package wandb: pip install wandb") from None
        self._image, self._last_write = wandb.Image, -1
        self._run = wandb.init(dir=folder, project=project, name=name or None, config=config)

    def write(self) -> None:
        storage = get_event_storage()
        values: Dict[int, Dict] = {}
        for key, (value, iteration) in storage.latest_with_smoothing_hint().items():
            if iteration > self._last_write:
                values.setdefault(iteration, {})[key] = value
        for key, picture, iteration in storage._vis_data:
            values.setdefault(iteration, {})[key] = self._image(picture.transpose(1, 2, 0))
        for iteration in sorted(values):
            self._run.log(values[iteration], step=iteration)
            self._last_write = iteration

    def close(self) -> None:
        self._run.finish()


class GracefulStop(HookBase):
    """On Ctrl-C, SIGTERM or a hangup (its terminal's end, unless nohup) finishes the iteration,
    saves, and exits with 128 + the signal's number.

    A second signal interrupts at once. Within ``ONE_SIGNAL`` seconds it is the same: one to a whole
    job comes from the launching process, too.
    """

    PERIOD = 10  # iterations between agreements, if there are several processes
    ONE_SIGNAL = 1.0

    def __init__(self, checkpointer: SSDCheckpointer):
        self._checkpointer = checkpointer
        self._signal, self._since = 0, 0.0
        self._handlers: Dict[int, object] = {}

    def before_train(self) -> None:
        self._signal = 0  # of an earlier train()
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                self._handlers[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        if not self._signal:
            self._since, self._signal = time.monotonic(), number
            logger.warning("Stopping after this iteration; once more to stop at once")
        elif time.monotonic() - self._since > self.ONE_SIGNAL:
            self._restore()
            signal.raise_signal(number)

    def after_step(self) -> None:
        stop = self._signal
        if comm.get_world_size() > 1:
            due = (self.trainer.iter + 1) % self.PERIOD == 0
            stop = max(comm.all_gather(stop)) if due else 0
        if stop:
            iteration = self.trainer.iter
            self.trainer.flush()
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
