"""What the contenders are given: JPEG files, batches in memory, raw outputs, detections."""

import json
import os
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import cv2
import numpy as np
import torch
from detectron2.data.datasets import load_coco_json
from lineages.rows import ROOT
from torch import Tensor

# Nothing of ssd's is imported here: another checkout (--before) may not have it.

SIZE = (480, 640)  # height and width of a JPEG
QUALITY = 90
DETAIL = 45  # standard deviation in levels: files of about 160 KB, as COCO's (train2017)
CLASSES = ["RBC", "WBC", "Platelets"]


def write_images(folder: Path, count: int, num_classes: int, detailed: bool = True) -> str:
    """Writes FOLDER/images/*.jpg, all different, and FOLDER/train.json in COCO's format.

    They are photographs of BCCD, if it lies in ``$DETECTRON2_DATASETS`` or beside the repository,
    else rendered shapes. The boxes are the data set's, their classes random.

    Args:
        detailed: adds noise with the spectrum of photographs (amplitude ~ 1 / frequency). Both
            sources are smooth: their files are a fifth as large as COCO's, and decoded in half
            the time.

    Returns:
        what they are.
    """
    from ssd.data.boxes import xyxy_boxes

    (folder / "images").mkdir()
    records, what = _source(folder, count)
    rng = np.random.default_rng(0)
    detail = DETAIL * _pink_noise(rng, (2 * SIZE[0], 2 * SIZE[1]))
    objects, size = {}, 0
    for number, record in enumerate(records):
        image = cv2.imread(record["file_name"])
        height, width = image.shape[:2]
        scale = np.array([SIZE[1] / width, SIZE[0] / height] * 2)
        name = f"{number:06}.jpg"
        image = cv2.resize(image, SIZE[::-1])
        if detailed:
            y, x = rng.integers(SIZE[0]), rng.integers(SIZE[1])
            image = image + detail[y : y + SIZE[0], x : x + SIZE[1], None]
            image = image.round().clip(0, 255).astype(np.uint8)
        path = str(folder / "images" / name)
        cv2.imwrite(path, image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        size += os.path.getsize(path)
        boxes = xyxy_boxes(record["annotations"]) * scale
        objects[name] = boxes, [int(rng.integers(num_classes)) for _ in boxes]
    _write_coco(folder / "train.json", objects, num_classes)
    what += " with noise" if detailed else ""
    what = f"{len(objects)} {what}, {SIZE[1]}x{SIZE[0]}, JPEG quality {QUALITY}"
    return f"{what}, {size / len(objects) / 1000:.0f} KB each"


def _pink_noise(rng: np.random.Generator, size: Tuple[int, int]) -> np.ndarray:
    """(H, W) of mean 0 and standard deviation 1; its amplitudes fall with the frequency."""
    rows, columns = np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=size)) / frequency, size)
    return noise / noise.std()


def _source(folder: Path, count: int) -> Tuple[List[Dict], str]:
    from ssd.data.shapes import render_shapes
    from ssd.data.voc import read_voc

    for root in (os.environ.get("DETECTRON2_DATASETS", "datasets"), ROOT.parent / "shared/data"):
        bccd = Path(root) / "bccd"
        if bccd.is_dir():
            records = [r for s in ("trainval", "test") for r in read_voc(str(bccd), s, CLASSES)]
            if len(records) >= count:
                return records[:count], "photographs (BCCD)"
    path = Path(render_shapes(str(folder / "shapes"), "train", count))
    return load_coco_json(str(path), str(path.parent / "train" / "images")), "rendered images"


def _write_coco(
    path: Path, objects: Dict[str, Tuple[np.ndarray, List[int]]], num_classes: int
) -> None:
    """COCO's format of each image's boxes (M, 4) XYXY and their classes from 0, by file name."""
    images, annotations = [], []
    for number, (name, (boxes, labels)) in enumerate(objects.items()):
        images.append({"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels):
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": number, "iscrowd": 0,
                    "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0),
                    "category_id": label + 1,
                }
            )  # fmt: skip
    categories = [{"id": k + 1, "name": f"class {k + 1}"} for k in range(num_classes)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(data))


