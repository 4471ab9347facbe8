"""Data sets in Pascal VOC's format."""

import math
import os
import xml.etree.ElementTree as ET
from collections import defaultdict
from typing import Optional, Sequence

from detectron2.structures import BoxMode

from ssd.data.files import IMAGE_EXTENSIONS, image_size, read_text, require

__all__ = ["read_voc"]


def read_voc(
    root: str,
    split: str,
    class_names: Sequence[str],
    use_difficult: bool = False,
    key: str = "DATASETS.REGISTER.<name>",
) -> list[dict]:
    """Reads a folder in the format of Pascal VOC.

    Args:
        root: holds Annotations/ID.xml, ImageSets/Main/SPLIT.txt (an ID per line), and
            JPEGImages/ID.jpg, or ID with the extension of <filename>, or the only image ID.*.
        split: the name of the list.
        class_names: in the order of the labels.
        use_difficult: difficult objects get ``iscrowd`` 0 instead of 1.
        key: of the config, for error messages.

    Returns:
        a dict per image in Detectron2's format, ``image_id`` being the ID. Boxes are XYXY in
        pixels, 0-based: VOC's 1-based inclusive corners xmin, ymin, xmax, ymax become xmin - 1,
        ymin - 1, xmax, ymax. One with xmin = xmax, a pixel wide by VOC's rule but a slip of the
        hand in practice, gets zero width, likewise for y; what isn't a number is NaN.

    Raises:
        FileNotFoundError: naming the missing file and the config key.
        ValueError: for XML that cannot be read or a class that isn't in ``class_names``.
    """
    list_file = os.path.join(root, "ImageSets", "Main", f"{split}.txt")
    require(list_file, f"{key}.SPLIT = {split!r}")
    image_folder = os.path.join(root, "JPEGImages")
    require(image_folder, f"{key}.ROOT = {root!r}")
    images = defaultdict(list)
    for file in os.listdir(image_folder):
        if file.lower().endswith(IMAGE_EXTENSIONS):
            images[os.path.splitext(file)[0]].append(file)
    lines = read_text(list_file, f"{key}.SPLIT").split("\n")
    ids = dict.fromkeys(line.strip() for line in lines if line.strip())
    records = []
    for image_id in ids:
        xml_file = os.path.join(root, "Annotations", f"{image_id}.xml")
        require(xml_file, f"{image_id!r} in {list_file}, {key}.SPLIT")
        try:
            tree = ET.parse(xml_file)
        except (ET.ParseError, ValueError) as error:  # ValueError: an encoding
            raise ValueError(f"{xml_file} is not valid XML: {error} ({key}.ROOT)") from None
        found, image = images.get(image_id, []), f"{image_id}.jpg"
        if image not in found:
            image = image_id + os.path.splitext(tree.findtext("filename", ""))[1]
        file_name = os.path.join(image_folder, image)
        if image not in found and not os.path.isfile(file_name):
            if len(found) != 1:
                require(file_name, f"{image_id!r} in {list_file}, {key}.SPLIT")
            file_name = os.path.join(image_folder, found[0])
        sides = [_number(tree.find("size"), side) for side in ("height", "width")]
        if not all(1 <= side < math.inf for side in sides):
            sides = image_size(file_name)
        height, width = map(int, sides)
        record = {"file_name": file_name, "image_id": image_id, "height": height, "width": width}
        record["annotations"] = []
        for obj in tree.findall("object"):
            label = obj.findtext("name", "").strip()
            if label not in class_names:
                raise ValueError(
                    f"{xml_file}: unknown class {label!r}; {key}.CLASSES is {list(class_names)}"
                )
            difficult = _number(obj, "difficult") == 1 and not use_difficult
            annotation = {"bbox": _voc_box(obj), "bbox_mode": BoxMode.XYXY_ABS}
            annotation.update(category_id=list(class_names).index(label), iscrowd=int(difficult))
            record["annotations"].append(annotation)
        records.append(record)
    return records


def _voc_box(obj: ET.Element) -> list[float]:
    node = obj.find("bndbox")
    x1, y1, x2, y2 = (_number(node, k, math.nan) for k in ("xmin", "ymin", "xmax", "ymax"))
    return [x1 - (x1 < x2), y1 - (y1 < y2), x2, y2]


def _number(node: Optional[ET.Element], tag: str, default: float = 0.0) -> float:
    try:
        return float(node.findtext(tag))
    except (AttributeError, TypeError, ValueError):
        return default
