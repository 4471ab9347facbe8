"""The side-by-side training with torchvision, for two iterations on BCCD."""

import json
import shutil
import sys
from pathlib import Path

import compare_learning as tool
import pytest
from commands import run
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TOOL = str(ROOT / "tools/compare_learning.py")


@pytest.fixture(scope="module")
def results(bccd, tmp_path_factory):
    """Folder of the results of one run of each."""
    folder = tmp_path_factory.mktemp("learning")
    args = "--contenders torchvision ours --seeds 3 --iterations 2 --device cpu".split()
    run(TOOL, "--output", folder, *args, DETECTRON2_DATASETS=bccd)
    return folder


@pytest.mark.parametrize("name", ["torchvision", "ours"])
def test_result_of_a_run(results, name):
    result = json.loads((results / f"{name}_3.json").read_text())
    assert (result["name"], result["seed"], result["iterations"]) == (name, 3, 2)
    assert result["device"] == "cpu" and result["seconds"] > 0
    assert all(0 < loss < 100 for losses in result["losses"] for loss in losses)
    assert [len(losses) for losses in result["losses"]] == [2, 2]
    (evaluation,) = result["evaluations"]
    assert evaluation["iteration"] == 2
    classes = {f"AP-{name}" for name in ("RBC", "WBC", "Platelets")}
    assert {"AP", "AP50", *classes} <= evaluation.keys()
    assert all(0 <= evaluation[key] <= 100 for key in ("AP", "AP50", *classes))


def test_contenders_start_alike(results):
    """They differ only in which of equal default boxes an object takes."""
    theirs, ours = (
        json.loads((results / f"{name}_3.json").read_text())["losses"][0]
        for name in ("torchvision", "ours")
    )
    assert ours == pytest.approx(theirs, rel=0.01)


def test_runs_of_other_lengths_are_not_mixed(results, tmp_path, monkeypatch, capsys):
    shutil.copytree(results, tmp_path / "runs")
    result = json.loads((results / "ours_3.json").read_text())
    result["evaluations"][0]["iteration"] = 1
    (tmp_path / "runs" / "ours_4.json").write_text(json.dumps(result))
    command = [TOOL, "--output", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", [*command, "--plot", str(tmp_path / "x.png")])
    with pytest.raises(ValueError, match="ours's runs were evaluated at different"):
        tool.main()
    arguments = "--contenders ours --seeds 4 --iterations 2".split()
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    with pytest.raises(SystemExit):
        tool.main()
    assert "is of 1 iterations, not 2" in capsys.readouterr().err


def test_runs_that_are_there_are_plotted(results, tmp_path, monkeypatch, capsys):
    arguments = ["--output", str(results), "--plot", str(tmp_path / "learning.png")]
    monkeypatch.setattr(sys, "argv", [TOOL, *arguments])
    tool.main()
    text = capsys.readouterr().out
    assert "torchvision, its recipe: AP50" in text and "ours, torchvision's recipe: AP50" in text
    assert "ours, own recipe" not in text
    with Image.open(tmp_path / "learning.png") as image:
        assert image.size == (1100, 440)
        assert len(image.convert("RGB").getcolors(1 << 20)) > 100  # something is drawn
