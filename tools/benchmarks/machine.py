"""What a process is asked for and gives, and the machine's rates. Imports little but torch."""

from dataclasses import dataclass, field
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import torch

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Work:
    """What is timed.

    Attributes:
        run: does it once.
        images: that one run handles.
        describe: after the last run: what came out, to be compared between contenders.
        queues: whether runs may be queued on the device without waiting for each.
        batches: of a loader, if runs take theirs from one.
    """

    run: Callable[[], object]
    images: int
    describe: Callable[[], Dict] = field(default=dict)
    queues: bool = False
    batches: Optional[Iterator] = None


@dataclass
class Spec:
    """What a process is asked for; plain values, so that it can be sent."""

    contender: str
    task: str
    case: str
    model: str
    dtype: str
    batch_size: int
    device: str
    threads: int
    workers: int
    folder: str
    opts: List[str]
    code: str = ""  # folder of another checkout, whose ssd is used


def arithmetic(device: str, dtype: str) -> Tuple[Callable, float]:
    """What a machine computes fastest, and its floating-point operations: on a GPU a product of two
    matrices of 8192 rows and columns, on a CPU a convolution (3×3, 512 channels, 8 maps of 38×38),
    a third faster there than a product."""
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # in fp32, as torch's convolutions do
        side = 8192
        a = torch.randn(side, side, device=device).to(TORCH[dtype])
        out = torch.empty_like(a)
        return lambda: torch.mm(a, a, out=out), 2.0 * side**3
    layout = {"dtype": TORCH[dtype], "memory_format": torch.channels_last}
    images = torch.randn(8, 512, 38, 38).to(**layout)
    weight = torch.randn(512, 512, 3, 3).to(**layout)
    flops = 2.0 * images.numel() * weight[0].numel()
    return lambda: torch.conv2d(images, weight, padding=1), flops


def copying(device: str) -> Tuple[Callable, float]:
    """A copy within the device's memory, of 128 MB on a CPU and 1 GB on a GPU, and the bytes that
    it reads and writes."""
    source = torch.ones(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * source.numel() * source.element_size()


def build(spec: Spec) -> Work:
    """Of "arithmetic" or "copy", which run in turns with the contenders."""
    if spec.contender == "arithmetic":
        run, flops = arithmetic(spec.device, spec.dtype)
        return Work(run, 1, lambda: {"flops": flops}, queues=True)
    run, moved = copying(spec.device)
    return Work(run, 1, lambda: {"bytes": moved}, queues=True)
