"""tools/benchmark.py on a tiny model: the same results on every side, and its arithmetic."""

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import benchmark
import numpy as np
import pytest
import torch
from benchmarks import contenders, inputs, machine, profiling, report, worker
from benchmarks.contenders.torchvision import TorchvisionFiles
from commands import run
from detectron2.data import DatasetCatalog, MetadataCatalog

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(folder, what prepare_files says of it)."""
    folder = tmp_path_factory.mktemp("benchmark")
    tasks = "--tasks losses data eval --models tiny"
    args = benchmark.parse(f"{tasks} --eval-images 12 --images {IMAGES}".split())
    return folder, worker.prepare_files(args, str(folder), for_mmdet=False)


@pytest.fixture
def work(prepared, monkeypatch):
    """A function (contender, task, …) → its work, after one run."""
    monkeypatch.setenv("DETECTRON2_DATASETS", ".")  # which Ours replaces

    def build(contender, task, case="", dtype="fp32", opts=(), runs=1):
        folder = prepared[0] / ("" if task == "eval" else "tiny")
        done = contenders.build(
            machine.Spec(
                contender=contender, task=task, case=case, model="tiny", dtype=dtype,
                batch_size=2, device="cpu", threads=1, workers=0, folder=str(folder),
                opts=list(opts),
            )
        )  # fmt: skip
        for _ in range(runs):
            done.run()
        return done

    yield build
    if "eval" in DatasetCatalog:
        DatasetCatalog.pop("eval")
        MetadataCatalog.pop("eval")


def test_preparing_says_what_the_images_and_the_network_are(prepared):
    _, found = prepared
    assert found["images"].startswith(f"{IMAGES} ") and "640x480" in found["images"]
    model = found["models"]["tiny"]
    assert model["default_boxes"] == 6 * (36 + 9 + 4 + 1 + 1 + 1) and model["num_classes"] == 5
    # calibrated to a quarter of all (box, class) pairs
    assert model["pairs"] == pytest.approx(model["default_boxes"] * 5 / 4, rel=0.02)
    assert model["cost"]["flops"] > 2e6 and model["cost"]["values"] > model["cost"]["weights"] / 10


def test_predictions_are_the_same_on_both_sides(work):
    ours, theirs = (work(name, "predict").describe() for name in ("ours", "torchvision"))
    assert ours == pytest.approx(theirs, rel=1e-5) and ours["detections_per_image"] > 100


def test_reduced_precision_is_used(work):
    plain, reduced = (
        work("ours", "train-step", dtype=dtype).describe() for dtype in ("fp32", "bf16")
    )
    assert plain != reduced
    assert reduced["loss_cls"] == pytest.approx(plain["loss_cls"], rel=0.1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", ["2000 pairs", "worst"])
def test_postprocessing_is_given_the_same(work, case, dtype):
    ours, theirs = (
        work(name, "postprocess", case, dtype).describe() for name in ("ours", "torchvision")
    )
    if dtype == "fp32":
        assert ours["pairs_per_image"] == pytest.approx(theirs["pairs_per_image"], abs=2)
    for key in ours:
        assert ours[key] == pytest.approx(theirs[key], rel=0.02 if dtype == "fp32" else 0.05)


def test_in_the_worst_case_48_classes_of_each_box_pass():
    logits, offsets = inputs.worst_case(3, 90, 2)
    scores = logits.softmax(dim=-1)[..., :-1]
    assert ((scores > 0.02).sum(dim=-1) == 48).all() and scores.max() < 0.0215
    assert offsets.shape == (2, 3, 4)


def test_losses_are_the_same_on_both_sides(work):
    ours, theirs = (work(name, "train-step", runs=2) for name in ("ours", "torchvision"))
    # but for which of equally good default boxes an object takes
    assert ours.describe() == pytest.approx(theirs.describe(), rel=0.01)
    assert ours.describe().keys() == {"loss_cls", "loss_box_reg"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_losses_by_themselves_are_those_of_the_step(work, dtype):
    step, losses = (work("ours", task, dtype=dtype) for task in ("train-step", "losses"))
    assert losses.describe() == pytest.approx(step.describe(), rel=1e-6)
    assert losses.images == step.images == 2


def test_losses_come_with_gradients_of_all_outputs(work, monkeypatch):
    found, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: found.append(grad(*args)))
    work("ours", "losses")
    (gradients,) = found
    assert len(gradients) == 12 and all(x.isfinite().all() for x in gradients)
    for side in (gradients[:6], gradients[6:]):  # logits, offsets
        assert any(x.any() for x in side)


@pytest.mark.parametrize("name", ["ours", "torchvision"])
def test_training_loop_reads_its_files(work, name):
    losses = work(name, "train-loop").describe()
    assert all(math.isfinite(x) and x > 0 for x in losses.values())


def test_options_reach_our_config(work):
    model = work("ours", "predict", opts=["TEST.DETECTIONS_PER_IMAGE", 3])
    assert model.describe()["detections_per_image"] == 3


@pytest.mark.parametrize(
    "name", ["ours", "torchvision (PIL)", "torchvision (tensors)", "cv2.imread (memory reused)"]
)
def test_data_reads_every_file_before_one_again(work, prepared, monkeypatch, name):
    if name == "torchvision (PIL)" and torch.__version__ < "2.5" and np.__version__ >= "2":
        pytest.skip("this torchvision's hue of PIL images fails with NumPy 2")
    data = work(name, "data")  # 32 samples
    found = data.describe()
    assert found == {"files_read": 32, "distinct_files": IMAGES}
    for path in (prepared[0] / "tiny/images").iterdir():
        path.rename(path.with_suffix(".away"))
    try:  # nothing was kept
        with pytest.raises((FileNotFoundError, RuntimeError, AttributeError, AssertionError)):
            data.run()
            assert not name.startswith("cv2.imread")  # which gives None
    finally:
        for path in (prepared[0] / "tiny/images").iterdir():
            path.rename(path.with_suffix(".jpg"))


def test_files_differ(prepared):
    files = [path.read_bytes() for path in (prepared[0] / "tiny/images").iterdir()]
    assert len(files) == len(set(files)) == IMAGES


@pytest.mark.parametrize("backend", ["PIL", "tensors"])
@pytest.mark.parametrize("preset", ["ssd", "ssdlite"])
def test_torchvisions_samples_have_the_input_size(prepared, backend, preset):
    records = inputs.read_records(prepared[0] / "tiny")
    files = TorchvisionFiles(records, (96, 96), preset, backend)
    torch.manual_seed(0)
    image, target = files[0]
    assert image.shape == (3, 96, 96) and image.dtype == torch.uint8
    assert target["boxes"].shape == (len(target["labels"]), 4)
    assert len(target["labels"]) and target["boxes"].max() <= 96


def test_evaluations_agree(work):
    """Detectron2 takes pycocotools where its own extension isn't built."""
    found = []
    for name in ("ours", "pycocotools", "detectron2"):
        found.append(work(name, "eval").describe())
        if name != "pycocotools":
            DatasetCatalog.pop("eval")
            MetadataCatalog.pop("eval")
    ours, theirs, detectron2s = found
    assert ours == pytest.approx(theirs, rel=1e-12) and 5 < ours["AP"] < 95
    assert detectron2s == pytest.approx(theirs, rel=1e-12)


