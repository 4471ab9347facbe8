"""The processes of a training: one, several of this machine or more, or one of torchrun's.

Ctrl-C, SIGTERM and a hangup are for the processes that train (:class:`ssd.hooks.GracefulStop`);
the launching one passes them on and waits.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
from typing import Callable, List

import torch
from detectron2.engine import default_argument_parser
from detectron2.engine import launch as launch_processes
from detectron2.utils import comm

__all__ = ["argument_parser", "end_process", "launch", "leave_process_group", "stop_signals"]


def stop_signals() -> List[int]:
    """Those that end a training: a hangup, too, unless the process was started by nohup."""
    hangup = getattr(signal, "SIGHUP", None)
    ends = hangup and signal.getsignal(hangup) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([hangup] if ends else [])]


def argument_parser():
    """Detectron2's standard arguments, with a free port so that two runs don't collide."""
    parser = default_argument_parser()
    parser.set_defaults(dist_url="auto")
    return parser


def launch(main: Callable, args) -> None:
    """Runs ``main(args)`` in ``--num-gpus`` processes per machine, or as a process of ``torchrun``.

    Processes use NCCL on GPUs and gloo without. One of ``torchrun`` ends here.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _join_torchrun()
        main(args)
        leave_process_group()
        end_process()
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ValueError("--num-machines > 1 needs --dist-url tcp://MACHINE0:PORT, got 'auto'")
    if args.num_gpus > 1 and torch.cuda.is_available():
        if args.num_gpus > (found := torch.cuda.device_count()):
            raise ValueError(f"--num-gpus {args.num_gpus}, but this machine has {found} GPUs")
    handlers, stops = {}, stop_signals()
    if args.num_gpus * args.num_machines > 1:
        handlers = {number: signal.signal(number, _forward) for number in stops}
    try:
        launch_processes(
            _run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args),
        )
    except torch.multiprocessing.ProcessExitedException as error:
        for number in stops:  # while it trained, or before
            if error.exit_code in (128 + number, -number):
                raise SystemExit(128 + number) from None
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _run(main: Callable, args) -> None:
    if comm.get_world_size() == 1:
        return main(args)
    signal.signal(signal.SIGINT, _exit_at_once)
    # it was started by "spawn", which workers would inherit: they would import all anew
    multiprocessing.set_start_method(None, force=True)
    try:
        main(args)
        leave_process_group()
    except SystemExit as error:  # of a stop that was asked for
        if not isinstance(error.code, int):
            raise
        end_process(error.code)
    end_process()


def _forward(number: int, frame) -> None:
    """The launching process leaves a signal to those it launched, and waits for them."""
    for process in multiprocessing.active_children():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(process.pid, number)


def leave_process_group() -> None:
    """Waits for the others and leaves: a process that exits earlier can make them abort."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        comm.synchronize()
        torch.distributed.destroy_process_group()


def end_process(code: int = 0) -> None:
    """Ends a launched process that has done its work, but for Python's own clearing up.

    A DistributedDataParallel keeps threads of its group, which at times abort the process there.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_at_once(number: int, frame) -> None:
    raise SystemExit(128 + number)


def _join_torchrun() -> None:
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if has_gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()
