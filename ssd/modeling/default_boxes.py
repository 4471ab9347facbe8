"""Default boxes (SSD paper, section 2.1 and 2.2)."""

import logging
import math
from typing import List, Sequence, Tuple

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
from detectron2.structures import Boxes
from torch import Tensor, nn

from ssd.checks import check_choice

__all__ = ["DefaultBoxGenerator", "check_centers"]

logger = logging.getLogger(__name__)


@ANCHOR_GENERATOR_REGISTRY.register()
class DefaultBoxGenerator(nn.Module):
    """Makes the default boxes of every level: XYXY in pixels of the network's input.

    The A shapes of a cell are, in this order: the square of side ``min``, the square of side
    ``sqrt(min * max)``, and for each aspect ratio r the wide box ``(min * sqrt(r), min / sqrt(r))``
    and the tall one. A box is centred at ``((x + 0.5) * step, (y + 0.5) * step)``. The order of
    boxes is level, row, column, shape.

    TensorFlow's first level has one square of another side in place of the two (``first_square``).

    Attributes:
        num_anchors: A of each level (the name that Detectron2's heads expect).
    """

    box_dim = 4

    @configurable
    def __init__(
        self,
        *,
        input_size: Tuple[int, int],
        min_sizes: Sequence[float],
        max_size: float,
        aspect_ratios: Sequence[Sequence[float]],
        steps: Sequence = (),
        clip: str = "none",
        first_square: float = 0.0,
    ):
        """
        Args:
            input_size: (height, width) of the network's input in pixels.
            min_sizes: side of the smaller square of each level, in pixels.
            max_size: the ``max`` of the last level; another level's is the next level's ``min``.
            aspect_ratios: of each level, positive; 1 / r swaps the two boxes of r.
            steps: of each level, in pixels: one number, or (y, x); empty: input size / map size.
            clip: "none"; "xyxy": the corners are clipped to the input; "cxcywh": the centre, width
                and height are, each by itself; "wh": width and height are.
            first_square: > 0: side of the only square of the first level, in pixels.
        """
        super().__init__()
        levels = len(min_sizes)
        for key, values in (("ASPECT_RATIOS", aspect_ratios), ("STEPS", steps or min_sizes)):
            if len(values) != levels:
                raise ValueError(
                    f"MODEL.SSD.DEFAULT_BOXES.{key} has {len(values)} levels, MIN_SIZES {levels}"
                )
        sizes = [float(size) for size in min_sizes] + [float(max_size)]
        if not all(0 < low < high < math.inf for low, high in zip(sizes, sizes[1:])):
            raise ValueError(
                "MODEL.SSD.DEFAULT_BOXES.MIN_SIZES followed by MAX_SIZE must be positive and "
                f"increasing, got {sizes}"
            )
        if any(not 0 < ratio < math.inf for level in aspect_ratios for ratio in level):
            raise ValueError(
                "MODEL.SSD.DEFAULT_BOXES.ASPECT_RATIOS must be positive, got "
                f"{list(map(list, aspect_ratios))}"
            )
        self.input_size = tuple(input_size)
        self.steps = [tuple(s) if isinstance(s, Sequence) else (s, s) for s in steps]
        if not all(len(s) == 2 and 0 < min(s) and max(s) < math.inf for s in self.steps):
            raise ValueError(
                "MODEL.SSD.DEFAULT_BOXES.STEPS must be positive numbers of pixels, or pairs (y, x) "
                f"of them, got {list(steps)}"
            )
        check_choice("MODEL.SSD.DEFAULT_BOXES.CLIP", clip, ("none", "xyxy", "cxcywh", "wh"))
        self.clip = clip
        self.shapes = [
            _cell_shapes(low, high, ratios)
            for low, high, ratios in zip(sizes, sizes[1:], aspect_ratios)
        ]
        if first_square > 0:
            self.shapes[0][:2] = [(first_square, first_square)]
        self.num_anchors = [len(shapes) for shapes in self.shapes]

    @classmethod
    def from_config(cls, cfg, input_shape: List[ShapeSpec]):
        boxes = cfg.MODEL.SSD.DEFAULT_BOXES
        if len(input_shape) != len(boxes.MIN_SIZES):
            raise ValueError(
                f"MODEL.SSD.DEFAULT_BOXES.MIN_SIZES has {len(boxes.MIN_SIZES)} levels, but "
                f"MODEL.SSD.IN_FEATURES and EXTRA_LAYERS make {len(input_shape)}"
            )
        return {
            "input_size": cfg.MODEL.SSD.INPUT_SIZE,
            "min_sizes": boxes.MIN_SIZES,
            "max_size": boxes.MAX_SIZE,
            "aspect_ratios": boxes.ASPECT_RATIOS,
            "steps": boxes.STEPS,
            "clip": boxes.CLIP,
            "first_square": boxes.FIRST_SQUARE,
        }

    def per_level(self, map_sizes: Sequence[Tuple[int, int]]) -> List[Tensor]:
        """Default boxes of feature maps of the given (height, width): one (H*W*A, 4) a level."""
        if len(map_sizes) != len(self.shapes):
            raise ValueError(
                f"{len(map_sizes)} feature maps, but {len(self.shapes)} levels of "
                "MODEL.SSD.DEFAULT_BOXES"
            )
        boxes = []
        limit = torch.tensor(self.input_size[::-1], dtype=torch.float64)  # width, height
        for level, ((rows, columns), shapes) in enumerate(zip(map_sizes, self.shapes)):
            if self.steps:
                step_y, step_x = self.steps[level]
            else:
                step_y, step_x = self.input_size[0] / rows, self.input_size[1] / columns
            y = (torch.arange(rows, dtype=torch.float64) + 0.5) * step_y
            x = (torch.arange(columns, dtype=torch.float64) + 0.5) * step_x
            center = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[:, :, None]
            size = torch.tensor(shapes, dtype=torch.float64)  # (A, 2), center: (H, W, 1, 2)
            if self.clip in ("cxcywh", "wh"):
                size = size.minimum(limit)
            if self.clip == "cxcywh":
                center = center.minimum(limit)
            level_boxes = torch.cat([center - size / 2, center + size / 2], dim=-1).reshape(-1, 4)
            if self.clip == "xyxy":
                level_boxes = level_boxes.clamp(min=0).minimum(limit.repeat(2))
                # offsets from a box without area are NaN, and so are their gradients
                if not (level_boxes[:, 2:] > level_boxes[:, :2]).all():
                    raise ValueError(
                        f"MODEL.SSD.DEFAULT_BOXES.STEPS {self.steps[level]} of level {level} put "
                        f"boxes of {rows} rows and {columns} columns outside the input "
                        f"{self.input_size}, where CLIP 'xyxy' leaves nothing of them"
                    )
            boxes.append(level_boxes.float())
        return boxes

    def forward(self, features: List[Tensor]) -> List[Boxes]:
        """As Detectron2's anchor generators: feature maps (N, C, H, W) to ``Boxes`` per level."""
        boxes = self.per_level([tuple(feature.shape[-2:]) for feature in features])
        return [Boxes(level.to(features[0].device)) for level in boxes]


