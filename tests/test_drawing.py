"""Boxes on images."""

import numpy as np
import pytest

from ssd.drawing import draw_boxes


@pytest.mark.parametrize("scale", [1, 3])
def test_boxes_are_drawn_where_they_are(scale):
    image = np.full((100, 120, 3), 10, np.uint8)
    boxes = np.array([[20.0, 30, 60, 80], [70, 40, 110, 90]])
    picture = draw_boxes(image, boxes, [0, 1], ["", ""], scale)
    assert picture.shape == (100 * scale, 120 * scale, 3)
    changed = (picture != 10).any(axis=2)
    assert not changed[50 * scale, 40 * scale] and not changed[95 * scale, 10 * scale]
    colors = []
    for x1, y1, x2, y2 in (boxes * scale).astype(int):
        for x, y in ((x1, (y1 + y2) // 2), (x2, (y1 + y2) // 2), ((x1 + x2) // 2, y2)):
            assert picture[y, x].max() > 200, (x, y)
        colors.append(picture[(y1 + y2) // 2, x1].astype(int))
    assert abs(colors[0] - colors[1]).max() > 50  # classes differ
    labelled = draw_boxes(image, boxes, [0, 1], ["cat", "a long name at the edge"], scale)
    text = (labelled != picture).any(axis=(1, 2))
    assert text[: 40 * scale].any() and not text[50 * scale :].any()


def test_dollars_are_no_formula():
    image, boxes = np.full((60, 90, 3), 10, np.uint8), np.array([[20.0, 30, 60, 50]])
    price = draw_boxes(image, boxes, [0], ["$x^$"])
    assert (price != draw_boxes(image, boxes, [0], ["x^"])).any()


def test_without_boxes_the_image_stays():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert (draw_boxes(image, np.zeros((0, 4)), [], []) == image).all()
