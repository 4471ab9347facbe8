"""Prediction layers: confidences and offsets of every default box (SSD paper, section 2.1)."""

from typing import List, Sequence, Tuple

import torch
from torch import Tensor, nn

from ssd.modeling.extra_layers import conv_block

__all__ = ["SSDHead", "SSDLiteHead"]


class SSDHead(nn.Module):
    """A 3×3 convolution per level for the confidences, and one for the offsets."""

    def __init__(self, in_channels: Sequence[int], num_anchors: Sequence[int], num_classes: int):
        """
        Args:
            in_channels: of each level's feature map.
            num_anchors: A, default boxes per cell, of each level.
            num_classes: K foreground classes; the background is output K.
        """
        super().__init__()
        self.num_classes = num_classes
        levels = list(zip(in_channels, num_anchors))
        self.cls_predictors = nn.ModuleList(
            self._predictor(channels, a * (num_classes + 1)) for channels, a in levels
        )
        self.box_predictors = nn.ModuleList(
            self._predictor(channels, a * 4) for channels, a in levels
        )

    def _predictor(self, in_channels: int, out_channels: int) -> nn.Module:
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.bias)
        return conv

    def forward(self, features: List[Tensor]) -> Tuple[List[Tensor], List[Tensor]]:
        """Feature maps (N, C, H, W) to logits (N, A*(K+1), H, W) and offsets (N, A*4, H, W)."""
        logits = [layer(x) for layer, x in zip(self.cls_predictors, features)]
        deltas = [layer(x) for layer, x in zip(self.box_predictors, features)]
        return logits, deltas

    def flatten(self, logits: List[Tensor], deltas: List[Tensor]) -> Tuple[Tensor, Tensor]:
        """All levels in the default boxes' order: (N, R, K + 1) and (N, R, 4), float32."""
        return _join(logits, self.num_classes + 1), _join(deltas, 4)


class SSDLiteHead(SSDHead):
    """Depthwise 3×3 and 1×1 convolutions in place of the 3×3 ones (MobileNetV2 paper, 6.2)."""

    def __init__(self, *args, norm: str = "BN", activation: str = "ReLU6"):
        self._norm, self._activation = norm, activation
        super().__init__(*args)

    def _predictor(self, in_channels: int, out_channels: int) -> nn.Module:
        depthwise = conv_block(
            in_channels, in_channels, self._norm, self._activation,
            kernel_size=3, padding=1, groups=in_channels,
        )  # fmt: skip
        pointwise = nn.Conv2d(in_channels, out_channels, 1)
        nn.init.normal_(depthwise.weight, std=0.03)
        nn.init.normal_(pointwise.weight, std=0.03)
        nn.init.zeros_(pointwise.bias)
        return nn.Sequential(depthwise, pointwise)


def _join(maps: List[Tensor], size: int) -> Tensor:
    """Maps (N, A * size, H, W) to one (N, R, size); a view of each map if it is channels-last."""
    maps = [x.permute(0, 2, 3, 1).reshape(len(x), -1, size) for x in maps]
    return torch.cat(maps, dim=1).float()
