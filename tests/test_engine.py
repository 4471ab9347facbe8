import copy
import errno
import fcntl
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_train_loader,
)
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from PIL import Image
from trainers import ScriptedTrainer, checkpoint, in_two_processes, train

import ssd.engine
from ssd.checkpoint import SSDCheckpointer
from ssd.config import load_config
from ssd.data.loader import build_train_loader
from ssd.data.mapper import SSDDatasetMapper
from ssd.engine import Trainer, TrainingStep, draw_detections, setup
from ssd.evaluation import check_records
from ssd.hooks import WeightAverage
from ssd.launch import argument_parser
from ssd.summary import write_summary

PLAIN = (
    "INPUT.PHOTOMETRIC.ENABLED False INPUT.EXPAND.ENABLED False INPUT.IOU_CROP.ENABLED False "
    "INPUT.RANDOM_FLIP none"
).split()


needs_fused_sgd = pytest.mark.skipif(
    torch.__version__ < "2.4", reason="this torch has fused SGD on GPUs only"
)


class WeighingTrainer(Trainer):
    """A Trainer whose evaluations give the sum of the evaluated model's weights."""

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {"bbox": {"AP50": weigh(model.state_dict())}}


def weigh(state):
    return float(sum(value.double().sum() for value in state.values()))


def saved(cfg):
    return {name for name in os.listdir(cfg.OUTPUT_DIR) if name.endswith(".pth")}


@pytest.mark.parametrize("max_iter", [1, 2])  # the last iteration, or one before it
def test_non_finite_loss_stops_with_terms_iteration_and_files_and_saves_nothing(
    tiny_cfg, datasets_folder, max_iter
):
    cfg = tiny_cfg("SOLVER.MAX_ITER", max_iter, "TEST.BEST_METRIC", "bbox/AP50")
    ScriptedTrainer.script = [7.0]
    trainer = ScriptedTrainer(cfg)
    next(trainer.model.parameters()).data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="iteration 0") as error:
        trainer.train()
    text = str(error.value)
    assert "'loss_cls': nan" in text and "'loss_box_reg': nan" in text and "BASE_LR" in text
    assert text.count(str(datasets_folder / "shapes" / "train")) == 4
    assert not saved(cfg) and not os.path.exists(f"{cfg.OUTPUT_DIR}/last_checkpoint")


class Line(torch.nn.Module):
    """Its losses are w · x and w² of the batch's first x."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0]))

    def forward(self, data):
        return {"loss_a": (self.weight * data[0]["x"]).sum(), "loss_b": self.weight.square().sum()}


def train_line(values, late):
    """(TrainingStep, weight after each iteration) of iterations with these x."""
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    loader = [[{"x": x, "file_name": f"{x}.jpg"}] for x in values]
    step = TrainingStep(model, loader, optimizer, late=late)
    weights = []
    with EventStorage() as storage:
        step._storage = storage
        for step.iter in range(len(values)):
            storage.iter = step.iter
            try:
                step.run_step()
            except FloatingPointError as error:
                return step, weights, storage, str(error)
            weights.append(float(model.weight))
        step.flush()
    return step, weights, storage, None


@needs_fused_sgd
@pytest.mark.parametrize("clip_type, value", [("norm", 0.5), ("value", 0.5), ("norm", 1e6)])
def test_gradients_are_clipped_unscaled(clip_type, value):
    """float16 on a GPU, in float32 with its scaler and kernel on a CPU."""
    cfg = get_cfg()
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, clip_type, value
    weights = []
    for scaled in (False, True):
        model = Line()
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
        optimizer = optimizer(model.parameters(), lr=0.1, fused=scaled)
        step = TrainingStep(model, [[{"x": 3.0, "file_name": "a.jpg"}]], optimizer)
        step.grad_scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        step.iter = 0
        with EventStorage() as step._storage:
            step.run_step()
        weights.append(float(model.weight))
    # the gradient is x + 2 w = 7
    assert weights[0] == pytest.approx(2 - 0.1 * min(value, 7)) and weights[1] == weights[0]


@needs_fused_sgd
def test_late_losses_are_the_same_and_of_their_iteration():
    (_, weights, now, _), (_, late_weights, late, _) = (
        train_line([1.0, 2.0, 3.0], late) for late in (False, True)
    )
    assert weights == late_weights
    for name in ("loss_a", "loss_b", "total_loss"):
        assert now.history(name).values() == late.history(name).values()
        assert len(late.history(name).values()) == 3


@needs_fused_sgd
@pytest.mark.parametrize("late", [False, True])
def test_a_non_finite_loss_never_reaches_the_weights(late):
    step, weights, storage, error = train_line([1.0, float("inf"), 1.0], late)
    _, expected, _, _ = train_line([1.0], late)
    assert "not finite at iteration 1" in error and "inf.jpg" in error
    assert weights == expected * (2 if late else 1), "late: the masked update changes nothing"
    assert float(step.model.weight) == expected[0]
    assert len(storage.history("loss_a").values()) == 1


@needs_fused_sgd
def test_a_resume_keeps_this_machines_kernels():
    """A run saved with other kernels, on a CPU or by an earlier version."""
    saved, _, _, _ = train_line([1.0, 2.0], late=False)
    state = saved.state_dict()
    state["optimizer"]["param_groups"][0].update(fused=None, foreach=True)
    step, _, _, _ = train_line([1.0], late=True)
    step.load_state_dict(state)
    (group,) = step.optimizer.param_groups
    assert group["fused"] and not group["foreach"]
    momentum = step.optimizer.state[step.model.weight]["momentum_buffer"]
    assert momentum == saved.optimizer.state[saved.model.weight]["momentum_buffer"] != 0


@needs_fused_sgd
def test_a_resume_in_another_memory_format_or_precision():
    """CHANNELS_LAST and SOLVER.AMP.DTYPE may change between a checkpoint and its resume."""
    expected, states = None, None
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3, bias=False).to(memory_format=memory_format)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
        step = TrainingStep(model, [], optimizer)
        step.iter = 0
        if states:
            step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            step.load_state_dict(states[0])
            model.load_state_dict(states[1])
            assert step.grad_scaler.get_scale() == 8  # a file without float16 has no scale
        steps = range(2) if states else range(4)
        for i in steps:
            if i == 2 and not states:
                states = copy.deepcopy((step.state_dict(), model.state_dict()))
            model.weight.grad = (
                torch.arange(108.0).view(4, 3, 3, 3).contiguous(memory_format=memory_format)
            )
            optimizer.step()
        expected = model.weight.detach() if expected is None else expected
    assert torch.equal(model.weight, expected)


class LateTrainer(Trainer):
    """Reports losses as on a GPU; its third iteration's activations aren't finite."""

    @classmethod
    def build_optimizer(cls, cfg, model):
        return torch.optim.SGD(model.parameters(), cfg.SOLVER.BASE_LR, momentum=0.9, fused=True)

    def build_hooks(self):
        def spoil(_, images):
            return (images[0] * float("inf"),) if self.iter == 2 else None

        self.model.backbone.register_forward_pre_hook(spoil)
        return super().build_hooks()


@needs_fused_sgd
@pytest.mark.parametrize("max_iter", [3, 6])
def test_what_late_losses_spoil_is_not_saved(tiny_cfg, max_iter):
    """The update is masked, but BatchNorm's statistics aren't."""
    cfg = tiny_cfg("SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", max_iter)
    with pytest.raises(FloatingPointError, match="iteration 2"):
        train(cfg, LateTrainer)
    assert saved(cfg) == {"model_0000000.pth", "model_0000001.pth"}
    trainer = LateTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2


def test_detectron2s_loader(tiny_cfg, caplog):
    """Detectron2's most usual change: a Trainer with its loader and mapper."""

    class Own(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg, mapper=DatasetMapper(cfg, is_train=True))

    cfg = tiny_cfg("SOLVER.MAX_ITER", 2)
    trainer = train(cfg, Own)
    assert "2 of batch 4 |" in open(write_summary(cfg, {}, trainer)).read()
    assert "start anew" not in caplog.text
    trainer = Own(tiny_cfg("SOLVER.MAX_ITER", 4))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2 and "its samples start anew" in caplog.text
    with pytest.raises(ValueError, match="SOLVER.MAX_EPOCHS needs ssd's training loader"):
        Own(tiny_cfg("SOLVER.MAX_EPOCHS", 2))