def result(task="predict", **samples):
    """A case whose contenders have these samples; "ours_bf16" is "ours bf16"."""
    found = {}
    for name, seconds in samples.items():
        name = name.replace("_", " ")
        dtype = name.split(" ")[-1] if name.endswith(tuple(report.BYTES)) else ""
        found[name] = {
            "samples": seconds, "images": 1 if name.startswith(report.MACHINE) else 4,
            "dtype": dtype, "memory": {"peak_mb": 100}, "found": {},
        }  # fmt: skip
    return {
        "task": task, "model": "m", "batch_size": 4, "case": "", "contenders": found,
        "disagreement": None,
    }  # fmt: skip


COST = {"flops": 1e9, "values": 1e6, "weights": 1e6}
REPORT = {"models": {"m": {"cost": COST, "default_boxes": 1000, "num_classes": 95}}}


def test_ratios_are_of_medians():
    case = result(
        ours_fp32=[0.2, 9.0, 0.1], torchvision_fp32=[0.6, 0.5, 0.7],
        ours_bf16=[0.1], torchvision_bf16=[0.3], mmdet_fp32=[0.4],
    )  # fmt: skip
    summary = report.summarise(case, REPORT)
    assert summary["ours fp32"]["seconds"] == 0.2
    assert summary["ours fp32"]["images_per_second"] == pytest.approx(20)
    times = {name: x["times_faster"] for name, x in summary.items()}
    assert times["ours fp32"].pop("before") is None
    assert times["ours fp32"] == pytest.approx({"torchvision": 3, "mmdet": 2})
    assert times["torchvision fp32"]["torchvision"] == 1
    assert times["torchvision fp32"]["mmdet"] == pytest.approx(0.4 / 0.6)
    assert times["ours bf16"]["torchvision"] == pytest.approx(3)
    assert times["ours bf16"]["mmdet"] is None
    assert times["ours bf16"]["torchvision fp32"] == pytest.approx(6)
    assert times["ours bf16"]["mmdet fp32"] == pytest.approx(4)


