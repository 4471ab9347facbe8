"""Validation losses, early stopping, pictures and W&B."""

import json
import math
import os
import signal
import sys

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata
from detectron2.engine import SimpleTrainer
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from trainers import ScriptedTrainer, checkpoint, in_two_processes, train

from ssd.data.shapes import CLASSES
from ssd.engine import Trainer
from ssd.hooks import GracefulStop, TrainingPictures, WandbWriter, validation_losses
from ssd.modeling import SSD

STOPPING = "TEST.EVAL_PERIOD 1 TEST.BEST_METRIC bbox/AP50 SOLVER.IMS_PER_BATCH 2".split()


def metrics(folder, key):
    """{iteration: value} of a key in metrics.json."""
    with open(f"{folder}/metrics.json") as file:
        lines = [json.loads(line) for line in file]
    return {line["iteration"]: line[key] for line in lines if key in line}


def batch(count, num_classes=6):
    """A training batch whose images have 0, 1, 2 … objects."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for objects in range(count):
        corners = torch.rand(objects, 2, generator=generator) * 48
        boxes = torch.cat([corners, corners + 20 + 24 * torch.rand(objects, 2)], dim=1)
        classes = torch.randint(num_classes, (objects,), generator=generator)
        instances = Instances((96, 96), gt_boxes=Boxes(boxes), gt_classes=classes)
        image = torch.randint(0, 256, (3, 96, 96), generator=generator).byte()
        result.append({"image": image, "instances": instances})
    return result


@pytest.mark.parametrize("normalizer", ["image", "batch", "each"])
def test_validation_losses_are_those_of_one_batch_of_all_images(tiny_cfg, normalizer, assert_equal):
    torch.manual_seed(0)
    opts = ["MODEL.SSD.LOSS.NORMALIZER", normalizer, "MODEL.SSD.LOSS.BOX_WEIGHT", 2.0]
    model = Trainer.build_model(tiny_cfg(*opts))
    for module in model.modules():  # else evaluation mode would give almost 0
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = batch(4)
    with torch.no_grad():
        model.eval()
        given = model.preprocess_image(images)
        features = [model.backbone(given.tensor)[name] for name in model.head_in_features]
        truth = [x["instances"] for x in images]
        expected = model.forward_training(given, features, model.head(features), truth)
    expected = {name: float(loss) for name, loss in expected.items()}
    expected["total_loss"] = sum(expected.values())
    assert min(expected.values()) > 0.1
    model.train()
    for sizes in ([4], [3, 1], [1, 1, 1, 1]):
        batches = np.split(np.array(images, object), np.cumsum(sizes)[:-1])
        found = validation_losses(model, [list(part) for part in batches])
        assert found == pytest.approx(expected, rel=1e-4)
    assert model.training
    assert_equal(dict(model.state_dict()), before)
    assert set(validation_losses(model, []).values()) == {0.0}


@pytest.mark.parametrize("normalizer", ["batch", "each"])
def test_validation_losses_are_those_of_a_subclass(tiny_cfg, normalizer):
    class OwnSSD(SSD):
        def losses(self, predictions, gt_instances):
            losses, divisor = super().losses(predictions, gt_instances)
            return {"loss_own": 3 * losses["loss_box_reg"], **losses}, divisor

    found = validation_losses(OwnSSD(tiny_cfg("MODEL.SSD.LOSS.NORMALIZER", normalizer)), [batch(3)])
    assert list(found) == ["loss_own", "loss_cls", "loss_box_reg", "total_loss"]
    assert found["loss_own"] == pytest.approx(3 * found["loss_box_reg"])
    assert found["total_loss"] == pytest.approx(found["loss_cls"] + 4 * found["loss_box_reg"])


def test_losses_and_pictures_are_written_and_change_nothing(tiny_cfg, tmp_path, assert_equal):
    ScriptedTrainer.script = [1.0, 1.0]
    plain = tiny_cfg()
    train(plain, ScriptedTrainer)
    assert not metrics(plain.OUTPUT_DIR, "validation/total_loss")
    assert not pictures(plain.OUTPUT_DIR)

    more = ["TEST.LOSS_PERIOD", 2, "VIS_PERIOD", 2, "OUTPUT_DIR", str(tmp_path / "more")]
    cfg = tiny_cfg(*more, "DATASETS.TEST", ("shapes_val",))
    trainer = train(cfg, ScriptedTrainer)
    for name in ("model", "trainer"):
        assert_equal(
            checkpoint(cfg, "model_final.pth")[name], checkpoint(plain, "model_final.pth")[name]
        )
    losses = {
        name: metrics(cfg.OUTPUT_DIR, f"validation/{name}")
        for name in ("loss_cls", "loss_box_reg", "total_loss")
    }
    assert all(set(values) == {1, 4} for values in losses.values()), "iteration 1 and the end"
    (final,) = Trainer.test_losses(cfg, trainer.model).values()
    assert final == pytest.approx({name: values[4] for name, values in losses.items()})
    (found,) = pictures(cfg.OUTPUT_DIR).values()
    assert [(x.step, x.width, x.height) for x in found] == [(i, 968, 4 * 488 - 8) for i in (1, 3)]


def pictures(folder):
    """{tag: pictures} of TensorBoard's file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow

    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return {tag: events.Images(tag) for tag in events.Tags()["images"]}


