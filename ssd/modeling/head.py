"""Prediction layers: confidences and offsets of every default box (SSD paper, section 2.1)."""

from typing import List, Sequence, Tuple

import torch
from torch import Tensor, nn

from ssd.modeling.blocks import conv_block, init_convolutions

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
        last = len(in_channels) - 1

        def predictors(size: int) -> nn.ModuleList:
            levels = enumerate(zip(in_channels, num_anchors))
            return nn.ModuleList(self._predictor(c, a * size, i == last) for i, (c, a) in levels)

        self.cls_predictors, self.box_predictors = predictors(num_classes + 1), predictors(4)

    def _predictor(self, in_channels: int, out_channels: int, is_last: bool) -> nn.Module:
        predictor = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        init_convolutions(predictor, nn.init.xavier_uniform_)
        return predictor

    def forward(self, features: List[Tensor]) -> Tuple[List[Tensor], List[Tensor]]:
        """Feature maps (N, C, H, W) to logits (N, A*(K+1), H, W) and offsets (N, A*4, H, W)."""
        logits = [layer(x) for layer, x in zip(self.cls_predictors, features)]
        deltas = [layer(x) for layer, x in zip(self.box_predictors, features)]
        return logits, deltas

    def flatten(self, logits: List[Tensor], deltas: List[Tensor]) -> Tuple[Tensor, Tensor]:
        """All levels in the default boxes' order: (N, R, K + 1) and (N, R, 4)."""
        return _join(logits, self.num_classes + 1), _join(deltas, 4)


class SSDLiteHead(SSDHead):
    """Depthwise 3×3 and 1×1 convolutions in place of the 3×3 ones (MobileNetV2 paper, 6.2)."""

    def __init__(self, *args, norm: str = "BN", last_1x1: bool = False):
        """
        Args:
            norm: of the depthwise convolution; its activation is ReLU6.
            last_1x1: whether the last level has a 1×1 convolution only (lufficc, qfgaohao).
        """
        self._norm, self._last_1x1 = norm, last_1x1
        super().__init__(*args)

    def _predictor(self, in_channels: int, out_channels: int, is_last: bool) -> nn.Module:
        predictor = nn.Sequential()
        if not (is_last and self._last_1x1):
            kwargs = {"norm": self._norm, "activation": "ReLU6", "groups": in_channels}
            predictor.append(conv_block(in_channels, in_channels, 3, **kwargs))
        predictor.append(nn.Conv2d(in_channels, out_channels, 1))
        init_convolutions(predictor, nn.init.normal_, std=0.03)
        return predictor


def _join(maps: List[Tensor], size: int) -> Tensor:
    """Maps (N, A * size, H, W) to one (N, R, size); a view of each map if it is channels-last."""
    maps = [x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, size) for x in maps]
    return torch.cat(maps, dim=1)
