"""Reads a data set with its defects, and looks into its files."""

import hashlib
import io
import json
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from tqdm import tqdm

from ssd.data.datasets import read_every_box
from ssd.data.mapper import read_image

THUMBNAIL = 16  # side in pixels
# From this many pixels of the shorter side on, an image is decoded in lower resolution.
REDUCED = (
    (1024, cv2.IMREAD_REDUCED_GRAYSCALE_8),
    (256, cv2.IMREAD_REDUCED_GRAYSCALE_4),
    (0, cv2.IMREAD_GRAYSCALE),
)


_PARTS = ("images", "categories", "annotations")


class Finding(NamedTuple):
    """OK; ERROR: stops the training or makes its result wrong; WARNING: costs accuracy, or is
    probably a mistake."""

    level: str
    text: str
    places: Sequence[str] = ()  # file names with what is wrong there
    advice: str = ""  # what to do


class ImageFile(NamedTuple):
    error: str  # why training can't read it, or ""
    size: Tuple[int, int] = (0, 0)  # turned as EXIF says
    orientation: int = 1  # EXIF's, 1 to 8
    digest: bytes = b""  # of the file
    # what it shows: (256,) grey values without their mean, of length 1; zeros without contrast
    thumbnail: Optional[np.ndarray] = None

    @property
    def stored_size(self) -> Tuple[int, int]:
        return self.size[::-1] if self.orientation >= 5 else self.size


class DataSet(NamedTuple):
    name: str
    records: List[dict]  # with every box, also those that the project's reader leaves out
    files: List[ImageFile]
    classes: List[str]
    root: str  # folder of the images
    loads: bool  # for a training

    def place(self, index: int) -> str:
        return os.path.relpath(self.records[index]["file_name"], self.root)


def read_dataset(name: str, entry: dict) -> Tuple[DataSet, List[Finding]]:
    """A registered data set, its files scanned, and what is wrong with its annotation files.

    A COCO file is read leniently: what its JSON lacks is a finding, not an exception.

    Args:
        entry: of DATASETS.REGISTER, or {} for a data set that others have registered.
    """
    metadata, findings = MetadataCatalog.get(name), []
    records, classes, root, loads = [], [], "", False
    try:
        if entry.get("FORMAT") in ("voc", "yolo"):  # the catalog leaves out defective boxes
            root, records = metadata.image_root, read_every_box(name)
        else:
            records = DatasetCatalog.get(name)
        classes, loads = metadata.thing_classes, True
    except Exception as error:  # a broken file raises anything
        text = f"can't be loaded: {type(error).__name__}: {error}".partition("; tools/doctor")[0]
        findings.append(Finding("ERROR", text, advice="Training stops with this error."))
    json_file = metadata.get("json_file")
    if json_file and os.path.isfile(json_file):
        root = metadata.image_root
        try:
            records, classes, problems = read_coco(json_file, root, entry.get("KEEP_IDS", False))
        except Exception as error:  # values of any type
            problems = [Finding("ERROR", f"{json_file} can't be checked further: {error!r}")]
        findings += problems
    if not records and not findings:
        findings.append(Finding("ERROR", "holds no image"))
    names = [record["file_name"] for record in records]
    found = scan_files(names)
    for record in records:
        if not (record.get("height") and record.get("width")):
            # of no use where nothing tells the size
            record["height"], record["width"] = found[record["file_name"]].size
            record["annotations"] = record["annotations"] if record["height"] else []
    root = root or os.path.dirname(os.path.commonprefix(names)) or "."
    return DataSet(name, records, [found[n] for n in names], list(classes), root, loads), findings


