"""Schedules as they are published: in epochs, with their batch, and a warm-up that multiplies."""

import logging
import math
from typing import Optional

import torch
from detectron2.solver import LRMultiplier
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from fvcore.common.param_scheduler import (
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)

from ssd.checks import check_choice, check_number

__all__ = [
    "WarmupTimes",
    "build_lr_scheduler",
    "check_solver",
    "epoch_length",
    "scale_learning_rate",
    "schedule_in_iterations",
]

logger = logging.getLogger(__name__)


def scale_learning_rate(cfg):
    """The config with the BASE_LR of REFERENCE_IMS_PER_BATCH scaled to IMS_PER_BATCH.

    Raises:
        ValueError: REFERENCE_WORLD_SIZE, by which Detectron2 scales it, is set, too.
    """
    reference = cfg.SOLVER.REFERENCE_IMS_PER_BATCH
    if not reference:
        return cfg
    if cfg.SOLVER.REFERENCE_WORLD_SIZE:
        raise ValueError(
            "SOLVER.REFERENCE_WORLD_SIZE and SOLVER.REFERENCE_IMS_PER_BATCH both scale the "
            "learning rate; one of them has to be 0"
        )
    cfg = _with(cfg, BASE_LR=cfg.SOLVER.BASE_LR * (cfg.SOLVER.IMS_PER_BATCH / reference))
    logger.info(
        "Learning rate scaled to %g for a global batch of %d (SOLVER.IMS_PER_BATCH)",
        cfg.SOLVER.BASE_LR,
        cfg.SOLVER.IMS_PER_BATCH,
    )
    return cfg


def epoch_length(num_images: int, repeat: int, ims_per_batch: int) -> int:
    """Iterations of one unit of the schedule: ``repeat`` passes over ``num_images``, rounded up.

    The rule for the last partial batch: MMDetection fills the last batch of a (repeated) epoch up
    from its beginning and so has as many iterations; torchvision drops it and has one less. Here
    there is no partial batch: the loader is a stream of full batches whose passes run into one
    another. A unit is as long as MMDetection's, and the next one begins with the stream's next
    image, up to a batch later than the pass.

    Args:
        num_images: of the training set, those left out by FILTER_EMPTY_ANNOTATIONS not counted.
        ims_per_batch: of all processes together.

    Raises:
        ValueError: if one of them is less than 1.
    """
    if min(num_images, repeat, ims_per_batch) < 1:
        raise ValueError(
            f"{num_images} images, SOLVER.REPEAT_DATASET {repeat} and SOLVER.IMS_PER_BATCH "
            f"{ims_per_batch} must be positive"
        )
    return math.ceil(num_images * repeat / ims_per_batch)