def test_validation_losses_are_of_the_averaged_weights(tiny_cfg):
    ScriptedTrainer.script = [1.0]
    cfg = tiny_cfg("SOLVER.EMA.ENABLED", True, "TEST.LOSS_PERIOD", 9)
    trainer = train(cfg, ScriptedTrainer)
    written = metrics(cfg.OUTPUT_DIR, "validation/total_loss")[4]
    averaged, trained = (
        Trainer.test_losses(cfg, model)["validation"]["total_loss"]
        for model in (trainer.evaluated_model, trainer.model)
    )
    assert written == pytest.approx(averaged) != pytest.approx(trained)


def test_losses_of_several_test_sets_have_their_names(tiny_cfg):
    cfg = tiny_cfg("DATASETS.TEST", ("shapes_val", "shapes_train"))
    losses = Trainer.test_losses(cfg, Trainer.build_model(cfg))["validation"]
    assert list(losses) == ["shapes_val", "shapes_train"]
    assert losses["shapes_val"]["total_loss"] != losses["shapes_train"]["total_loss"]


def test_validation_images_have_no_augmentation(tiny_cfg):
    """Expand and crop are on: two looks would differ."""
    cfg = tiny_cfg()
    model = Trainer.build_model(cfg)
    assert Trainer.test_losses(cfg, model) == Trainer.test_losses(cfg, model)


def test_pictures_show_ground_truth_on_the_left_and_detections_on_the_right(tiny_cfg):
    model = Trainer.build_model(tiny_cfg())
    metadata = Metadata(thing_classes=list("abcdef"))
    black = {"image": torch.zeros(3, 96, 96, dtype=torch.uint8)}
    boxes = Boxes(torch.tensor([[24.0, 24.0, 72.0, 72.0]]))
    black["instances"] = Instances((96, 96), gt_boxes=boxes, gt_classes=torch.tensor([1]))
    hook = TrainingPictures(1, model, metadata)
    picture = hook.draw([black])
    assert picture.shape == (3, 480, 968) and picture.dtype == np.uint8 and model.training
    edge = picture[:, 240, 116:125].max(axis=1)  # of the box, 5 times as large
    assert edge[0] > 100 > edge[2], "the second colour of Detectron2's map is an orange"
    assert not picture[:, :, 488:].any(), "an untrained model is sure of nothing"
    hook.SCORE = 0.0
    assert hook.draw([black])[:, :, 488:].any()
    black["instances"] = black["instances"][[]]
    assert not hook.draw([black])[:, :, :480].any()


def test_a_step_that_keeps_no_batch_has_no_pictures(tiny_cfg):
    trainer = Trainer(tiny_cfg("VIS_PERIOD", 1, "SOLVER.MAX_ITER", 1))
    trainer._trainer = SimpleTrainer(trainer.model, trainer.data_loader, trainer.optimizer)
    trainer.train()
    assert not trainer.storage._vis_data


