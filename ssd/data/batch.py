"""How a batch gets from a loader's worker to the main process: in one file in memory."""

import io
import os
import pickle
from multiprocessing import reduction
from typing import List

import torch

__all__ = ["Batch"]


class Batch(list):
    """A list of dicts whose tensors travel between processes in one file in memory.

    By itself each tensor costs the receiver a connection, a mapping and its release: for a batch of
    32 images, their boxes and their classes more time than a GPU needs for the training step.
    Docker's small /dev/shm isn't used. It arrives as a plain list.
    """


_in_files = True  # until one can't be handed over: each DupFd that fails would keep its file


def _send(batch: Batch) -> tuple:
    global _in_files
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(list(batch))
    # in falling size of their elements, so that each is aligned
    order = sorted(enumerate(pickler.tensors), key=lambda x: -x[1].element_size())
    layout = [(number, x.dtype, x.shape, x.numel() * x.element_size()) for number, x in order]
    try:
        flat = [x.contiguous().as_strided((x.numel(),), (1,)) for _, x in order]
        parts = [x.view(torch.uint8).numpy() for x in flat]
    except RuntimeError:  # not plain memory
        return list, (list(batch),)
    try:
        if _in_files:
            with open(os.memfd_create("batch"), "wb") as file:
                for part in parts:
                    file.write(part)
                file.seek(0)
                return _receive, (stream.getvalue(), layout, reduction.DupFd(file.fileno()))
    except (AttributeError, OSError):  # not Linux, not allowed, no socket: TMPDIR is too long
        _in_files = False
    return _receive, (stream.getvalue(), layout, b"".join(parts))  # through the pipe itself


reduction.ForkingPickler.register(Batch, _send)  # for processes only, not for files and copies


class _Pickler(pickle.Pickler):
    """Writes numbers in the place of tensors, which it keeps."""

    def __init__(self, stream):
        super().__init__(stream)
        self.tensors = []

    def persistent_id(self, x):
        if type(x) is not torch.Tensor or x.requires_grad:
            return None
        if x.device.type != "cpu" or x.layout != torch.strided:
            return None
        self.tensors.append(x)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream, tensors: List[torch.Tensor]):
        super().__init__(stream)
        self.tensors = tensors

    def persistent_load(self, number: int) -> torch.Tensor:
        return self.tensors[number]


def _receive(data: bytes, layout: List[tuple], source) -> list:
    sizes = [size for *_, size in layout]
    # a GPU reads pinned memory by itself, and torch doesn't pin it once more
    pin_memory = torch.cuda.is_initialized()
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pin_memory)
    with io.BytesIO(source) if isinstance(source, bytes) else open(source.detach(), "rb") as file:
        file.readinto(packed.numpy())
    tensors = [None] * len(layout)
    for part, (number, dtype, shape, _) in zip(packed.split(sizes), layout):
        tensors[number] = part.view(dtype).view(shape)
    return _Unpickler(io.BytesIO(data), tensors).load()
