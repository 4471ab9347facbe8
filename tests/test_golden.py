"""Every golden file of MMDetection's SSD is reproduced, within GOLDEN.md's tolerances.

Takes each ``*.npz`` in ``tests/data/golden`` or in the folder that ``SSD_GOLDEN_DIR`` names. The
file's name says the model: ssd300, ssd512 or ssdlite. tools/lineages/mmdet.py compares all arrays
with the model of the lab that reproduces it.
"""

import numpy as np
import pytest
from lineages import mmdet

FILES = sorted(mmdet.GOLDEN.glob("*.npz"))
QUANTITIES = {
    "input": 1e-4,
    "features": 1e-4,  # of the level's mean absolute value, as the next three
    "logits": 1e-4,
    "offsets": 1e-4,
    "inference path": 1e-3,  # both differ by 3e-4 from float64
    "default boxes": 1e-3,  # pixels
    "decoded boxes": 1e-3,
    "candidates over the threshold": 1,
    "detections without a partner": 0,
    "scores of detections": 1e-4,
    "boxes of detections": 0.1,
    "matched labels": 0,
    "encoded targets": 1e-4,
    "losses": 1e-5,  # relative, as the next three
    "gradients": 1e-3,
    "training path": 1e-3,
}
BATCH_NORM = {
    "losses in training mode": 1e-5,
    "BatchNorm in training mode": 1e-4,
    "training path": 1e-2,
}


def test_files_are_there():
    assert FILES, f"no golden file in {mmdet.GOLDEN}"


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_all_arrays_are_reproduced(path):
    rows = mmdet.rows_of(path)
    expected = {**QUANTITIES, **(BATCH_NORM if "ssdlite" in path.stem else {})}
    assert {row.quantity: row.tolerance for row in rows} == expected
    assert [row for row in rows if not row.difference <= expected[row.quantity]] == []


def test_another_array_shows_in_its_row(tmp_path):
    """Each array is off by little more than its tolerance; so no row can't fail."""
    path = mmdet.ROOT / "tests/data/golden/golden_mmdet_ssdlite.npz"
    arrays = dict(np.load(path))
    for key, change in {
        "input_val": 2e-4,
        "feat3_val": 2e-4 * arrays["feat3_meanabs"],
        "cls5_val": 2e-4 * arrays["cls5_meanabs"],
        "reg0_val": 2e-4 * arrays["reg0_meanabs"],
        "anchor_box": 2e-3,
        "decode_clip": 5e-3,
        "num_over_thr": 2,
        "det0_scores": 2e-4,
        "detalt1_boxes": 0.2,
        "main_gt0_best": 2e-4,
    }.items():
        arrays[key] = arrays[key] + np.asarray(change, arrays[key].dtype)
    arrays["detori1_labels"][150] += 1
    arrays["empty0_pos1_target"][-1, 2] += 2e-4
    arrays["shared_labels"][1, -1] = 0
    for key, factor in {
        "empty0_loss_bbox": 2e-5, "train_loss_cls": 2e-5, "train_bn_norm": 2e-4, "grad_norm": 2e-3,
    }.items():  # fmt: skip
        arrays[key] = arrays[key] * (1 + factor)
    np.savez(tmp_path / "ssdlite.npz", **arrays)
    rows = mmdet.rows_of(tmp_path / "ssdlite.npz")
    ours = {"inference path", "training path"}  # one without an array, one less strict
    assert {row.quantity for row in rows if not row.is_equal} == {x.quantity for x in rows} - ours
    np.savez(tmp_path / "ssdlite2.npz", **{**arrays, "grad_norm": arrays["grad_norm"] * 1.02})
    rows = mmdet.rows_of(tmp_path / "ssdlite2.npz")
    assert {row.quantity for row in rows if row.is_equal} == {"inference path"}


def test_an_array_without_comparison_is_an_error(tmp_path):
    np.savez(tmp_path / "ssd300.npz", feat0_val=np.zeros(3), tie_margins=np.zeros(3))
    data = mmdet.GoldenFile(tmp_path / "ssd300.npz")
    with pytest.raises(ValueError, match=r"nothing was compared with: \['feat0_val'\]"):
        data.check_all_read()
    assert data.tensor("feat0_val").tolist() == [0, 0, 0]
    data.check_all_read()