def read_records(folder: Path) -> List[Dict]:
    """Of each image ``file_name``, ``image_id``, ``boxes`` (M, 4) float32 XYXY in its pixels and
    ``classes`` (M,) int64 in [0, K)."""
    data = json.loads((folder / "train.json").read_text())
    found = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        found[annotation["image_id"]].append(annotation)
    records = []
    for image in data["images"]:
        of_image = found[image["id"]]
        boxes = np.array([x["bbox"] for x in of_image], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        records.append(
            {
                "file_name": str(folder / "images" / image["file_name"]),
                "image_id": image["id"],
                "boxes": torch.from_numpy(boxes),
                "classes": torch.tensor([x["category_id"] - 1 for x in of_image]).long(),
            }
        )
    return records


def photographs(folder: Path, count: int) -> List[Tensor]:
    """(3, 480, 640) uint8 RGB each; the files over again if there are fewer."""
    files = sorted((folder / "images").iterdir())
    return [_read(str(files[i % len(files)])) for i in range(count)]


def training_batch(folder: Path, count: int, size: Tuple[int, int]) -> List[Dict]:
    """As :func:`read_records`, with ``image`` (3, H, W) uint8 RGB of the network's input size, in
    whose pixels the boxes are."""
    records, batch = read_records(folder), []
    scale = torch.tensor([size[1] / SIZE[1], size[0] / SIZE[0]] * 2)
    for i in range(count):
        record = records[i % len(records)]
        image = _read(record["file_name"], size)
        batch.append({**record, "image": image, "boxes": record["boxes"] * scale})
    return batch


def _read(path: str, size=None) -> Tensor:
    image = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
    if size is not None:
        image = cv2.resize(image, size[::-1])
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def worst_case_maps(maps: Sequence[Sequence[Tensor]], num_classes: int) -> List[List[Tensor]]:
    """:func:`worst_case` in place of each level's logits (N, A · (K + 1), H, W) and offsets
    (N, A · 4, H, W)."""
    boxes_per_level = [x[0].numel() // 4 for x in maps[1]]
    flat = worst_case(sum(boxes_per_level), num_classes, len(maps[1][0]))
    return [
        [
            part.reshape(len(part), *x.shape[-2:], -1).permute(0, 3, 1, 2).to(x)
            for part, x in zip(values.split(boxes_per_level, dim=1), levels)
        ]
        for values, levels in zip(flat, maps)
    ]


def worst_case(num_boxes: int, num_classes: int, count: int) -> Tuple[Tensor, Tensor]:
    """Raw outputs in which 48 classes of every default box (or all but one) are just over 0.02.

    Returns:
        logits (N, R, K + 1), the background last, and offsets (N, R, 4).
    """
    generator = torch.Generator().manual_seed(0)
    over = min(48, num_classes - 1)
    shape = (count, num_boxes, num_classes)
    chosen = torch.rand(shape, generator=generator).argsort(dim=-1) < over
    scores = 0.0201 + 0.0006 * torch.rand(shape, generator=generator)
    scores = torch.where(chosen, scores, 1e-5)
    background = (1 - scores.sum(dim=-1, keepdim=True)).clamp(min=1e-5)
    logits = torch.cat([scores, background], dim=-1).log()
    return logits, torch.randn(count, num_boxes, 4, generator=generator)


def write_evaluation(folder: Path, count: int) -> None:
    """Objects as many as in COCO, in FOLDER/eval.json, and detections in FOLDER/eval.npz.

    About 7 objects and always 100 detections per image: two around each object, the rest anywhere.
    """
    rng, num_classes = np.random.default_rng(0), 80
    objects, detections = {}, []
    for number in range(count):
        boxes = _random_boxes(rng, rng.poisson(7))
        labels = [int(rng.integers(num_classes)) for _ in boxes]
        objects[f"{number}.jpg"] = boxes, labels
        side = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        near = [boxes + 0.05 * side * rng.standard_normal(boxes.shape) for _ in range(2)]
        found = np.concatenate([*near, _random_boxes(rng, 100)])[:100]
        classes = np.concatenate([labels, labels, rng.integers(num_classes, size=100)])[:100]
        scores = rng.random(100)
        scores[: 2 * len(boxes)] = 0.5 + 0.5 * scores[: 2 * len(boxes)]
        detections.append(np.concatenate([found, scores[:, None], classes[:, None]], axis=1))
    _write_coco(folder / "eval.json", objects, num_classes)
    np.savez(folder / "eval.npz", np.array(detections, np.float32))


def _random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) XYXY inside the image; the sides' logarithms are uniform from 8 to 320 pixels."""
    side = np.exp(rng.uniform(np.log(8), np.log(320), (count, 2)))
    corner = rng.random((count, 2)) * (np.array(SIZE[::-1]) - side)
    return np.concatenate([corner, corner + side], axis=1)