def test_the_faster_of_torchvisions_chains_counts():
    case = result("data", ours=[0.1], **{"torchvision (PIL)": [0.4], "torchvision (tensors)": [1]})
    case["contenders"]["cv2.imread (memory reused)"] = {
        **case["contenders"]["ours"],
        "samples": [0.1],
        "images": 8,
    }
    ours = report.summarise(case, REPORT)["ours"]
    assert ours["times_faster"]["torchvision"] == pytest.approx(4)
    assert ours["of_limit"] == pytest.approx(0.5)  # decoding takes half of it per image


@pytest.mark.parametrize("rate", ["arithmetic", "matmul"])  # as older files have it
def test_limits_follow_from_rates_measured_in_turns(rate):
    case = result(ours_fp32=[0.2], copy=[0.5], **{f"{rate}_fp32": [0.1, 0.2, 0.3]})
    case["contenders"][f"{rate} fp32"]["found"] = {"flops": 8e9}
    case["contenders"]["copy"]["found"] = {"bytes": 4e9}
    assert report.machine_rates(case["contenders"]) == {"fp32": 4e10, "copy": 8e9}
    ours = report.summarise(case, REPORT)["ours fp32"]
    assert ours["limit"] == {"seconds": pytest.approx(4 * 1e9 / 4e10), "by": "arithmetic"}
    assert ours["of_limit"] == pytest.approx(0.5)
    slow = report.network_limit(COST, {"fp32": 4e10, "copy": 1e8}, "fp32", 4)
    assert slow == {"seconds": pytest.approx(4 * 5e6 / 1e8), "by": "copy"}
    training = report.network_limit(COST, {"bf16": 4e10, "copy": 1e12}, "bf16", 4, training=True)
    assert training["seconds"] == pytest.approx(0.3)


@pytest.mark.parametrize("task, times", [("postprocess", 1), ("losses", 2)])
def test_outputs_are_read_and_of_losses_gradients_written(task, times):
    case = result(task, ours_fp32=[1.0], ours_bf16=[1.0], copy=[1.0])
    case["contenders"]["copy"]["found"] = {"bytes": 4e6}
    limit = report.case_limit(case, REPORT, "ours fp32")
    assert limit == {"seconds": times * 4 * 1000 * (95 + 1 + 4) * 4 / 4e6, "by": "copy"}
    assert report.case_limit(case, REPORT, "ours bf16")["seconds"] == limit["seconds"] / 2


def test_disagreement_is_the_largest_relative_one():
    case = result(ours_fp32=[1], torchvision_fp32=[1], ours_bf16=[1])
    case["contenders"]["ours fp32"]["found"] = {"a": 99, "b": 10}
    case["contenders"]["torchvision fp32"]["found"] = {"a": 100, "b": 8, "c": 1}
    assert report.disagreement(case) == pytest.approx(0.25)
    case["contenders"]["torchvision fp32"]["found"] = {}
    assert report.disagreement(case) is None


