import re

import pytest
from detectron2.structures import BoxMode

from ssd.data.boxes import find_box_defects, xyxy_boxes


@pytest.mark.parametrize("side", [None, 0])
def test_images_of_unknown_size_have_no_outside(side):
    box = {"category_id": 0, "bbox_mode": BoxMode.XYWH_ABS, "bbox": [90, 2, 3, 4]}
    record = {"file_name": "a.jpg", "width": side, "height": side, "annotations": [box]}
    assert find_box_defects([record]) == []


@pytest.mark.parametrize("box", ["1,2", [1, 2, 3], [1, 2, 3, 4, 5], None])
def test_a_box_that_is_none_names_its_file(box):
    good = {"category_id": 0, "bbox_mode": BoxMode.XYWH_ABS, "bbox": [1, 2, 3, 4]}
    record = {"file_name": "a.jpg", "width": 9, "height": 9}
    message = f"^a.jpg: object 3 has bbox {re.escape(repr(box))}, expected 4 numbers"
    with pytest.raises(ValueError, match=message):
        find_box_defects([{**record, "annotations": [*[good] * 3, {**good, "bbox": box}]}])
    # not as many boxes of other numbers
    with pytest.raises((TypeError, ValueError)):
        xyxy_boxes([{**good, "bbox": [1, 2, 3]}] * 4)
