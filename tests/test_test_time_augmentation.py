"""Views of an image, and their detections mapped back and merged."""

import pytest
import torch
from detectron2.evaluation import DatasetEvaluators
from detectron2.structures import Boxes
from torchvision.ops import box_iou

from ssd.engine import Trainer
from ssd.test_time_augmentation import SSDWithTTA


@pytest.fixture
def model(tiny_cfg):
    """An untrained SSD, which detects something everywhere."""
    torch.manual_seed(0)
    return Trainer.build_model(tiny_cfg()).eval()


def photograph(height=48, width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator).byte()


@torch.no_grad()
def detect(model, image, **more):
    return model([{"image": image, **more}])[0]["instances"]


def shifted(instances, x, y):
    return instances.pred_boxes.tensor + torch.tensor([x, y, x, y])


def assert_same(found, expected, atol=1e-3):
    """The same detections, also where equal scores come in another order."""
    assert len(found) == len(expected) > 5
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    distance = (found.pred_boxes.tensor[:, None] - expected.pred_boxes.tensor).abs().amax(-1)
    same = (distance < atol) & (found.pred_classes[:, None] == expected.pred_classes)
    same &= (found.scores[:, None] - expected.scores).abs() < 1e-5
    assert same.any(0).all() and same.any(1).all()


def test_windows_by_hand(model):
    tta = SSDWithTTA(model, crops=(1, 2), crop_overlap=0.5)
    # parts of w with w + w / 2 = 90: 60
    assert tta.windows(40, 90) == [(0, 0, 90, 40), (0, 0, 60, 40), (30, 0, 90, 40)]
    tta = SSDWithTTA(model, crops=(2, 2), crop_overlap=0.0)
    assert tta.windows(3, 4)[1:] == [(0, 0, 2, 2), (2, 0, 4, 2), (0, 2, 2, 3), (2, 2, 4, 3)]
    assert SSDWithTTA(model, crops=(1, 1)).windows(40, 90) == [(0, 0, 90, 40)]


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (47, 301)])
@pytest.mark.parametrize("crops, overlap", [((3, 4), 0.0), ((2, 3), 0.25), ((5, 1), 0.9)])
def test_windows_cover_the_image_and_are_never_empty(model, size, crops, overlap):
    tta = SSDWithTTA(model, crops=crops, crop_overlap=overlap)
    seen = torch.zeros(size)
    windows = tta.windows(*size)
    assert len(windows) == 1 + crops[0] * crops[1] and windows[0] == (0, 0, *size[::-1])
    for x0, y0, x1, y1 in windows[1:]:
        assert 0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0]
        seen[y0:y1, x0:x1] = 1
    assert seen.all()


def test_a_single_view_gives_the_models_detections(model):
    image = photograph()
    tta = SSDWithTTA(model, flip=False)
    assert_same(detect(tta, image), detect(model, image), atol=1e-5)
    sizes = {"height": 480, "width": 320}
    assert_same(detect(tta, image, **sizes), detect(model, image, **sizes))
    assert detect(tta, image, **sizes).image_size == (480, 320)


def test_detections_of_the_mirror_image_are_mapped_back(model):
    """An image and its mirror image have the same two views: mirrored detections."""
    tta = SSDWithTTA(model, flip=True)
    image = photograph()
    found, mirrored = detect(tta, image), detect(tta, image.flip(-1))
    left, top, right, bottom = mirrored.pred_boxes.tensor.unbind(1)
    mirrored.pred_boxes = Boxes(torch.stack([64 - right, top, 64 - left, bottom], 1))
    assert_same(found, mirrored)
    plain = detect(model, image)
    assert len(found) != len(plain) or not torch.equal(found.scores, plain.scores)


def test_detections_of_a_part_are_those_of_the_part_alone_moved(model):
    """Black but for one part: beside it nothing else may give its detections."""
    model.detection["detections_per_image"] = 100
    image = torch.zeros(3, 96, 128, dtype=torch.uint8)
    image[:, 48:, 64:] = photograph(48, 64)
    tta = SSDWithTTA(model, flip=False, crops=(2, 2), crop_overlap=0.0)
    assert tta.windows(96, 128)[-1] == (64, 48, 128, 96)
    alone = detect(model, photograph(48, 64))
    boxes = shifted(alone, 64, 48)
    whole = (boxes[:, 0] >= 64.64) & (boxes[:, 1] >= 48.48)  # borders within the image
    assert 0 < whole.sum() < len(whole)
    model.detection["detections_per_image"] = 100000  # merging leaves room for all
    found = detect(tta, image)
    distance = (boxes[:, None] - found.pred_boxes.tensor).abs().amax(-1)
    same = (distance < 1e-3) & (alone.pred_classes[:, None] == found.pred_classes)
    same &= (alone.scores[:, None] - found.scores).abs() < 1e-5
    better = box_iou(boxes, found.pred_boxes.tensor) > model.detection["nms_thresh"]
    better &= alone.pred_classes[:, None] == found.pred_classes
    better &= found.scores > alone.scores[:, None]
    assert (same.any(1) | better.any(1))[whole].all(), "found, or suppressed by a better one"
    assert same.any(1)[whole].float().mean() > 0.3
    assert not same.any(1)[~whole].any(), "cut off"