def schedule_in_iterations(cfg, num_images: Optional[int]):
    """The config with MAX_ITER and STEPS that follow from MAX_EPOCHS and STEPS_EPOCHS.

    Epochs are passes over the data, also with REPEAT_DATASET: MMDetection's 24 epochs of a data
    set repeated 5 times are MAX_EPOCHS 120 and REPEAT_DATASET 5, that is 24 units of
    :func:`epoch_length` iterations. Without MAX_EPOCHS the config comes back as it is, but for a
    step in the last iteration.

    Args:
        num_images: see :func:`epoch_length`; None if not known.

    Raises:
        ValueError: MAX_EPOCHS with an unknown number of images, no iteration at all, a number of
            epochs that isn't a multiple of REPEAT_DATASET, steps that don't increase or lie behind
            the end, or another COSINE_STEP than "iteration" or "epoch".
    """
    solver = cfg.SOLVER
    check_choice("SOLVER.COSINE_STEP", solver.COSINE_STEP, ("iteration", "epoch"))
    if not solver.MAX_EPOCHS:
        if solver.MAX_ITER < 1:
            raise ValueError(f"SOLVER.MAX_ITER must be at least 1, got {solver.MAX_ITER}")
        if solver.STEPS_EPOCHS or solver.COSINE_STEP == "epoch":
            logger.warning(
                "SOLVER.STEPS_EPOCHS and COSINE_STEP have no effect while SOLVER.MAX_EPOCHS is 0"
            )
        if solver.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
            return cfg
        steps = [x for x in solver.STEPS if x != solver.MAX_ITER]  # of no effect, but an error
        if any(later <= earlier for earlier, later in zip([0, *steps], steps)):
            raise ValueError(f"SOLVER.STEPS must be positive and increase, got {solver.STEPS}")
        return cfg if len(steps) == len(solver.STEPS) else _with(cfg, STEPS=tuple(steps))
    if num_images is None:
        raise ValueError(
            "SOLVER.MAX_EPOCHS needs ssd's training loader, whose number of images is known: set "
            "SOLVER.MAX_ITER and STEPS instead, and MAX_EPOCHS 0"
        )
    length = epoch_length(num_images, solver.REPEAT_DATASET, solver.IMS_PER_BATCH)
    epochs = [*solver.STEPS_EPOCHS, solver.MAX_EPOCHS]
    if any(later <= earlier for earlier, later in zip([0, *epochs], epochs)) or any(
        epoch % solver.REPEAT_DATASET for epoch in epochs
    ):
        raise ValueError(
            "SOLVER.STEPS_EPOCHS and then SOLVER.MAX_EPOCHS must be increasing positive multiples "
            f"of SOLVER.REPEAT_DATASET {solver.REPEAT_DATASET}, got {list(solver.STEPS_EPOCHS)} "
            f"and {solver.MAX_EPOCHS}"
        )
    *steps, max_iter = (epoch // solver.REPEAT_DATASET * length for epoch in epochs)
    logger.info(
        "%d epochs of %d images are %d iterations (SOLVER.MAX_ITER); SOLVER.STEPS: %s",
        solver.MAX_EPOCHS,
        num_images,
        max_iter,
        tuple(steps),
    )
    return _with(cfg, MAX_ITER=max_iter, STEPS=tuple(steps))


def _with(cfg, **values):
    """A frozen copy with these values in SOLVER."""
    cfg = cfg.clone()
    cfg.SOLVER.update(values)
    cfg.freeze()
    return cfg


class WarmupTimes(ParamScheduler):
    """A schedule, held over every ``hold`` iterations, times a warm-up factor.

    So do MMEngine and torch, whose schedulers each multiply the rate (with an end rate other than
    0 they do so only while the warm-up lies within the first unit). Detectron2's
    WarmupParamScheduler has the warm-up in place of the schedule: it goes straight to the value
    that the schedule has at its end.
    """

    def __init__(
        self,
        schedule: ParamScheduler,
        max_iter: int,
        *,
        hold: int = 1,
        warmup_iters: int = 0,
        warmup_factor: float = 1e-3,
        warmup_method: str = "linear",
    ):
        """
        Args:
            warmup_iters: the first iteration (from 0) without warm-up: 1000 is torch's LinearLR
                with total_iters=1000, 499 MMEngine's with end=500.
            warmup_factor: in iteration 0.
            warmup_method: "linear" up to 1, or "constant".

        Raises:
            ValueError: for another method.
        """
        ramps = {
            "linear": LinearParamScheduler(warmup_factor, 1.0),
            "constant": ConstantParamScheduler(warmup_factor),
        }
        check_choice("SOLVER.WARMUP_METHOD", warmup_method, ramps)
        self._schedule, self._max_iter, self._hold = schedule, max_iter, hold
        self._ramp, self._warmup_iters = ramps[warmup_method], warmup_iters

    def __call__(self, where: float) -> float:
        """The factor of the base rate at ``where`` = iteration / max_iter."""
        iteration = round(where * self._max_iter)
        value = self._schedule(iteration // self._hold * self._hold / self._max_iter)
        if iteration < self._warmup_iters:
            value *= self._ramp(iteration / self._warmup_iters)
        return value


def check_solver(cfg) -> None:
    """The values that would fail late, or train nothing."""
    solver = cfg.SOLVER
    rate, end = solver.BASE_LR, solver.get("BASE_LR_END", 0.0)
    fits_cosine = solver.LR_SCHEDULER_NAME != "WarmupCosineLR" or 0 <= end <= rate > 0
    if not (0 <= rate < math.inf and fits_cosine):
        raise ValueError(
            "SOLVER.BASE_LR must be 0 or more, with WarmupCosineLR more than 0 and at least "
            f"SOLVER.BASE_LR_END, got {rate} and {end}"
        )
    check_number("SOLVER.WARMUP_FACTOR", solver.WARMUP_FACTOR)
    check_number("TEST.EARLY_STOPPING.PATIENCE", cfg.TEST.EARLY_STOPPING.PATIENCE)
    if solver.CHECKPOINT_PERIOD < 1:
        raise ValueError(
            "SOLVER.CHECKPOINT_PERIOD must be at least 1 iteration, got "
            f"{solver.CHECKPOINT_PERIOD}; the last one is always saved"
        )


def build_lr_scheduler(cfg, optimizer: torch.optim.Optimizer):
    """Detectron2's scheduler, or with MAX_EPOCHS the published kind (:class:`WarmupTimes`).

    Args:
        cfg: that of :func:`schedule_in_iterations`.

    Raises:
        ValueError: with MAX_EPOCHS, an LR_SCHEDULER_NAME other than WarmupMultiStepLR and
            WarmupCosineLR, or RESCALE_INTERVAL.
    """
    solver = cfg.SOLVER
    if not solver.MAX_EPOCHS:
        return build_detectron2_lr_scheduler(cfg, optimizer)
    if solver.get("RESCALE_INTERVAL", False):  # not in every Detectron2
        raise ValueError("SOLVER.RESCALE_INTERVAL must be False with SOLVER.MAX_EPOCHS, got True")
    hold = solver.MAX_ITER * solver.REPEAT_DATASET // solver.MAX_EPOCHS  # one unit
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        values = [solver.GAMMA**k for k in range(len(solver.STEPS) + 1)]
        schedule = MultiStepParamScheduler(values, solver.MAX_ITER, list(solver.STEPS))
    elif solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        schedule = CosineParamScheduler(1.0, solver.get("BASE_LR_END", 0.0) / solver.BASE_LR)
        hold = hold if solver.COSINE_STEP == "epoch" else 1
    else:
        raise ValueError(
            "SOLVER.LR_SCHEDULER_NAME: 'WarmupMultiStepLR' or 'WarmupCosineLR' with "
            f"SOLVER.MAX_EPOCHS, got {solver.LR_SCHEDULER_NAME!r}"
        )
    multiplier = WarmupTimes(
        schedule,
        solver.MAX_ITER,
        hold=hold,
        warmup_iters=solver.WARMUP_ITERS,
        warmup_factor=solver.WARMUP_FACTOR,
        warmup_method=solver.WARMUP_METHOD,
    )
    return LRMultiplier(optimizer, multiplier, max_iter=solver.MAX_ITER)
