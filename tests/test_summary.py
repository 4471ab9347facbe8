"""OUTPUT_DIR/README.md of trainings and evaluations."""

import json
import sys

import pytest
import torch

from ssd.engine import Trainer
from ssd.summary import write_summary

RESULTS = {
    "bbox": {"AP": 53.642, "APs": float("nan"), "AP-a-b": 1.0, "AP50-a-b": 2.5, "AP-x|y": 3.0},
    "voc": {"mAP": 7.0},
}


class ScriptedTrainer(Trainer):
    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return RESULTS


def test_tables_of_results_by_task_and_class(tiny_cfg, tmp_path):
    cfg = tiny_cfg("OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", "somewhere/model.pth")
    assert write_summary(cfg, RESULTS) == str(tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Evaluation on shapes_val\n\n|  |  |\n|---|---|\n| command | ")
    tables = """\
## bbox

| AP | APs |
|---|---|
| 53.64 | – |

| class | AP | AP50 |
|---|---|---|
| a-b | 1.00 | 2.50 |
| x\\|y | 3.00 | – |

## voc

| mAP |
|---|
| 7.00 |
"""
    assert text.endswith(f"\n\n{tables}")
    for fact in (
        "| weights | `somewhere/model.pth` |", "| evaluated on | shapes_val (4 images) |",
        "SSD on build_mobilenetv2_backbone, input 96x96, 6 classes", "CPU", torch.__version__,
    ):  # fmt: skip
        assert fact in text, fact

    write_summary(cfg, {"shapes_val": {"bbox": {"AP": 1.0}}, "other": {"bbox": {"AP": 2.0}}})
    text = (tmp_path / "README.md").read_text()
    assert "## shapes_val, bbox\n" in text and "## other, bbox\n" in text and "voc" not in text


def test_training_says_what_it_was_and_no_evaluation_replaces_it(tiny_cfg, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_net.py", "MODEL.SSD.X", "a b"])
    opts = "TEST.EVAL_PERIOD 1 TEST.BEST_METRIC bbox/AP TEST.EARLY_STOPPING.PATIENCE 2"
    cfg = tiny_cfg(*opts.split(), "SOLVER.EMA.ENABLED", True, "SOLVER.MAX_ITER", 8)
    trainer = ScriptedTrainer(cfg)
    path = write_summary(cfg, trainer.train(), trainer)
    with open(path) as file:
        text = file.read()
    assert text.startswith("# Training on shapes_train\n")
    for fact in (
        "| command | `train_net.py MODEL.SSD.X 'a b'` |", "| trained on | shapes_train (16 images)",
        "| iterations | 3 of batch 4 (epochs: 0.8), stopped early; planned: 8 |",
        "| best checkpoint | model_best.pth: bbox/AP 53.64, iteration 0 |", "random weights",
        "model_final.pth, the averaged weights (SOLVER.EMA)", "| time with evaluations | 0:00:",
        f"| learning rate | {cfg.SOLVER.BASE_LR:g}, {cfg.SOLVER.LR_SCHEDULER_NAME} |",
    ):  # fmt: skip
        assert fact in text, fact
    assert write_summary(cfg, RESULTS) is None
    with open(path) as file:
        assert file.read() == text


def test_best_checkpoint_of_another_training_is_not_named(tiny_cfg):
    cfg = tiny_cfg("SOLVER.MAX_ITER", 1)
    trainer = ScriptedTrainer(cfg)
    results = trainer.train()
    with open(f"{cfg.OUTPUT_DIR}/model_best.json", "w") as file:
        json.dump({"metric": "bbox/AP", "value": 99.0, "iteration": 5}, file)
    with open(write_summary(cfg, results, trainer)) as file:
        assert "99.00" not in file.read()


@pytest.mark.parametrize("results", [{}, {"bbox": {}}])
def test_without_annotations_there_is_no_table(tiny_cfg, tmp_path, results):
    with open(write_summary(tiny_cfg("OUTPUT_DIR", str(tmp_path)), results)) as file:
        assert "## " not in file.read()