def test_merged_detections_obey_the_models_thresholds(model):
    tta = SSDWithTTA(model, flip=True, crops=(2, 2))
    model.detection["detections_per_image"] = 40
    found = detect(tta, photograph(96, 128))
    assert len(found) == 40 and (found.scores.diff() <= 0).all()
    boxes = found.pred_boxes.tensor
    assert (boxes >= 0).all() and (boxes <= torch.tensor([128, 96, 128, 96])).all()
    overlap = box_iou(boxes, boxes) > model.detection["nms_thresh"]
    overlap &= found.pred_classes[:, None] == found.pred_classes
    assert overlap.sum() == len(found), "only with itself"
    model.detection["score_thresh"] = 1.0
    assert len(detect(tta, photograph(96, 128))) == 0


def test_a_batch_of_images_of_several_sizes(model):
    tta = SSDWithTTA(model, crops=(1, 2))
    images = [photograph(), photograph(96, 30, seed=1).float()]
    with torch.no_grad():
        outputs = tta([{"image": image} for image in images])
    for image, output in zip(images, outputs):
        assert_same(output["instances"], detect(tta, image))
    assert tta([]) == []


@pytest.mark.parametrize("opts, message", [
    (("TEST.AUG.CROPS", [2]), r"TEST.AUG.CROPS must be \[rows, columns\].* got \[2\]"),
    (("TEST.AUG.CROPS", [0, 2]), r"TEST.AUG.CROPS .* got \[0, 2\]"),
    (("TEST.AUG.CROP_OVERLAP", 1.0), "TEST.AUG.CROP_OVERLAP .* got 1.0"),
])  # fmt: skip
def test_wrong_keys_are_named(model, tiny_cfg, opts, message):
    with pytest.raises(ValueError, match=message):
        SSDWithTTA(tiny_cfg(*opts), model)


def test_a_test_loader_of_ones_own_gives_the_images(tiny_cfg, model, caplog):
    sizes = []

    class Own(Trainer):
        @classmethod
        def build_test_loader(cls, cfg, dataset_name):
            loader = super().build_test_loader(cfg, dataset_name)
            sizes.append(next(iter(loader))[0]["image"].shape)
            return loader

    class OwnWithMapper(Trainer):
        @classmethod
        def build_test_loader(cls, cfg, dataset_name, mapper=None):
            loader = super().build_test_loader(cfg, dataset_name, mapper)
            sizes.append(next(iter(loader))[0]["image"].shape)
            return loader

    OwnWithMapper.test_with_TTA(tiny_cfg(), model)
    assert "takes no mapper=None" not in caplog.text
    OwnWithMapper.test_losses(tiny_cfg(), model)
    Own.test_with_TTA(tiny_cfg(), model)
    assert "takes no mapper=None" in caplog.text
    Own.test_losses(tiny_cfg(), model)  # ssd's own loader
    caplog.clear()
    Own(tiny_cfg("TEST.LOSS_PERIOD", 1))
    assert "TEST.LOSS_PERIOD reads images by ssd's loader" in caplog.text
    sizes.pop()
    full, *reduced = sizes
    assert min(full[1:]) > 200 and reduced == [(3, 96, 96)] * 2


def test_trainer_evaluates_with_it_as_detectron2_names_it(tiny_cfg, model):
    cfg = tiny_cfg("TEST.AUG.CROPS", [2, 1], "TEST.EVALUATORS", ["coco", "voc"])
    model.train()
    results = Trainer.test_with_TTA(cfg, model)
    assert model.training and set(results) == {"bbox_TTA", "voc_TTA"}
    assert "AP50-star" in results["bbox_TTA"]

    class OwnTrainer(Trainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            assert output_folder.endswith("inference_TTA/shapes_val")
            return DatasetEvaluators([])

    assert OwnTrainer.test_with_TTA(cfg, model) == {}
    cfg = tiny_cfg("DATASETS.TEST", ("shapes_val", "shapes_train"))

    assert set(Trainer.test_with_TTA(cfg, model)) == {"shapes_val_TTA", "shapes_train_TTA"}