@needs_fused_sgd
def test_the_last_late_losses_are_logged(tiny_cfg):
    cfg = tiny_cfg("SOLVER.MAX_ITER", 2)
    train(cfg, LateTrainer)
    with open(f"{cfg.OUTPUT_DIR}/metrics.json") as file:
        logged = [json.loads(line) for line in file]
    assert [line["iteration"] for line in logged if "total_loss" in line] == [1]


def test_a_failure_in_the_last_iteration_is_not_evaluated(tiny_cfg):
    """Other processes would wait for this one, and it for them."""

    class Failing(Trainer):
        evaluations = 0

        def run_step(self):
            if self.iter == 1:
                raise RuntimeError("failed")
            super().run_step()

        @classmethod
        def test(cls, cfg, model, evaluators=None):
            cls.evaluations += 1
            return {}

    with pytest.raises(RuntimeError, match="failed"):
        train(tiny_cfg("SOLVER.MAX_ITER", 2), Failing)
    assert Failing.evaluations == 0
    train(tiny_cfg("SOLVER.MAX_ITER", 1), Failing)
    assert Failing.evaluations == 1


def test_what_is_trained_is_kept_if_the_loader_fails(tiny_cfg, caplog, assert_equal):
    class FailingMapper(SSDDatasetMapper):
        left = 3 * 4  # images

        def __call__(self, record):
            if not self.left:
                raise ValueError("image a.jpg is truncated")
            self.left -= 1
            return super().__call__(record)

    class Failing(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_train_loader(cfg, FailingMapper(cfg, is_train=True))

    cfg = tiny_cfg("SOLVER.MAX_ITER", 5, "DATASETS.TEST", "()")
    with pytest.raises(ValueError, match="a.jpg"):
        train(cfg, Failing)
    assert "No batch for iteration 3; --resume goes on there" in caplog.text
    assert saved(cfg) == {"model_0000002.pth"}
    train(cfg, resume=True)
    found = checkpoint(cfg, "model_final.pth")["model"]
    train(cfg)
    assert_equal(found, checkpoint(cfg, "model_final.pth")["model"], "model")
    FailingMapper.left = 0
    shutil.rmtree(cfg.OUTPUT_DIR)
    with pytest.raises(ValueError, match="a.jpg"):
        train(cfg, Failing)
    assert not saved(cfg)


def test_a_failed_evaluation_before_the_first_step_saves_nothing(tiny_cfg):
    """A resumed run repeats the evaluation in which the one before it ended."""
    cfg = tiny_cfg("SOLVER.MAX_ITER", 6, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 2)
    for resume, script in ((False, [1.0, RuntimeError("ends")]), (True, [RuntimeError("ends")])):
        ScriptedTrainer.script = script
        with pytest.raises(RuntimeError, match="ends"):
            train(cfg, ScriptedTrainer, resume)
        assert not ScriptedTrainer.script
        assert saved(cfg) == {"model_0000001.pth", "model_0000003.pth"}


def test_an_interrupted_trainer_goes_on(tiny_cfg, assert_equal):
    """As in a notebook: the same Trainer once more."""

    class Interrupted(Trainer):
        signals = [signal.SIGINT]

        def run_step(self):
            super().run_step()
            if self.iter == 2 and self.signals:
                signal.raise_signal(self.signals.pop())

    cfg = tiny_cfg("SOLVER.MAX_ITER", 5, "DATASETS.TEST", "()")
    seed_all_rng(cfg.SEED)
    trainer = Interrupted(cfg)
    with pytest.raises(SystemExit):
        trainer.train()
    trainer.resume_or_load(True)
    trainer.train()
    with open(f"{cfg.OUTPUT_DIR}/metrics.json") as file:
        logged = [json.loads(line)["iteration"] for line in file]
    assert logged[-1] == 4
    found = checkpoint(cfg, "model_final.pth")["model"]
    shutil.rmtree(cfg.OUTPUT_DIR)
    train(cfg)
    assert_equal(found, checkpoint(cfg, "model_final.pth")["model"], "model")


def test_two_processes_do_not_train_in_one_folder(tiny_cfg, repo, tiny_opts):
    cfg = tiny_cfg()
    code = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""
    os.makedirs(cfg.OUTPUT_DIR)
    command = [sys.executable, "-c", code, f"{cfg.OUTPUT_DIR}/.lock"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        other.stdout.readline()
        trainer = Trainer(cfg)
        with pytest.raises(ValueError, match="OUTPUT_DIR.*another process is training there"):
            trainer.train()
        lab = str(repo / "labs" / "quickstart" / "config.yaml")
        args = ["--config-file", lab, *tiny_opts, "OUTPUT_DIR", cfg.OUTPUT_DIR]
        with pytest.raises(ValueError, match="another process is training there"):
            setup(argument_parser().parse_args(args))
        assert "config.yaml" not in os.listdir(cfg.OUTPUT_DIR)
        setup(argument_parser().parse_args(["--eval-only", *args]))
        other.stdin.close()

    def refused():
        code = (
            "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        )
        return subprocess.run([sys.executable, "-c", code, f"{cfg.OUTPUT_DIR}/.lock"]).returncode

    setup(argument_parser().parse_args(args))
    assert refused()  # from then on, not only once the data are read
    during, trainer = [], Trainer(cfg)
    trainer.register_hooks([HookBase()])
    trainer._hooks[-1].after_step = lambda: during.append(refused())
    trainer.train()
    assert during[0] and not refused()


def test_a_training_that_is_refused_saves_nothing(tiny_cfg, monkeypatch):
    cfg = tiny_cfg("SOLVER.MAX_ITER", 5, "DATASETS.TEST", "()")
    trainer = Trainer(cfg)
    batch = next(iter(trainer._trainer.data_loader))
    trainer._trainer._data_loader_iter_obj = iter([batch] * 3)
    with pytest.raises(StopIteration):
        trainer.train()
    assert saved(cfg) == {"model_0000002.pth"}
    os.remove(f"{cfg.OUTPUT_DIR}/model_0000002.pth")

    def lockf(*args):
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(ValueError, match="another process"):
        trainer.train()
    assert not saved(cfg)


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOLCK, errno.ENOSYS])
def test_file_systems_without_locks(tiny_cfg, monkeypatch, code):
    def lockf(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    if code == errno.EACCES:  # how some say that it is locked
        with pytest.raises(ValueError, match="another process"):
            train(tiny_cfg())
    else:
        train(tiny_cfg())


def test_registered_sets_are_not_read_to_check_their_records(tiny_cfg, monkeypatch):
    cfg = tiny_cfg()
    (name,) = cfg.DATASETS.TEST
    monkeypatch.delattr(MetadataCatalog.get(name), "json_file", raising=False)
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: pytest.fail("read"))
    check_records(cfg, name)


def test_an_evaluation_by_the_trainings_own_config_keeps_it(tiny_cfg, monkeypatch):
    cfg = tiny_cfg("DATASETS.TEST", "()")
    train(cfg)
    path = f"{cfg.OUTPUT_DIR}/config.yaml"
    with open(path, "w") as file:
        file.write(cfg.dump())
    args = argument_parser().parse_args(["--config-file", path, "--eval-only", "SEED", "5"])
    setup(args)
    monkeypatch.setattr(ssd.engine, "default_setup", lambda *_: os.truncate(path, 0) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        setup(args)
    with open(path) as file:
        assert file.read() == cfg.dump()
    assert not [x for x in os.listdir(cfg.OUTPUT_DIR) if x.startswith("config.yaml.")]


def test_exploding_loss_stops_a_run(tiny_cfg):
    cfg = tiny_cfg("SOLVER.BASE_LR", 1e30, "SOLVER.CHECKPOINT_PERIOD", 1)
    with pytest.raises(FloatingPointError, match="iteration 1"):
        train(cfg)
    assert saved(cfg) == {"model_0000000.pth"}


def test_best_checkpoint_is_kept_also_across_a_resume(tiny_cfg, caplog):
    opts = ["TEST.EVAL_PERIOD", 1, "TEST.BEST_METRIC", "bbox/AP50", "SOLVER.CHECKPOINT_PERIOD", 3]
    opts += ["SOLVER.IMS_PER_BATCH", 2]

    def run(max_iter, script, resume):
        cfg = tiny_cfg(*opts, "SOLVER.MAX_ITER", max_iter)
        ScriptedTrainer.script = script
        train(cfg, ScriptedTrainer, resume)
        with open(f"{cfg.OUTPUT_DIR}/model_best.json") as file:
            return cfg, json.load(file)

    cfg, best = run(3, [10.0, 30.0, 20.0], resume=False)
    assert best == {"metric": "bbox/AP50", "value": 30.0, "iteration": 1}
    assert checkpoint(cfg, "model_best.pth")["iteration"] == 1

    # a resume repeats the evaluation of its first checkpoint
    _, best = run(5, [20.0, 29.0, float("nan")], resume=True)
    assert best["value"] == 30.0
    cfg, best = run(7, [float("nan"), 31.0, 5.0], resume=True)
    assert (best["value"], best["iteration"]) == (31.0, 5)
    assert checkpoint(cfg, "model_best.pth")["iteration"] == 5

    assert "holds a training" not in caplog.text
    _, best = run(3, [1.0, 2.0, 0.0], resume=False)  # a new run has no memory
    assert best["value"] == 2.0
    last = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
    assert f"write model_final.pth into {last} again and add --resume" in caplog.text
    with pytest.raises(FileNotFoundError, match="model_best.json"):
        run(2, [float("nan")] * 2, resume=False)
    _, best = run(3, [float("nan"), 0.5], resume=True)  # nor a resumed one of it
    assert best == {"metric": "bbox/AP50", "value": 0.5, "iteration": 2}


def test_pictures_of_images_with_one_name(tiny_cfg, register, tmp_path):
    records, exif = [], Image.Exif()
    exif[274] = 6  # a quarter turn, which the annotations don't have
    for width in (40, 50):
        path = tmp_path / str(width) / "x.jpg"
        path.parent.mkdir()
        Image.new("RGB", (width, 30)).save(path, exif=exif)
        records += [{"file_name": str(path), "height": 30, "width": width, "annotations": []}] * 2
    name = register([{**x, "image_id": i} for i, x in enumerate(records)], "abcdef")
    cfg = tiny_cfg("DATASETS.TEST", (name,), "TEST.VIS_IMAGES", 2)
    for score, drawn in ((0.0, True), (1.0, False)):
        paths = draw_detections(cfg, build_model(cfg), score)
        assert [os.path.basename(path) for path in paths] == ["x.jpg", "x_1.jpg"]
        for path, width in zip(paths, (40, 50)):  # the first and the third
            with Image.open(path) as picture:
                assert picture.size == (width, 30)
                assert (np.asarray(picture).max() > 20) == drawn


def test_frozen_random_layers_are_told(tiny_cfg, caplog):
    opts = "MODEL.SSD.BOTTOM_UP build_resnet_backbone MODEL.SSD.IN_FEATURES ['res3','res4','res5']"
    opts += " MODEL.RESNETS.OUT_FEATURES ['res3','res4','res5'] MODEL.RESNETS.DEPTH 50"
    for freeze_at in (2, 0):
        caplog.clear()
        Trainer(tiny_cfg(*opts.split(), "MODEL.BACKBONE.FREEZE_AT", freeze_at))
        assert ("which stay random" in caplog.text) == (freeze_at > 0)


def test_best_checkpoint_says_its_iteration_and_is_not_what_a_resume_takes(tiny_cfg):
    cfg = tiny_cfg("SOLVER.MAX_ITER", 2, "TEST.BEST_METRIC", "bbox/AP50")
    ScriptedTrainer.script = [7.0]
    train(cfg, ScriptedTrainer)
    best, final = checkpoint(cfg, "model_best.pth"), checkpoint(cfg, "model_final.pth")
    assert best["iteration"] == final["iteration"] == 1
    assert all(torch.equal(value, final["model"][key]) for key, value in best["model"].items())
    with open(f"{cfg.OUTPUT_DIR}/last_checkpoint") as file:
        assert file.read() == "model_final.pth"  # though model_best.pth was saved after it


@pytest.mark.parametrize("metric", ["voc/mAP", "bbox/AP51", "AP50", "bbox/AP-rung", "bbox/AP-*"])
def test_best_metric_that_is_not_evaluated_is_refused_at_once(tiny_cfg, metric):
    message = rf"TEST.BEST_METRIC '{re.escape(metric)}'.*EVALUATORS \['coco'\].*shapes_val.*bbox/AP"
    with pytest.raises(ValueError, match=message):
        Trainer(tiny_cfg("TEST.BEST_METRIC", metric))


def test_evaluators_that_do_not_exist_are_refused_at_once(tiny_cfg):
    with pytest.raises(ValueError, match="TEST.EVALUATORS names 'lvis'"):
        Trainer(tiny_cfg("TEST.EVALUATORS", ["lvis"]))


def test_best_metric_of_an_evaluator_of_ones_own(tiny_cfg):
    class OwnTrainer(ScriptedTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            raise AssertionError("the script evaluates")

    opts = ["TEST.EVALUATORS", ["own"], "TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER", 2]
    ScriptedTrainer.script = [1.0] * 4
    train(tiny_cfg(*opts, "TEST.BEST_METRIC", "bbox/AP50"), OwnTrainer)
    with pytest.raises(ValueError, match="TEST.BEST_METRIC 'own/F1' is not evaluated.*bbox/AP50"):
        train(tiny_cfg(*opts, "TEST.BEST_METRIC", "own/F1"), OwnTrainer)


def test_metrics_of_a_test_of_ones_own_can_be_the_best(tiny_cfg):
    ScriptedTrainer.script = [1.0]

    class OwnTrainer(ScriptedTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            return {"bbox": {"AP50-own": super().test(cfg, model)["bbox"]["AP50"]}}

    cfg = tiny_cfg("TEST.BEST_METRIC", "bbox/AP50-own", "SOLVER.MAX_ITER", 1)
    train(cfg, OwnTrainer)
    with open(f"{cfg.OUTPUT_DIR}/model_best.json") as file:
        assert json.load(file) == {"metric": "bbox/AP50-own", "value": 1.0, "iteration": 0}


def test_a_model_in_a_module_of_ones_own_trains(tiny_cfg):
    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return self.model(batch)

    class OwnTrainer(Trainer):
        @classmethod
        def build_model(cls, cfg):
            return Wrapper(super().build_model(cfg))

    assert train(tiny_cfg("SOLVER.MAX_ITER", 1), OwnTrainer).iter == 1


def test_a_static_evaluator_that_a_training_may_not_have(tiny_cfg):
    """As Detectron2's DefaultTrainer takes it; and hooks without any evaluation."""

    class OwnTrainer(Trainer):
        @staticmethod
        def build_evaluator(cfg, dataset_name):
            raise AssertionError("no hook evaluates")

        def build_hooks(self):
            return [x for x in super().build_hooks() if not isinstance(x, EvalHook)]

    trainer = train(tiny_cfg("SOLVER.MAX_ITER", 1), OwnTrainer)
    assert trainer.iter == 1
    # before the training
    with pytest.raises(TypeError, match=r"TEST.AUG.ENABLED needs build_evaluator\(.*output_folder"):
        OwnTrainer(tiny_cfg("TEST.AUG.ENABLED", True))


@pytest.mark.parametrize("has_log", [True, False])
def test_a_script_without_loggers_sees_the_training(has_log, tiny_cfg, capsys, caplog, monkeypatch):
    if not has_log:
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
    train(tiny_cfg("SOLVER.REFERENCE_IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 1))
    texts = [caplog.text, capsys.readouterr().out]
    told = ["Learning rate scaled" in x and "Starting training from" in x for x in texts]
    assert told == [has_log, not has_log]


@pytest.mark.parametrize("level", ["DEBUG", "ERROR"])
def test_a_script_keeps_its_log_levels(tiny_cfg, capsys, caplog, level):
    for name in ("detectron2", "ssd"):
        caplog.set_level(level, name)
    caplog.handler.setLevel("NOTSET")
    Trainer(tiny_cfg("SOLVER.REFERENCE_IMS_PER_BATCH", 2))
    assert bool(caplog.text) == (level == "DEBUG") and not capsys.readouterr().out
    for name in ("detectron2", "ssd"):
        assert logging.getLogger(name).level == getattr(logging, level)


@pytest.mark.parametrize("key, opts", [
    ("SOLVER.CHECKPOINT_PERIOD", "SOLVER.CHECKPOINT_PERIOD 0"),
    ("SOLVER.BASE_LR must", "SOLVER.BASE_LR 0.0 SOLVER.LR_SCHEDULER_NAME WarmupCosineLR"),
    ("SOLVER.BASE_LR must", "SOLVER.BASE_LR -1.0 SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR"),
    ("SOLVER.BASE_LR must", "SOLVER.BASE_LR 0.001 SOLVER.REFERENCE_IMS_PER_BATCH 16 "
     "SOLVER.BASE_LR_END 0.0005 SOLVER.LR_SCHEDULER_NAME WarmupCosineLR"),
    ("SOLVER.WARMUP_FACTOR", "SOLVER.WARMUP_FACTOR -1.0"),
    ("SOLVER.STEPS must", "SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR SOLVER.STEPS [2,1]"),
    ("SOLVER.AMP.DTYPE: .* got ''", "SOLVER.AMP.ENABLED True SOLVER.AMP.DTYPE ''"),
    ("OUTPUT_DIR must be a folder of this machine, got 's3://a'", "OUTPUT_DIR s3://a"),
    ("TEST.EARLY_STOPPING.PATIENCE", "TEST.EARLY_STOPPING.PATIENCE -1"),
    ("REFERENCE_WORLD_SIZE", "SOLVER.REFERENCE_WORLD_SIZE 2 SOLVER.REFERENCE_IMS_PER_BATCH 8"),
])  # fmt: skip
def test_periods_and_rates_that_make_no_sense_are_refused_at_once(tiny_cfg, key, opts):
    with pytest.raises(ValueError, match=key):
        Trainer(tiny_cfg(*opts.split()))


def test_a_resume_takes_the_rates_of_its_config(tiny_cfg):
    opts = ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR"]
    first = train(tiny_cfg(*opts, 0.02, "SOLVER.MAX_ITER", 2))
    opts = [*opts, 0.002, "SOLVER.WEIGHT_DECAY", 0.1, "SOLVER.MAX_ITER", 4]
    trainer = Trainer(tiny_cfg(*opts))
    trainer.resume_or_load(True)
    group, before = (x.optimizer.param_groups[0] for x in (trainer, first))
    assert group["lr"] == pytest.approx(before["lr"] / 10) and group["weight_decay"] == 0.1
    expected = Trainer(trainer.cfg)
    expected.scheduler.step(2)
    trainer.scheduler.step(2)
    rates = [x.optimizer.param_groups[0]["lr"] for x in (trainer, expected)]
    assert rates[0] == rates[1] > 0


def test_schedulers_and_states_of_ones_own_resume(tiny_cfg, assert_equal):
    """Schedulers without base rates, optimizers that count in groups, a model's extra state."""

    class OwnTrainer(Trainer):
        @classmethod
        def build_model(cls, cfg):
            model = super().build_model(cfg)
            model.backbone.get_extra_state = lambda: {"seen": 1}
            model.backbone.set_extra_state = lambda state: None
            return model

        @classmethod
        def build_optimizer(cls, cfg, model):
            optimizer = super().build_optimizer(cfg, model)
            for group in optimizer.param_groups:
                group["k"] = 0
            return optimizer

        @classmethod
        def build_lr_scheduler(cls, cfg, optimizer):
            parts = [torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(2)]
            return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])

    trainer = OwnTrainer(tiny_cfg("SOLVER.MAX_ITER", 1, "VIS_PERIOD", 1))
    for group in trainer.optimizer.param_groups:
        group["k"] = 7
    trainer.train()
    resumed = OwnTrainer(tiny_cfg("SOLVER.MAX_ITER", 2))
    resumed.resume_or_load(True)
    assert_equal(resumed.optimizer.state_dict(), trainer.optimizer.state_dict())
    assert resumed.optimizer.param_groups[0]["k"] == 7


def test_a_rate_of_0_can_be_changed_at_a_resume(tiny_cfg):
    cfg = tiny_cfg("SOLVER.MAX_ITER", 1, "SOLVER.BIAS_LR_FACTOR", 0.0)
    train(cfg)
    opts = ["SOLVER.MAX_ITER", 2, "SOLVER.BIAS_LR_FACTOR", 0.0, "SOLVER.BASE_LR", 0.5]
    trainer = Trainer(tiny_cfg(*opts))
    trainer.resume_or_load(True)
    assert min(group["lr"] for group in trainer.optimizer.param_groups) == 0


def test_missing_test_data_show_before_the_training(tiny_cfg, repo, tmp_path, tiny_opts):
    tiny_cfg()  # sets DETECTRON2_DATASETS
    lab = tmp_path / "lab.yaml"
    classes = list(MetadataCatalog.get("shapes_train").thing_classes)
    entry = {"FORMAT": "coco", "ROOT": "r", "ANNOTATIONS": "a.json", "IMAGES": "i"}
    sets = {"TEST": ["t_gone"], "REGISTER": {"t_gone": {**entry, "CLASSES": classes}}}
    base = str(repo / "labs/quickstart/config.yaml")
    lab.write_text(json.dumps({"_BASE_": base, "DATASETS": sets}))
    with pytest.raises(FileNotFoundError, match="a.json.*t_gone.ANNOTATIONS"):
        Trainer(load_config(str(lab), [*tiny_opts, "OUTPUT_DIR", str(tmp_path)]))


@pytest.mark.parametrize("reference, expected", [(0, 0.04), (16, 0.01), (2, 0.08)])
def test_learning_rate_scales_with_the_global_batch(tiny_cfg, reference, expected):
    cfg = tiny_cfg("SOLVER.REFERENCE_IMS_PER_BATCH", reference, "SOLVER.BASE_LR", 0.04)
    trainer = Trainer(cfg)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([expected] * len(rates))
    assert trainer.cfg.SOLVER.IMS_PER_BATCH == 4 and trainer.max_iter == 4


def test_caffe_biases_learn_at_twice_the_rate_without_decay(repo):
    lab = repo / "labs" / "ssd_vgg16_size300" / "config.yaml"
    cfg = load_config(str(lab), ["MODEL.DEVICE", "cpu"])
    model = Trainer.build_model(cfg)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = set()
    for group in Trainer.build_optimizer(cfg, model).param_groups:
        for parameter in group["params"]:
            is_bias = names[id(parameter)].endswith(".bias")
            expected = (0.002, 0) if is_bias else (0.001, 0.0005)
            assert (group["lr"], group["weight_decay"]) == expected, names[id(parameter)]
            seen.add(id(parameter))
    assert seen == set(names)


def test_bfloat16_trains_on_a_cpu(tiny_cfg):
    cfg = tiny_cfg("SOLVER.AMP.ENABLED", True, "SOLVER.MAX_ITER", 3)
    trainer = Trainer(cfg)
    dtypes = []
    convolution = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.Conv2d))
    convolution.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    before = convolution.weight.detach().clone()
    trainer.train()
    assert dtypes[:3] == [torch.bfloat16] * 3
    assert convolution.weight.dtype == torch.float32 and convolution.weight.isfinite().all()
    assert not torch.equal(convolution.weight, before)


@pytest.mark.parametrize("dtype, message", [
    ("float16", "SOLVER.AMP.DTYPE float16 needs CUDA, MODEL.DEVICE is cpu"),
    ("int8", "SOLVER.AMP.DTYPE.*'int8'"),
])  # fmt: skip
def test_other_mixed_precision_on_a_cpu_is_an_error(tiny_cfg, dtype, message):
    with pytest.raises(ValueError, match=message):
        Trainer(tiny_cfg("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype))


@pytest.mark.parametrize("below", ["file", "file/output"])
def test_unwritable_output_folder_is_an_error_before_anything_else(
    repo, datasets_folder, tmp_path, monkeypatch, below
):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_folder))
    (tmp_path / "file").write_text("")
    lab = str(repo / "labs" / "quickstart" / "config.yaml")
    folder = str(tmp_path / below)
    args = argument_parser().parse_args(["--config-file", lab, "OUTPUT_DIR", folder])
    with pytest.raises(OSError, match=f"OUTPUT_DIR '{folder}' can't be written"):
        setup(args)


def test_weights_of_the_zoo_bring_their_config(tmp_path):
    opts = ["MODEL.WEIGHTS", "zoo://ssd512_voc0712_lufficc", "OUTPUT_DIR", str(tmp_path)]
    opts += ["MODEL.DEVICE", "cpu", "TEST.DETECTIONS_PER_IMAGE", "7"]
    cfg = setup(argument_parser().parse_args(["--eval-only", *opts]))
    assert cfg.MODEL.WEIGHTS == "zoo://ssd512_voc0712_lufficc" and cfg.OUTPUT_DIR == str(tmp_path)
    assert cfg.MODEL.SSD.INPUT_SIZE == [512, 512] and cfg.MODEL.SSD.NUM_CLASSES == 20
    assert cfg.MODEL.SSD.DEFAULT_BOXES.MAX_SIZE == 537.65
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 7, "the command line's own win"


@pytest.mark.parametrize("flags, training, kept", [
    (["--eval-only"], True, True), (["--eval-only"], False, False), ([], True, False),
])  # fmt: skip
def test_an_evaluation_keeps_the_config_of_a_training(flags, training, kept, repo, tmp_path):
    (tmp_path / "config.yaml").write_text("of a run: before\n")
    if training:
        (tmp_path / "last_checkpoint").write_text("model_final.pth")
    lab = str(repo / "labs" / "quickstart" / "config.yaml")
    setup(argument_parser().parse_args([*flags, "--config-file", lab, "OUTPUT_DIR", str(tmp_path)]))
    assert ((tmp_path / "config.yaml").read_text() == "of a run: before\n") == kept
    assert "MAX_ITER" in (tmp_path / "log.txt").read_text()  # the evaluation's


def test_overfits_four_images_and_draws_them(tiny_cfg, datasets_folder, tmp_path, monkeypatch):
    # four of the training images are also the test set
    source = datasets_folder / "shapes"
    root = tmp_path / "few" / "shapes"
    shutil.copytree(source / "train" / "images", root / "train" / "images")
    data = json.loads((source / "train.json").read_text())
    data["images"] = data["images"][:4]
    data["annotations"] = [x for x in data["annotations"] if x["image_id"] <= 4]
    shutil.copytree(root / "train", root / "val")
    for split in ("train", "val"):
        (root / f"{split}.json").write_text(json.dumps(data))

    opts = "MODEL.MOBILENET.WIDTH_MULT 0.5 MODEL.BATCH_NORM.MOMENTUM 0.3 SOLVER.MAX_ITER 120"
    opts += " SOLVER.WARMUP_ITERS 10 TEST.VIS_IMAGES 2"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "few"))
    cfg = tiny_cfg(*PLAIN, *opts.split())
    trainer = train(cfg)
    with open(f"{cfg.OUTPUT_DIR}/metrics.json") as file:
        losses = [json.loads(line).get("total_loss") for line in file]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0] / 5
    assert trainer._last_eval_results["bbox"]["AP50"] > 85

    paths = draw_detections(cfg, trainer.model)
    assert len(paths) == 2 and all(os.path.getsize(path) > 1000 for path in paths)
    assert os.path.dirname(paths[0]) == os.path.join(cfg.OUTPUT_DIR, "detections", "shapes_val")


