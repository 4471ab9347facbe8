#!/usr/bin/env python
"""Parameters, FLOPs and activations of a lab's network, by module.

    python tools/analyze_model.py --tasks parameter flop activation --config-file config.yaml

Counted for one image of MODEL.SSD.INPUT_SIZE, in the network: backbone, extra layers and head.
Unlike in a two-stage detector nothing depends on the image, so one run without data is exact. A
multiply-add counts once, as in Detectron2 and torchvision. BatchNorm, decoding and NMS aren't
counted.
"""

import argparse
from collections import Counter

import torch
from detectron2.modeling import build_model
from fvcore.nn import (
    ActivationCountAnalysis,
    FlopCountAnalysis,
    flop_count_table,
    parameter_count,
    parameter_count_table,
)
from list_models import Network
from torch import nn

from ssd import load_config

TASKS = ("parameter", "flop", "activation", "structure")


def count_parameters(network: nn.Module, image: torch.Tensor, depth: int) -> str:
    total = parameter_count(network)[""] / 1e6
    return f"{parameter_count_table(network, max_depth=depth)}\nparameters: {total:.2f} M"


def count_flops(network: nn.Module, image: torch.Tensor, depth: int) -> str:
    flops = FlopCountAnalysis(network, image)
    flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # evaluations fold it into the convolution in front of it
    flops.set_op_handle("aten::batch_norm", lambda inputs, outputs: Counter())
    kinds = ", ".join(f"{name} {n / 1e9:.2f}" for name, n in flops.by_operator().items())
    return f"{flop_count_table(flops, max_depth=depth)}\nGFLOPs: {kinds}"


def count_activations(network: nn.Module, image: torch.Tensor, depth: int) -> str:
    activations = ActivationCountAnalysis(network, image)
    activations.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    lines = [
        f"{name or 'network':40} {count / 1e6:8.2f} M"
        for name, count in activations.by_module().items()
        if count and name.count(".") + bool(name) <= depth
    ]
    total = activations.total() / 1e6
    return "\n".join([*lines, f"activations: {total:.2f} M outputs of convolutions"])


def structure(network: nn.Module, image: torch.Tensor, depth: int) -> str:
    return str(network)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of a lab")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["parameter", "flop"])
    parser.add_argument("--max-depth", type=int, default=2, help="of modules in the tables")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE … for the config")
    args = parser.parse_args()
    cfg = load_config(args.config_file, ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", *args.opts])
    model = build_model(cfg).eval()
    work = dict(zip(TASKS, (count_parameters, count_flops, count_activations, structure)))
    for task in args.tasks:
        with torch.no_grad():
            image = torch.zeros(1, len(cfg.MODEL.PIXEL_MEAN), *model.input_size)
            print(f"{task}\n{work[task](Network(model), image, args.max_depth)}\n")


if __name__ == "__main__":
    main()
