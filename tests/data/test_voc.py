import os

import cv2
import numpy as np
import pytest
from catalog import VOC, clean_catalog, make_cfg  # noqa: F401
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ssd.data.boxes import find_box_defects
from ssd.data.datasets import register_datasets
from ssd.data.voc import read_voc


def write_voc(root, xmls, split="train", suffix=".jpg"):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        os.makedirs(root / folder, exist_ok=True)
    for image_id, xml in xmls.items():
        (root / "Annotations" / f"{image_id}.xml").write_text(xml)
        image = np.zeros((30, 40, 3), np.uint8)
        cv2.imwrite(str(root / "JPEGImages" / (image_id + suffix)), image)
    (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(xmls) + "\n")


def voc_object(box, name="cat", difficult=0):
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box)
    box = "".join(f"<{k}>{v}</{k}>" for k, v in corners)
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox>"
        "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
    )


def voc_xml(*objects, size="<size><width>40</width><height>30</height></size>", name="a.jpg"):
    return f"<annotation><filename>{name}</filename>{size}{''.join(objects)}</annotation>"


HERE = os.path.dirname(os.path.abspath(__file__))
TEST_DATA = os.environ.get("SSD_TEST_DATA") or os.path.join(HERE, "../../../shared/data")
BCCD = os.path.join(TEST_DATA, "bccd")
needs_bccd = pytest.mark.skipif(not os.path.isdir(BCCD), reason=f"no {BCCD} ($SSD_TEST_DATA)")


def test_voc(tmp_path):
    # 1-based inclusive (1, 1, 40, 30) is the whole image of 40 x 30.
    xml = voc_xml(voc_object((1, 1, 40, 30)), voc_object((5, 6, 7.5, 8), "dog", difficult=1))
    write_voc(tmp_path / "v", {"b": xml, "a": voc_xml()})
    register_datasets(make_cfg({"t_voc": VOC, "t_difficult": {**VOC, "USE_DIFFICULT": True}}))
    assert MetadataCatalog.get("t_voc").thing_classes == ["cat", "dog"]
    records = DatasetCatalog.get("t_voc")
    assert [r["image_id"] for r in records] == ["b", "a"]  # the list's order
    assert records[0]["file_name"] == str(tmp_path / "v/JPEGImages/b.jpg")
    assert (records[0]["height"], records[0]["width"]) == (30, 40)
    mode = BoxMode.XYXY_ABS
    cat = {"category_id": 0, "bbox": [0, 0, 40, 30], "bbox_mode": mode, "iscrowd": 0}
    dog = {"category_id": 1, "bbox": [4, 5, 7.5, 8], "bbox_mode": mode, "iscrowd": 1}
    assert records[0]["annotations"] == [cat, dog] and records[1]["annotations"] == []
    annotations = DatasetCatalog.get("t_difficult")[0]["annotations"]
    assert annotations == [cat, {**dog, "iscrowd": 0}]


def test_voc_image_of_another_type_and_unknown_size(tmp_path):
    xmls = {"a": voc_xml(size="", name="whatever.png")}
    xmls["b"] = voc_xml(size="<size><width>0</width><height>0</height></size>", name="b.png")
    write_voc(tmp_path, xmls, suffix=".png")
    for record in read_voc(str(tmp_path), "train", ["cat"]):
        assert record["file_name"].endswith(".png")
        assert (record["height"], record["width"]) == (30, 40)
    write_voc(tmp_path, {"c": voc_xml(name="renamed.jpg"), "d": voc_xml(name="d")}, suffix=".PNG")
    records = read_voc(str(tmp_path), "train", ["cat"])
    assert [os.path.basename(x["file_name"]) for x in records] == ["c.PNG", "d.PNG"]
    (tmp_path / "JPEGImages/c.jpe").touch()  # named, so taken
    write_voc(tmp_path, {"c": voc_xml(name="c.jpe")}, suffix=".PNG")
    assert read_voc(str(tmp_path), "train", ["cat"])[0]["file_name"].endswith("c.jpe")


