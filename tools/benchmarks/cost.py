"""What a network needs of the machine."""

from typing import Dict, Sequence

import torch
from fvcore.nn import FlopCountAnalysis
from list_models import Network
from torch import Tensor, nn


def network_cost(model: nn.Module) -> Dict[str, float]:
    """Of one image: ``flops`` of the convolutions (a multiply-add counts twice), ``values`` that
    convolutions read and write but for weights, and ``weights`` that they read."""
    batch = torch.zeros(1, 3, *model.input_size)
    network = Network(model).eval()
    counts = FlopCountAnalysis(network, batch).unsupported_ops_warnings(False)
    counts.uncalled_modules_warnings(False)
    cost = {"flops": 2 * float(counts.by_operator()["conv"]), "values": 0, "weights": 0}

    def count(layer: nn.Module, args: Sequence[Tensor], output: Tensor) -> None:
        cost["values"] += args[0].numel() + output.numel()
        cost["weights"] += layer.weight.numel()

    hooks = [
        module.register_forward_hook(count)
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        network(batch)
    for hook in hooks:
        hook.remove()
    return cost
