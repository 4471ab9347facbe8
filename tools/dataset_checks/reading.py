"""Reads a data set with its defects, and looks into its files."""

import contextlib
import hashlib
import io
import json
import logging
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from tqdm import tqdm

from ssd.data.datasets import read_every_box
from ssd.data.files import image_size
from ssd.data.mapper import read_image

THUMBNAIL = 16  # side in pixels
DARK = 32  # of 255
# From this many pixels of the shorter side on, an image is decoded in lower resolution.
REDUCED = (
    (1024, cv2.IMREAD_REDUCED_GRAYSCALE_8),
    (256, cv2.IMREAD_REDUCED_GRAYSCALE_4),
    (0, cv2.IMREAD_GRAYSCALE),
)

# The parts of a COCO file, and what the doctor knows of their entries.
_PARTS = {
    "images": {"id", "file_name", "height", "width"},
    "categories": {"id", "name"},
    "annotations": {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore"},
}
# What a copy makes of the defects that it doesn't leave out.
_MENDED = {
    "images without height or width": "given the file's size",
    "images whose height or width is no number": "given the file's size",
    "annotations with the id of another": "numbered anew",
    "annotations with ignore: 1": "made a crowd",
    "annotations whose segmentation is no list of polygons": "kept as a box",
    "annotations whose segmentation is no polygon": "kept as a box",
}


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
    is_tiff: bool = False
    brightest: int = 255

    @property
    def stored_size(self) -> Tuple[int, int]:
        return self.size[::-1] if self.orientation >= 5 else self.size

    @property
    def sizes(self) -> Sequence[Tuple[int, int]]:
        """Those that training takes; OpenCV turns TIFFs in any case."""
        return (self.size,) if self.is_tiff else (self.size, self.stored_size)


class DataSet(NamedTuple):
    name: str
    records: List[dict]  # with every box, also those that the project's reader leaves out
    files: List[ImageFile]
    classes: List[str]
    root: str  # folder of the images
    loads: bool  # for a training
    ids: Sequence[int] = ()  # categories of the classes
    # of a copy, by what the reader found; None: it can't be copied
    changes: Optional[Sequence[str]] = None

    def place(self, index: int) -> str:
        return os.path.relpath(self.records[index]["file_name"], self.root)


def object_key(annotation: dict, box: np.ndarray) -> tuple:
    """What objects have in common that are there twice."""
    return annotation["category_id"], annotation.get("iscrowd", 0), *box.round()


def read_dataset(name: str, entry: dict) -> Tuple[DataSet, List[Finding]]:
    """A registered data set, its files scanned, and what is wrong with its annotation files.

    A COCO file is read leniently: what its JSON lacks is a finding, not an exception.

    Args:
        entry: of DATASETS.REGISTER, or {} for a data set that others have registered.
    """
    metadata, findings = MetadataCatalog.get(name), []
    records, classes, root, loads, changes = [], {}, "", False, None
    try:
        if entry.get("FORMAT") in ("voc", "yolo"):  # the catalog leaves out defective boxes
            with _said_by("ssd.data.yolo") as warnings:
                root, records = metadata.image_root, read_every_box(name)
            findings += [Finding("WARNING", text) for text in warnings]
        else:
            records = DatasetCatalog.get(name)
        classes, loads, changes = dict(enumerate(metadata.thing_classes, 1)), True, []
    except Exception as error:  # a broken file raises anything
        text = f"can't be loaded: {type(error).__name__}: {error}".partition("; tools/doctor")[0]
        findings.append(Finding("ERROR", text, advice="Training stops with this error."))
    json_file = metadata.get("json_file")
    if json_file and os.path.isfile(json_file):
        root, records = metadata.image_root, []  # frees them before the file is read again
        try:
            records, classes, problems, changes = read_coco(
                json_file, root, entry.get("KEEP_IDS", False)
            )
        except Exception as error:  # values of any type
            records, classes, changes = [], {}, None
            problems = [Finding("ERROR", f"{json_file} can't be checked further: {error!r}")]
        findings += problems
        loads = loads and bool(classes)  # else their names can't be compared
    if not records and "ERROR" not in [finding.level for finding in findings]:
        findings.append(Finding("ERROR", "holds no image"))
    names = [record["file_name"] for record in records]
    found = scan_files(names)
    for record in records:
        if not (record.get("height") and record.get("width")):
            # of no use where nothing tells the size
            record["height"], record["width"] = found[record["file_name"]].size
            record["annotations"] = record["annotations"] if record["height"] else []
    root = root or os.path.dirname(os.path.commonprefix(names)) or "."
    files, ids, classes = [found[n] for n in names], list(classes), list(classes.values())
    return DataSet(name, records, files, classes, root, loads, ids, changes), findings


@contextlib.contextmanager
def _said_by(name: str) -> Iterator[List[str]]:
    """The warnings of a logger, in the place of its handlers."""
    messages, log, disabled = [], logging.getLogger(name), logging.root.manager.disable

    def keep(record):
        messages.append(record.getMessage())

    log.addFilter(keep)  # None: it goes no further
    logging.disable(logging.INFO)
    try:
        yield messages
    finally:
        log.removeFilter(keep)
        logging.disable(disabled)


def read_coco(
    json_file: str, root: str, keep_ids: bool = False
) -> Tuple[List[dict], Dict[int, str], List[Finding], Optional[List[str]]]:
    """The records, classes by category id, and findings of a COCO file, as far as it can be read;
    and the changes of a copy, None if there can't be one.

    Args:
        root: folder of the images.
        keep_ids: class i is category id i + 1 (see ssd.data.datasets).
    """
    try:
        with open(json_file, encoding="utf-8") as f:
            data = json.load(f)
        images, categories = data["images"], data["categories"]
        annotations = data.get("annotations", [])
        parts = dict(zip(_PARTS, (images, categories, annotations)))
        for key, part in parts.items():
            if not isinstance(part, list):
                raise TypeError(f"{key} is no list: {str(part)[:80]}")
            if wrong := [x for x in part if not isinstance(x, dict)]:
                raise TypeError(f"{key} has an entry that is no object: {str(wrong[0])[:80]}")
        names = {c["id"]: c["name"] for c in categories}
        wrong = [c for c in categories if not isinstance(c["name"], str)]
        if wrong or not names:
            raise TypeError(f"categories: expected names that are texts, got {str(wrong)[:80]}")
    except (ValueError, KeyError, TypeError) as error:
        text = f"{json_file} is no COCO file: {type(error).__name__}: {error}"
        return [], {}, [Finding("ERROR", text, advice=f"It needs {', '.join(_PARTS)}.")], None
    ids = list(range(1, max(names) + 1)) if keep_ids else sorted(names)
    problems = defaultdict(list)
    for key in ("id", "name"):
        counts = Counter(c[key] for c in categories)
        same = [f"{c['name']}: id {c['id']}" for c in categories if counts[c[key]] > 1]
        problems[f"categories of the same {key}"] = same
    copyable = not any(problems.values())
    records = _read_images(images, root, problems)
    labels = {category: label for label, category in enumerate(ids) if category in names}
    _read_annotations(annotations, records, labels, root, problems)
    harmless = {
        "annotations of unknown images": "They are ignored.",
        "images that are listed twice": "They count once.",
        "annotations whose segmentation is no polygon": "Detectron2 leaves these objects out.",
    }
    findings, changes = [], []
    for text, places in problems.items():
        if places:
            level = "WARNING" if text in harmless else "ERROR"
            advice = harmless.get(text, "Correct the file.")
            findings.append(Finding(level, f"{len(places)} {text}", places, advice))
        changes += [f"{place}: {_MENDED.get(text, 'left out')} ({text})" for place in places]
    for key, part in parts.items():
        if unknown := sorted(set().union(*part) - _PARTS[key]):
            changes.append(f"left out of all {key}: {', '.join(unknown)}")
    classes = {i: names.get(i, f"id {i}") for i in ids}
    records = [record for record in records.values() if record]
    return records, classes, findings, changes if copyable else None


def _read_images(
    images: Sequence[dict], root: str, problems: Dict[str, List[str]]
) -> Dict[int, Optional[dict]]:
    """The records by image id. None: several images have it, and no one knows whose objects are
    its annotations."""
    keys = [(image.get("id"), image.get("file_name")) for image in images]
    for (number, name), n in Counter(keys).items():
        if n > 1 and None not in (number, name):
            problems["images that are listed twice"].append(f"{name}: id {number}")
    rows = dict(zip(keys, images))  # the last one counts, as in training
    counts, records = Counter(number for number, _ in rows), {}
    for image in rows.values():
        name, sides = image.get("file_name"), [image.get("height"), image.get("width")]
        if name is None or "id" not in image:
            problems["images without id or file_name"].append(str(image)[:80])
        elif counts[image["id"]] > 1:
            problems["images with the id of another"].append(f"{name}: id {image['id']}")
            records[image["id"]] = None
        else:
            if any(side and not isinstance(side, (int, float)) for side in sides):
                problems["images whose height or width is no number"].append(name)
                sides = [None, None]
            elif not all(sides):
                problems["images without height or width"].append(name)
            record = {"file_name": os.path.join(root, name), "image_id": image["id"]}
            record.update(height=sides[0], width=sides[1], annotations=[])
            records[image["id"]] = record
    return records


def _read_annotations(
    annotations: Sequence[dict],
    records: Dict[int, Optional[dict]],
    labels: Dict[int, int],
    root: str,
    problems: Dict[str, List[str]],
) -> None:
    """Adds the annotations to their records."""
    seen, numbers = set(), (int, float, type(None))
    for annotation in annotations:
        place = f"annotation {annotation.get('id')}"
        record = records.get(annotation.get("image_id"))
        if record is None:
            kind = "ambiguous" if annotation.get("image_id") in records else "unknown"
            problems[f"annotations of {kind} images"].append(place)
            continue
        place = f"{os.path.relpath(record['file_name'], root)}: {place}"
        category, box = annotation.get("category_id"), annotation.get("bbox")
        if category not in labels:
            problems["annotations of unknown categories"].append(f"{place}, category {category!r}")
            continue
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
        if polygons and not isinstance(polygons, dict):  # Detectron2's rule
            try:
                if not [p for p in polygons if len(p) % 2 == 0 and len(p) >= 6]:
                    problems["annotations whose segmentation is no polygon"].append(place)
            except TypeError:
                problems["annotations whose segmentation is no list of polygons"].append(place)
        ignored = annotation.get("iscrowd", 0) or annotation.get("ignore", 0)
        box = [float("nan") if v is None else float(v) for v in box]
        record["annotations"].append(
            {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": int(bool(ignored)),
             "category_id": labels[category], "area": annotation.get("area")}
        )  # fmt: skip


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
                orientation, is_tiff = image.getexif().get(0x0112), image.format == "TIFF"
                whole = image.format != "JPEG" or data.endswith(b"\xff\xd9")
                # which Pillow and not every OpenCV turn
                whole &= orientation in (None, 1) or image.format in ("JPEG", "PNG", "TIFF")
            height, width = image_size(io.BytesIO(data))
        except Exception:  # Pillow raises anything for a broken file
            whole, orientation, is_tiff = False, 1, False
        if not whole:
            height, width = read_image(name).shape[:2]
        orientation = orientation if orientation in range(1, 9) else 1
        side = min(height, width)
        flag = next(flag for least, flag in REDUCED if side >= least)
        grey = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
        if grey is None:
            read_image(name)
            raise ValueError(f"image {name} can't be decoded")
        brightest = int(grey.max())
        if brightest < DARK:  # or small, or of one colour
            brightest = int(read_image(name).max())
    except (OSError, ValueError, cv2.error) as error:
        return ImageFile(str(error))
    digest = hashlib.sha256(data).digest()
    thumbnail = _thumbnail(grey)
    return ImageFile("", (height, width), orientation, digest, thumbnail, is_tiff, brightest)


def _thumbnail(grey: np.ndarray) -> np.ndarray:
    cells = cv2.resize(grey, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
    values = cells.astype(np.float32).ravel() - cells.mean(dtype=np.float32)
    contrast = np.linalg.norm(values) / THUMBNAIL  # standard deviation
    return values / np.linalg.norm(values) if contrast > 4 else np.zeros_like(values)
