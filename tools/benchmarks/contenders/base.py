"""What the contenders share."""

import contextlib
import itertools
from pathlib import Path
from typing import Callable, Dict, List, Sequence

import cv2
import torch
from torch import Tensor, nn

from benchmarks.inputs import photographs
from benchmarks.machine import TORCH, Spec, Work

RATE = 1e-12  # learning rate: the losses stay those of the first step


class Contender:
    """One project's side of every task that it knows."""

    def __init__(self, spec: Spec):
        self.spec = spec
        self.folder = Path(spec.folder)
        self.scaler = torch.amp.GradScaler(enabled=spec.dtype == "fp16")
        if spec.task == "data":
            torch.set_num_threads(1)
            cv2.setNumThreads(0)

    def work(self) -> Work:
        return getattr(self, self.spec.task.replace("-", "_"))()

    def autocast(self):
        if self.spec.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.spec.device, TORCH[self.spec.dtype])

    def weights(self, side: str) -> Dict[str, Tensor]:
        path = self.folder / f"{self.spec.model}_{side}.pth"
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    def images(self) -> List[Tensor]:
        return photographs(self.folder, self.spec.batch_size)

    def data(self) -> Work:
        dataset = self.dataset()
        return self.samples(dataset, lambda number, sample: dataset.file_name(number))

    def samples(self, dataset, file_name: Callable, count: int = 32) -> Work:
        """``count`` further samples of a data set at a time, asked for as torch's loaders do."""
        numbers, files = itertools.count(), []
        read = getattr(dataset, "__getitems__", None) or (lambda batch: [dataset[n] for n in batch])

        def run():
            batch = list(itertools.islice(numbers, count))
            files.extend(map(file_name, batch, read(batch)))

        return Work(
            run, count, lambda: {"files_read": len(files), "distinct_files": len(set(files))}
        )

    def optimizer_step(self, losses: Callable[[], Tensor], optimizer) -> None:
        with self.autocast():
            loss = losses()
        optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()


def detected(scores: Sequence[Tensor]) -> Dict:
    """Of each image's detections: how many, and how sure."""
    joined = torch.cat(list(scores)).float()
    return {
        "detections_per_image": len(joined) / len(scores),
        "mean_score": float(joined.mean()) if len(joined) else 0.0,
    }


def over_threshold(thresh: float, logits: Tensor, background: int) -> Dict:
    """The (box, class) pairs of an image, of logits (N, R, K + 1)."""
    scores = logits.detach().float().softmax(dim=-1)
    scores[..., background] = 0
    return {"pairs_per_image": int((scores > thresh).sum()) / len(scores)}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4)


class Files(torch.utils.data.Dataset):
    """JPEG files and their boxes, over again if more are asked for."""

    def __init__(self, records: List[Dict]):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def file_name(self, number: int) -> str:
        return self.records[number % len(self.records)]["file_name"]


def endless(dataset, spec: Spec, collate: Callable):
    """Shuffled batches, epoch after epoch."""
    loader = torch.utils.data.DataLoader(
        dataset, spec.batch_size, shuffle=True, num_workers=spec.workers, collate_fn=collate,
        drop_last=True, pin_memory=spec.device == "cuda", persistent_workers=spec.workers > 0,
    )  # fmt: skip
    while True:
        yield from loader
