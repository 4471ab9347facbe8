"""Matching classes by name or by MODEL.SSD.CLASS_MAP, and carrying their rows."""

from itertools import permutations

import pytest
import torch
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

from ssd.checkpoint import classes
from ssd.checkpoint.classes import (
    carry_rows,
    known_classes,
    match_classes,
    parse_class_map,
    same_classes,
)

COCO, IDS, VOC = known_classes(80), known_classes(90), known_classes(20)
# aeroplane, bicycle, …, tvmonitor: COCO's contiguous numbers and category ids, written by hand.
VOC_IN_COCO = [4, 1, 14, 8, 39, 5, 2, 15, 56, 19, 60, 16, 17, 3, 0, 58, 18, 57, 6, 62]
VOC_IDS = [5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72]


def test_known_classes():
    assert len(COCO) == 80 and COCO[0] == "person" and COCO[11] == "stop sign"
    assert COCO[79] == "toothbrush" and "" not in COCO
    assert len(VOC) == 20 and VOC[0] == "aeroplane" and VOC[19] == "tvmonitor"
    assert VOC == sorted(VOC)
    assert [known_classes(count) for count in (0, 1, 19, 21, 79, 81, 91)] == [None] * 7


def test_known_classes_by_category_id():
    assert len(IDS) == 90 and IDS[0] == "person" and IDS[89] == "toothbrush"
    unused = [number for number, name in enumerate(IDS, 1) if not name]
    assert unused == [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    assert [name for name in IDS if name] == COCO


def test_a_changed_list_of_known_classes_changes_no_other():
    known_classes(20).clear()
    known_classes(80).clear()
    assert known_classes(20) == VOC and known_classes(80) == COCO


def test_all_of_voc_is_in_coco():
    assert match_classes(COCO, VOC) == VOC_IN_COCO
    assert match_classes(IDS, VOC) == [number - 1 for number in VOC_IDS]


def test_what_of_coco_is_in_voc():
    rows = match_classes(VOC, COCO)
    assert sum(row >= 0 for row in rows) == 20
    assert all(rows[coco] == voc for voc, coco in enumerate(VOC_IN_COCO))


def test_unused_ids_match_nothing():
    assert match_classes(IDS, ["", "-", " "]) == [-1, -1, -1]
    assert match_classes(["", "cat"], ["", "cat"]) == [-1, 1]
    rows = match_classes(COCO, IDS)
    assert [row for row in rows if row >= 0] == list(range(80)) and rows.count(-1) == 10


def test_spelling_does_not_count():
    names = ["Potted_Plant", "potted-plant", "POTTEDPLANT", " potted  plant"]
    assert match_classes(["cat", "potted plant"], names) == [1] * 4
    assert match_classes(["hotdog", "Stop-Sign"], ["hot dog", "stop_sign"]) == [0, 1]


@pytest.mark.parametrize(
    "one, other",
    [
        ("aeroplane", "airplane"), ("motorbike", "Motorcycle"), ("sofa", "couch"),
        ("tvmonitor", "TV"), ("Television", "tv"), ("diningtable", "dining table"),
        ("bike", "bicycle"), ("Mobile phone", "cell phone"), ("cellphone", "mobile_phone"),
        ("fridge", "refrigerator"), ("Hair Dryer", "hair drier"), ("doughnut", "donut"),
        ("automobile", "car"), ("plane", "aeroplane"), ("Moniter/TV", "tvmonitor"),
    ],
)  # fmt: skip
def test_synonyms_match_both_ways(one, other):
    assert match_classes(["cat", one], [other, "dog"]) == [1, -1]
    assert match_classes(["cat", other], [one, "dog"]) == [1, -1]


@pytest.mark.parametrize("group", classes._SYNONYMS, ids=[g[0] for g in classes._SYNONYMS])
def test_each_name_is_in_one_group(group):
    assert all(match_classes([a], [b]) == [0] for a, b in permutations(group, 2))
    others = [name for g in classes._SYNONYMS if g is not group for name in g]
    assert set(match_classes(group, others)) == {-1}


@pytest.mark.parametrize("name", ["pedestrian", "rider", "cyclist", "van", "SUV", "people", "cats"])
def test_related_classes_are_not_equal(name):
    assert match_classes(COCO, [name]) == match_classes(VOC, [name]) == [-1]


def test_other_vocabularies():
    cityscapes = [c["name"] for c in CITYSCAPES_CATEGORIES if c["isthing"]]
    rider = cityscapes.index("rider")
    rows = match_classes(COCO, cityscapes)
    assert rows[rider] == -1 and cityscapes == [
        "rider" if row < 0 else COCO[row] for row in rows
    ]  # fmt: skip
    lvis = [c["name"] for c in LVIS_CATEGORIES]
    rows = match_classes(lvis, COCO)
    assert [name for name, row in zip(COCO, rows) if row < 0] == [
        "sports ball", "hot dog", "potted plant"
    ]  # fmt: skip
    found = [row for row in match_classes(COCO, lvis) if row >= 0]
    assert len(found) == len(set(found)) == 77


def test_the_same_name_goes_before_one_that_is_alike():
    assert match_classes(["cat", "sofa", "couch"], ["couch", "sofa", "Couch"]) == [2, 1, 1]
    letters = ["A", "a", "1-1", "11"]
    assert match_classes(letters, letters) == [0, 1, 2, 3] and same_classes(letters, letters)
    assert parse_class_map(["a", "11"], letters, 4, 2) == [1, 3]
    assert same_classes(["sofa", "car"], ["couch", "Car"])
    assert same_classes(["Cat", "cat", "dog"], ["Cat", "cat", "Dog"])
    assert not same_classes(["bike", "bicycle"], ["bicycle", "bike"])


def test_no_classes():
    assert match_classes([], ["cat"]) == [-1] and match_classes(["cat"], []) == []


# 2 default boxes; of source class c at box a the row is (10 a + c), 3 is the background.
VALUE = torch.tensor([0.0, 1, 2, 3, 10, 11, 12, 13])
# fresh rows are negative: 4 classes, then the background
FRESH = -torch.arange(1.0, 11)
ROWS = [2, -1, 0, 2]
EXPECTED = torch.tensor([2.0, -2, 0, 2, 3, 12, -7, 10, 12, 13])


def test_rows_of_biases():
    assert torch.equal(carry_rows(VALUE, FRESH, 2, ROWS), EXPECTED)


def test_rows_of_weights():
    scale = torch.tensor([1.0, 0.5, -3]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    value, fresh = (x.view(-1, 1, 1, 1) * scale for x in (VALUE, FRESH))
    result = carry_rows(value, fresh, 2, ROWS)
    assert torch.equal(result, EXPECTED.view(-1, 1, 1, 1) * scale)


def test_inputs_stay_as_they_are():
    value, fresh = VALUE.clone(), FRESH.clone()
    carry_rows(value, fresh, 2, ROWS).zero_()
    assert torch.equal(value, VALUE) and torch.equal(fresh, FRESH)


def test_the_same_classes_carry_everything():
    assert torch.equal(carry_rows(VALUE, -VALUE, 2, [0, 1, 2]), VALUE)


def test_without_matches_only_the_background_is_carried():
    result = carry_rows(VALUE, FRESH, 2, [-1] * 4)
    assert torch.equal(result, torch.tensor([-1.0, -2, -3, -4, 3, -6, -7, -8, -9, 13]))


def test_a_half_precision_file():
    result = carry_rows(VALUE.half(), FRESH, 2, ROWS)
    assert result.dtype == torch.float32 and torch.equal(result, EXPECTED)


def test_coco_to_voc_keeps_logits():
    torch.manual_seed(0)
    value, fresh = torch.randn(4 * 81, 5), torch.randn(4 * 21, 5)
    carried = carry_rows(value, fresh, 4, match_classes(COCO, VOC))
    features = torch.randn(5, 7)
    before = (value @ features).view(4, 81, 7)
    after = (carried @ features).view(4, 21, 7)
    for voc, coco in [(0, 4), (14, 0), (17, 57), (19, 62), (20, 80)]:
        torch.testing.assert_close(after[:, voc], before[:, coco])
    torch.testing.assert_close(after, before[:, [*VOC_IN_COCO, 80]])


@pytest.mark.parametrize(
    "value, fresh, num_anchors, rows",
    [
        (torch.zeros(9), FRESH, 2, ROWS),  # the file's rows aren't a multiple of 2
        (torch.zeros(0), FRESH, 2, ROWS),
        (torch.tensor(1.0), FRESH, 2, ROWS),
        (VALUE, torch.zeros(9), 2, ROWS),
        (VALUE, FRESH, 2, ROWS[:3]),
        (VALUE, torch.zeros(10, 1), 2, ROWS),
        (torch.zeros(8, 3, 3, 3), torch.zeros(10, 3, 1, 1), 2, ROWS),
        (torch.zeros(8, 512, 3, 3), torch.zeros(10, 256, 3, 3), 2, ROWS),
    ],
)
def test_shapes_that_do_not_fit(value, fresh, num_anchors, rows):
    with pytest.raises(ValueError, match="confidence layer") as error:
        carry_rows(value, fresh, num_anchors, rows)
    assert str(tuple(value.shape)) in str(error.value)
    assert str(tuple(fresh.shape)) in str(error.value)


@pytest.mark.parametrize("row", [3, -2])
def test_rows_out_of_range(row):
    # 3 is the background's row, and would be carried without a word
    with pytest.raises(ValueError, match=f"class {row}, expected -1 or 0 to 2"):
        carry_rows(VALUE, FRESH, 2, [0, 1, 2, row])


def test_class_map():
    class_map = ["Sofa", -1, 16, "", "tvmonitor", 79, 0]
    assert parse_class_map(class_map, COCO, 80, 7) == [57, -1, 16, -1, 62, 79, 0]
    assert parse_class_map([4, -1, "", 0], None, 5, 4) == [4, -1, -1, 0]
    assert parse_class_map(VOC, IDS, 90, 20) == [number - 1 for number in VOC_IDS]


@pytest.mark.parametrize(
    "class_map, source, message",
    [
        (["cat"], COCO, "has 1 entries, expected 2.*NUM_CLASSES"),
        ([], COCO, "has 0 entries, expected 2"),
        (["cat", "Girafe"], COCO, r"\[1\] is 'Girafe' \(did you mean 'giraffe'\?\), expected"),
        (["cat", "xyzzy"], COCO, r"\[1\] is 'xyzzy', expected the name"),
        ([" ", "cat"], COCO, r"\[0\] is ' ', expected the name"),
        (["cat", -1], None, r"\[0\] is 'cat', but the names of the 80 .*from 0 to 79"),
        ([0, 80], COCO, r"\[1\] is 80, expected .*from 0 to 79, or -1"),
        ([-2, 0], None, r"\[0\] is -2, expected .*from 0 to 79"),
        ([0, True], COCO, r"\[1\] is True, expected"),
        ([0, 1.0], COCO, r"\[1\] is 1.0, expected"),
        ([None, 1], COCO, r"\[0\] is None, expected"),
    ],
)
def test_class_maps_that_do_not_fit(class_map, source, message):
    with pytest.raises(ValueError, match=rf"^MODEL\.SSD\.CLASS_MAP.*{message}"):
        parse_class_map(class_map, source, 80, 2)
