"""Data loaders whose samples depend on the seed and their number in the run, on nothing else."""

import contextlib
import itertools
import logging
import multiprocessing
import os
import random
import signal
import threading
from typing import Callable, Iterator, List, Optional, Sequence

import cv2
import numpy as np
import torch.utils.data
from detectron2.data import (
    DatasetFromList,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.utils import comm

from ssd.data.batch import Batch
from ssd.data.boxes import find_box_defects
from ssd.data.datasets import check_class_count, check_names
from ssd.data.files import datasets_folder_text
from ssd.data.mapper import SSDDatasetMapper
from ssd.memory import keep_freed_memory

__all__ = [
    "RunSampler",
    "SampleStream",
    "build_test_loader",
    "build_train_loader",
    "num_images",
]

logger = logging.getLogger(__name__)


class SampleStream(torch.utils.data.Dataset):
    """An endless sequence of augmented samples: item n is the n-th sample of the run.

    The data set is shuffled anew in every epoch. Both the order and a sample's augmentation are
    drawn from (seed, number) only: not from the worker, its process or what came before.

    Attributes:
        num_images: of the data set; an endless sequence has no length.
    """

    def __init__(self, dataset: List[dict], mapper: Callable, seed: int):
        if not dataset:
            raise ValueError("DATASETS.TRAIN holds no image")
        self._dataset = DatasetFromList(dataset, copy=False)
        self.num_images = len(dataset)
        self._mapper = mapper
        # a mapper of one's own, or a subclass with its own __call__, is called for each image
        self._in_two_steps = getattr(type(mapper), "__call__", None) is SSDDatasetMapper.__call__
        self._seed = seed
        self._order = (-1, None)

    def __getitem__(self, number: int) -> dict:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> List[dict]:
        """The samples of a batch, as torch's loaders ask for them.

        All are drawn before the first image is read: decoding an image evicts from the CPU's cache
        what drawing needs, which takes up to three times as long in turns.
        """
        with _restored_generators():
            if not self._in_two_steps:
                return [self._map(number) for number in numbers]
            drawn = [self._mapper.draw(self._seeded_dict(number)) for number in numbers]
        return [self._mapper.load(*x) for x in drawn]

    def _map(self, number: int) -> dict:
        """The mapper's sample; of the next image if it refuses one with None, as in Detectron2."""
        for attempt in range(max(len(self._dataset), 1000)):
            if (sample := self._mapper(self._seeded_dict(number, attempt))) is not None:
                return sample
        raise ValueError("the mapper gives None for each image of DATASETS.TRAIN")

    def _seeded_dict(self, number: int, attempt: int = 0) -> dict:
        """The n-th dict of the run, with the global generators seeded for its augmentation; in
        further attempts those behind it in its epoch's order."""
        epoch, position = divmod(number, len(self._dataset))
        if self._order[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._dataset))
            self._order = (epoch, order)
        position = (position + attempt) % len(self._dataset)
        dataset_dict = self._dataset[int(self._order[1][position])]
        # those that Detectron2's augmentations draw from
        words = np.random.SeedSequence([self._seed, number, attempt]).generate_state(2)
        np.random.seed(words)
        random.seed(int(words[0]))
        return dataset_dict


@contextlib.contextmanager
def _restored_generators() -> Iterator[None]:
    states = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])


class RunSampler(torch.utils.data.Sampler):
    """Sample numbers of this process: of each iteration's global batch, its contiguous share.

    Attributes:
        start_iter: the iteration to begin with; set before iterating, to resume.
    """

    def __init__(self, ims_per_batch: int):
        world_size = comm.get_world_size()
        if ims_per_batch < 1 or ims_per_batch % world_size:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH {ims_per_batch} must be a positive multiple of the "
                f"{world_size} processes"
            )
        self.start_iter = 0
        self._global = ims_per_batch
        self.batch_size = ims_per_batch // world_size
        self._offset = comm.get_rank() * self.batch_size

    def __iter__(self) -> Iterator[int]:
        for iteration in itertools.count(self.start_iter):
            first = iteration * self._global + self._offset
            yield from range(first, first + self.batch_size)


