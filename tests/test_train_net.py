"""The commands of the README as users give them: in a lab's folder, in processes of their own."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback

import pytest
import torch
from detectron2.utils.env import seed_all_rng

from ssd.engine import Trainer
from ssd.launch import argument_parser

TIMEOUT = 120  # seconds that one command may take on a busy machine
RUN = "SOLVER.MAX_ITER 60 SOLVER.CHECKPOINT_PERIOD 3 DATALOADER.NUM_WORKERS 1"
EVALUATION = "TEST.EVALUATORS ['coco','voc'] TEST.AUG.ENABLED True TEST.AUG.CROPS [1,2]"
# BatchNorm's statistics are each process's own; without it any number of processes is equal.
SHARED = (
    "MODEL.MOBILENET.NORM FrozenBN "
    "MODEL.SSD.IN_FEATURES ['stage3','stage5','conv2'] MODEL.SSD.NORM FrozenBN "
    "SOLVER.BASE_LR 0.003"
)


class Command:
    """A running train_net.py; its output goes to a file."""

    def __init__(self, repo, datasets_folder, opts, output, *flags, launcher=()):
        self.output = output
        output.mkdir(exist_ok=True)
        number = len(list(output.glob("stdout*")))
        self._stdout = output / f"stdout{number}.txt"
        command = [sys.executable, *launcher, "../../train_net.py", "--config-file", "config.yaml"]
        environment = {"DETECTRON2_DATASETS": str(datasets_folder), "PYTHONUNBUFFERED": "1"}
        with open(self._stdout, "w") as file:
            self._process = subprocess.Popen(
                [*command, *flags, *opts, "OUTPUT_DIR", str(output)],
                cwd=repo / "labs" / "quickstart",
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self):
        """Waits for its end and returns the exit code and all that it printed."""
        try:
            code = self._process.wait(TIMEOUT)
        finally:
            self.stop()
        return code, self._stdout.read_text()

    def wait_for_checkpoint(self, after=-1):
        """Waits for the first checkpoint of a later iteration than ``after``."""
        end = time.monotonic() + TIMEOUT
        while not any(n > after for n in checkpoints(self.output)):
            assert self._process.poll() is None, self._stdout.read_text()[-3000:]
            assert time.monotonic() < end, self._stdout.read_text()[-3000:]
            time.sleep(0.005)

    def kill(self):
        self._process.kill()
        self._process.wait()
        self.stop()

    def send(self, number):
        """A signal to all processes, as a terminal sends Ctrl-C and a scheduler SIGTERM."""
        os.killpg(self._process.pid, number)

    def stop(self):
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


@pytest.fixture(scope="module")
def start(repo, datasets_folder, tiny_opts):
    """A function (OPTS, output folder, flags, launcher) → Command; all are ended in the end."""
    commands = []

    def run(opts, output, *flags, launcher=()):
        opts = [*tiny_opts, *opts.split()]
        commands.append(Command(repo, datasets_folder, opts, output, *flags, launcher=launcher))
        return commands[-1]

    yield run
    for command in commands:
        command.stop()


def checkpoints(output):
    """Iterations that have a checkpoint."""
    return sorted(int(p.stem[6:]) for p in output.glob("model_0*.pth"))


def read_checkpoint(path):
    return torch.load(path, weights_only=True)


def copypaste(text):
    return re.findall(r"copypaste: (.*)", text)


def first_iteration(text):
    return int(re.search(r"Starting training from iteration (\d+)", text)[1])


@pytest.fixture(scope="module")
def whole_run(start, tmp_path_factory):
    """Folder and printed text of a run without interruption."""
    output = tmp_path_factory.mktemp("whole")
    opts = f"{RUN} {EVALUATION} TEST.VIS_IMAGES 2 TEST.LOSS_PERIOD 20"
    code, text = start(opts, output).wait()
    assert code == 0, text[-3000:]
    return output, text


def test_run_leaves_checkpoints_metrics_log_and_pictures(whole_run):
    output, text = whole_run
    assert checkpoints(output) == list(range(2, 60, 3))
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert any("total_loss" in line for line in lines)
    metrics = {key: value for line in lines for key, value in line.items()}
    assert {"bbox/AP50", "bbox/AP50-star", "voc/mAP", "loss_cls", "loss_box_reg"} <= set(metrics)
    assert {"bbox_TTA/AP50", "voc_TTA/mAP", "validation/total_loss"} <= set(metrics)
    assert len(list(output.glob("events.out.tfevents*"))) == 1
    assert len(list((output / "detections" / "shapes_val").glob("*.jpg"))) == 2
    assert (output / "config.yaml").is_file()
    text = (output / "README.md").read_text()
    assert text.startswith("# Training on shapes_train\n") and "--config-file config.yaml" in text
    assert re.findall("## (.*)", text) == ["bbox", "voc", "bbox_TTA", "voc_TTA"]


def test_log_shows_the_messages_of_this_package(whole_run):
    output, text = whole_run
    for part in ("Saving checkpoint to", "VOC AP of shapes_val", "Wrote 2 pictures"):
        assert part in text and part in (output / "log.txt").read_text()


def test_eval_only_gives_the_numbers_of_the_training_run(whole_run, start, tmp_path):
    output, trained = whole_run
    opts = f"MODEL.WEIGHTS {output}/model_final.pth {EVALUATION}"
    opts += " TEST.EXPECTED_RESULTS [['bbox','AP',-1.0,0.5]]"
    code, text = start(opts, tmp_path, "--eval-only").wait()
    assert code == 1 and "Result verification failed" in text, text[-3000:]
    assert len(copypaste(text)) == 12 and copypaste(text) == copypaste(trained)
    results = "inference/shapes_val/coco_instances_results.json"
    detections = json.loads((tmp_path / results).read_text())
    assert detections and detections == json.loads((output / results).read_text())
    assert not list(tmp_path.glob("*.pth"))
    tables = [(folder / "README.md").read_text() for folder in (output, tmp_path)]
    assert tables[1].startswith("# Evaluation on shapes_val\n")
    assert len({table[table.index("## ") :] for table in tables}) == 1


def test_killed_and_interrupted_run_resumes_to_the_same_weights(
    whole_run, start, tmp_path, assert_equal
):
    killed = start(RUN, tmp_path)
    killed.wait_for_checkpoint(after=2)  # so the first one is finished, with its tag
    killed.kill()
    last = int((tmp_path / "last_checkpoint").read_text()[6:-4])
    for path in tmp_path.glob("model_0*.pth"):
        read_checkpoint(path)  # each is whole
    assert last in (checkpoints(tmp_path)[-1], checkpoints(tmp_path)[-1] - 3)

    interrupted = start(RUN, tmp_path, "--resume")
    interrupted.wait_for_checkpoint(after=checkpoints(tmp_path)[-1])
    interrupted.send(signal.SIGINT)
    code, text = interrupted.wait()
    assert code == 130, text[-3000:]
    assert first_iteration(text) == last + 1
    assert "Traceback" not in text
    assert re.search(r"Stopped after iteration \d+; continue with --resume", text)
    last = checkpoints(tmp_path)[-1]
    assert last < 59 and not (tmp_path / "model_final.pth").exists()
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{last:07d}.pth"

    hung_up = start(RUN, tmp_path, "--resume")
    hung_up.wait_for_checkpoint(after=last)
    hung_up.send(signal.SIGHUP)
    code, text = hung_up.wait()
    assert code == 129 and "Traceback" not in text, text[-3000:]
    last = checkpoints(tmp_path)[-1]

    code, text = start(RUN, tmp_path, "--resume").wait()
    assert code == 0, text[-3000:]
    assert first_iteration(text) == last + 1
    resumed = read_checkpoint(tmp_path / "model_final.pth")
    expected = read_checkpoint(whole_run[0] / "model_final.pth")
    assert resumed["iteration"] == 59
    for key in ("model", "trainer"):  # the trainer's holds momentum and schedule
        assert_equal(resumed[key], expected[key], key)


def test_processes_give_the_result_of_one_and_stop_together(start, tiny_cfg, tmp_path):
    opts = f"{SHARED} SOLVER.MAX_ITER 3"
    endless = f"{SHARED} SOLVER.MAX_ITER 100000 SOLVER.CHECKPOINT_PERIOD 3 DATALOADER.NUM_WORKERS 1"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    # at the same time: they must not meet at one port
    stopped = start(endless, tmp_path / "stopped", "--num-gpus", "2")
    runs = [
        start(opts, tmp_path / "launched", "--num-gpus", "2"),
        start(opts, tmp_path / "torchrun", launcher=torchrun),
    ]
    stopped.wait_for_checkpoint()
    stopped.send(signal.SIGTERM)

    cfg = tiny_cfg(*opts.split(), "OUTPUT_DIR", str(tmp_path / "one"))
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    weights = read_checkpoint(tmp_path / "one" / "model_final.pth")["model"]
    assert max((weights[key] - before[key]).abs().max() for key in weights) > 1e-3
    for run in runs:
        code, text = run.wait()
        assert code == 0, text[-3000:]
        assert "World size: 2" in text
        both, one = (last_losses(folder) for folder in (run.output, tmp_path / "one"))
        assert both == pytest.approx(one, rel=1e-5)
        found = read_checkpoint(run.output / "model_final.pth")["model"]
        for key, value in weights.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5, msg=key)

    code, text = stopped.wait()
    last = checkpoints(tmp_path / "stopped")[-1]
    assert (tmp_path / "stopped" / "last_checkpoint").read_text() == f"model_{last:07d}.pth"
    assert read_checkpoint(tmp_path / "stopped" / f"model_{last:07d}.pth")["iteration"] == last
    assert last % 10 == 9  # the processes agree every 10 iterations
    assert code == 143 and "Traceback" not in text, text[-3000:]


def last_losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    line = next(line for line in reversed(lines) if "total_loss" in line)
    assert line["iteration"] == 2
    return [line[key] for key in ("total_loss", "loss_cls", "loss_box_reg")]


def test_evaluation_takes_the_last_checkpoint_with_resume(repo, tiny_cfg, tiny_opts, tmp_path):
    cfg = tiny_cfg("SOLVER.MAX_ITER", 1)
    Trainer(cfg).train()
    main = runpy.run_path(str(repo / "train_net.py"))["main"]
    weights, other = f"{cfg.OUTPUT_DIR}/model_final.pth", str(tmp_path / "other")

    def evaluate(output, *more):
        lab = str(repo / "labs" / "quickstart" / "config.yaml")
        opts = [*tiny_opts, "OUTPUT_DIR", output, *more]
        main(argument_parser().parse_args(["--config-file", lab, "--eval-only", "--resume", *opts]))
        with open(f"{output}/log.txt") as file:
            return file.read()

    warning = "--resume: no checkpoint in {}, MODEL.WEIGHTS is evaluated"
    text = evaluate(cfg.OUTPUT_DIR)
    assert f"Loading from {weights}" in text and warning.format(cfg.OUTPUT_DIR) not in text
    assert warning.format(other) in evaluate(other, "MODEL.WEIGHTS", weights)


@pytest.mark.parametrize("arguments, last_line", [
    ("--config-file config.yaml SOLVER.BASE_LRR 1",
     r"KeyError: .unknown config key SOLVER.BASE_LRR in the command line; did you mean .*BASE_LR"),
    ("--config-file confg.yaml",
     r"FileNotFoundError: --config-file 'confg.yaml' does not exist .*quickstart"),
    ("--config-file config.yaml --eval-only",
     r"ValueError: evaluation needs weights: MODEL.WEIGHTS is empty"),
    ("--config-file config.yaml MODEL.WEIGHTS absent.pth",
     r"FileNotFoundError: MODEL.WEIGHTS 'absent.pth' does not exist .*quickstart"),
    ("--config-file config.yaml DATASETS.TEST ('shapes_vall',)",
     r"ValueError: DATASETS.TEST: data set 'shapes_vall' is neither .* did you mean shapes_val"),
])  # fmt: skip
def test_mistakes_end_with_a_clear_last_line(
    repo, datasets_folder, tmp_path, tiny_opts, monkeypatch, arguments, last_line
):
    monkeypatch.chdir(repo / "labs" / "quickstart")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_folder))
    opts = [*arguments.split(), *tiny_opts, "OUTPUT_DIR", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_net.py", *opts])
    with pytest.raises(Exception) as error:
        runpy.run_path(str(repo / "train_net.py"), run_name="__main__")
    assert re.match(last_line, traceback.format_exception_only(error.value)[-1])
