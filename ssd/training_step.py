"""One iteration of training: mixed precision on any device, and losses that are checked."""

import logging
import math
import time
from typing import Dict, List, Optional

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor

from ssd.memory import keep_freed_memory

__all__ = ["TrainingStep", "check_finite"]


logger = logging.getLogger(__name__)

# Of a parameter group; the others are the optimizer's state, "lr" is the schedule's.
_OWN = ("initial_lr", "weight_decay", "momentum", "dampening", "nesterov", "foreach", "fused")


class TrainingStep(SimpleTrainer):
    """SimpleTrainer with automatic mixed precision on any device, and a check of the losses.

    On CPUs losses are checked before the update. On GPUs the host would have to wait for them: so a
    non-finite loss masks its own update on the device, and is reported a step later.
    """

    def __init__(
        self, model, data_loader, optimizer, amp_dtype: Optional[str] = None, late: bool = False
    ):
        """
        Args:
            amp_dtype: "bfloat16" or "float16" (with loss scaling, CUDA only); None: float32.
            late: report losses a step later; needs an optimizer with ``fused=True``.
        """
        super().__init__(model, data_loader, optimizer)
        self.device = next(model.parameters()).device.type
        if self.device == "cpu":
            keep_freed_memory()
        if amp_dtype not in (None, "bfloat16", "float16"):
            raise ValueError(f"SOLVER.AMP.DTYPE: 'bfloat16' or 'float16', got {amp_dtype!r}")
        if amp_dtype == "float16" and self.device != "cuda":
            raise ValueError(f"SOLVER.AMP.DTYPE float16 needs CUDA, MODEL.DEVICE is {self.device}")
        self.amp_dtype = getattr(torch, amp_dtype) if amp_dtype else None
        self.grad_scaler = torch.amp.GradScaler(enabled=amp_dtype == "float16")
        self._late = late
        self._unreported = None
        self.batch: List[Dict] = []  # of the last step; empty if the loader failed

    def run_step(self) -> None:
        start = time.perf_counter()
        self.batch = []
        self.batch = data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        with torch.autocast(self.device, self.amp_dtype, enabled=self.amp_dtype is not None):
            losses = self.model(data)
        self.grad_scaler.scale(sum(losses.values())).backward()
        report = _LossReport(losses, self.iter, data_time, data)
        if self._late:
            report, self._unreported = self._unreported, report
            if not self.grad_scaler.is_enabled():  # it masks gradients that aren't finite
                self.optimizer.found_inf = self._unreported.is_not_finite()
        if report:
            self._write(report)
        if self.grad_scaler.is_enabled():
            # a fused optimizer would do so itself, but after SOLVER.CLIP_GRADIENTS
            self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def flush(self) -> None:
        """Reports the last step's losses, if they are late."""
        report, self._unreported = self._unreported, None
        if report:
            self._write(report)

    def _write(self, report: "_LossReport") -> None:
        losses = report.values()
        check_finite(losses, report.iteration, report.files)
        self._write_metrics(losses, report.data_time, iter=report.iteration)

    def state_dict(self) -> Dict:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: Dict) -> None:
        # the config's values count, and which kernels run here, not those of the run that saved
        owns = [{k: x for k, x in g.items() if k in _OWN} for g in self.optimizer.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.optimizer.param_groups, owns):
            for key in ("weight_decay", "momentum"):
                if key in own and key in group and group[key] != own[key]:
                    logger.info("%s is %g, before the resume %g", key, own[key], group[key])
            group.update(own)
        for parameter, state in self.optimizer.state.items():
            if (momentum := state.get("momentum_buffer")) is not None:
                # a fused optimizer needs it in the parameter's memory format (CHANNELS_LAST)
                state["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
        if scale := state_dict.get("grad_scaler"):  # empty if it wasn't float16
            self.grad_scaler.load_state_dict(scale)


class _LossReport:
    """A step's losses on their way to the host."""

    def __init__(self, losses: Dict[str, Tensor], iteration: int, data_time: float, data: List):
        self._names = list(losses)
        self._on_device = torch.stack([value.detach() for value in losses.values()])
        self.iteration, self.data_time = iteration, data_time
        self.files = [x.get("file_name") for x in data]
        self._copied = None
        if self._on_device.is_cuda:
            self._on_host = torch.empty_like(self._on_device, device="cpu", pin_memory=True)
            self._on_host.copy_(self._on_device, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._on_device.device))

    def values(self) -> Dict[str, Tensor]:
        if self._copied is None:
            return dict(zip(self._names, self._on_device))
        self._copied.synchronize()
        return dict(zip(self._names, self._on_host))

    def is_not_finite(self) -> Tensor:
        """1.0 or 0.0 on the device, the same in all processes; a fused optimizer skips a 1.0."""
        flag = 1 - self._on_device.isfinite().all().float()
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return flag


def check_finite(losses: Dict[str, Tensor], iteration: int, files: List[str]) -> None:
    """FloatingPointError with every term, the iteration and the files, if one isn't finite."""
    values = {name: value.item() for name, value in losses.items()}
    if not all(map(math.isfinite, values.values())):
        raise FloatingPointError(
            f"loss is not finite at iteration {iteration}: {values}; batch: "
            f"{', '.join(map(str, files))}. "
            "Lower SOLVER.BASE_LR or raise SOLVER.WARMUP_ITERS if the images are fine."
        )