def build_train_loader(cfg, mapper: Optional[Callable] = None) -> torch.utils.data.DataLoader:
    """An endless loader of lists of ``IMS_PER_BATCH / processes`` mapped dicts.

    Raises:
        ValueError: class names or counts disagree, no image, an IMS_PER_BATCH that isn't a multiple
            of the number of processes, or a ``DATALOADER.SAMPLER_TRAIN`` other than the default.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ValueError(
            "DATALOADER.SAMPLER_TRAIN: only 'TrainingSampler' (shuffled epochs) is supported, got "
            f"{cfg.DATALOADER.SAMPLER_TRAIN!r}"
        )
    check_names(cfg)
    check_class_count(cfg, is_train=False)  # what is known before the data sets are read
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; a lab's --config-file names its data sets")
    try:
        with _say_where(f"DATASETS.TRAIN {cfg.DATASETS.TRAIN}"):
            dataset = get_detection_dataset_dicts(
                cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
            )
    except AssertionError as error:  # no image in one of them, or an invalid category_id
        raise ValueError(f"DATASETS.TRAIN {cfg.DATASETS.TRAIN}: {error}") from None
    except ValueError:
        check_class_count(cfg, is_train=False)  # which says more about classes that don't agree
        raise
    check_class_count(cfg)
    classes = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes
    defects = find_box_defects(dataset, classes)
    for line in defects[:20]:
        logger.warning("Left out of training: %s", line)
    if len(defects) > 20:
        logger.warning("… and %d more defective boxes", len(defects) - 20)
    if mapper is None:  # ours doesn't read masks, which need more memory than all else
        keys = ("bbox", "bbox_mode", "category_id", "iscrowd")
        dataset = [
            {**record, "annotations": [
                {key: x[key] for key in keys if key in x} for x in record.get("annotations", [])
            ]}
            for record in dataset
        ]  # fmt: skip

    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    sampler = RunSampler(cfg.SOLVER.IMS_PER_BATCH)
    workers = cfg.DATALOADER.NUM_WORKERS
    if workers == 0:
        keep_freed_memory()
    return torch.utils.data.DataLoader(
        SampleStream(dataset, mapper or SSDDatasetMapper(cfg, True), seed),
        sampler=sampler,
        batch_size=sampler.batch_size,
        num_workers=workers,
        collate_fn=Batch,
        # in a thread of its own, which also receives the batches
        pin_memory=workers > 0 and cfg.MODEL.DEVICE.startswith("cuda"),
        worker_init_fn=_init_worker,
    )


def num_images(loader) -> Optional[int]:
    """Of a training loader's data set; None for a loader of one's own."""
    return getattr(getattr(loader, "dataset", None), "num_images", None)


def build_test_loader(cfg, dataset_name: str, mapper: Optional[Callable] = None):
    """Detectron2's test loader with our mapper, ``TEST.IMS_PER_BATCH`` images at a time."""
    with _say_where(f"DATASETS.TEST {dataset_name!r}"):
        dataset = get_detection_dataset_dicts(dataset_name, filter_empty=False)
    loader = build_detection_test_loader(
        dataset,
        mapper=mapper or SSDDatasetMapper(cfg, False),
        batch_size=cfg.TEST.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=Batch,
    )
    loader.worker_init_fn = _init_worker
    return loader


@contextlib.contextmanager
def _say_where(what: str) -> Iterator[None]:
    """Adds to a missing file's error which setting asked for it, and where it is looked for."""
    try:
        yield
    except FileNotFoundError as error:
        if "DETECTRON2_DATASETS" in str(error):
            raise
        raise FileNotFoundError(f"{what}: {error}; {datasets_folder_text()}") from None


def _init_worker(_: int) -> None:
    cv2.setNumThreads(0)
    keep_freed_memory()
    # Ctrl-C, a hangup and a SIGTERM to the whole job are the main process's to handle, which needs
    # its workers until it has; it ends them by a SIGTERM of its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_parent_says, daemon=True).start()


def _end_when_parent_says() -> None:
    parent = multiprocessing.parent_process()
    while parent.is_alive():
        sent = signal.sigtimedwait([signal.SIGTERM], 5)
        if sent and sent.si_pid == parent.pid:
            break
    os._exit(0)