def read_coco(
    json_file: str, root: str, keep_ids: bool = False
) -> Tuple[List[dict], List[str], List[Finding]]:
    """The records, classes and findings of a COCO file, as far as it can be read.

    Args:
        root: folder of the images.
        keep_ids: class i is category id i + 1 (see ssd.data.datasets).
    """
    try:
        with open(json_file, encoding="utf-8") as f:
            data = json.load(f)
        images, categories = data["images"], data["categories"]
        annotations = data.get("annotations", [])
        for key, part in zip(_PARTS, (images, categories, annotations)):
            if not isinstance(part, list):
                raise TypeError(f"{key} is no list: {str(part)[:80]}")
            if wrong := [x for x in part if not isinstance(x, dict)]:
                raise TypeError(f"{key} has an entry that is no object: {str(wrong[0])[:80]}")
        names = {c["id"]: c["name"] for c in categories}
    except (ValueError, KeyError, TypeError) as error:
        text = f"{json_file} is no COCO file: {type(error).__name__}: {error}"
        return [], [], [Finding("ERROR", text, advice=f"It needs {', '.join(_PARTS)}.")]
    ids = list(range(1, max(names, default=0) + 1)) if keep_ids else sorted(names)
    labels = {category: label for label, category in enumerate(ids)}
    problems = defaultdict(list)
    records: Dict[int, dict] = {}
    for image in images:
        name = image.get("file_name")
        if name is None or "id" not in image:
            problems["images without id or file_name"].append(str(image)[:80])
        elif image["id"] in records:
            problems["images with the id of another"].append(f"{name}: id {image['id']}")
        else:
            record = {"file_name": os.path.join(root, name), "image_id": image["id"]}
            record.update(height=image.get("height"), width=image.get("width"), annotations=[])
            records[image["id"]] = record
            if not (record["height"] and record["width"]):
                problems["images without height or width"].append(name)
    seen = set()
    for annotation in annotations:
        place = f"annotation {annotation.get('id')}"
        record = records.get(annotation.get("image_id"))
        if record is None:
            problems["annotations of unknown images"].append(place)
            continue
        place = f"{os.path.relpath(record['file_name'], root)}: {place}"
        category, box = annotation.get("category_id"), annotation.get("bbox")
        if category not in names:
            problems["annotations of unknown categories"].append(f"{place}, category {category}")
            continue
        numbers = (int, float, type(None))
        if not (
            isinstance(box, list) and len(box) == 4 and all(isinstance(v, numbers) for v in box)
        ):
            problems["annotations without a bbox of four numbers"].append(place)
            continue
        if annotation.get("id") in seen:
            problems["annotations with the id of another"].append(place)
        seen.add(annotation.get("id"))
        if annotation.get("ignore", 0):
            problems["annotations with ignore: 1"].append(place)
        polygons = annotation.get("segmentation")
        if isinstance(polygons, list) and not all(isinstance(p, list) for p in polygons):
            problems["annotations whose segmentation is no list of polygons"].append(place)
        elif isinstance(polygons, list) and polygons and all(len(p) < 6 for p in polygons):
            problems["annotations whose segmentation is no polygon"].append(place)
        ignored = annotation.get("iscrowd", 0) or annotation.get("ignore", 0)
        box = [float("nan") if v is None else float(v) for v in box]
        record["annotations"].append(
            {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": int(bool(ignored)),
             "category_id": labels[category]}
        )  # fmt: skip
    harmless = {
        "annotations of unknown images": "They are ignored.",
        "annotations whose segmentation is no polygon": "Detectron2 leaves these objects out.",
    }
    findings = [
        Finding("WARNING" if text in harmless else "ERROR", f"{len(places)} {text}", places,
                harmless.get(text, "Correct the file."))
        for text, places in problems.items()
    ]  # fmt: skip
    return list(records.values()), [names.get(i, f"id {i}") for i in ids], findings


def scan_files(names: Sequence[str]) -> Dict[str, ImageFile]:
    """Looks into image files, several at a time."""
    names = list(dict.fromkeys(names))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = tqdm(pool.map(scan_file, names), "images", len(names), disable=None, leave=False)
        return dict(zip(names, found))


def scan_file(name: str) -> ImageFile:
    """Size and orientation from the header, and a thumbnail from a low resolution.

    Whatever looks suspicious is read as training reads it, which then says what is wrong.
    """
    try:
        with open(name, "rb") as f:
            data = f.read()
        try:
            with Image.open(io.BytesIO(data)) as image:
                (width, height), orientation = image.size, image.getexif().get(0x0112, 1)
                whole = image.format != "JPEG" or data.endswith(b"\xff\xd9")
        except Exception:  # Pillow raises anything for a broken file
            whole, orientation = False, 1
        if not whole:
            height, width = read_image(name).shape[:2]
        elif orientation >= 5:
            height, width = width, height
        side = min(height, width)
        flag = next(flag for least, flag in REDUCED if side >= least)
        grey = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
        if grey is None:
            read_image(name)
            raise ValueError(f"image {name} can't be decoded")
    except (OSError, ValueError, cv2.error) as error:
        return ImageFile(str(error))
    digest = hashlib.sha256(data).digest()
    return ImageFile("", (height, width), orientation, digest, _thumbnail(grey))


def _thumbnail(grey: np.ndarray) -> np.ndarray:
    cells = cv2.resize(grey, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    values = cells.astype(np.float32).ravel() - cells.mean(dtype=np.float32)
    contrast = np.linalg.norm(values) / THUMBNAIL  # standard deviation
    return values / np.linalg.norm(values) if contrast > 4 else np.zeros_like(values)
