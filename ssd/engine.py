"""Training and evaluation: Detectron2's DefaultTrainer with what SSD's recipes need.

The step itself is :mod:`ssd.training_step`, what happens beside it :mod:`ssd.hooks`.
"""

import contextlib
import difflib
import functools
import inspect
import logging
import os
import shutil
import time
import weakref
from typing import IO, Dict, List, Optional

import torch
import yaml
from detectron2.data import MetadataCatalog
from detectron2.data.transforms import AugmentationList
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    TrainerBase,
    create_ddp_model,
    default_setup,
)
from detectron2.engine.hooks import EvalHook, PeriodicWriter
from detectron2.evaluation import inference_on_dataset, print_csv_format, verify_results
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import setup_logger
from torch import nn

from ssd import model_zoo
from ssd.checkpoint import SSDCheckpointer
from ssd.config import load_config
from ssd.data.augmentations import build_augmentation
from ssd.data.datasets import check_class_count
from ssd.data.files import read_image
from ssd.data.loader import RunSampler, build_test_loader, build_train_loader, num_images
from ssd.data.mapper import SSDDatasetMapper
from ssd.drawing import draw_instances, write_image
from ssd.evaluation import build_evaluator, check_records, metric_names
from ssd.hooks import (
    BestCheckpoint,
    EarlyStop,
    EarlyStopping,
    Evaluation,
    GracefulStop,
    TrainingPictures,
    WandbWriter,
    WeightAverage,
    validation_losses,
)
from ssd.inference import compile_network, optimize
from ssd.metrics import START, end_last_line
from ssd.modeling import SSD
from ssd.solver import build_lr_scheduler, check_solver, scale_learning_rate, schedule_in_iterations
from ssd.summary import holds_training
from ssd.test_time_augmentation import SSDWithTTA
from ssd.training_step import TrainingStep

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

__all__ = ["Trainer", "TrainingStep", "draw_detections", "setup"]

logger = logging.getLogger(__name__)


