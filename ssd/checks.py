"""Checks of a config's values: errors say key, value and what is expected."""

import math
from typing import Sequence, Tuple

from detectron2.modeling import META_ARCH_REGISTRY

__all__ = [
    "check_choice",
    "check_model",
    "check_number",
    "check_positive",
    "check_range",
    "is_detectron2s",
    "is_ssd",
]


def is_detectron2s(cfg) -> bool:
    """Whether ``MODEL.META_ARCHITECTURE`` is one of Detectron2's, which have keys of their own, or
    derives from one."""
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCH_REGISTRY:
        return False
    registered = META_ARCH_REGISTRY.get(name)
    classes = getattr(registered, "__mro__", [registered])
    return not is_ssd(cfg) and any(x.__module__.startswith("detectron2.") for x in classes)


def is_ssd(cfg) -> bool:
    """Whether ``MODEL.META_ARCHITECTURE`` is SSD or a class of one's own that derives from it."""
    if cfg.MODEL.META_ARCHITECTURE not in META_ARCH_REGISTRY:
        return False
    found, ssd = map(META_ARCH_REGISTRY.get, (cfg.MODEL.META_ARCHITECTURE, "SSD"))
    return isinstance(found, type) and issubclass(found, ssd)  # or a function


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{key} must be one of {list(choices)}, got {value!r}")


def check_number(key: str, value: float, lowest: float = 0, highest: float = math.inf) -> None:
    """Both bounds are allowed, infinity and NaN aren't."""
    if not (lowest <= value <= highest and value < math.inf):
        expected = f"{lowest} or more" if highest == math.inf else f"{lowest} to {highest}"
        raise ValueError(f"{key} must be {expected}, got {value}")


def check_range(key: str, value: Tuple[float, float], lowest: float, highest: float) -> None:
    if len(value) != 2 or not lowest <= value[0] <= value[1] <= highest:
        raise ValueError(
            f"{key} must be two numbers of {lowest} to {highest}, lowest first, got {tuple(value)}"
        )


def check_positive(key: str, *values: int) -> None:
    if any(not isinstance(value, int) or value < 1 for value in values):
        what = "positive integers" if len(values) > 1 else "a positive integer"
        raise ValueError(f"{key} must be {what}, got {', '.join(map(str, values))}")


def check_model(cfg) -> None:
    """The values of ``MODEL`` and ``TEST`` that would fail late, or give a wrong network."""
    ssd = cfg.MODEL.SSD
    if len(ssd.INPUT_SIZE) != 2:
        raise ValueError(f"MODEL.SSD.INPUT_SIZE must be [height, width], got {ssd.INPUT_SIZE}")
    check_positive("MODEL.SSD.INPUT_SIZE", *ssd.INPUT_SIZE)
    check_positive("MODEL.SSD.NUM_CLASSES", ssd.NUM_CLASSES)
    check_positive("MODEL.SSD.TOPK_CANDIDATES_TEST", ssd.TOPK_CANDIDATES_TEST)
    check_positive("TEST.DETECTIONS_PER_IMAGE", cfg.TEST.DETECTIONS_PER_IMAGE)
    if len(ssd.BBOX_REG_WEIGHTS) != 4 or not all(x > 0 for x in ssd.BBOX_REG_WEIGHTS):
        raise ValueError(
            f"MODEL.SSD.BBOX_REG_WEIGHTS must be 4 positive numbers, got {ssd.BBOX_REG_WEIGHTS}"
        )
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if len(mean) != len(std) or not all(x > 0 for x in std):
        raise ValueError(
            "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD need a number for each channel, PIXEL_STD "
            f"positive ones, got {mean} and {std}"
        )
    for key, value, choices in (
        ("MATCHING.BEST", ssd.MATCHING.BEST, ("argmax", "bipartite")),
        ("LOSS.NORMALIZER", ssd.LOSS.NORMALIZER, ("image", "batch", "each")),
        ("HEAD", ssd.HEAD, ("conv", "lite", "lite_last_1x1")),
        ("SCORE_FUNCTION", ssd.SCORE_FUNCTION, ("softmax", "sigmoid")),
        ("CLIP_TEST", ssd.CLIP_TEST, ("before_nms", "after_nms")),
        ("BBOX_REG_CLAMP", ssd.BBOX_REG_CLAMP, ("both", "upper", "none")),
    ):
        check_choice(f"MODEL.SSD.{key}", value, choices)
    for key in ("NEG_POS_RATIO", "NEGATIVES_WITHOUT_POSITIVES", "SMOOTH_L1_BETA", "BOX_WEIGHT"):
        check_number(f"MODEL.SSD.LOSS.{key}", ssd.LOSS[key])
    check_number("MODEL.SSD.MATCHING.IOU_THRESHOLD", ssd.MATCHING.IOU_THRESHOLD, highest=1)
    check_number("MODEL.SSD.SCORE_THRESH_TEST", ssd.SCORE_THRESH_TEST, highest=1)
    check_number("MODEL.SSD.NMS_THRESH_TEST", ssd.NMS_THRESH_TEST, highest=1)
    check_number("MODEL.BATCH_NORM.MOMENTUM", cfg.MODEL.BATCH_NORM.MOMENTUM, highest=1)
    if not 0 < cfg.MODEL.BATCH_NORM.EPS < math.inf:
        raise ValueError(f"MODEL.BATCH_NORM.EPS must be positive, got {cfg.MODEL.BATCH_NORM.EPS}")
