"""Searches sizes and aspect ratios of default boxes for a set of objects, level by level.

Among default boxes of one shape the nearest to an object's centre has the highest IoU, and along x
and y each by itself. So an object's best IoU needs one box of each shape, not all cells of a map:
thousands of settings can be tried. Clipping at the border is neglected.
"""

import math
from itertools import product
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ssd.modeling.default_boxes import DefaultBoxGenerator

STEPS = (0.7, 0.85, 0.93, 0.97, 1.03, 1.08, 1.18, 1.4)  # factors that are tried for a value
GROWTH = 1.25  # from a level's min size to the next one's, at least, unless the start has less
RATIOS = (1.2, 6.0)  # bounds of aspect ratios
MIN_SIZE = 4.0  # pixels
WORTH = 0.002  # rise of the score that a change needs, lest it fits single objects
FINEST_REACH = 0.5 / (1 - math.sqrt(2 / 3))  # see reach()


class Setting(NamedTuple):
    """MIN_SIZES and MAX_SIZE in pixels of the input, and ASPECT_RATIOS, as in the config."""

    min_sizes: List[float]
    max_size: float
    aspect_ratios: List[List[float]]

    @property
    def sizes(self) -> List[float]:
        return [*self.min_sizes, self.max_size]


def cell_shapes(setting: Setting, **generator_args) -> List[List[Tuple[float, float]]]:
    """(width, height) of the default boxes of a cell, of each level.

    Args:
        generator_args: of DefaultBoxGenerator, besides what the setting says.
    """
    return DefaultBoxGenerator(**setting._asdict(), **generator_args).shapes


def reach(step: float) -> float:
    """The side of the smallest square that a square of its size covers with IoU 0.5 wherever it
    lies, if they are ``step`` apart: both centres differ by half a step along x and y at most."""
    return FINEST_REACH * step


class Search:
    """Best IoUs of M objects for any setting.

    Args:
        boxes: (M, 4) XYXY in pixels of the input.
        classes: (M,) class numbers; each class weighs the same.
        levels: of each level the centres of its default boxes, (x of P columns, y of Q rows).
        threshold: the IoU of recall.
        generator_args: see :func:`cell_shapes`.
    """

    def __init__(
        self,
        boxes: np.ndarray,
        classes: np.ndarray,
        levels: Sequence[Tuple[np.ndarray, np.ndarray]],
        threshold: float,
        **generator_args,
    ):
        self.wh = boxes[:, 2:] - boxes[:, :2]
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        self.offsets = [
            np.stack([_nearest(centers[:, axis], level[axis]) for axis in (0, 1)], axis=1)
            for level in levels
        ]
        counts = np.bincount(classes)
        self.weights = 1 / (counts[classes] * (counts > 0).sum())
        self.threshold, self.generator_args = threshold, generator_args

    def shapes(self, setting: Setting) -> List[List[Tuple[float, float]]]:
        return cell_shapes(setting, **self.generator_args)

    def level_ious(self, level: int, shapes: Sequence[Tuple[float, float]]) -> np.ndarray:
        """(M,) each object's highest IoU with default boxes of these shapes on a level."""
        best = np.zeros(len(self.wh))
        for shape in np.array(shapes):
            overlap = np.minimum(self.wh, shape)
            overlap = np.minimum(overlap, (self.wh + shape) / 2 - self.offsets[level])
            both = overlap.clip(0).prod(1)
            best = np.maximum(best, both / (self.wh.prod(1) + shape.prod() - both))
        return best

    def score(self, ious: np.ndarray) -> float:
        """Recall plus mean best IoU, each the mean over classes; from (levels, M) IoUs."""
        best = ious.max(axis=0)
        return float((self.weights * (best + (best >= self.threshold))).sum())

    def improve(self, setting: Setting) -> Tuple[Setting, float]:
        """Changes one value after the other as long as the score rises; the result and its score.

        Values are rounded to whole pixels and to tenths (aspect ratios).
        """
        ious = self._all_ious(setting)
        growth = [min(GROWTH, b / a) for a, b in zip(setting.sizes, setting.sizes[1:])]
        places = [(None, i) for i in range(len(setting.sizes))]
        for level, ratios in enumerate(setting.aspect_ratios):
            places += [(level, i) for i in range(len(ratios))]
        score, gain = self.score(ious), 1.0
        while gain > 0:
            before = score
            for (level, index), factor in product(places, STEPS):
                candidate = _scaled(setting, level, index, factor)
                if not _is_valid(candidate, growth) or candidate == setting:
                    continue
                new = self._update(ious, setting, candidate)
                if (new_score := self.score(new)) > score + WORTH:
                    setting, ious, score = candidate, new, new_score
            gain = score - before
        return setting, score

    def spread(self, setting: Setting, largest: float) -> Setting:
        """Another start: sizes in a geometric row from the small objects' to ``largest``."""
        sides = np.sqrt(self.wh.prod(1))
        order = np.argsort(sides)
        small = sides[order][np.searchsorted(self.weights[order].cumsum(), 0.05)]
        sizes = np.geomspace(small, max(largest, small * 2), len(setting.sizes))
        sizes = [max(MIN_SIZE, float(round(size))) for size in sizes]
        sizes = [size + i * (sizes[0] == MIN_SIZE) for i, size in enumerate(sizes)]
        return Setting(sizes[:-1], sizes[-1], setting.aspect_ratios)

    def _all_ious(self, setting: Setting) -> np.ndarray:
        shapes = self.shapes(setting)
        return np.stack([self.level_ious(level, s) for level, s in enumerate(shapes)])

    def _update(self, ious: np.ndarray, old: Setting, new: Setting) -> np.ndarray:
        """The IoUs of ``new``: only levels of other shapes are computed."""
        ious = ious.copy()
        for level, (a, b) in enumerate(zip(self.shapes(old), self.shapes(new))):
            if a != b:
                ious[level] = self.level_ious(level, b)
        return ious


def _nearest(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The distance of each value to the nearest of the points, which rise."""
    right = np.searchsorted(points, values).clip(1, max(len(points) - 1, 1))
    right = right.clip(max=len(points) - 1)
    return np.minimum(np.abs(values - points[right]), np.abs(values - points[right - 1]))


def _scaled(setting: Setting, level: Optional[int], index: int, factor: float) -> Setting:
    """With one of a level's aspect ratios times ``factor``, or one of the sizes (level None)."""
    sizes, ratios = setting.sizes, [list(r) for r in setting.aspect_ratios]
    if level is None:
        sizes[index] = float(round(sizes[index] * factor))
    else:
        ratios[level][index] = round(ratios[level][index] * factor, 1)
    return Setting(sizes[:-1], sizes[-1], ratios)


def _is_valid(setting: Setting, growth: Sequence[float]) -> bool:
    sizes = setting.sizes
    rising = all(high >= g * low for low, high, g in zip(sizes, sizes[1:], growth))
    bounded = all(RATIOS[0] <= r <= RATIOS[1] for level in setting.aspect_ratios for r in level)
    different = all(len(set(level)) == len(level) for level in setting.aspect_ratios)
    return sizes[0] >= MIN_SIZE and rising and bounded and different
