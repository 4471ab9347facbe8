"""The processes: each does its work when the parent asks for it, and waits otherwise."""

import contextlib
import math
import multiprocessing
import os
import platform
import resource
import signal
import sys
import time
import traceback
from typing import Dict, Iterator, List

from benchmarks.report import MACHINE

# Nothing else is imported before the number of threads and the path are set, and the parent stays
# small: what a process starts with would count as its memory.


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far.

    Where Linux tells, that of the program only: getrusage also counts what the process that
    started it held.
    """
    with contextlib.suppress(OSError):
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def set_up(threads: int, code: str = "") -> None:
    """Before anything large is imported: threads, and what ``import ssd`` and these tools find."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    tools = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path[:0] = [code or os.path.dirname(tools), tools]
    if code:  # an installed ssd would serve the modules that the other checkout lacks
        editable = "__editable___ssd"
        sys.meta_path[:] = [
            x for x in sys.meta_path if not getattr(x, "__module__", "").startswith(editable)
        ]
    multiprocessing.set_start_method(None, force=True)  # of loaders: the platform's, not ours
    import logging

    import torch

    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)


def contend(connection, spec: Dict, warmup: int, min_seconds: float) -> None:
    """Builds the work, runs it at "warm up" and at each "run", and tells about it at "finish".

    Every answer is a tuple: ("ready", images per run), ("time", seconds per run), ("done",
    description), or ("error", traceback).
    """
    os.setpgid(0, 0)  # if it dies, the system ends its loader's stopped processes
    sys.stdout = open(os.devnull, "w")  # COCO's tables
    try:
        set_up(spec["threads"], spec["code"])
        import torch

        from benchmarks.machine import Spec

        if spec["contender"] in MACHINE:
            from benchmarks.machine import build
        else:
            from benchmarks.contenders import build

        imports = peak_memory_mb()
        on_gpu = spec["device"] == "cuda"
        work = build(Spec(**spec))

        def run(count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                work.run()
                if on_gpu and not work.queues:
                    torch.cuda.synchronize()
            if on_gpu:
                torch.cuda.synchronize()
            return (time.perf_counter() - start) / count

        def receive() -> str:
            with _stopped(multiprocessing.active_children()):
                return connection.recv()

        connection.send(("ready", work.images))
        count, workers = 1, max(1, spec["workers"])
        while (message := receive()) != "finish":
            if message == "warm up":
                seconds = [run(1) for _ in range(warmup)][-1]
                if work.batches is not None:
                    for _ in range(2 * workers):  # read ahead while the network was warming up
                        next(work.batches)
                    seconds = run(workers)
                count = min(1000, math.ceil(min_seconds / seconds) or 1)
                if work.batches is not None:  # the processes may deliver theirs at the same time
                    count = math.ceil(count / workers) * workers
            else:
                seconds = run(count)
            connection.send(("time", seconds))
        peak = peak_memory_mb()
        memory = {"peak_mb": round(peak), "above_imports_mb": round(peak - imports)}
        if on_gpu:
            memory["gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
        info = {"images": work.images, "runs_per_round": count, "memory": memory}
        connection.send(("done", {**info, "found": work.describe()}))
    except Exception:
        connection.send(("error", traceback.format_exc()))


@contextlib.contextmanager
def _stopped(processes: List) -> Iterator[None]:
    """A loader's own processes: while others are timed they neither take cores nor read ahead."""
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)


def prepare(connection, args, folder: str, for_mmdet: bool) -> None:
    """Calls :func:`prepare_files` and answers with what that returns, or ("error", traceback)."""
    try:
        set_up(args.threads)
        connection.send(("done", prepare_files(args, folder, for_mmdet)))
    except Exception:
        connection.send(("error", traceback.format_exc()))


def prepare_files(args, folder: str, for_mmdet: bool) -> Dict:
    """Files and weights for all contenders, and the networks' costs.

    Args:
        args: of the command line.
    """
    from pathlib import Path

    import torch
    import torchvision
    from detectron2.modeling import build_model

    from benchmarks import inputs
    from benchmarks.cost import network_cost
    from benchmarks.definitions import config, definition, write_weights

    folder, device = Path(folder), args.device
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: torch finds no GPU")
    for name in args.models:
        config(name, device, *args.opts)  # a wrong key shows before all is measured
    count = args.images if {"data", "train-loop"} & set(args.tasks) else max(args.batch_sizes)
    found = {"torch": torch.__version__, "torchvision": torchvision.__version__, "models": {}}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    for name in args.models:
        sub, cfg = folder / name, config(name, "cpu")
        sub.mkdir()
        num_classes = cfg.MODEL.SSD.NUM_CLASSES
        found["images"] = inputs.write_images(sub, count, num_classes, not args.smooth_images)
        one, cost = definition(name), {}
        entry = {"torchvision": one.torchvision is not None, "mmdet": one.mmdet}
        if set(args.tasks) - {"data", "eval"}:
            model = build_model(cfg).eval()
            cost = network_cost(model)
            image = inputs.photographs(sub, 1)[0]
            entry["pairs"] = write_weights(name, image, sub, for_mmdet)
            entry["default_boxes"] = len(model.default_boxes)
            entry["num_classes"] = model.num_classes
        found["models"][name] = {**entry, "cost": cost}
    if "eval" in args.tasks:
        inputs.write_evaluation(folder, args.eval_images)
    return found