def test_shares_of_a_task_are_those_of_its_parts():
    def case(task, seconds, batch_size=8, case="", name="ours bf16"):
        contenders = {name: {"samples": seconds}, "torchvision bf16": {"samples": [9.0]}}
        return {
            "task": task, "model": "m", "batch_size": batch_size, "case": case,
            "contenders": contenders,
        }  # fmt: skip

    results = [
        case("predict", [1.9, 2.0, 5.0]), case("network", [1.0]), case("network", [1.5], 1),
        case("postprocess", [0.5], case="2000 pairs"), case("postprocess", [1.8], case="worst"),
        case("train-loop", [4.0]),
    ]  # fmt: skip
    assert report.shares(results) == [
        "- m, batch 8, ours bf16: `network` takes 50 % of `predict`",
        "- m, batch 8, ours bf16: `postprocess` takes 25 % of `predict`",
    ]
    results += [case("train-step", [3.8]), case("losses", [0.19])]
    assert report.shares(results)[2:] == [
        "- m, batch 8, ours bf16: `train-step` takes 95 % of `train-loop`",
        "- m, batch 8, ours bf16: `losses` takes 5 % of `train-step`",
    ]


def test_what_waits_for_a_gpu_is_found_on_a_cpu():
    x = torch.arange(4.0)

    def run():
        x[x > 1].sum().item()
        x.tolist()
        x.unique().numpy()
        x + 1

    found = profiling._called_lines(run)
    assert sorted(line.split(": ")[1] for line in found) == sorted(
        ["_local_scalar_dense", "index by a mask", "tolist", "_unique2", "numpy"]
    )
    assert all(f"{__file__}:" in line for line in found) and found.total() == 5


