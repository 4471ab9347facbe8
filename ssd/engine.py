"""Training and evaluation: Detectron2's DefaultTrainer with what SSD's recipes need."""

import inspect
import logging
import math
import os
import signal
import time
import weakref
from typing import Callable, Dict, List

import cv2
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
    default_argument_parser,
    default_setup,
)
from detectron2.engine import launch as launch_processes
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from detectron2.utils.visualizer import Visualizer
from torch import Tensor, nn

from ssd import model_zoo
from ssd.checkpoint import SSDCheckpointer
from ssd.config import load_config
from ssd.data.datasets import check_class_count
from ssd.data.loader import build_test_loader, build_train_loader
from ssd.data.mapper import read_image
from ssd.evaluation import build_evaluator
from ssd.hooks import BestCheckpoint, GracefulStop, WeightAverage
from ssd.inference import compile_network, optimize
from ssd.memory import keep_freed_memory
from ssd.solver import build_lr_scheduler, schedule_in_iterations

__all__ = ["Trainer", "argument_parser", "draw_detections", "launch", "setup"]

logger = logging.getLogger(__name__)


def argument_parser():
    """Detectron2's standard arguments, with a free port so that two runs don't collide."""
    parser = default_argument_parser()
    parser.set_defaults(dist_url="auto")
    return parser