def test_schedule_in_epochs_follows_from_the_real_size_of_the_data_set(tiny_cfg, register):
    box = {"bbox": [1, 1, 50, 50], "bbox_mode": 0, "category_id": 0}
    dicts = [
        {"file_name": f"{i}.jpg", "height": 96, "width": 96, "image_id": i, "annotations": [box]}
        for i in range(9)
    ]
    dicts += [{**dicts[0], "image_id": i, "annotations": []} for i in range(9, 14)]
    name = register(dicts, ["cat"])

    def trainer(*opts):
        keys = ["DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "MODEL.SSD.NUM_CLASSES", 1]
        return Trainer(tiny_cfg(*keys, "SOLVER.IMS_PER_BATCH", 4, *opts))

    epochs = ["SOLVER.MAX_EPOCHS", 6, "SOLVER.STEPS_EPOCHS", [4]]
    empty = ["DATALOADER.FILTER_EMPTY_ANNOTATIONS"]
    found = trainer(*epochs, *empty, True)
    assert (found.max_iter, found.cfg.SOLVER.STEPS) == (6 * 3, (4 * 3,))
    found = trainer(*epochs, *empty, False)
    assert (found.max_iter, found.cfg.SOLVER.STEPS) == (6 * 4, (4 * 4,))
    found = trainer(*epochs, *empty, False, "SOLVER.REPEAT_DATASET", 2)
    assert (found.max_iter, found.cfg.SOLVER.STEPS) == (3 * 7, (2 * 7,))
    assert trainer("SOLVER.MAX_ITER", 5).max_iter == 5


def test_training_in_epochs_uses_their_rates(tiny_cfg):
    opts = "SOLVER.MAX_EPOCHS 3 SOLVER.COSINE_STEP epoch SOLVER.IMS_PER_BATCH 8"
    cfg = tiny_cfg(*opts.split(), "SOLVER.BASE_LR", 0.04)
    rates = []

    class RecordingTrainer(ScriptedTrainer):
        def run_step(self):
            rates.append(self.optimizer.param_groups[0]["lr"])
            super().run_step()

    ScriptedTrainer.script = [0.0]
    train(cfg, RecordingTrainer)
    assert rates == pytest.approx([0.04, 0.04, 0.03, 0.03, 0.01, 0.01])


def test_averages_computed_by_hand():
    model = torch.nn.BatchNorm1d(1)
    average = WeightAverage(model, decay=0.2)
    model.weight.data.fill_(8.0)  # loaded weights: the average begins with them
    average.before_train()
    assert not average.model.training and average.model.weight.item() == 8
    # decay 0.1, 2 / 11, then 0.2 (not 3 / 12)
    for value, expected in ((18.0, 17.0), (28.0, 26.0), (6.0, 10.0)):
        model.weight.data.fill_(value)
        model.running_var.fill_(value - 7)  # 1 in the beginning
        model.num_batches_tracked += 1
        average.after_step()
        assert average.model.weight.item() == pytest.approx(expected, abs=1e-5)
        assert average.model.running_var.item() == pytest.approx(expected - 7, abs=1e-5)
    assert average.model.num_batches_tracked == 3 and average.model.bias == 0

    resumed = WeightAverage(model, decay=0.2)
    resumed.model.load_state_dict(average.model.state_dict())
    resumed.load_state_dict(average.state_dict())
    resumed.before_train()
    assert resumed.model.weight.item() == pytest.approx(10, abs=1e-5)


def test_buffers_that_are_not_saved_are_not_averaged():
    """As those of one's own backbone that hold -inf, or depend on the batch."""
    model = torch.nn.Linear(1, 1)
    model.register_buffer("mask", torch.tensor(-math.inf), persistent=False)
    average = WeightAverage(model, decay=0.2)
    model.register_buffer("made_later", torch.zeros(3), persistent=False)
    average.model.register_buffer("made_in_evaluation", torch.zeros(3), persistent=False)
    average.before_train()
    average.after_step()
    assert average.model.mask == -math.inf


def test_what_stands_in_two_places_is_averaged_once():
    shared = torch.nn.BatchNorm1d(1)
    model = torch.nn.Sequential(shared, shared)
    average = WeightAverage(model, decay=0.2)
    average.before_train()
    shared.weight.data.fill_(11.0)
    shared.running_mean.fill_(10.0)
    average.after_step()  # decay 0.1
    assert average.model[1].weight.item() == pytest.approx(10.0)
    assert average.model[1].running_mean.item() == pytest.approx(9.0)


@pytest.mark.parametrize("key, value", [
    ("VIS_PERIOD", 2), ("TEST.LOSS_PERIOD", 2), ("TEST.AUG.ENABLED", True)
])  # fmt: skip
def test_what_only_an_ssd_can_do_is_refused_before_the_training(tiny_cfg, key, value):
    class Wrapper(torch.nn.Module):
        def __init__(self, cfg):
            super().__init__()
            self.student = build_model(cfg)

    class OwnTrainer(Trainer):
        @classmethod
        def build_model(cls, cfg):
            return Wrapper(cfg)

    class OwnLosses(OwnTrainer):
        def test_losses(self, *_):
            return {}

    OwnTrainer(tiny_cfg())
    OwnLosses(tiny_cfg("TEST.LOSS_PERIOD", 2))
    with pytest.raises(ValueError, match=f"{key}: only for an SSD, not Wrapper"):
        OwnTrainer(tiny_cfg(key, value))


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="SOLVER.EMA.DECAY must be .* got"):
        WeightAverage(torch.nn.Linear(1, 1), decay)


