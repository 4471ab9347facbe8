import itertools
import logging
import os
import random

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils import comm

from ssd.data.loader import (
    RunSampler,
    SampleStream,
    build_test_loader,
    build_train_loader,
)
from ssd.data.mapper import SSDDatasetMapper
from ssd.data.shapes import CLASSES

PLAIN_CHAIN = "INPUT.EXPAND.ENABLED False INPUT.IOU_CROP.ENABLED False".split()


def batches(cfg, count, start_iter=0):
    """``count`` batches of plain comparable values from iteration ``start_iter`` on."""
    loader = build_train_loader(cfg)
    loader.sampler.start_iter = start_iter
    return [[plain(x) for x in batch] for batch in itertools.islice(loader, count)]


def plain(sample):
    fields = sample["instances"]
    boxes, classes = fields.gt_boxes.tensor.tolist(), fields.gt_classes.tolist()
    return sample["file_name"], sample["image"].numpy().tobytes(), boxes, classes


def file_names(batch):
    return [x[0] for x in batch]


def test_stream_does_not_depend_on_workers(tiny_cfg):
    alone = batches(tiny_cfg(), 5)
    for workers in (1, 2):
        assert batches(tiny_cfg("DATALOADER.NUM_WORKERS", workers), 5) == alone


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="there are no files in memory here")
def test_batches_of_evaluations_travel_likewise(tiny_cfg):
    cfg = tiny_cfg("DATALOADER.NUM_WORKERS", 1, "TEST.IMS_PER_BATCH", 2)
    batch = next(iter(build_test_loader(cfg, cfg.DATASETS.TEST[0])))
    assert len(batch) == 2 and len({x["image"].untyped_storage().data_ptr() for x in batch}) == 1


@pytest.mark.parametrize("start_iter", [3, 5])  # within the first epoch of 16 / 4, and later
def test_resumed_stream_continues_the_run(tiny_cfg, start_iter):
    whole = batches(tiny_cfg(), 7)
    for workers in (0, 1):
        cfg = tiny_cfg("DATALOADER.NUM_WORKERS", workers)
        assert batches(cfg, 7 - start_iter, start_iter) == whole[start_iter:]


def test_ranks_share_the_batch_of_one_process(tiny_cfg, monkeypatch):
    cfg = tiny_cfg()
    whole = batches(cfg, 2)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        shares.append(batches(cfg, 2))
    assert [a + b for a, b in zip(*shares)] == whole