def setup(args):
    """The config of the command line's arguments; logs it and the environment.

    Writes it to OUTPUT_DIR/config.yaml; an evaluation in a training's folder keeps the training's.
    No other process can train there from then until this one's training or process ends.
    ``MODEL.WEIGHTS zoo://NAME`` without ``--config-file`` brings the config of these weights.

    Raises:
        OSError: ``OUTPUT_DIR`` can't be written.
        ValueError: another process is training there.
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
    if not args.eval_only:
        _lock(cfg.OUTPUT_DIR)  # before a file of another one is replaced
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="ssd")
    path, kept = os.path.join(cfg.OUTPUT_DIR, "config.yaml"), ""
    if args.eval_only and comm.is_main_process() and holds_training(cfg.OUTPUT_DIR):
        with contextlib.suppress(FileNotFoundError):
            kept = shutil.copy(path, f"{path}.{os.getpid()}.tmp")
    try:
        default_setup(cfg, args)  # writes config.yaml
    finally:
        if kept:
            os.replace(kept, path)
    if kept:
        logger.info("%s is again that of the training; this evaluation's is above", path)
    return cfg


def _check_output_dir(folder: str) -> None:
    if "://" in folder:
        raise ValueError(f"OUTPUT_DIR must be a folder of this machine, got {folder!r}")
    path = os.path.join(folder, f".writable.{os.getpid()}")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(path, "w"):
            pass
        os.remove(path)
    except OSError as error:
        raise type(error)(f"OUTPUT_DIR {folder!r} can't be written: {error}") from None


_locks: Dict[str, IO] = {}  # by folder; to close another open file of one would end its lock


def _lock(folder: str) -> None:
    """Keeps other processes from training in ``folder`` until :func:`_unlock` or this one's end,
    if its file system can."""
    real = os.path.realpath(folder)
    if fcntl is None or not comm.is_main_process() or real in _locks:
        return
    file = open(os.path.join(real, ".lock"), "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(
            f"OUTPUT_DIR {folder!r}: another process is training there; give this one another"
        ) from None
    except OSError:
        pass
    _locks[real] = file


def _unlock(folder: str) -> None:
    if file := _locks.pop(os.path.realpath(folder), None):
        file.close()


class Trainer(DefaultTrainer):
    """DefaultTrainer with our loaders, checkpoints, evaluators and training step.

    Like every DefaultTrainer it is steered by the config; ``resume_or_load()``, then ``train()``.

    Attributes:
        cfg: the given one with the learning rate, MAX_ITER and STEPS that follow from it and from
            the size of the training set.
        seconds: that the last :meth:`train` took.
        evaluated: the iterations whose evaluations, where due, are done.
    """

    evaluated, seconds = 0, 0.0
    _last_eval_results: Dict = {}  # if build_hooks gives no evaluation

    def __init__(self, cfg):
        TrainerBase.__init__(self)
        _check_output_dir(cfg.OUTPUT_DIR)
        for name in ("detectron2", "ssd"):
            log = logging.getLogger(name)
            if log.level != logging.NOTSET or log.isEnabledFor(logging.INFO):
                continue  # a script has set it up
            if log.hasHandlers():
                log.setLevel(logging.INFO)
            else:
                setup_logger(distributed_rank=comm.get_rank(), name=name)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        cfg = scale_learning_rate(cfg)
        check_solver(cfg)
        data_loader = self.build_train_loader(cfg)
        for name in cfg.DATASETS.TEST:
            self.build_test_loader(cfg, name)  # what is missing shows before the training
            if not (self._overrides("build_evaluator") or self._overrides("test")):
                check_records(cfg, name)
        cfg = schedule_in_iterations(cfg, num_images(data_loader))
        model = self.build_model(cfg)
        frozen = [name for name, x in model.named_parameters() if not x.requires_grad]
        if frozen and not cfg.MODEL.WEIGHTS:
            logger.warning(
                f"MODEL.WEIGHTS is empty, but {len(frozen)} parameters are frozen, {frozen[0]} …, "
                "which stay random unless your code loads them; MODEL.BACKBONE.FREEZE_AT 0 trains "
                "all of a ResNet"
            )
        optimizer = self.build_optimizer(cfg, model)
        ema = cfg.SOLVER.EMA
        self._average = WeightAverage(model, ema.DECAY) if ema.ENABLED else None
        if cfg.MODEL.COMPILE:
            compile_network(model)
        # the model moves its inputs itself; Detectron2's own device ids fail on CPUs
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
        self._trainer = TrainingStep(
            model, data_loader, optimizer,
            amp_dtype=cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else None,
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
        """What evaluations use: the averaged SSD with SOLVER.EMA, else the trained one."""
        return self._average.model if self._average else getattr(self.model, "module", self.model)

    def resume_or_load(self, resume: bool = True) -> None:
        if not resume and comm.is_main_process() and self.checkpointer.has_checkpoint():
            path = os.path.join(self.cfg.OUTPUT_DIR, "last_checkpoint")
            last = os.path.basename(self.checkpointer.get_checkpoint_file())
            logger.warning(
                f"OUTPUT_DIR {self.cfg.OUTPUT_DIR} holds a training, whose files this one writes "
                f"over; another OUTPUT_DIR keeps both. To go on with that one, stop this one, "
                f"write {last} into {path} again and add --resume"
            )
        base_lrs = list(getattr(self.scheduler, "base_lrs", []))  # not all of torch's have them
        super().resume_or_load(resume)
        if base_lrs:
            self._keep_base_lrs(base_lrs)
        sampler = getattr(self._trainer.data_loader, "sampler", None)
        if isinstance(sampler, RunSampler):
            sampler.start_iter = self.start_iter
        elif self.start_iter:
            logger.warning("The training loader isn't ssd's: its samples start anew")

    def _keep_base_lrs(self, base_lrs: List[float]) -> None:
        """After a resume SOLVER.BASE_LR counts, not the rate of the run before."""
        before, self.scheduler.base_lrs = self.scheduler.base_lrs, base_lrs
        if list(before) != base_lrs:
            logger.info("SOLVER.BASE_LR is %g, before the resume %g", base_lrs[0], before[0])
            for group, old, new in zip(self.optimizer.param_groups, before, base_lrs):
                group["lr"] = group["lr"] * new / old if old else new

    def state_dict(self) -> Dict:
        return {**super().state_dict(), "evaluated": self.evaluated}

    def load_state_dict(self, state_dict: Dict) -> None:
        super().load_state_dict(state_dict)
        self.evaluated = state_dict.get("evaluated", 0)

    def before_train(self) -> None:
        # before all else, for ssd.metrics
        self.storage.put_scalar(START, self.start_iter, smoothing_hint=False)
        super().before_train()
        if self.evaluated < self.start_iter < self.max_iter:
            # the run before may have ended in the evaluation after its last step
            self.iter = self.storage.iter = self.start_iter - 1
            for hook in self._hooks:
                if isinstance(hook, (Evaluation, BestCheckpoint, EarlyStopping)):
                    hook.after_step()
            self.iter = self.storage.iter = self.start_iter

    def after_step(self) -> None:
        # nothing is saved or evaluated before the losses of the last step are known to be finite
        step, test = self.iter + 1, self.cfg.TEST
        periods = self.cfg.SOLVER.CHECKPOINT_PERIOD, test.EVAL_PERIOD, test.LOSS_PERIOD
        if step == self.max_iter or any(x > 0 and step % x == 0 for x in periods):
            self.flush()
        super().after_step()

    def flush(self) -> None:
        """Reports the last step's losses now, if they are late."""
        if isinstance(self._trainer, TrainingStep):  # not a subclass's own
            self._trainer.flush()

    @classmethod
    def build_optimizer(cls, cfg, model):
        """Detectron2's SGD, on GPUs as one kernel for all parameters."""
        optimizer = super().build_optimizer(cfg, model)
        if next(model.parameters()).device.type != "cuda":
            return optimizer
        groups = [
            {k: x for k, x in group.items() if k not in ("foreach", "fused")}
            for group in optimizer.param_groups
        ]
        optimizer = type(optimizer)(groups, lr=cfg.SOLVER.BASE_LR, fused=True)
        # torch allocates it at the first step and, if that one is masked, never fills it
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer

    def train(self) -> Dict:
        """Trains to the last iteration, or until TEST.EARLY_STOPPING ends it.

        Returns:
            the results of the last evaluation, {} in all but the main process.

        Raises:
            ValueError: another process is training in OUTPUT_DIR.
        """
        _lock(self.cfg.OUTPUT_DIR)
        start = time.perf_counter()
        if self.seconds:  # once more, as in a notebook: the first time closed its writers
            for hook in self._hooks:
                if isinstance(hook, PeriodicWriter):
                    hook._writers = self.build_writers()
        try:
            TrainerBase.train(self, self.start_iter, self.max_iter)
        except EarlyStop:
            pass
        except Exception:
            self._save_after_loader_error()
            raise
        finally:
            self.seconds = time.perf_counter() - start
            _unlock(self.cfg.OUTPUT_DIR)
        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(self.cfg, self._last_eval_results)
        return self._last_eval_results

    def _save_after_loader_error(self) -> None:
        """Saves what is trained so far if it was no step that failed, but getting its batch."""
        step = self._trainer
        # in before_train the iteration may be the one before the first
        if not isinstance(step, TrainingStep) or step.batch or self.iter <= self.start_iter:
            return
        if comm.get_world_size() == 1:  # or the others would have to agree
            self.iter -= 1  # the last one that was trained
            with self.storage:
                self.flush()
            self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)
            logger.error("No batch for iteration %d; --resume goes on there", self.iter + 1)

    def build_hooks(self) -> List[HookBase]:
        cfg, test, model = self.cfg, self.cfg.TEST, self.evaluated_model

        def evaluate():
            self._last_eval_results = self.test(cfg, model)
            return self._last_eval_results

        def evaluate_with_tta():
            results = self.test_with_TTA(cfg, model)
            self._last_eval_results = {**self._last_eval_results, **results}
            return results

        if not isinstance(model, SSD):
            keys = {
                "VIS_PERIOD": cfg.VIS_PERIOD > 0 and not hasattr(model, "input_format"),
                "TEST.LOSS_PERIOD": test.LOSS_PERIOD and not self._overrides("test_losses"),
                "TEST.AUG.ENABLED": test.AUG.ENABLED and not self._overrides("test_with_TTA"),
            }
            if wrong := [key for key, value in keys.items() if value]:
                raise ValueError(f"{', '.join(wrong)}: only for an SSD, not {type(model).__name__}")
        ret = super().build_hooks()
        writer = [ret.pop()] if comm.is_main_process() else []
        evaluation = Evaluation(test.EVAL_PERIOD, evaluate)
        ret = [evaluation if isinstance(x, EvalHook) else x for x in ret]
        if self._average:  # first, for what saves and evaluates after a step
            ret.insert(0, self._average)
            if test.PRECISE_BN.ENABLED:
                logger.warning(
                    "TEST.PRECISE_BN changes the trained weights' BatchNorm only, evaluations use "
                    "the averaged weights (SOLVER.EMA)"
                )
        if test.AUG.ENABLED:
            try:
                inspect.signature(self.build_evaluator).bind(cfg, "", "")
            except TypeError:
                raise TypeError(
                    "TEST.AUG.ENABLED needs build_evaluator(cfg, dataset_name, output_folder)"
                ) from None
            ret.append(Evaluation(0, evaluate_with_tta))
        if test.LOSS_PERIOD:
            if not self._takes_mapper():
                logger.warning(
                    "TEST.LOSS_PERIOD reads images by ssd's loader: your build_test_loader(cfg, "
                    "dataset_name) takes no mapper=None"
                )
            ret.append(Evaluation(test.LOSS_PERIOD, lambda: self.test_losses(cfg, model)))
        if cfg.VIS_PERIOD > 0 and comm.is_main_process():
            metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
            ret.append(TrainingPictures(cfg.VIS_PERIOD, model, metadata))
        best = None
        if test.BEST_METRIC or test.EARLY_STOPPING.PATIENCE:
            # a subclass's own evaluators have names of metrics that aren't known here
            has_own = self._overrides("build_evaluator") or self._overrides("test")
            _check_best_metric(cfg, None if has_own else metric_names(cfg))
            if comm.is_main_process():
                best = BestCheckpoint(test.EVAL_PERIOD, self.checkpointer, test.BEST_METRIC)
                ret.append(best)
        if patience := test.EARLY_STOPPING.PATIENCE:
            ret.append(EarlyStopping(test.EVAL_PERIOD, patience, self.checkpointer, best))
        return [*ret, GracefulStop(self.checkpointer), *writer]

    def build_writers(self) -> List[EventWriter]:
        end_last_line(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json"))
        writers, wandb = super().build_writers(), self.cfg.WANDB
        if wandb.ENABLED:
            config = yaml.safe_load(self.cfg.dump())
            writers.insert(0, WandbWriter(self.cfg.OUTPUT_DIR, wandb.PROJECT, wandb.NAME, config))
        return writers

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name, mapper=None):
        """``mapper``: given for test-time augmentation and validation losses."""
        return build_test_loader(cfg, dataset_name, mapper)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def _overrides(cls, name: str) -> bool:
        own, ours = getattr(cls, name), getattr(Trainer, name)
        return getattr(own, "__func__", own) is not getattr(ours, "__func__", ours)

    @classmethod
    def _takes_mapper(cls) -> bool:
        return "mapper" in inspect.signature(cls.build_test_loader).parameters

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        check_class_count(cfg, is_train=False)
        _share_buffers(model)
        return super().test(cfg, optimize(model, cfg), evaluators)

    @classmethod
    def test_with_TTA(cls, cfg, model) -> Dict:
        """:meth:`test` with test-time augmentation (TEST.AUG), as in Detectron2's train_net.py.

        Returns:
            results as "bbox_TTA" …, or with several test sets as "<name>_TTA".
        """
        check_class_count(cfg, is_train=False)
        _share_buffers(model)
        model = SSDWithTTA(cfg, optimize(model, cfg))
        # images in their full size, which crops need
        mapper = SSDDatasetMapper(
            is_train=False, augmentation=AugmentationList([]), image_format=cfg.INPUT.FORMAT
        )
        build_loader = cls.build_test_loader
        if cls._takes_mapper():
            build_loader = functools.partial(build_loader, mapper=mapper)
        else:
            logger.warning(
                "TEST.AUG takes the images of your build_test_loader(cfg, dataset_name), perhaps "
                "reduced ones, as it takes no mapper=None"
            )
        results = {}
        for name in cfg.DATASETS.TEST:
            loader = build_loader(cfg, name)
            folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA", name)
            evaluator = cls.build_evaluator(cfg, name, folder)
            results[name] = inference_on_dataset(model, loader, evaluator)
            if comm.is_main_process():
                logger.info("Results for %s with test-time augmentation:", name)
                print_csv_format(results[name])
        return {f"{key}_TTA": value for key, value in _single(results).items()}

    @classmethod
    def test_losses(cls, cfg, model) -> Dict:
        """The losses of the test sets, see :func:`ssd.hooks.validation_losses`.

        Returns:
            {"validation": losses}, with several test sets {"validation": {name: losses}}.
        """
        mapper = SSDDatasetMapper(
            is_train=True,
            augmentation=build_augmentation(cfg, is_train=False),
            image_format=cfg.INPUT.FORMAT,
        )
        _share_buffers(model)
        build_loader = (cls if cls._takes_mapper() else Trainer).build_test_loader
        loaders = {name: build_loader(cfg, name, mapper=mapper) for name in cfg.DATASETS.TEST}
        losses = {name: validation_losses(model, loader) for name, loader in loaders.items()}
        return {"validation": _single(losses)}


