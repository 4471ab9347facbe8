"""docs/fidelity.md holds: all differences that tools/fidelity.py computes; and it can see one.

The rows on MMDetection are computed once for this file and tests/test_golden.py.
"""

import math
import sys
from pathlib import Path

import fidelity
import pytest
import torch
from detectron2.structures import Boxes, Instances
from lineages import independent, mmdet, rows, settings
from lineages import torchvision as tv

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found():
    """All rows."""
    return sum(fidelity.compute().values(), [])


@pytest.fixture(scope="module")
def document():
    return (ROOT / "docs/fidelity.md").read_text()


def test_every_difference_is_within_its_tolerance(found):
    assert [row for row in found if not row.is_equal] == []
    assert sum(row.difference is not None for row in found) > 70


def test_document_lists_exactly_these_rows(found, document):
    missing = {lab for kind, lab in mmdet.LABS.items() if not mmdet.golden_file(kind)}

    def there(keys):
        return [key for key in keys if (key[0], key[1]) not in {(x, mmdet.SOURCE) for x in missing}]

    expected, actual = there(row.key for row in found), there(fidelity.keys_in(document))
    assert actual == expected, "run: python tools/fidelity.py"
    assert len(set(actual)) == len(actual)


def test_document_lists_the_labs_settings(document):
    assert document.endswith(settings.settings_markdown()), "run: python tools/fidelity.py"


def test_every_lab_has_default_boxes_that_were_compared(found):
    labs = {path.parent.name for path in ROOT.glob("labs/*/config.yaml")}
    compared = {row.lab for row in found if row.quantity.startswith("default boxes")}
    missing = {lab for kind, lab in mmdet.LABS.items() if not mmdet.golden_file(kind)}
    assert compared | missing == labs, "add a lab's source to BOXES in tools/lineages/sources.py"


def test_files_that_rows_point_to_are_there(found):
    notes = [row.note for row in found if row.difference is None and "tests/" in row.note]
    assert len(notes) == 3 and all((ROOT / note.split(": ")[1]).is_file() for note in notes)