def test_resumed_run_has_the_same_averages(tiny_cfg, assert_equal):
    opts = "SOLVER.EMA.ENABLED True SOLVER.AMP.ENABLED True SOLVER.CHECKPOINT_PERIOD 2"
    cfg = tiny_cfg(*opts.split(), "SOLVER.MAX_EPOCHS", 1)  # 4 iterations
    train(cfg, WeighingTrainer)
    whole, middle = checkpoint(cfg, "model_final.pth"), checkpoint(cfg, "model_0000001.pth")
    assert weigh(middle["ema"]) != weigh(whole["ema"]) != weigh(whole["model"])
    kinds = {name: (value.dtype, value.shape) for name, value in whole["model"].items()}
    assert kinds == {name: (value.dtype, value.shape) for name, value in whole["ema"].items()}

    with open(f"{cfg.OUTPUT_DIR}/last_checkpoint", "w") as file:
        file.write("model_0000001.pth")
    trainer = train(cfg, WeighingTrainer, resume=True)
    assert trainer.start_iter == 2
    resumed = checkpoint(cfg, "model_final.pth")
    assert resumed.keys() == whole.keys() >= {"model", "ema", "trainer"}
    assert_equal(resumed, whole)


def test_averaging_can_begin_at_a_resume(tiny_cfg, assert_equal):
    cfg = tiny_cfg("SOLVER.MAX_ITER", 1)
    train(cfg, WeighingTrainer)
    trained = checkpoint(cfg, "model_final.pth")
    assert "ema" not in trained
    cfg = tiny_cfg("SOLVER.MAX_ITER", 1, "SOLVER.EMA.ENABLED", True)
    trainer = train(cfg, WeighingTrainer, resume=True)  # nothing is left to do
    assert_equal(dict(trainer.evaluated_model.state_dict()), dict(trained["model"]))