def launch(main: Callable, args) -> None:
    """Runs ``main(args)`` in ``--num-gpus`` processes per machine, or as a process of ``torchrun``.

    Processes use NCCL on GPUs and gloo without.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _join_torchrun()
        main(args)
        return
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ValueError("--num-machines > 1 needs --dist-url tcp://MACHINE0:PORT, got 'auto'")
    if args.num_gpus > 1 and torch.cuda.is_available():
        if args.num_gpus > (found := torch.cuda.device_count()):
            raise ValueError(f"--num-gpus {args.num_gpus}, but this machine has {found} GPUs")
    if args.num_gpus * args.num_machines > 1:
        # the processes handle Ctrl-C themselves; this one waits for them
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        launch_processes(
            _run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args),
        )
    except torch.multiprocessing.ProcessExitedException as error:
        if error.exit_code not in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise
        raise SystemExit(error.exit_code) from None


def _run(main: Callable, args) -> None:
    if comm.get_world_size() > 1:  # otherwise Ctrl-C is ignored, as in the launching process
        signal.signal(signal.SIGINT, _exit_at_once)
    main(args)


def _exit_at_once(number: int, frame) -> None:
    raise SystemExit(128 + number)


def _join_torchrun() -> None:
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if has_gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()


def setup(args):
    """The config of the command line's arguments; logs it and the environment.

    ``MODEL.WEIGHTS zoo://NAME`` without ``--config-file`` brings the config of these weights.

    Raises:
        OSError: ``OUTPUT_DIR`` can't be written.
        See also :func:`load_config`.
    """
    weights = dict(zip(args.opts[::2], args.opts[1::2])).get("MODEL.WEIGHTS", "")
    if weights.startswith(model_zoo.PREFIX) and not args.config_file:
        name = weights.removeprefix(model_zoo.PREFIX)
        cfg = model_zoo.get_config(name, trained=True, opts=args.opts)
        cfg.freeze()
    else:
        cfg = load_config(args.config_file, args.opts)
    _check_output_dir(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="ssd")
    default_setup(cfg, args)
    return cfg


def _check_output_dir(folder: str) -> None:
    path = os.path.join(folder, f".writable.{os.getpid()}")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(path, "w"):
            pass
        os.remove(path)
    except OSError as error:
        raise type(error)(f"OUTPUT_DIR {folder!r} can't be written: {error}") from None


class Trainer(DefaultTrainer):
    """DefaultTrainer with our loaders, checkpoints, evaluators and training step.

    Like every DefaultTrainer it is steered by the config; ``resume_or_load()``, then ``train()``.

    Attributes:
        cfg: the given one with the learning rate, MAX_ITER and STEPS that follow from it and from
            the size of the training set.
    """

    def __init__(self, cfg):
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        cfg = _scale_learning_rate(cfg)
        data_loader = self.build_train_loader(cfg)
        cfg = schedule_in_iterations(cfg, data_loader.dataset.num_images)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        ema = cfg.SOLVER.EMA
        self._average = WeightAverage(model, ema.DECAY) if ema.ENABLED else None
        if cfg.MODEL.COMPILE:
            compile_network(model)
        # not given, Detectron2 would pass device ids, which fails on CPUs
        kwargs = {} if model.device.type == "cuda" else {"device_ids": None}
        model = create_ddp_model(model, broadcast_buffers=False, **kwargs)
        self._trainer = TrainingStep(
            model, data_loader, optimizer,
            amp_dtype=cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else "",
            late=optimizer.defaults.get("fused", False),
        )  # fmt: skip
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SSDCheckpointer(
            model, cfg.OUTPUT_DIR, cfg=cfg, trainer=weakref.proxy(self)
        )
        if self._average:
            self.checkpointer.add_checkpointable("ema", self._average.model)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @property
    def evaluated_model(self) -> nn.Module:
        """What evaluations use: the averaged model with SOLVER.EMA, else the trained one."""
        return self._average.model if self._average else self.model

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        self._trainer.data_loader.sampler.start_iter = self.start_iter

    def after_train(self) -> None:
        if self.iter >= self.max_iter:  # not after a failure
            self._trainer.flush()
        super().after_train()

    @classmethod
    def build_optimizer(cls, cfg, model):
        """Detectron2's SGD, on GPUs as one kernel for all parameters."""
        optimizer = super().build_optimizer(cfg, model)
        has_fused = "fused" in inspect.signature(torch.optim.SGD).parameters  # torch >= 2.3
        if next(model.parameters()).device.type != "cuda" or not has_fused:
            return optimizer
        groups = [
            {k: x for k, x in group.items() if k not in ("foreach", "fused")}
            for group in optimizer.param_groups
        ]
        return type(optimizer)(groups, lr=cfg.SOLVER.BASE_LR, fused=True)

    def build_hooks(self) -> List[HookBase]:
        ret = super().build_hooks()
        if self._average:  # first, for what saves and evaluates after a step

            def evaluate():
                self._last_eval_results = self.test(self.cfg, self.evaluated_model)
                return self._last_eval_results

            period = self.cfg.TEST.EVAL_PERIOD
            ret = [EvalHook(period, evaluate) if isinstance(x, EvalHook) else x for x in ret]
            ret.insert(0, self._average)
        own = [GracefulStop(self.checkpointer)]
        if self.cfg.TEST.BEST_METRIC:
            _check_best_metric(self.cfg)
        if self.cfg.TEST.BEST_METRIC and comm.is_main_process():
            metric, period = self.cfg.TEST.BEST_METRIC, self.cfg.TEST.EVAL_PERIOD
            own.insert(0, BestCheckpoint(period, self.checkpointer, metric))
        at = len(ret) - comm.is_main_process()  # the main process's last hook writes the metrics
        return ret[:at] + own + ret[at:]

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        check_class_count(cfg)
        return super().test(cfg, optimize(model, cfg), evaluators)


def _check_best_metric(cfg) -> None:
    tasks = [{"coco": "bbox/", "voc": "voc/"}.get(name, "") for name in cfg.TEST.EVALUATORS]
    if not any(task in cfg.TEST.BEST_METRIC for task in tasks):
        raise ValueError(
            f"TEST.BEST_METRIC {cfg.TEST.BEST_METRIC!r}: with TEST.EVALUATORS "
            f"{list(cfg.TEST.EVALUATORS)} it contains one of {tasks}"
        )


def _scale_learning_rate(cfg):
    reference = cfg.SOLVER.REFERENCE_IMS_PER_BATCH
    if not reference:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.BASE_LR *= cfg.SOLVER.IMS_PER_BATCH / reference
    cfg.freeze()
    logger.info(
        "Learning rate scaled to %g for a global batch of %d (SOLVER.IMS_PER_BATCH)",
        cfg.SOLVER.BASE_LR,
        cfg.SOLVER.IMS_PER_BATCH,
    )
    return cfg