@pytest.mark.parametrize("script, last", [
    ([10.0, 30.0, 20.0, 30.0, 7.0], 3),  # the best, two without a better one, the final one
    ([math.nan, math.nan, 7.0], 1),
    ([1.0, 0.0, 2.0, 1.0, 2.0, 7.0], 4),
    ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 5),  # to the end
])  # fmt: skip
def test_early_stop_ends_as_a_whole_training_does(tiny_cfg, script, last):
    cfg = tiny_cfg(*STOPPING, "SOLVER.MAX_ITER", 6, "TEST.EARLY_STOPPING.PATIENCE", 2)
    ScriptedTrainer.script, final = list(script), script[-1]
    seed_all_rng(cfg.SEED)
    trainer = ScriptedTrainer(cfg)
    assert trainer.train() == {"bbox": {"AP50": final}} and not ScriptedTrainer.script
    assert trainer.iter == trainer.max_iter == last + 1
    assert metrics(cfg.OUTPUT_DIR, "bbox/AP50")[last + 1] == final
    saved = checkpoint(cfg, "model_final.pth")
    assert saved["iteration"] == saved["trainer"]["iteration"] == last
    with open(f"{cfg.OUTPUT_DIR}/last_checkpoint") as file:
        assert file.read() == "model_final.pth"


def test_early_stop_of_a_resumed_run(tiny_cfg):
    """Stopped after iteration 1, it counts on; when it has stopped, only more patience helps."""

    def run(max_iter, patience, script, resume=True):
        more = ["SOLVER.MAX_ITER", max_iter, "TEST.EARLY_STOPPING.PATIENCE", patience]
        ScriptedTrainer.script = script
        trainer = train(tiny_cfg(*STOPPING, *more), ScriptedTrainer, resume)
        assert not ScriptedTrainer.script
        return trainer

    assert run(2, 3, [30.0, 20.0], resume=False).iter == 2
    trainer = run(9, 3, [20.0, 29.0, 30.0, 1.0])  # first that of the checkpoint once more
    assert (trainer.start_iter, trainer.iter) == (2, 4)
    for _ in range(2):
        trainer = run(9, 3, [1.0])
        assert trainer.start_iter == trainer.iter == 4
        assert checkpoint(trainer.cfg, "model_final.pth")["iteration"] == 3
    trainer = run(9, 4, [31.0, 1.0, 2.0, 3.0, 4.0])  # a new best, then four without
    assert (trainer.start_iter, trainer.iter) == (4, 9)


def test_an_evaluation_that_was_killed_is_repeated(tiny_cfg, tmp_path):
    """Best value and early stop are those of the run that nobody killed."""
    opts = [*STOPPING, "SOLVER.MAX_ITER", 9, "TEST.EARLY_STOPPING.PATIENCE", 2]
    opts += ["SOLVER.CHECKPOINT_PERIOD", 1, "OUTPUT_DIR"]

    def run(folder, script, resume=False):
        ScriptedTrainer.script = script
        cfg = tiny_cfg(*opts, str(tmp_path / folder))
        trainer = train(cfg, ScriptedTrainer, resume)
        assert not ScriptedTrainer.script
        best = json.loads((tmp_path / folder / "model_best.json").read_text())
        return trainer.iter, best

    iteration, best = expected = run("whole", [5.0, 9.0, 4.0, 3.0, 2.0])
    assert iteration == 4 and best["iteration"] == 1
    with pytest.raises(KeyboardInterrupt):
        run("killed", [5.0, KeyboardInterrupt()])
    assert run("killed", [9.0, 4.0, 3.0, 2.0], resume=True) == expected
    assert checkpoint(tiny_cfg(*opts, str(tmp_path / "killed")), "model_best.pth")["iteration"] == 1


def test_a_stopped_trainer_can_train_again(tiny_cfg):
    """As in a notebook, after Ctrl-C."""
    hook = GracefulStop(None)
    hook._note(signal.SIGINT, None)
    hook.before_train()
    hook.after_train()
    assert not hook._signal