def _cell_shapes(min_size: float, max_size: float, ratios: Sequence[float]) -> List[Tuple]:
    """(width, height) of the shapes of one cell, in the order that the released weights need."""
    middle = math.sqrt(min_size * max_size)
    shapes = [(min_size, min_size), (middle, middle)]
    for ratio in ratios:
        long, short = min_size * math.sqrt(ratio), min_size / math.sqrt(ratio)
        shapes += [(long, short), (short, long)]
    return shapes


def check_centers(
    boxes: Sequence[Tensor], map_sizes: Sequence[Tuple[int, int]], input_size: Tuple[int, int]
) -> None:
    """Whether each level's default boxes, (R, 4) XYXY, are spread over the input, not beside it.

    Raises:
        ValueError: they are for an input nearly twice as large, or more. Less is a warning.
    """
    for level, (level_boxes, (rows, columns)) in enumerate(zip(boxes, map_sizes)):
        center = (level_boxes[:, :2] + level_boxes[:, 2:]).mean(dim=0) / 2
        ratio = center / torch.tensor(input_size[::-1]) * 2
        if ratio.is_meta or ((ratio - 1).abs() < 0.1).all():  # 1.07 in SSD300
            continue
        text = (
            f"MODEL.SSD.DEFAULT_BOXES.STEPS put the boxes of level {level}, {rows} rows and "
            f"{columns} columns, around x and y {center.tolist()} in an input of (height, width) "
            f"{input_size}; STEPS [] takes what fits, but for weights that were trained so"
        )
        if (ratio > 1.9).any():  # more than rounding up a map's size can explain
            raise ValueError(text)
        logger.warning(text)