class TrainingStep(SimpleTrainer):
    """SimpleTrainer with automatic mixed precision on any device, and a check of the losses.

    On CPUs losses are checked before the update. On GPUs the host would have to wait for them: so a
    non-finite loss masks its own update on the device, and is reported a step later.
    """

    def __init__(self, model, data_loader, optimizer, amp_dtype: str = "", late: bool = False):
        """
        Args:
            amp_dtype: "bfloat16", "float16" (with loss scaling, CUDA only), or "" for none.
            late: report losses a step later; needs an optimizer with ``fused=True``.
        """
        super().__init__(model, data_loader, optimizer)
        self.device = next(model.parameters()).device.type
        if self.device == "cpu":
            keep_freed_memory()
        if amp_dtype not in ("", "bfloat16", "float16"):
            raise ValueError(f"SOLVER.AMP.DTYPE: 'bfloat16' or 'float16', got {amp_dtype!r}")
        if amp_dtype == "float16" and self.device != "cuda":
            raise ValueError(f"SOLVER.AMP.DTYPE float16 needs CUDA, MODEL.DEVICE is {self.device}")
        self.amp_dtype = getattr(torch, amp_dtype) if amp_dtype else None
        scaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)  # before torch 2.3
        self.grad_scaler = scaler(enabled=amp_dtype == "float16")
        self._late = late
        self._unreported = None

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        with torch.autocast(self.device, self.amp_dtype, enabled=self.amp_dtype is not None):
            losses = self.model(data)
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        report = _LossReport(losses, self.iter, data_time, data)
        if self._late:
            report, self._unreported = self._unreported, report
            if not self.grad_scaler.is_enabled():  # it masks what isn't finite, too
                self.optimizer.found_inf = self._unreported.is_not_finite()
        if report:
            self._write(report)
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
        # which kernels run is this machine's choice, not that of the one that saved
        kernels = [{k: x.get(k) for k in ("foreach", "fused")} for x in self.optimizer.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.optimizer.param_groups, kernels):
            group.update(own)
        self.grad_scaler.load_state_dict(state_dict.get("grad_scaler", {}))


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
            self._copied.record()

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
    values = {name: float(value) for name, value in losses.items()}
    if not all(map(math.isfinite, values.values())):
        raise FloatingPointError(
            f"loss is not finite at iteration {iteration}: {values}; batch: "
            f"{', '.join(map(str, files))}. "
            "Lower SOLVER.BASE_LR or raise SOLVER.WARMUP_ITERS if the images are fine."
        )


def draw_detections(cfg, model, score_thresh: float = 0.5) -> List[str]:
    """Writes pictures of ``TEST.VIS_IMAGES`` images of each test set to OUTPUT_DIR/detections.

    The images are spread evenly over the set. Returns the files' names.
    """
    paths = []
    for name in cfg.DATASETS.TEST:
        folder = os.path.join(cfg.OUTPUT_DIR, "detections", name)
        os.makedirs(folder, exist_ok=True)
        loader = build_test_loader(cfg, name)
        dataset = loader.dataset
        count = min(cfg.TEST.VIS_IMAGES, len(dataset))
        model.eval()
        for index in range(count):
            sample = dataset[index * len(dataset) // count]
            with torch.no_grad():
                instances = model([sample])[0]["instances"].to("cpu")
            instances = instances[instances.scores > score_thresh]
            image = read_image(sample["file_name"], "RGB")
            picture = Visualizer(image, MetadataCatalog.get(name)).draw_instance_predictions(
                instances
            )
            stem = os.path.splitext(os.path.basename(sample["file_name"]))[0]
            paths.append(os.path.join(folder, f"{stem}.jpg"))
            cv2.imwrite(paths[-1], picture.get_image()[:, :, ::-1])
    logger.info("Wrote %d pictures of detections to %s/detections", len(paths), cfg.OUTPUT_DIR)
    return paths