def test_evaluations_and_the_best_checkpoint_are_of_the_averaged_weights(tiny_cfg, assert_equal):
    opts = "SOLVER.EMA.ENABLED True SOLVER.MAX_ITER 3 SOLVER.CHECKPOINT_PERIOD 1"
    opts += " TEST.EVAL_PERIOD 1 TEST.BEST_METRIC bbox/AP50"
    cfg = tiny_cfg(*opts.split())
    trainer = train(cfg, WeighingTrainer)
    files = [checkpoint(cfg, f"model_000000{i}.pth") for i in range(3)]
    weights = [weigh(file["ema"]) for file in files]
    assert len({*weights, *(weigh(file["model"]) for file in files)}) == 6
    assert weigh(trainer.evaluated_model.state_dict()) == weights[2]
    assert trainer._last_eval_results["bbox"]["AP50"] == weights[2]
    with open(f"{cfg.OUTPUT_DIR}/model_best.json") as file:
        best = json.load(file)
    assert best["value"] == max(weights) and best["iteration"] == weights.index(max(weights))
    assert_equal(checkpoint(cfg, "model_best.pth")["ema"], files[best["iteration"]]["ema"])


@pytest.mark.parametrize("saved_with, enabled, key, message", [
    (True, True, "ema", "Taking the averaged weights (SOLVER.EMA)"),
    (True, False, "model", "also holds averaged weights: SOLVER.EMA.ENABLED True takes those"),
    (False, True, "model", "There are no averaged weights (SOLVER.EMA)"),
])  # fmt: skip
def test_evaluation_of_a_file_takes_its_averaged_weights(
    tiny_cfg, caplog, saved_with, enabled, key, message, assert_equal
):
    cfg = tiny_cfg("SOLVER.EMA.ENABLED", saved_with, "SOLVER.MAX_ITER", 1)
    train(cfg, WeighingTrainer)
    cfg = tiny_cfg("SOLVER.EMA.ENABLED", enabled)
    model = Trainer.build_model(cfg)
    path = f"{cfg.OUTPUT_DIR}/model_final.pth"
    with caplog.at_level(logging.INFO, logger="ssd"):
        SSDCheckpointer(model, cfg=cfg, strict=True).load(path)
    assert_equal(dict(model.state_dict()), dict(checkpoint(cfg, "model_final.pth")[key]))
    assert message in caplog.text
    assert caplog.text.count("averaged weights") == 1

    SSDCheckpointer(model, cfg=cfg).load(path)  # a training begins with the trained weights
    assert_equal(dict(model.state_dict()), dict(checkpoint(cfg, "model_final.pth")["model"]))