def test_voc_files_of_windows_and_sizes_that_are_none(tmp_path):
    sizes = (
        "<size><width>nan</width><height>30</height></size>",
        "<size><width>inf</width></size>",
    )
    write_voc(tmp_path, dict(zip("ab", (voc_xml(size=size) for size in sizes))))
    path = tmp_path / "ImageSets/Main/train.txt"
    path.write_text("\ufeff" + path.read_text().replace("\n", "\r\n"), encoding="utf-8")
    records = read_voc(str(tmp_path), "train", ["cat"])
    assert [(r["image_id"], r["height"], r["width"]) for r in records] == [
        ("a", 30, 40), ("b", 30, 40)
    ]  # fmt: skip
    xml = '<?xml version="1.0" encoding="gb2312"?>' + voc_xml()
    (tmp_path / "Annotations/a.xml").write_text(xml)
    with pytest.raises(ValueError, match="a.xml is not valid XML: .*encoding"):
        read_voc(str(tmp_path), "train", ["cat"])


def test_voc_box_defects_are_dropped_and_logged(tmp_path, caplog):
    boxes = [(5, 5, 5, 9), (9, 5, 3, 9), (1, 1, 10, 10), (1, "x", 9, 9), (41, 1, 60, 9)]
    write_voc(tmp_path / "v", {"a": voc_xml(*map(voc_object, boxes))})
    records = read_voc(str(tmp_path / "v"), "train", ["cat", "dog"])
    defects = find_box_defects(records, ["cat", "dog"])
    file_name = records[0]["file_name"]
    assert defects == [
        f"{file_name}: object 0 (cat) has zero width: [5.0, 4.0, 5.0, 9.0]",
        f"{file_name}: object 1 (cat) has negative width: [9.0, 4.0, 3.0, 9.0]",
        f"{file_name}: object 3 (cat) isn't finite: [0.0, nan, 9.0, 9.0]",
        f"{file_name}: object 4 (cat) lies outside the image of 40x30: [40.0, 0.0, 60.0, 9.0]",
    ]
    assert "object 0 (class 0)" in find_box_defects(records)[0]
    register_datasets(make_cfg({"t_voc": VOC}))
    records = DatasetCatalog.get("t_voc")
    assert [a["bbox"] for a in records[0]["annotations"]] == [[0, 0, 10, 10]]
    assert "t_voc: dropped 4 boxes" in caplog.text and defects[0] in caplog.text
    assert find_box_defects(records) == []


def test_voc_errors(tmp_path):
    root = tmp_path / "v"
    key = "DATASETS.REGISTER.t_voc"
    register_datasets(make_cfg({"t_voc": VOC}))  # nothing is read yet

    def load_fails(error, *texts):
        with pytest.raises(error) as info:
            DatasetCatalog.get("t_voc")
        for text in texts:
            assert text in str(info.value)

    load_fails(FileNotFoundError, "train.txt", f"{key}.SPLIT = 'train'", f"is '{tmp_path}'")
    write_voc(root, {"a": voc_xml(voc_object((1, 1, 5, 5), "cow"))})
    load_fails(ValueError, "a.xml", "'cow'", f"{key}.CLASSES is ['cat', 'dog']")
    split = root / "ImageSets/Main/train.txt"
    split.write_bytes("Größe".encode("cp1252"))
    load_fails(ValueError, f"{split} ({key}.SPLIT) isn't UTF-8")
    write_voc(root, {"a": voc_xml()})
    (root / "Annotations/a.xml").write_text("<annotation><size>")
    load_fails(ValueError, "a.xml is not valid XML", key)
    os.remove(root / "Annotations/a.xml")
    load_fails(FileNotFoundError, "a.xml", f"{key}.SPLIT")
    write_voc(root, {"a": voc_xml()})
    os.remove(root / "JPEGImages/a.jpg")
    load_fails(FileNotFoundError, "a.jpg", f"{key}.SPLIT")


@needs_bccd
def test_bccd():
    classes = ["RBC", "WBC", "Platelets"]
    counts, defects = {}, []
    for split in ("train", "val", "test"):
        records = read_voc(BCCD, split, classes)
        counts[split] = len(records), sum(len(r["annotations"]) for r in records)
        defects += find_box_defects(records, classes)
    assert {split: count[0] for split, count in counts.items()} == {
        "train": 205, "val": 87, "test": 72,
    }  # fmt: skip
    assert sum(count[1] for count in counts.values()) == 4888
    assert sorted(os.path.basename(line) for line in defects) == [
        "BloodImage_00338.jpg: object 12 (RBC) has zero width: [504.0, 337.0, 504.0, 337.0]",
        "BloodImage_00343.jpg: object 3 (RBC) has zero width: [181.0, 329.0, 181.0, 329.0]",
    ]