def test_a_loop_is_as_slow_as_its_loader(tmp_path):
    """Not as what was read ahead while others were timed; an image takes 0.1 s, a step less."""
    slow = """
import time
_read = read_image
def read_image(*args):
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    return _read(*args)
"""
    shutil.copytree(ROOT / "ssd", tmp_path / "ssd", ignore=shutil.ignore_patterns("*.pyc"))
    (tmp_path / "labs").symlink_to(ROOT / "labs")
    with open(tmp_path / "ssd/data/files.py", "a") as file:
        file.write(slow)
    arguments = (
        "--tasks train-loop --models tiny --batch-sizes 2 --rounds 3 --warmup 1 --workers 2 "
        f"--images {IMAGES} --smooth-images --threads 1 --contenders mmdet --before {tmp_path} "
        f"--min-seconds 0 --json {tmp_path / 'out.json'}"
    ).split()
    run("tools/benchmark.py", *arguments, cwd=ROOT)
    (case,) = json.loads((tmp_path / "out.json").read_text())["results"]
    found = case["contenders"]["before fp32"]
    assert found["runs_per_round"] == 2 and sorted(found["samples"])[1] > 0.08


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(report, what was printed) of the command on the tiny model."""
    path = tmp_path_factory.mktemp("report") / "out.json"
    arguments = (
        "--tasks predict --models tiny --batch-sizes 2 --rounds 1 --warmup 1 --min-seconds 0 "
        f"--threads 1 --json {path}"
    ).split()
    printed = run("tools/benchmark.py", *arguments, cwd=ROOT)
    return json.loads(path.read_text()), printed


def test_report_holds_what_a_reader_needs(written):
    found, text = written
    assert found["hardware"]["cpu"] and found["hardware"]["cores"] >= 1
    assert found["hardware"]["threads"] == 1 and found["versions"]["torch"] == torch.__version__
    assert found["commit"] and found["command"].startswith("python tools/benchmark.py --tasks")
    assert "--json" not in found["command"]
    assert found["models"]["tiny"]["pairs"] > 300
    (case,) = found["results"]
    contenders = case["contenders"]
    assert contenders["mmdet fp32"] == {"dtype": "fp32", "not_run": "has no such model"}
    for name in ("ours fp32", "torchvision fp32"):
        x = contenders[name]
        assert len(x["samples"]) == 1 and x["samples"][0] > 0 and x["images"] == 2
        assert x["memory"]["peak_mb"] > x["memory"]["above_imports_mb"] > 0
        assert f"| tiny, batch 2 | {name} | " in text
    assert case["disagreement"] < 1e-4
    summary = case["summary"]
    ratio = contenders["torchvision fp32"]["samples"][0] / contenders["ours fp32"]["samples"][0]
    assert summary["ours fp32"]["times_faster"]["torchvision"] == pytest.approx(ratio)
    assert summary["ours fp32"]["of_limit"] > 0
    assert "| tiny, batch 2 | mmdet fp32 | has no such model |" in text


def test_tables_come_from_a_json_file_again(written, tmp_path, capsys, monkeypatch):
    found, text = written
    path = tmp_path / "report.json"
    path.write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--markdown", str(path)])
    benchmark.main()
    assert capsys.readouterr().out == text


def test_cases_of_the_arguments():
    args = benchmark.parse("--tasks postprocess eval --models ssd300 --batch-sizes 1 8".split())
    found = [str(case) for case in benchmark.cases(args)]
    assert found[:2] == ["postprocess, ssd300, batch 1, 2000 pairs"] + [
        "postprocess, ssd300, batch 1, worst"
    ]
    assert len(found) == 5 and "eval" in found[-1]
    (losses,) = benchmark.cases(
        benchmark.parse("--tasks losses --models tiny --batch-sizes 8 --dtypes bf16".split())
    )
    assert list(losses.contenders) == ["ours bf16", "copy"]
    worst = list(
        benchmark.cases(benchmark.parse("--tasks postprocess --models tiny --dtypes bf16".split()))
    )[-1]
    assert {dtype for _, dtype in worst.contenders.values()} == {"bf16", ""}
    args = benchmark.parse(
        f"--tasks predict --dtypes fp32 bf16 --contenders ours --before {ROOT}".split()
    )
    names = list(next(iter(benchmark.cases(args))).contenders)
    assert names[:4] == ["ours fp32", "before fp32", "ours bf16", "before bf16"]
    assert "torchvision fp32" not in names and "arithmetic bf16" in names


def test_another_checkout_is_not_mixed_with_an_installed_one(tmp_path):
    (tmp_path / "old/ssd").mkdir(parents=True)
    (tmp_path / "old/ssd/__init__.py").touch()
    (tmp_path / "finder.py").write_text(  # as setuptools' for an editable install
        "import importlib.util\n"
        "class Finder:\n"
        "    __module__ = '__editable___ssd_1_finder'\n"
        "    def find_spec(name, *_):\n"
        f"        path = {str(ROOT)!r} + '/' + name.replace('.', '/') + '.py'\n"
        "        return importlib.util.spec_from_file_location(name, path)\n"
        "    find_spec = staticmethod(find_spec)\n"
    )
    (tmp_path / "look.py").write_text(
        "import importlib.util, sys\n"
        "from benchmarks import worker\n"
        "from finder import Finder\n"
        "sys.meta_path.append(Finder)\n"
        "worker.set_up(1, sys.argv[1])\n"
        "print(importlib.util.find_spec('ssd.memory'))\n"
    )
    environment = {"PYTHONPATH": ROOT / "tools"}
    assert run(tmp_path / "look.py", tmp_path / "old", **environment) == "None\n"


def test_a_task_without_contenders_is_left_out(capsys):
    args = benchmark.parse("--tasks losses --models tiny --contenders torchvision".split())
    assert not list(benchmark.cases(args))
    assert capsys.readouterr().err == "losses: none of --contenders takes part\n"


def test_failing_process_is_told_not_waited_for():
    process = benchmark.Process(os._exit)  # the pipe's end is no exit code: TypeError
    assert process.ask() is None and "exit code 1" in process.error
    process.close()


class Dying(dict):
    """A contender's spec: it dies while its loader's process, which has its pipe, is stopped."""

    def __getitem__(self, key):
        if not (loader := os.fork()):
            os.kill(os.getpid(), signal.SIGSTOP)
        os.waitpid(loader, os.WUNTRACED)
        os._exit(3)


def test_contender_that_dies_is_told_and_leaves_nothing():
    process = benchmark.Process(worker.contend, Dying(), 1, 0.0)
    assert process.ask() is None and "exit code 3" in process.error
    process.close()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--dtypes fp16", "--dtypes fp16 needs --device cuda"),
        ("--models ssd301", "'ssd301' is neither one of"),
        ("--rounds 0", "--rounds must be at least 1"),
        ("--batch-sizes 8 0", "--batch-sizes must be at least 1"),
        ("--before /nowhere", "--before /nowhere is no checkout"),
        ("--json /nowhere/a.json", "the folder of /nowhere/a.json doesn't exist"),
        ("--workers -1", "--workers must be at least 0"),
        ("--contenders mmdetection", "invalid choice: 'mmdetection'"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(arguments.split())
    assert message in capsys.readouterr().err