def norm_opts(norm):
    opts = f"MODEL.MOBILENET.NORM {norm} MODEL.SSD.NORM {norm} MODEL.SSD.CHANNELS_LAST False"
    return f"{opts} SOLVER.BASE_LR 0.003".split()


def test_synchronised_batch_norm_of_two_processes_equals_batch_norm_of_one(tiny_cfg, tmp_path):
    cfg = tiny_cfg(*norm_opts("BN"), "SOLVER.MAX_ITER", 1)
    opts = ["SOLVER.MAX_ITER", 1, "OUTPUT_DIR", str(tmp_path / "two")]
    of_two = tiny_cfg(*norm_opts("naiveSyncBN"), *opts)
    in_two_processes(lambda rank: train(of_two, WeighingTrainer), tmp_path)
    two = checkpoint(of_two, "model_final.pth")["model"]

    counts = {}  # the values per channel over which each layer normalises

    class CountingTrainer(WeighingTrainer):
        @classmethod
        def build_model(cls, cfg):
            model = super().build_model(cfg)
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.register_forward_hook(
                        lambda module, inputs, output, name=name: counts.update(
                            {name: output.numel() // module.num_features}
                        )
                    )
            return model

    trainer = train(cfg, CountingTrainer)
    assert len(counts) > 50
    weights = trainer.model.state_dict()
    seed_all_rng(cfg.SEED)
    before = Trainer.build_model(cfg).state_dict()
    assert max(float((before[key] - weights[key]).abs().max()) for key in weights) > 0.01
    keep = 1 - cfg.MODEL.BATCH_NORM.MOMENTUM
    for key, value in weights.items():
        layer, _, leaf = key.rpartition(".")
        if leaf == "num_batches_tracked":
            continue  # naiveSyncBN doesn't count
        if leaf == "running_var":  # naiveSyncBN's is of the biased variance, torch's unbiased
            value = keep + (value - keep) * (1 - 1 / counts[layer])
        torch.testing.assert_close(
            two[key], value, rtol=1e-4, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_frozen_batch_norm_trains_with_unchanged_statistics(tiny_cfg, assert_equal):
    cfg = tiny_cfg(*norm_opts("FrozenBN"), "SOLVER.MAX_ITER", 2)
    seed_all_rng(cfg.SEED)
    trainer = WeighingTrainer(cfg)
    frozen = {
        name: {key: value.clone() for key, value in module.named_buffers()}
        for name, module in trainer.model.named_modules()
        if isinstance(module, FrozenBatchNorm2d)
    }
    weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    modules = dict(trainer.model.named_modules())
    assert len(frozen) > 50
    for name, buffers in frozen.items():
        assert_equal(dict(modules[name].named_buffers()), buffers, name)
    assert not any(isinstance(x, torch.nn.BatchNorm2d) for x in modules.values())
    for name, value in trainer.model.backbone.named_parameters(prefix="backbone"):
        assert not torch.equal(value, weights[name]), name
