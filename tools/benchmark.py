#!/usr/bin/env python
"""Measures this project's speed and memory beside torchvision's and MMDetection's.

    python tools/benchmark.py --tasks predict train-step --models ssd300 --batch-sizes 1 8
    python tools/benchmark.py --tasks predict --device cuda --dtypes fp32 bf16 --json out.json
    python tools/benchmark.py --markdown out.json

Each contender is a process of its own, and so is each of its dtypes. All of a case run in turns,
once per round, so that whatever else the machine does hits all alike. Printed are medians over the
rounds, how many times faster each is than the peers (× torchvision: the ratio of the medians), and
how near to the limit: the convolutions' FLOPs over the machine's measured rate (of a convolution,
on a GPU of a matrix product), bytes over its measured rate of copying where that is longer, for
data the time to decode the JPEGs. MMDetection takes part where it is installed.

Tasks:
  data         640x480 JPEG file -> augmented uint8 tensor and boxes; one process, one thread
  train-step   a batch in memory -> losses, gradients, a step of SGD
  losses       its part between raw outputs and their gradients: matching, mining, loss; no peers
  train-loop   train-step with a data loader (--workers)
  predict      decoded 640x480 uint8 images -> detections
  network      normalised images on the device -> raw outputs
  postprocess  raw outputs -> detections: of about 2000 (box, class) pairs over the threshold, and
               in the worst case, 48 classes of every default box just over 0.02
  eval         COCO's evaluation of --eval-images images with 100 detections each
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

from benchmarks import report as reporting
from benchmarks import worker

ROOT = Path(__file__).resolve().parents[1]
NETWORK_TASKS = ("train-step", "train-loop", "predict", "network")
OUTPUT_TASKS = ("losses", "postprocess")
TASKS = ("data", *NETWORK_TASKS, *OUTPUT_TASKS, "eval")
MODELS = ("ssd300", "ssdlite_mobilenetv3", "ssdlite_mobilenetv2", "ssd512")
CONTENDERS = {
    "data": (
        "ours", "before", "torchvision (PIL)", "torchvision (tensors)", "mmdet", "cv2.imread",
        "cv2.imread (memory reused)",
    ),
    "losses": ("ours", "before"),
    "eval": ("ours", "before", "pycocotools", "detectron2"),
}  # fmt: skip


@dataclasses.dataclass
class Case:
    """What is compared; ``contenders`` are (name, dtype) by label."""

    task: str
    model: str
    batch_size: int
    case: str
    contenders: Dict[str, Tuple[str, str]]

    def __str__(self) -> str:
        parts = (self.task, self.model, self.batch_size and f"batch {self.batch_size}", self.case)
        return ", ".join(str(x) for x in parts if x)


def cases(args) -> Iterator[Case]:
    """All cases that the arguments ask for."""
    for task in args.tasks:
        names = CONTENDERS.get(task, ("ours", "before", "torchvision", "mmdet"))
        names = [x for x in names if x != "before" or args.before]
        if args.contenders:
            chosen = (*args.contenders, "before", "cv2.imread")
            names = [x for x in names if x.split(" ")[0] in chosen]
        if not names:
            print(f"{task}: none of --contenders takes part", file=sys.stderr)
            continue
        dtypes = args.dtypes if task in (*NETWORK_TASKS, *OUTPUT_TASKS) else [""]
        contenders = {reporting.label(x, d): (x, d) for d in dtypes for x in names}
        if task in NETWORK_TASKS:
            contenders |= {reporting.label("arithmetic", d): ("arithmetic", d) for d in dtypes}
        if task in (*NETWORK_TASKS, *OUTPUT_TASKS):
            contenders["copy"] = ("copy", "")
        models = args.models[:1] if task == "eval" else args.models
        batch_sizes = [0] if task in ("data", "eval") else args.batch_sizes
        details = {"postprocess": ("2000 pairs", "worst"), "eval": (f"{args.eval_images} images",)}
        for key in itertools.product(models, batch_sizes, details.get(task, ("",))):
            yield Case(task, *key, contenders)


def why_not(name: str, case: Case, models: Dict) -> str:
    """Why a contender can't take part; empty if it can."""
    group = name.split(" ")[0]
    if group == "mmdet":
        if case.model in models and not models[case.model]["mmdet"]:
            return "has no such model"
        return "" if installed("mmdet") else "not installed"
    if group == "torchvision" and not models[case.model]["torchvision"]:
        return "has no such model"
    if group == "detectron2" and not installed("detectron2._C"):
        return "not installed"
    return ""


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


