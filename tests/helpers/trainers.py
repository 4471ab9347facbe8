"""Short runs for the tests of the engine and its hooks."""

import os

import torch
import torch.multiprocessing
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from ssd.engine import Trainer
from ssd.launch import end_process, leave_process_group


def in_two_processes(function, folder):
    """``function(rank)`` in each of two processes that are one job; ``folder`` is empty at first.

    They are forked, since a new process would import everything again.
    """
    arguments = (function, f"file://{folder}/init")
    torch.multiprocessing.start_processes(_join, arguments, 2, start_method="fork")


def _join(rank, function, init):
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    comm.create_local_process_group(2)
    function(rank)
    leave_process_group()
    end_process()


class ScriptedTrainer(Trainer):
    """A Trainer whose evaluations give the values of ``script``, one after the other, or raise."""

    script = []

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        value = cls.script.pop(0) if comm.is_main_process() else None
        if isinstance(value, BaseException):
            raise value
        return {"bbox": {"AP50": value}} if comm.is_main_process() else {}


def train(cfg, trainer_class=Trainer, resume=False):
    seed_all_rng(cfg.SEED)
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def checkpoint(cfg, name):
    return torch.load(os.path.join(cfg.OUTPUT_DIR, name), weights_only=True)
