"""Makes a trained model fast for inference, without changing what it computes."""

import copy
import logging
import textwrap
from typing import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ssd.checks import check_choice
from ssd.cuda_graph import CudaGraph
from ssd.memory import keep_freed_memory
from ssd.modeling import SSD
from ssd.modeling.blocks import BATCH_NORMS, StridedConv2d
from ssd.modeling.postprocessing import never_waits

__all__ = ["compile_network", "fold_batch_norm", "optimize"]

logger = logging.getLogger(__name__)
_AS_IT_IS = "it runs as it is, without TEST.DTYPE, MODEL.COMPILE, TEST.CUDA_GRAPH"


def optimize(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """The model for inference: a copy in evaluation mode, or itself if nothing can be done to it.

    BatchNorm goes into the convolutions in front of it; with ``MODEL.COMPILE`` the network is
    compiled, and with ``TEST.DTYPE`` it runs in that type. Default boxes, scores and detections
    stay in float32. On GPUs a CUDA graph holds everything between a batch and its detections
    (``TEST.CUDA_GRAPH``), if NMS needn't wait for the GPU, as with more than 512 detections per
    image. On CPUs the process keeps memory that it frees.

    Args:
        model: an SSD, also wrapped in DistributedDataParallel; any other model is returned itself,
            without the wrapper, and so is one with forward hooks or that can't be copied.

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
    if any(module._forward_hooks for module in model.modules()):
        logger.warning(f"Forward hooks may be tied to this model: {_AS_IT_IS}")
        return model
    try:
        model = copy.deepcopy(model).eval().requires_grad_(False)
    except Exception as error:  # what a backbone holds, as tensors with gradients
        logger.warning(f"The model can't be copied: {_AS_IT_IS} ({error})")
        return model
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
        model.cuda_graph = CudaGraph()
    return model


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
        if (
            type(module) in (Conv2d, StridedConv2d)  # another class may use its weight otherwise
            and "weight" in module._parameters  # not computed, as with weight norm or pruning
            and isinstance(module.norm, BATCH_NORMS)
            and module.norm.running_mean is not None
        ):
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

    What can't be compiled runs as it is, and the log says why.
    """
    from torch import _dynamo  # takes seconds

    _dynamo.config.suppress_errors = True
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_say_why)
    for module in (model.backbone, model.head):
        module.compile()
    model.multibox_loss = torch.compile(model.multibox_loss)
    if model.device.type == "cuda":
        model.best_detections = torch.compile(model.best_detections)


def _say_why(record: logging.LogRecord) -> bool:
    """Of what can't be compiled one line in our log, instead of 300 of torch's per function."""
    if not record.exc_info or logging.getLogger(record.name).isEnabledFor(logging.DEBUG):
        return True
    reason = textwrap.shorten(str(record.exc_info[1]).strip().partition("\n\n")[0], 300)
    text = "MODEL.COMPILE: not all can be compiled: %s (TORCH_LOGS=+dynamo says more)"
    log_first_n(logging.WARNING, text % reason, key="message", name=__name__)
    return False
