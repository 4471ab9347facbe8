"""Makes a trained model fast for inference, without changing what it computes."""

import copy
import functools
import logging
import threading
import warnings
import weakref
from typing import Callable, Dict, Iterator, List, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ssd.checks import check_choice
from ssd.memory import keep_freed_memory
from ssd.modeling import SSD
from ssd.modeling.blocks import BATCH_NORMS, StridedConv2d
from ssd.modeling.postprocessing import never_waits

__all__ = ["CudaGraph", "compile_network", "fold_batch_norm", "optimize"]

logger = logging.getLogger(__name__)


def optimize(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """The model for inference: a copy in evaluation mode, or itself if nothing can be done to it.

    BatchNorm goes into the convolutions in front of it; with ``MODEL.COMPILE`` the network is
    compiled, and with ``TEST.DTYPE`` it runs in that type. Default boxes, scores and detections
    stay in float32. On GPUs a CUDA graph holds everything between a batch and its detections
    (``TEST.CUDA_GRAPH``), if NMS needn't wait for the GPU, as with more than 512 detections per
    image. On CPUs the process keeps memory that it frees.

    Args:
        model: an SSD, also wrapped in DistributedDataParallel; any other model is returned itself,
            without the wrapper.

    Raises:
        ValueError: ``TEST.DTYPE`` isn't known.
    """
    model = getattr(model, "module", model)
    dtypes = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    check_choice("TEST.DTYPE", cfg.TEST.DTYPE, dtypes)
    if not isinstance(model, SSD):
        return model
    on_gpu = model.device.type == "cuda"
    if not on_gpu:
        keep_freed_memory()
    dtype = dtypes[cfg.TEST.DTYPE]
    graph = (
        cfg.TEST.CUDA_GRAPH
        and on_gpu
        and never_waits(len(model.default_boxes) * model.num_classes, cfg.TEST.DETECTIONS_PER_IMAGE)
    )
    if not (cfg.MODEL.COMPILE or dtype or graph or any(_normed_convolutions(model))):
        return model
    model = copy.deepcopy(model).eval().requires_grad_(False)
    fold_batch_norm(model)
    if dtype:
        model.inference_dtype = dtype
        for module in model.modules():
            if isinstance(module, nn.Conv2d):  # once; autocast would do it at every run
                for weight in module.parameters(recurse=False):
                    weight.data = weight.to(dtype)
    if cfg.MODEL.COMPILE:
        compile_network(model)
    elif on_gpu:
        fuse_relu(model)
    if graph:
        # not the model itself: a cycle would keep its memory until the garbage collector comes
        model.infer = CudaGraph(functools.partial(type(model).infer, weakref.proxy(model)))
    return model


class CudaGraph:
    """A function of CUDA tensors, as one launch per call instead of one per operation.

    For each combination of shapes the first call records a graph. Results stay valid until the next
    call. What can't be recorded runs as it is, and the log says why. Graphs share memory, where
    smaller batches have room: the first of a larger batch releases all before. Copies record anew.

    Attributes:
        turn: a lock that threads hold from a call until they have used its results.
    """

    turn = threading.RLock()  # of all graphs: one of each couldn't be copied with its model

    def __init__(self, function: Callable[..., Tuple[Tensor, ...]]):
        self._function = function
        self.forget()

    def forget(self) -> None:
        """Drops what is recorded, as when the weights are elsewhere."""
        self._graphs, self._largest, self._pool, self._stream = {}, 0, None, None

    def __getstate__(self) -> Dict:
        return {"_function": self._function}

    def __setstate__(self, state: Dict) -> None:
        self.__init__(state["_function"])

    def __call__(self, *args: Tensor) -> Tuple[Tensor, ...]:
        if not args[0].is_cuda:  # the model has been moved
            return self._function(*args)
        # a graph's inputs are written again in later calls, which torch.inference_mode's can't be
        with torch.cuda.device(args[0].device), torch.inference_mode(False), torch.no_grad():
            return self._replay(args)

    def _replay(self, args: Tuple[Tensor, ...]) -> Tuple[Tensor, ...]:
        key = tuple((x.shape, x.dtype) for x in args)
        if key not in self._graphs:
            stream, size = torch.cuda.current_stream(), args[0].numel()
            if size > self._largest:
                self.forget()
                torch.cuda.empty_cache()
                self._largest = size
            try:
                self._graphs[key] = self._record(args)
            except RuntimeError as error:
                torch.cuda.set_stream(stream)  # not the recording one
                logger.warning("TEST.CUDA_GRAPH isn't used for %s: %s", key, error)
                self._graphs[key] = None
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    self._largest = 0  # of what holds memory
        if self._graphs[key] is None:
            return self._function(*args)
        graph, inputs, outputs = self._graphs[key]
        for static, x in zip(inputs, args):
            static.copy_(x)
        graph.replay()
        return outputs

    def _record(self, args: Tuple[Tensor, ...]):
        inputs = [x.clone(memory_format=torch.preserve_format) for x in args]
        stream = self._stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what is chosen, compiled or allocated at the first runs
                self._function(*inputs)
            self._check_that_nothing_waits(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads (a loader's, the compiler's) may allocate meanwhile
        with torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            outputs = self._function(*inputs)
        self._pool = graph.pool()
        return graph, inputs, outputs

    def _check_that_nothing_waits(self, inputs: List[Tensor]) -> None:
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
                self._function(*inputs)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        if any("called a synchronizing" in x for x in caught):
            raise RuntimeError("it waits for the GPU")


def fold_batch_norm(model: nn.Module) -> None:
    """Multiplies BatchNorm's scale into the weights in front of it and adds its shift, in place.

    For a model in evaluation mode. Exact but for rounding.
    """
    for conv in _normed_convolutions(model):
        norm = conv.norm
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
            norm.weight, norm.bias,
        )  # fmt: skip
        conv.norm = None


def _normed_convolutions(model: nn.Module) -> Iterator[Conv2d]:
    for module in model.modules():
        if isinstance(module, Conv2d) and isinstance(module.norm, BATCH_NORMS):
            yield module


class _ConvReLU(Conv2d):
    """Convolution, bias and ReLU or ReLU6 by one kernel of cuDNN."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:  # the model has been moved
            return super().forward(x.to(self.weight.dtype))
        x = torch.cudnn_convolution_relu(
            x.to(self.weight.dtype), self.weight, self.bias,
            self.stride, self.padding, self.dilation, self.groups,
        )  # fmt: skip
        return x.clamp_(max=6) if isinstance(self.activation, nn.ReLU6) else x


def fuse_relu(model: nn.Module) -> None:
    """Lets convolutions on a GPU add their bias and apply their ReLU themselves, in place.

    For inference; torch has two further kernels for that, which take as long as the convolution.
    """
    for module in model.modules():
        if (
            type(module) in (Conv2d, StridedConv2d)
            and module.norm is None
            and module.bias is not None
            and module.groups == 1
            and isinstance(module.activation, (nn.ReLU, nn.ReLU6))
        ):
            module.__class__ = _ConvReLU


def compile_network(model: SSD) -> None:
    """Compiles backbone, head, loss, and on GPUs post-processing, at their first run, in place;
    names of parameters stay.

    What can't be compiled runs as it is, and torch's log says why.
    """
    from torch import _dynamo  # takes seconds

    _dynamo.config.suppress_errors = True
    for module in (model.backbone, model.head):
        module.compile()
    model.multibox_loss = torch.compile(model.multibox_loss)
    if model.device.type == "cuda":
        model.best_detections = torch.compile(model.best_detections)
