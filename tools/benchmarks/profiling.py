"""Where our time goes: a trace, the costliest operations, and what stops the device's queue."""

import argparse
import collections
import tempfile
import traceback
import warnings
from pathlib import Path

from benchmarks import worker

# Operations that wait for the device; on a CPU they show where a GPU would be waited for.
_SYNCHRONISING = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")


def profile(args) -> None:
    """Prints and writes what ``--profile`` asks for; measures in this process."""
    worker.set_up(args.threads)
    import torch
    from torch.profiler import ProfilerActivity

    from benchmarks.contenders import build
    from benchmarks.machine import Spec

    task, on_gpu = args.tasks[0], args.device == "cuda"
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        first = {key: getattr(args, key)[:1] for key in ("tasks", "models", "batch_sizes")}
        first = argparse.Namespace(**{**vars(args), **first})
        worker.prepare_files(first, folder, for_mmdet=False)
        work = build(
            Spec(
                contender="ours", task=task, case="2000 pairs", model=args.models[0],
                dtype=args.dtypes[0], batch_size=args.batch_sizes[0], device=args.device,
                threads=args.threads, workers=args.workers, opts=args.opts,
                folder=folder if task == "eval" else str(Path(folder, args.models[0])),
            )
        )  # fmt: skip
        for _ in range(args.warmup):
            work.run()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        with torch.profiler.profile(activities=activities, record_shapes=True) as trace:
            work.run()
            if on_gpu:
                torch.cuda.synchronize()
        trace.export_chrome_trace(args.profile)
        averages = trace.key_averages()
        by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        print(f"The ten costliest operations of {task} (trace: {args.profile}):")
        print(averages.table(sort_by=by, row_limit=10, max_name_column_width=60))
        counts = {x.key: x.count for x in averages if x.key in _SYNCHRONISING}
        print(f"Operations that wait for a device: {counts or 'none'}")
        lines = _warned_lines(work.run) if on_gpu else _called_lines(work.run)
        for line, count in lines.most_common():
            print(f"  {count} × {line}")


def _warned_lines(run) -> collections.Counter:
    """Python lines of the synchronisations that CUDA's debug mode warns of."""
    import torch

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "synchroniz" in str(w.message)]
    return collections.Counter(f"{w.filename}:{w.lineno}" for w in found)


def _called_lines(run) -> collections.Counter:
    """Python lines of the operations of a CPU run that would synchronise on a GPU."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten
    waiting = (
        aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten._unique2,
        aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave,
    )  # fmt: skip
    indexing = (aten.index, aten.index_put_, aten.index_put)
    reading = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)  # no operations on a CPU
    counter = collections.Counter()

    class WatchReading(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in reading:
                counter[f"{_caller()}: {function.__name__}"] += 1
            return function(*args, **(kwargs or {}))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            packet = function.overloadpacket
            by_mask = packet in indexing and any(
                x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
            )
            if packet in waiting or by_mask:
                name = f"{packet.__name__}{' by a mask' if by_mask else ''}"
                counter[f"{_caller()}: {name}"] += 1
            return function(*args, **(kwargs or {}))

    with Watch(), WatchReading():
        run()
    return counter


def _caller() -> str:
    """The innermost line outside torch."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        if "/torch/" not in frame.filename and "benchmarks/profiling" not in frame.filename:
            return f"{frame.filename}:{frame.lineno} ({frame.line})"
    return "?"
