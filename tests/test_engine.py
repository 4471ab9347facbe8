import json
import os
import shutil

import pytest
import torch
from detectron2.utils.env import seed_all_rng

from ssd.config import load_config
from ssd.engine import Trainer, argument_parser, draw_detections, launch, setup

PLAIN = (
    "INPUT.PHOTOMETRIC.ENABLED False INPUT.EXPAND.ENABLED False INPUT.IOU_CROP.ENABLED False "
    "INPUT.RANDOM_FLIP none"
).split()


class ScriptedTrainer(Trainer):
    """A Trainer whose evaluations give the values of ``script``, one after the other."""

    script = []

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {"bbox": {"AP50": cls.script.pop(0)}}


def train(cfg, trainer_class=Trainer, resume=False):
    seed_all_rng(cfg.SEED)
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def saved(cfg):
    return {name for name in os.listdir(cfg.OUTPUT_DIR) if name.endswith(".pth")}


def checkpoint(cfg, name):
    return torch.load(os.path.join(cfg.OUTPUT_DIR, name), weights_only=True)


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


def test_exploding_loss_stops_a_run(tiny_cfg):
    cfg = tiny_cfg("SOLVER.BASE_LR", 1e30, "SOLVER.CHECKPOINT_PERIOD", 1)
    with pytest.raises(FloatingPointError, match="iteration 1"):
        train(cfg)
    assert saved(cfg) == {"model_0000000.pth"}


def test_best_checkpoint_is_kept_also_across_a_resume(tiny_cfg):
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

    _, best = run(5, [29.0, float("nan")], resume=True)
    assert best["value"] == 30.0
    cfg, best = run(7, [31.0, 5.0], resume=True)
    assert (best["value"], best["iteration"]) == (31.0, 5)
    assert checkpoint(cfg, "model_best.pth")["iteration"] == 5

    _, best = run(3, [1.0, 2.0, 0.0], resume=False)  # a new run has no memory
    assert best["value"] == 2.0


def test_best_checkpoint_says_its_iteration_and_is_not_what_a_resume_takes(tiny_cfg):
    cfg = tiny_cfg("SOLVER.MAX_ITER", 2, "TEST.BEST_METRIC", "bbox/AP50")
    ScriptedTrainer.script = [7.0]
    train(cfg, ScriptedTrainer)
    best, final = checkpoint(cfg, "model_best.pth"), checkpoint(cfg, "model_final.pth")
    assert best["iteration"] == final["iteration"] == 1
    assert all(torch.equal(value, final["model"][key]) for key, value in best["model"].items())
    with open(f"{cfg.OUTPUT_DIR}/last_checkpoint") as file:
        assert file.read() == "model_final.pth"  # though model_best.pth was saved after it


def test_best_metric_of_an_evaluator_that_is_off_is_refused_at_once(tiny_cfg):
    with pytest.raises(ValueError, match="TEST.BEST_METRIC 'voc/mAP'.*TEST.EVALUATORS.*'coco'"):
        Trainer(tiny_cfg("TEST.BEST_METRIC", "voc/mAP"))


def test_best_metric_must_be_evaluated(tiny_cfg):
    cfg = tiny_cfg("SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1, "TEST.BEST_METRIC", "bbox/AP51")
    ScriptedTrainer.script = [1.0, 1.0]
    with pytest.raises(ValueError, match="TEST.BEST_METRIC 'bbox/AP51'.*bbox/AP50"):
        train(cfg, ScriptedTrainer)


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


def test_several_machines_need_an_address():
    args = argument_parser().parse_args(["--num-machines", "2"])
    with pytest.raises(ValueError, match="--dist-url"):
        launch(print, args)


def test_one_process_is_launched_in_place(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    args = argument_parser().parse_args([])
    seen = []
    launch(seen.append, args)
    assert seen == [args]


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