class Process:
    """A worker of its own, asked and answered through a pipe."""

    def __init__(self, target, *args):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *args), daemon=False)
        self._process.start()
        theirs.close()
        self.error = ""

    def ask(self, message: str = ""):
        """What it answers; None, and ``error`` is set, if it failed."""
        try:
            if message:
                self.connection.send(message)
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            kind, value = "error", f"the process ended with exit code {self._process.exitcode}"
        if kind == "error":
            self.error = value
            return None
        return value

    def close(self) -> None:
        self.connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()


def measure(case: Case, args, folder: str, models: Dict) -> Dict:
    """Runs all contenders of a case in turns."""
    results, processes = {}, {}
    try:
        for label, (name, dtype) in case.contenders.items():
            results[label] = {"dtype": dtype}
            if reason := why_not(name, case, models):
                results[label]["not_run"] = reason
                continue
            spec = {
                "contender": name, "task": case.task, "case": case.case, "model": case.model,
                "dtype": dtype or "fp32", "batch_size": max(1, case.batch_size),
                "device": "cpu" if case.task in ("data", "eval") else args.device,
                "threads": args.threads, "workers": args.workers,
                "folder": folder if case.task == "eval" else os.path.join(folder, case.model),
                "opts": args.opts, "code": args.before if name == "before" else "",
            }  # fmt: skip
            processes[label] = Process(worker.contend, spec, args.warmup, args.min_seconds)
        for process in processes.values():  # which get ready at the same time
            process.ask()
        for process in processes.values():
            if not process.error:
                process.ask("warm up")
        samples = {label: [] for label in processes}
        order = list(processes)
        for number in range(args.rounds):
            shift = number % len(order)
            for label in order[shift:] + order[:shift]:
                if not processes[label].error:
                    seconds = processes[label].ask("run")
                    if seconds is not None:
                        samples[label].append(seconds)
        for label, process in processes.items():
            done = None if process.error else process.ask("finish")
            if process.error:
                results[label]["error"] = process.error
            else:
                results[label].update(samples=samples[label], **done)
    finally:
        for process in processes.values():
            process.close()
    result = {**vars(case), "contenders": results}
    result["disagreement"] = reporting.disagreement(result)
    return result


