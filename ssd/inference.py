"""Makes a trained model fast for inference, without changing what it computes."""

import copy
import logging
from typing import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ssd.memory import keep_freed_memory
from ssd.modeling import SSD

__all__ = ["compile_network", "fold_batch_norm", "optimize"]

logger = logging.getLogger(__name__)

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)


def optimize(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """The model for inference: a copy in evaluation mode, or itself if nothing can be done to it.

    BatchNorm goes into the convolutions in front of it; with ``MODEL.COMPILE`` the network is
    compiled, and with ``TEST.DTYPE`` it runs in that type. Default boxes, scores and detections
    stay in float32. On CPUs the process keeps memory that it frees.

    Args:
        model: an SSD, also wrapped in DistributedDataParallel; any other model is returned itself.

    Raises:
        ValueError: ``TEST.DTYPE`` isn't known.
    """
    model = getattr(model, "module", model)
    dtype = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if cfg.TEST.DTYPE not in dtype:
        raise ValueError(f"TEST.DTYPE: one of {list(dtype)}, got {cfg.TEST.DTYPE!r}")
    if isinstance(model, SSD) and model.device.type == "cpu":
        keep_freed_memory()
    works = cfg.MODEL.COMPILE or dtype[cfg.TEST.DTYPE] or any(_normed_convolutions(model))
    if not (isinstance(model, SSD) and works):
        return model
    model = copy.deepcopy(model).eval().requires_grad_(False)
    fold_batch_norm(model)
    model.inference_dtype = dtype[cfg.TEST.DTYPE]
    if cfg.MODEL.COMPILE:
        # constant weights: on CPUs they are laid out for the convolutions once
        compile_network(model, options={"freezing": True} if model.device.type == "cpu" else None)
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
        if isinstance(module, Conv2d) and isinstance(module.norm, _BATCH_NORMS):
            yield module


def compile_network(model: SSD, options=None) -> None:
    """Compiles backbone and head at their first run, in place; names of parameters stay.

    What can't be compiled runs as it is, and torch's log says why.
    """
    if not hasattr(nn.Module, "compile"):
        logger.warning("MODEL.COMPILE needs torch >= 2.2, this is %s: not used", torch.__version__)
        return
    from torch import _dynamo  # takes seconds

    _dynamo.config.suppress_errors = True
    for module in (model.backbone, model.head):
        module.compile(options=options)