def test_each_epoch_visits_every_image_once_in_another_order():
    dataset = [{"number": i} for i in range(10)]
    stream = SampleStream(dataset, lambda x: x["number"], seed=1)
    epochs = [[stream[10 * epoch + i] for i in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [stream[i] for i in (25, 3, 14)] == [epochs[2][5], epochs[0][3], epochs[1][4]]


def test_other_seeds_give_other_orders_and_augmentations(tiny_cfg):
    first, same, other = (batches(tiny_cfg("SEED", seed), 4) for seed in (1, 1, 2))
    first, same, other = (sum(run, []) for run in (first, same, other))
    assert first == same
    assert file_names(first) != file_names(other)
    # the first epoch of both seeds has the same images, but never the same pixels
    assert sorted(file_names(first)) == sorted(file_names(other))
    assert not {x[1] for x in first} & {x[1] for x in other}


def test_an_image_is_augmented_anew_in_each_epoch(tiny_cfg):
    samples = sum(batches(tiny_cfg(), 8), [])
    assert len({x[0] for x in samples}) == 16 and len({x[1] for x in samples}) == 32


def test_reading_a_sample_leaves_the_global_generators_alone(tiny_cfg):
    np.random.seed(3)
    random.seed(3)
    torch.manual_seed(3)
    stream = build_train_loader(tiny_cfg()).dataset
    drawn = []
    for _ in range(2):
        drawn.append((np.random.rand(), random.random(), torch.rand(1).item()))
        np.random.seed(3)
        random.seed(3)
        torch.manual_seed(3)
        stream[0]
        stream.__getitems__([1, 2])
    assert drawn[0] == drawn[1] == (np.random.rand(), random.random(), torch.rand(1).item())


def test_a_batch_has_the_samples_that_are_read_one_by_one(tiny_cfg):
    stream = build_train_loader(tiny_cfg()).dataset
    numbers = [5, 40, 3, 3]
    assert [plain(x) for x in stream.__getitems__(numbers)] == [plain(stream[n]) for n in numbers]


def test_a_mapper_of_ones_own_is_called(tiny_cfg):
    class Mapper(SSDDatasetMapper):
        def __call__(self, dataset_dict):
            return {**super().__call__(dataset_dict), "drawn": np.random.rand()}

    own = build_train_loader(tiny_cfg(), Mapper(tiny_cfg(), True)).dataset
    stock = build_train_loader(tiny_cfg()).dataset
    for a, b in zip(own.__getitems__([0, 1]), stock.__getitems__([0, 1])):
        assert plain(a) == plain(b) and 0 <= a["drawn"] < 1


def test_a_mapper_may_refuse_images():
    dataset = [{"number": i} for i in range(10)]

    def large(x):
        return (x["number"], np.random.rand()) if x["number"] > 5 else None

    some = SampleStream(dataset, large, seed=1)
    samples = some.__getitems__(range(200))
    assert {number for number, _ in samples} == {6, 7, 8, 9}
    assert len({drawn for _, drawn in samples}) == 200, "also those in place of others"
    assert some.__getitems__([4, 5]) == some.__getitems__([4, 5])
    one = SampleStream(dataset[:1], lambda x: x if np.random.rand() > 0.7 else None, seed=1)
    assert len(one.__getitems__(range(100))) == 100
    with pytest.raises(ValueError, match="None for each image"):
        SampleStream(dataset, lambda x: None, seed=1)[0]


def test_images_of_unknown_size(tiny_cfg, register, datasets_folder):
    """As Detectron2 takes them in training."""
    annotation = {"bbox": [5, 5, 90, 90], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    images = sorted((datasets_folder / "shapes/train").rglob("*.jpg"))
    dicts = [{"file_name": str(path), "annotations": [annotation]} for path in images]
    name = register(dicts, CLASSES)
    cfg = tiny_cfg("DATASETS.TRAIN", (name,), "DATASETS.TEST", (), *PLAIN_CHAIN)
    for sample in next(iter(build_train_loader(cfg))):
        assert sample["image"].shape == (3, 96, 96) and len(sample["instances"]) == 1


def one_object(**more):
    """A record of a data set."""
    annotation = {"bbox": [5, 5, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    return {"file_name": "a.jpg", "annotations": [{**annotation, **more}]}


def test_a_training_set_is_read_once_and_without_its_masks(tiny_cfg, register):
    record, reads = one_object(segmentation=[[5, 5, 9, 5, 9, 9]]), []
    name = register([record], CLASSES)
    read = DatasetCatalog.pop(name)
    del MetadataCatalog.get(name).thing_classes  # as of a COCO file, until it is read

    def count():
        reads.append(name)
        MetadataCatalog.get(name).thing_classes = CLASSES
        return read()

    DatasetCatalog.register(name, count)
    cfg = tiny_cfg("DATASETS.TRAIN", (name,), "DATASETS.TEST", ())
    seen = build_train_loader(cfg).dataset._dataset[0]["annotations"][0]
    assert reads == [name] and "segmentation" not in seen and "segmentation" in str(record)
    own = build_train_loader(cfg, lambda x: x).dataset._dataset[0]["annotations"][0]
    assert "segmentation" in own


def test_training_sets_of_other_classes_are_told_by_name(tiny_cfg, register):
    names = [register([one_object()], classes) for classes in (CLASSES, CLASSES[::-1])]
    metadata = MetadataCatalog.get(names[1])
    del metadata.thing_classes
    read = DatasetCatalog.pop(names[1])

    def late():
        metadata.thing_classes = CLASSES[::-1]
        return read()

    DatasetCatalog.register(names[1], late)
    message = f"6 of the classes of data set '{names[1]}' .* as class 0, '{CLASSES[-1]}' and not"
    with pytest.raises(ValueError, match=message):
        build_train_loader(tiny_cfg("DATASETS.TRAIN", tuple(names), "DATASETS.TEST", ()))


@pytest.mark.parametrize("key, value, message", [
    ("category_id", 6, r"DATASETS.TRAIN \('t_registered_0',\): .*category_id=6"),
    ("bbox_mode", None, "a.jpg: object 0 has no bbox_mode"),
])  # fmt: skip
def test_defects_of_ones_own_dicts_are_named(tiny_cfg, register, key, value, message):
    annotation = {"bbox": [5, 5, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    annotation = {k: x for k, x in {**annotation, key: value}.items() if x is not None}
    name = register([{"file_name": "a.jpg", "annotations": [annotation]}], CLASSES)
    with pytest.raises(ValueError, match=message):
        build_train_loader(tiny_cfg("DATASETS.TRAIN", (name,), "DATASETS.TEST", ()))


def test_a_data_set_without_class_names(tiny_cfg, register):
    name = register([{"file_name": "a.jpg"}], CLASSES)
    del MetadataCatalog.get(name).thing_classes
    with pytest.raises(ValueError, match=f"data set '{name}' has no class names"):
        build_train_loader(tiny_cfg("DATASETS.TRAIN", (name,), "DATASETS.TEST", ()))


@pytest.mark.parametrize("key, name, build", [
    ("TRAIN", "coco_2014_train", build_train_loader),
    ("TEST", "coco_2014_val", lambda cfg: build_test_loader(cfg, *cfg.DATASETS.TEST)),
])  # fmt: skip
def test_missing_annotations_name_the_data_set_and_its_folder(
    key, name, build, tiny_cfg, monkeypatch
):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/elsewhere")
    sets = ["DATASETS.TRAIN", (), "DATASETS.TEST", (), f"DATASETS.{key}", (name,)]
    cfg = tiny_cfg(*sets, "MODEL.SSD.NUM_CLASSES", 80)
    with pytest.raises(FileNotFoundError) as error:
        build(cfg)
    parts = (f"DATASETS.{key}", name, "/annotations/instances_", "DETECTRON2_DATASETS is '/else")
    assert all(part in str(error.value) for part in parts)


def test_training_without_a_data_set_names_the_config_file(tiny_cfg):
    with pytest.raises(ValueError, match="DATASETS.TRAIN is empty.*--config-file"):
        build_train_loader(tiny_cfg("DATASETS.TRAIN", ()))


def test_a_failing_sample_restores_the_global_generators():
    def mapper(_):
        np.random.rand()
        raise OSError("unreadable")

    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    with pytest.raises(OSError):
        SampleStream([{}], mapper, 1)[0]
    assert np.random.rand() == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named_whatever_the_workers(tiny_cfg, register, workers):
    dicts = [{"file_name": "/absent/x.jpg", "height": 9, "width": 9, "annotations": []}]
    name = register(dicts, CLASSES)
    cfg = tiny_cfg("DATASETS.TRAIN", (name,), "DATALOADER.NUM_WORKERS", workers)
    message = ""
    try:
        batches(cfg, 1)
    except FileNotFoundError as error:
        message = str(error)
        error.__traceback__ = None  # which keeps the worker alive, as pytest.raises would
    assert "/absent/x.jpg does not exist" in message


def test_batch_must_divide_among_processes(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH 4 .* 3 processes"):
        RunSampler(4)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH 0"):
        RunSampler(0)


def test_empty_data_set_is_an_error_that_names_it(tiny_cfg, register):
    with pytest.raises(ValueError, match="DATASETS.TRAIN"):
        SampleStream([], lambda x: x, 1)
    name = register([], CLASSES)
    with pytest.raises(ValueError, match=name):
        build_train_loader(tiny_cfg("DATASETS.TRAIN", (name,)))


def test_no_or_unknown_training_set_is_an_error_that_names_the_key(tiny_cfg):
    for names in ((), ("shapes_trian",)):
        with pytest.raises(ValueError, match="DATASETS.TRAIN"):
            build_train_loader(tiny_cfg("DATASETS.TRAIN", names))


def test_class_count_must_be_the_models(tiny_cfg):
    with pytest.raises(ValueError, match="shapes_train.* 6 classes.*MODEL.SSD.NUM_CLASSES is 80"):
        build_train_loader(tiny_cfg("MODEL.SSD.NUM_CLASSES", 80))


def test_other_samplers_are_an_error(tiny_cfg):
    cfg = tiny_cfg("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
    with pytest.raises(ValueError, match="SAMPLER_TRAIN.*RepeatFactorTrainingSampler"):
        build_train_loader(cfg)


def test_defective_boxes_are_logged_with_file_and_class(tiny_cfg, register, caplog):
    boxes = [[5, 5, 5, 20], [5, 5, 20, 20]]
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1, "iscrowd": 0}
        for box in boxes
    ]
    dicts = [
        {"file_name": f"{i}.jpg", "height": 30, "width": 40, "annotations": annotations}
        for i in range(23)
    ]
    cfg = tiny_cfg("DATASETS.TRAIN", (register(dicts, CLASSES),))
    with caplog.at_level(logging.WARNING):
        build_train_loader(cfg)
    lines = [message for message in caplog.messages if ".jpg" in message]
    assert len(lines) == 20 and "3 more" in caplog.text
    assert lines[4] == (
        "Left out of training: 4.jpg: object 0 (rectangle) has zero width: [5.0, 5.0, 5.0, 20.0]"
    )


def test_test_loader_reads_all_images_in_order_without_annotations(tiny_cfg):
    cfg = tiny_cfg("TEST.IMS_PER_BATCH", 3)
    loader = build_test_loader(cfg, "shapes_val")
    found = list(loader)
    assert [len(batch) for batch in found] == [3, 1]
    ids = [x["image_id"] for batch in found for x in batch]
    assert ids == [1, 2, 3, 4]
    assert all(x["image"].shape == (3, 96, 96) for batch in found for x in batch)
    assert all("instances" not in x for batch in found for x in batch)