def test_only_a_later_signal_stops_at_once(monkeypatch):
    """The launching process passes one to a whole job on, so that it comes twice."""
    now, raised = [100.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("signal.raise_signal", raised.append)
    hook = GracefulStop(None)
    for now[0], expected in ((100.0, []), (100.5, []), (101.5, [signal.SIGTERM])):
        hook._note(signal.SIGTERM, None)
        assert raised == expected


@pytest.mark.parametrize("opts", [
    "TEST.BEST_METRIC bbox/AP50", "TEST.EVAL_PERIOD 5", "TEST.EVAL_PERIOD 5 TEST.BEST_METRIC x"
])  # fmt: skip
def test_early_stopping_needs_a_metric_and_a_period(tiny_cfg, opts):
    with pytest.raises(ValueError, match="TEST.BEST_METRIC"):
        Trainer(tiny_cfg("TEST.EARLY_STOPPING.PATIENCE", 2, *opts.split()))


def test_two_processes_stop_together_and_share_the_validation_images(tiny_cfg, register, tmp_path):
    opts = [*STOPPING, "TEST.EARLY_STOPPING.PATIENCE", 1, "TEST.LOSS_PERIOD", 1]
    opts += ["SOLVER.MAX_ITER", 5, "TEST.IMS_PER_BATCH", 1, "MODEL.MOBILENET.NORM", "FrozenBN"]
    opts += ["MODEL.SSD.NORM", "FrozenBN"]
    tiny_cfg()  # registers the shapes
    name = register(DatasetCatalog.get("shapes_val")[:3], CLASSES)  # one process has two of them
    cfg = tiny_cfg(*opts, "DATASETS.TEST", (name,))

    def train_part(rank):
        ScriptedTrainer.script = [30.0, 20.0, 10.0] if rank == 0 else []
        trainer = train(cfg, ScriptedTrainer)
        assert trainer.iter == trainer.max_iter == 2
        model = trainer.evaluated_model
        for evaluate in (Trainer.test, Trainer.test_with_TTA, Trainer.test_losses):
            variances = [x for name, x in model.named_buffers() if "running_var" in name]
            if rank:
                variances[0].fill_(9.0)
            losses = evaluate(trainer.cfg, model)
            first, other = comm.all_gather(variances[0])
            assert torch.equal(first, other) and first[0] != 9, "both evaluate what is saved"
        (losses,) = losses.values()
        (tmp_path / f"losses{rank}.json").write_text(json.dumps(losses))

    in_two_processes(train_part, tmp_path)
    found = [json.loads((tmp_path / f"losses{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert metrics(cfg.OUTPUT_DIR, "validation/total_loss")[2] == found[0]["total_loss"]

    model = Trainer.build_model(cfg)
    model.load_state_dict(checkpoint(cfg, "model_final.pth")["model"])
    (alone,) = Trainer.test_losses(cfg, model).values()
    assert found[0] == pytest.approx(alone, rel=1e-6)


def test_wandb_gets_scalars_and_pictures_offline(tiny_cfg, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = tiny_cfg("WANDB.ENABLED", True, "VIS_PERIOD", 4, "WANDB.NAME", "a run of this test")
    ScriptedTrainer.script = [12.5]
    train(cfg, ScriptedTrainer)
    (folder,) = [x for x in os.scandir(f"{cfg.OUTPUT_DIR}/wandb") if x.name.startswith("offline")]
    (path,) = [x.path for x in os.scandir(folder) if x.name.endswith(".wandb")]
    with open(path, "rb") as file:
        data = file.read()
    for text in (b"loss_cls", b"bbox/AP50", b"12.5", b"a run of this test", b"BASE_LR"):
        assert text in data, text
    files = [name for _, _, names in os.walk(folder) for name in names]
    assert [name for name in files if name.endswith(".png")]
    assert pictures(cfg.OUTPUT_DIR), "TensorBoard gets them, too"


def test_wandb_that_is_not_installed_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="WANDB.ENABLED .* pip install wandb"):
        WandbWriter(str(tmp_path), "project", "", {})
