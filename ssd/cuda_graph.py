"""CUDA graphs: many operations on a GPU by one launch."""

import logging
import threading
import warnings
from typing import Callable, List, Tuple

import torch
from torch import Tensor

__all__ = ["CudaGraph"]

logger = logging.getLogger(__name__)
Function = Callable[..., Tuple[Tensor, ...]]


class CudaGraph:
    """Calls a function of CUDA tensors by one launch instead of one per operation.

    For each combination of shapes the first call records a graph of the function, which is always
    the same. Results stay valid until the next call. What can't be recorded runs as it is, and the
    log says why. Graphs share memory, where smaller batches have room: the first of a larger batch
    releases all before. Copies record anew.

    Attributes:
        turn: a lock that threads hold from a call until they have used its results.
    """

    turn = threading.RLock()  # of all graphs: a recording changes settings of the process

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """Drops what is recorded, as when the weights are elsewhere."""
        self._graphs, self._largest, self._pool, self._stream = {}, 0, None, None

    def __reduce__(self):
        return CudaGraph, ()

    def __call__(self, function: Function, *args: Tensor) -> Tuple[Tensor, ...]:
        if not args[0].is_cuda:  # the model has been moved
            return function(*args)
        # a graph's inputs are written again in later calls, which torch.inference_mode's can't be
        with torch.cuda.device(args[0].device), torch.inference_mode(False), torch.no_grad():
            return self._replay(function, args)

    def _replay(self, function: Function, args: Tuple[Tensor, ...]) -> Tuple[Tensor, ...]:
        key = tuple((x.shape, x.dtype) for x in args)
        if key not in self._graphs:
            stream, size = torch.cuda.current_stream(), args[0].numel()
            if size > self._largest:
                self.forget()
                torch.cuda.empty_cache()
                self._largest = size
            try:
                self._graphs[key] = self._record(function, args)
            except RuntimeError as error:
                torch.cuda.set_stream(stream)  # not the recording one
                logger.warning("TEST.CUDA_GRAPH isn't used for %s: %s", key, error)
                self._graphs[key] = None
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    self._largest = 0  # of what holds memory
        if self._graphs[key] is None:
            return function(*args)
        graph, inputs, outputs = self._graphs[key]
        for static, x in zip(inputs, args):
            static.copy_(x)
        graph.replay()
        return outputs

    def _record(self, function: Function, args: Tuple[Tensor, ...]):
        inputs = [x.clone() for x in args]
        stream = self._stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what is chosen, compiled or allocated at the first runs
                function(*inputs)
            self._check_that_nothing_waits(function, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads (a loader's, the compiler's) may allocate meanwhile
        with torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            outputs = function(*inputs)
        self._pool = graph.pool()
        return graph, inputs, outputs

    def _check_that_nothing_waits(self, function: Function, inputs: List[Tensor]) -> None:
        """Before the recording: one that fails breaks torch's generators and allocator."""
        mode = torch.cuda.get_sync_debug_mode()
        caught, own = [], threading.get_ident()

        def note(message, *_, **__):
            if threading.get_ident() == own:  # other threads may wait for their results
                caught.append(str(message))

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            torch.cuda.set_sync_debug_mode("warn")
            try:
                function(*inputs)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        if any("called a synchronizing" in x for x in caught):
            raise RuntimeError("it waits for the GPU")