def test_only_prints_the_labs_that_match(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fidelity.py", "--only", "^quickstart$"])
    assert fidelity.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert fidelity.keys_in("\n".join(lines)) == [("quickstart", "own model", "default boxes")]
    assert lines[-1] == "1 of 1 rows are equal within their tolerance"
    monkeypatch.setattr(sys, "argv", ["fidelity.py", "--only", "quikstart"])
    with pytest.raises(SystemExit):
        fidelity.main()
    assert "--only 'quikstart' fits no lab" in capsys.readouterr().err


# --- A difference is seen ----------------------------------------------------------------------


def with_settings(monkeypatch, *opts):
    """Labs as if they had other settings."""
    of_lab = rows.lab_config

    def lab_config(lab, *given):
        return of_lab(lab, *given, *opts)

    for module in (rows, independent, tv):
        monkeypatch.setattr(module, "lab_config", lab_config)


NETWORK = {"features", "logits", "offsets"}


@pytest.mark.parametrize(
    "lab, opts, seen",
    [
        ("ssdlite_mobilenetv3_size320_voc0712", "MODEL.MOBILENET.SQUEEZE_FIRST False", NETWORK),
        ("ssdlite_mobilenetv3_size320_voc0712", "MODEL.SSD.EXTRA_ACTIVATION ReLU6", NETWORK),
        ("ssdlite_mobilenetv2_size300_tf", "MODEL.SSD.SAME_PADDING False", NETWORK | {"scores"}),
        ("ssdlite_mobilenetv2_size300_tf", "MODEL.SSD.SCORE_FUNCTION softmax", {"scores"}),
        ("ssd_mobilenetv1_size300_voc0712", "MODEL.PIXEL_STD [1.,1.,1.]", NETWORK | {"input"}),
    ],
)
def test_another_setting_of_the_network_is_seen(monkeypatch, lab, opts, seen):
    with_settings(monkeypatch, *opts.split())
    found = independent.network_rows.__wrapped__(lab)
    assert {row.quantity for row in found if not row.is_equal} == seen


@pytest.mark.parametrize(
    "lab, opts",
    [
        ("ssd_vgg16_size300", "CLIP xyxy"),
        ("ssd_vgg16_size512", "MIN_SIZES [20.48,51.,133.,215.,296.,378.,460.]"),
        ("ssd_resnet50_size300", "CLIP none"),
        ("ssdlite_mobilenetv2_size300_tf", "FIRST_SQUARE 31.0"),
        ("ssd_mobilenetv1_size300_voc0712", "STEPS [16.,32.,64.,107.,150.,300.]"),
    ],
)
def test_another_setting_of_the_default_boxes_is_seen(monkeypatch, lab, opts):
    with_settings(monkeypatch, *f"MODEL.SSD.DEFAULT_BOXES.{opts}".split())
    assert not any(row.is_equal for row in independent.box_rows.__wrapped__(lab))


def test_other_settings_are_seen_in_all_rows_of_torchvision(monkeypatch):
    with_settings(
        monkeypatch,
        *"MODEL.PIXEL_MEAN [127.,127.,127.] MODEL.SSD.MATCHING.IOU_THRESHOLD 0.4".split(),
        *"MODEL.SSD.DEFAULT_BOXES.MIN_SIZES [60.,112.,160.,208.,256.,304.]".split(),
        *"MODEL.SSD.LOSS.NEGATIVES_WITHOUT_POSITIVES 3".split(),
    )
    found = tv.rows_of.__wrapped__("ssdlite_mobilenetv3_size320")
    # where no detection has a partner, their boxes can't differ
    assert {row.quantity for row in found if row.is_equal} <= {"boxes of detections"}


def test_measures_of_difference():
    one = torch.tensor([1.0, -3.0])
    assert rows.largest(one, torch.tensor([1.5, -3.25])) == 0.5
    assert rows.largest(torch.zeros(0, 4), torch.zeros(0, 4)) == 0
    assert rows.unequal(one, torch.tensor([1.0, 3.0])) == 1
    # means 2 and 4: 0.5 / 2 and 0.5 / 4
    assert rows.of_mean([one, 2 * one], [one + 0.5, 2 * one]) == 0.25
    assert rows.of_mean([one, 2 * one], [one, 2 * one + 0.5]) == 0.125
    assert rows.relative([2.0, 0.0], [2.5, 0.0]) == 0.25
    assert rows.relative([2.0, 0.0], [2.0, 1e-5]) == pytest.approx(0.1)
    for wrong in ([one, one * float("nan")], [one * float("nan"), one]):
        assert math.isnan(rows.of_mean([one, one], wrong))
        assert math.isnan(rows.relative([2.0, 2.0], [float(x[0]) for x in wrong]))
    for measure in (rows.largest, rows.unequal):
        with pytest.raises(ValueError, match=r"shapes \(2,\) and \(1, 2\)"):
            measure(one, one[None])
    for measure in (rows.of_mean, rows.relative):
        with pytest.raises(ValueError, match="1 .*but 2 of ours"):
            measure([one], [one, one])


@pytest.mark.parametrize("difference, equal", [(1.0, True), (1.5, False), (float("nan"), False)])
def test_a_row_is_equal_within_its_tolerance(difference, equal):
    row = rows.Row("lab", "source", "logits", difference, 1.0, "", "")
    assert row.is_equal == equal
    assert ("**" in fidelity.table([row]).splitlines()[2].split("|")[3]) != equal


def detections(*items):
    """Each: x of a box of 100 by 100 pixels, label, score."""
    x = torch.tensor([[item[0], 0.0, item[0] + 100, 100] for item in items]).reshape(-1, 4)
    labels = torch.tensor([item[1] for item in items], dtype=torch.int64)
    scores = torch.tensor([item[2] for item in items])
    return {"boxes": x, "labels": labels, "scores": scores}


def compare(theirs, ours):
    ours = Instances(
        (200, 200),
        pred_boxes=Boxes(ours["boxes"]), pred_classes=ours["labels"], scores=ours["scores"],
    )  # fmt: skip
    return rows.compare_detections([theirs], [ours])


def test_detections_of_equal_score_may_swap():
    result = compare(
        detections((0.0, 1, 0.5), (50.0, 1, 0.5)), detections((50.25, 1, 0.5), (0.0, 1, 0.5))
    )
    assert result == {"alone": 0, "scores": 0, "boxes": 0.25, "count": 2}


@pytest.mark.parametrize(
    "ours, alone",
    [
        (detections((0.0, 2, 0.5)), 2),  # label
        (detections((1.0, 1, 0.5)), 2),  # IoU 99 / 101
        (detections((0.0, 1, 0.5002)), 2),  # score
        (detections(), 2),
        (detections((0.0, 1, 0.5), (0.0, 1, 0.5)), 1),  # one more
    ],
)
def test_detections_that_differ_are_counted(ours, alone):
    assert compare(detections((0.0, 1, 0.5)), ours)["alone"] == alone
    assert compare(detections(), detections())["alone"] == 0