def hardware(threads: int) -> Dict:
    name = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return {"cpu": name, "cores": cores(), "threads": threads}


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def git(*args: str) -> str:
    """What git prints about this checkout; empty if it fails or isn't installed."""
    command = ["git", "-C", str(ROOT), *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def run(args) -> Dict:
    """All cases; returns the report."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        process = Process(worker.prepare, args, folder, installed("mmdet"))
        found = process.ask()
        process.close()
        if process.error:
            raise SystemExit(f"preparing failed:\n{process.error}")
        gpu = {"gpu": found["gpu"]} if "gpu" in found else {}
        shown = {k: v for k, v in vars(args).items() if k not in ("json", "markdown", "profile")}
        report = {
            "command": command_line(sys.argv[1:]),
            "commit": git("rev-parse", "--short", "HEAD") or "unknown",
            "changed": bool(git("status", "--porcelain")),
            "date": time.strftime("%Y-%m-%d"),
            "hardware": {**hardware(args.threads), **gpu},
            "versions": {k: found[k] for k in ("torch", "torchvision", "cuda") if k in found},
            "environment": {k: os.environ.get(k) for k in ("OMP_WAIT_POLICY",)},
            "settings": shown,
            "images": found["images"],
            "models": found["models"],
            "results": [],
        }
        for case in cases(args):
            print(f"{time.strftime('%H:%M:%S')} {case}", file=sys.stderr, flush=True)
            result = measure(case, args, folder, report["models"])
            for label, x in result["contenders"].items():
                if "error" in x:
                    print(f"{label}:\n{x['error']}", file=sys.stderr)
            report["results"].append(result)
            result["summary"] = reporting.summarise(result, report)
            write(args.json, report)
    return report


def command_line(arguments: List[str]) -> str:
    """To repeat it, without where the results went."""
    arguments = list(arguments)
    if "--json" in arguments:
        at = arguments.index("--json")
        del arguments[at : at + 2]
    return shlex.join(["python", "tools/benchmark.py", *arguments])


def write(path: str, report: Dict) -> None:
    if path:
        Path(path).write_text(json.dumps(report, indent=1) + "\n")


def parse(argv: List[str]):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help=f"of {MODELS}, or a lab's name"
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", choices=reporting.BYTES, default=["fp32"])
    parser.add_argument(
        "--contenders",
        nargs="+",
        help="only these; default: all that can take part",
        choices=("ours", "torchvision", "mmdet", "cv2.imread", "pycocotools", "detectron2"),
    )
    parser.add_argument(
        "--before", default="", metavar="FOLDER", help="another checkout of ours, as a contender"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=cores(), help="default: all cores")
    parser.add_argument("--workers", type=int, default=2, help="of the data loader (train-loop)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2, help="runs before the rounds")
    parser.add_argument(
        "--min-seconds", type=float, default=0.2, help="a round repeats short work for this long"
    )
    parser.add_argument("--images", type=int, default=320, help="JPEG files")
    parser.add_argument(
        "--smooth-images", action="store_true",
        help="files of about 30 KB instead of 160 KB, as COCO's: no noise is added",
    )  # fmt: skip
    parser.add_argument("--eval-images", type=int, default=500)
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE … for our config")
    parser.add_argument("--json", default="", metavar="FILE", help="write all samples there")
    parser.add_argument("--markdown", metavar="FILE", help="only print the tables of a --json file")
    parser.add_argument(
        "--profile", metavar="FILE",
        help="instead of measuring: a chrome trace of our first task, model, batch size and dtype; "
        "prints the costliest operations and what synchronises host and device",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if "fp16" in args.dtypes and args.device == "cpu":
        parser.error("--dtypes fp16 needs --device cuda; on a CPU there is bf16")
    for name in ("rounds", "warmup", "threads", "images", "eval_images", "batch_sizes"):
        value = getattr(args, name)
        if (min(value) if name == "batch_sizes" else value) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    labs = ROOT / "labs"
    for name in args.models:
        if name not in (*MODELS, "tiny") and not (labs / name / "config.yaml").is_file():
            parser.error(f"--models: {name!r} is neither one of {MODELS} nor a lab")
    if args.before:
        args.before = os.path.abspath(args.before)
        if not os.path.isfile(os.path.join(args.before, "ssd", "__init__.py")):
            parser.error(f"--before {args.before} is no checkout: ssd/ isn't there")
    for path in filter(None, (args.json, args.profile)):
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            parser.error(f"the folder of {path} doesn't exist")
    if args.workers < 0:
        parser.error(f"--workers must be at least 0, got {args.workers}")
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    if args.markdown:
        print(reporting.markdown(json.loads(Path(args.markdown).read_text())), end="")
        return
    # as train_net.py does; the threads of waiting contenders would take the others' cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if args.profile:
        from benchmarks.profiling import profile

        profile(args)
        return
    print(reporting.markdown(run(args)), end="")


if __name__ == "__main__":
    main()
