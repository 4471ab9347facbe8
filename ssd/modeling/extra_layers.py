"""The backbone of an SSD: any backbone, L2Norm and extra layers (SSD paper, section 2.1)."""

from typing import Dict, Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ssd.checks import check_choice
from ssd.modeling.blocks import (
    BatchNorm2d,
    InvertedResidual,
    check_out_features,
    conv_block,
    init_convolutions,
    set_batch_norm,
)

__all__ = ["L2Norm", "SSDBackbone", "build_ssd_backbone"]


class L2Norm(nn.Module):
    """Channel-wise L2 normalisation with a learned scale per channel (ParseNet, 1506.04579)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 20.0))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape; computed in at least float32 also under autocast."""
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = values.square().sum(dim=1, keepdim=True).sqrt() + 1e-10
        return (self.weight[None, :, None, None] * values / norm).to(x.dtype)


class SSDBackbone(Backbone):
    """A bottom-up backbone whose last feature map is reduced further by extra layers.

    Outputs the chosen maps of ``bottom_up``, normalised where asked for, and ``extra1``,
    ``extra2``, …
    """

    @configurable
    def __init__(
        self,
        *,
        bottom_up: Backbone,
        in_features: Sequence[str],
        extra_layers: Sequence[Sequence[int]] = (),
        l2_norm_features: Sequence[str] = (),
        l2_norm: str = "L2Norm",
        block: str = "conv",
        norm: str = "",
        activation: str = "ReLU",
    ):
        """
        Args:
            bottom_up: any Detectron2 backbone.
            in_features: names of its outputs to use; the last one feeds the extra layers.
            extra_layers: (bottleneck channels, output channels, kernel, stride, padding) of each.
            l2_norm_features: those of ``in_features`` that are normalised; the extra layers read
                the map before it.
            l2_norm: by what: "L2Norm", or "BN" for BatchNorm (``MODEL.SSD.L2_NORM``).
            block, norm, activation: the kind of extra layers; see ``MODEL.SSD.EXTRA_BLOCK``.
        """
        super().__init__()
        shapes = bottom_up.output_shape()
        self.in_features = check_out_features(in_features, shapes)
        if unknown := [name for name in l2_norm_features if name not in in_features]:
            raise ValueError(f"MODEL.SSD.L2_NORM_FEATURES: no feature {unknown} in {in_features}")
        norms = {"L2Norm": L2Norm, "BN": BatchNorm2d}
        check_choice("MODEL.SSD.L2_NORM", l2_norm, norms)
        self.bottom_up = bottom_up
        self.l2_norm = nn.ModuleDict(
            {name: norms[l2_norm](shapes[name].channels) for name in l2_norm_features}
        )
        self._out_feature_channels = {name: shapes[name].channels for name in in_features}
        self._out_feature_strides = {name: shapes[name].stride for name in in_features}
        channels, stride = shapes[in_features[-1]].channels, shapes[in_features[-1]].stride

        self.extra_layers = nn.ModuleList()
        for number, row in enumerate(extra_layers, 1):
            least = (1, 1, 1, 1, 0)
            is_row = isinstance(row, Sequence) and len(row) == 5
            if not (is_row and all(isinstance(x, int) and x >= y for x, y in zip(row, least))):
                raise ValueError(
                    "MODEL.SSD.EXTRA_LAYERS: a row is [bottleneck channels, output channels, "
                    f"kernel, stride, padding], all positive integers but for the last, got {row}"
                )
            layer = _extra_layer(channels, row, block, norm=norm, activation=activation)
            self.extra_layers.append(layer)
            channels, stride = row[1], stride * row[3]
            self._out_feature_channels[f"extra{number}"] = channels
            self._out_feature_strides[f"extra{number}"] = stride
        self._out_features = list(self._out_feature_channels)
        if block == "conv":
            init_convolutions(self.extra_layers, nn.init.xavier_uniform_)
        else:
            init_convolutions(self.extra_layers, nn.init.normal_, std=0.03)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec):
        ssd = cfg.MODEL.SSD
        if ssd.BOTTOM_UP not in BACKBONE_REGISTRY:
            raise ValueError(
                f"MODEL.SSD.BOTTOM_UP: no {ssd.BOTTOM_UP!r} in Detectron2's BACKBONE_REGISTRY"
            )
        return {
            "bottom_up": BACKBONE_REGISTRY.get(ssd.BOTTOM_UP)(cfg, input_shape),
            "in_features": ssd.IN_FEATURES,
            "extra_layers": ssd.EXTRA_LAYERS,
            "l2_norm_features": ssd.L2_NORM_FEATURES,
            "l2_norm": ssd.L2_NORM,
            "block": ssd.EXTRA_BLOCK,
            "norm": ssd.NORM,
            "activation": ssd.EXTRA_ACTIVATION,
        }

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """(N, 3, H, W) to the named feature maps: ``in_features`` as given, then extra ones."""
        features = self.bottom_up(x)
        outputs = {name: features[name] for name in self.in_features}
        x = outputs[self.in_features[-1]]
        for name, l2_norm in self.l2_norm.items():
            outputs[name] = l2_norm(outputs[name])
        for number, layer in enumerate(self.extra_layers, 1):
            x = outputs[f"extra{number}"] = layer(x)
        return outputs


def _extra_layer(in_channels: int, row: Sequence[int], block: str, **kwargs: str) -> nn.Module:
    """One extra layer, a row of ``MODEL.SSD.EXTRA_LAYERS``; ``block`` as in ``EXTRA_BLOCK``.

    ``kwargs``: norm and activation, see :func:`conv_block`.
    """
    bottleneck, out_channels, kernel, stride, padding = row
    spatial = {"stride": stride, "padding": padding}
    if block in ("inverted", "inverted_se"):
        return InvertedResidual(
            in_channels, bottleneck, out_channels, kernel, **spatial, **kwargs,
            squeeze=block == "inverted_se", squeeze_first=True,
        )  # fmt: skip
    layer = nn.Sequential(conv_block(in_channels, bottleneck, **kwargs))
    if block == "conv":
        layer.append(conv_block(bottleneck, out_channels, kernel, **spatial, **kwargs))
    elif block == "separable":
        depthwise = {**spatial, **kwargs, "groups": bottleneck}
        layer.append(conv_block(bottleneck, bottleneck, kernel, **depthwise))
        layer.append(conv_block(bottleneck, out_channels, **kwargs))
    else:
        raise ValueError(
            "MODEL.SSD.EXTRA_BLOCK: 'conv', 'separable', 'inverted' or 'inverted_se', "
            f"got {block!r}"
        )
    return layer


@BACKBONE_REGISTRY.register()
def build_ssd_backbone(cfg, input_shape: ShapeSpec) -> SSDBackbone:
    """``MODEL.SSD.BOTTOM_UP`` with L2Norm and extra layers."""
    return set_batch_norm(SSDBackbone(cfg, input_shape), cfg)