def _share_buffers(model: nn.Module) -> None:
    """Lets all processes evaluate what is saved: BatchNorm's statistics are each process's own."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def _single(results: Dict) -> Dict:
    """Results by data set; those of the only one by themselves, as DefaultTrainer has it."""
    return next(iter(results.values())) if len(results) == 1 else results


def _check_best_metric(cfg, known: Optional[List[str]]) -> None:
    """``known``: what is evaluated, or None if the evaluators aren't ours."""
    test = cfg.TEST
    if test.EARLY_STOPPING.PATIENCE and not (test.BEST_METRIC and test.EVAL_PERIOD > 0):
        raise ValueError(
            "TEST.EARLY_STOPPING.PATIENCE needs TEST.BEST_METRIC, e.g. bbox/AP50, and "
            f"TEST.EVAL_PERIOD > 0, got {test.BEST_METRIC!r} and {test.EVAL_PERIOD}"
        )
    if known is not None and test.BEST_METRIC not in known:
        raise ValueError(
            f"TEST.BEST_METRIC {test.BEST_METRIC!r} is not what TEST.EVALUATORS "
            f"{list(test.EVALUATORS)} give for DATASETS.TEST {list(cfg.DATASETS.TEST)}; there are "
            f"{', '.join(difflib.get_close_matches(test.BEST_METRIC, known, 12, 0))}"
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
            size = sample.get("height"), sample.get("width")
            image = read_image(sample["file_name"], "BGR", size)
            picture = draw_instances(image, instances, MetadataCatalog.get(name))
            stem = os.path.splitext(os.path.basename(sample["file_name"]))[0]
            path = os.path.join(folder, f"{stem}.jpg")
            if path in paths:  # images of several folders
                path = os.path.join(folder, f"{stem}_{index}.jpg")
            paths.append(path)
            write_image(path, picture)
    logger.info("Wrote %d pictures of detections to %s/detections", len(paths), cfg.OUTPUT_DIR)
    return paths
