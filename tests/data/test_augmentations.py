import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.utils import logger
from fvcore.transforms.transform import NoOpTransform
from torchvision import tv_tensors
from torchvision.transforms import v2

from ssd.config import add_ssd_config
from ssd.data.augmentations import (
    ComposedWarp,
    Expand,
    IoUCrop,
    PhotometricDistortion,
    Resize,
    build_augmentation,
)
from ssd.data.transforms import (
    PhotometricTransform,
    PhotometricWarp,
    TorchvisionPhotometricTransform,
    WarpTransform,
    centers_inside,
)

HEIGHT, WIDTH = 120, 160
IMAGE = np.random.RandomState(0).randint(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
CROWD = np.array(
    [[5, 5, 45, 50], [60, 10, 100, 40], [110, 20, 150, 90], [20, 70, 70, 110], [90, 80, 120, 115]],
    np.float32,
)
LARGE = np.array([[10, 8, 140, 110]], np.float32)


@pytest.fixture(autouse=True)
def seed():
    np.random.seed(0)
    torch.manual_seed(0)


def assert_same_distribution(ours, theirs):
    """Two-sample Kolmogorov-Smirnov test, column by column, at a level of 1e-4."""
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    bound = 2.23 * np.sqrt(1 / len(ours) + 1 / len(theirs))
    for a, b in zip(ours.T, theirs.T):
        values = np.union1d(a, b)
        shares = [np.searchsorted(np.sort(v), values, side="right") / len(v) for v in (a, b)]
        assert np.abs(shares[0] - shares[1]).max() < bound


def drawn_by(transform, inputs):
    """What a transform of torchvision draws; before 0.21 its method was private."""
    return (getattr(transform, "make_params", None) or transform._get_params)(inputs)


def torchvision_input(boxes=CROWD):
    image = tv_tensors.Image(torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8))
    size = (HEIGHT, WIDTH)
    return [image, tv_tensors.BoundingBoxes(torch.tensor(boxes), format="XYXY", canvas_size=size)]


def box_iou(box, boxes):
    side = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    both = side.clip(0).prod(1)
    area = (box[2] - box[0]) * (box[3] - box[1])
    return both / (area + (boxes[:, 2:] - boxes[:, :2]).prod(1) - both)


def survivors(crop, boxes):
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((crop[:2] < centers) & (centers < crop[2:])).all(1)


def draw_crops(crop, boxes, count):
    """Regions of ``count`` draws; None where the image is kept."""
    transforms = [crop.get_transform(IMAGE, boxes) for _ in range(count)]
    return [None if isinstance(t, NoOpTransform) else np.array(t.region) for t in transforms]


# ---------------------------------------------------------------------------- photometric


def test_photometric_draws():
    augmentation = PhotometricDistortion(0.5, 32, (0.5, 1.5), (0.6, 1.4), 18, 0.25, "RGB")
    draws = [augmentation.get_transform(IMAGE) for _ in range(3000)]
    assert all(isinstance(t, PhotometricTransform) and t.image_format == "RGB" for t in draws)
    for name, low, high, neutral in (
        ("brightness", -32, 32, 0),
        ("contrast", 0.5, 1.5, 1),
        ("saturation", 0.6, 1.4, 1),
        ("hue", -18, 18, 0),
    ):
        values = np.array([getattr(t, name) for t in draws])
        drawn = values[values != neutral]
        assert 0.46 < len(drawn) / len(draws) < 0.54
        assert_same_distribution(drawn[:, None], np.linspace(low, high, 5000)[:, None])
        assert low <= drawn.min() and drawn.max() <= high
    assert 0.46 < np.mean([t.contrast_first for t in draws]) < 0.54
    orders = [t.channel_order for t in draws]
    assert len(set(orders)) == 6
    assert abs(np.mean([o != (0, 1, 2) for o in orders]) - 0.25 * 5 / 6) < 0.03
    for style in ("caffe", "torchvision"):
        identity = PhotometricDistortion(0, 0.1, style=style).get_transform(IMAGE)
        assert np.array_equal(identity.apply_image(IMAGE), IMAGE)


def test_photometric_draws_match_torchvision():
    augmentation = PhotometricDistortion(
        brightness=0.125, hue=9, swap_channels_prob=0.5, style="torchvision"
    )
    reference = v2.RandomPhotometricDistort()
    inputs = [torch.zeros(3, 2, 2, dtype=torch.uint8)]
    ours, theirs = [], []
    for _ in range(3000):
        t = augmentation.get_transform(IMAGE)
        assert type(t) is TorchvisionPhotometricTransform
        swapped = t.channel_order != (0, 1, 2)
        ours.append((t.brightness, t.contrast, t.saturation, t.hue / 180, swapped))
        ours[-1] += (t.contrast != 1 and t.contrast_first,)
        p = drawn_by(reference, inputs)
        order = p["channel_permutation"]
        swapped = order is not None and order.tolist() != [0, 1, 2]
        factors = [p[k] or 1 for k in ("brightness_factor", "contrast_factor", "saturation_factor")]
        theirs.append((*factors, p["hue_factor"] or 0, swapped))
        theirs[-1] += (p["contrast_factor"] is not None and p["contrast_before"],)
    assert_same_distribution(ours, theirs)


# ---------------------------------------------------------------------------- expand


def test_expand_matches_torchvision():
    ours, theirs = [], []
    zoom_out = v2.RandomZoomOut(side_range=(1.0, 4.0))
    for _ in range(3000):
        transform = Expand(1.0, 4.0).get_transform(IMAGE)
        x0, y0, x1, y1 = transform.region
        assert transform.output_size == (y1 - y0, x1 - x0)
        ours.append((-x0, -y0, x1 - WIDTH, y1 - HEIGHT))
        theirs.append(drawn_by(zoom_out, torchvision_input())["padding"])
    ours, theirs = np.array(ours), np.array(theirs)
    assert ours.min() == 0
    assert_same_distribution(ours, theirs)
    sides = [
        np.stack([p[:, 0] + p[:, 2] + WIDTH, p[:, 1] + p[:, 3] + HEIGHT], 1) for p in (ours, theirs)
    ]
    assert_same_distribution(*sides)
    ratios = sides[0] / (WIDTH, HEIGHT)
    assert np.abs(ratios[:, 0] - ratios[:, 1]).max() < 0.02  # one ratio for both sides
    assert ratios.min() < 1.01 and 3.98 < ratios.max() <= 4
    kept = [isinstance(Expand(0.3).get_transform(IMAGE), NoOpTransform) for _ in range(2000)]
    assert 0.66 < np.mean(kept) < 0.74


def test_expand_puts_the_image_and_its_boxes_on_the_mean():
    aug_input = T.AugInput(IMAGE, boxes=CROWD)
    transform = T.AugmentationList([Expand(1.0, 3.0, (1, 2, 3))])(aug_input)[0]
    left, top = -int(transform.region[0]), -int(transform.region[1])
    np.testing.assert_array_equal(aug_input.boxes, CROWD + [left, top, left, top])
    np.testing.assert_array_equal(aug_input.image[top : top + HEIGHT, left : left + WIDTH], IMAGE)
    outside = np.ones(aug_input.image.shape[:2], bool)
    outside[top : top + HEIGHT, left : left + WIDTH] = False
    assert outside.any() and (aug_input.image[outside] == (1, 2, 3)).all()


# ---------------------------------------------------------------------------- crop


@pytest.mark.parametrize(
    "min_ious", [(0.0,), (0.1,), (0.3,), (0.5,), (0.7,), (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)]
)
def test_crop_matches_torchvision(min_ious):
    boxes = CROWD if max(min_ious) < 0.5 else np.concatenate([CROWD, LARGE])
    augmentation = IoUCrop(min_ious, (0.3, 1.0), (0.5, 2.0), 5, "torchvision")
    reference = v2.RandomIoUCrop(sampler_options=[*min_ious, 1.0], trials=5)
    inputs = torchvision_input(boxes)
    count = 1000
    ours = draw_crops(augmentation, boxes, count)
    theirs = []
    for _ in range(count):
        p = drawn_by(reference, inputs)
        left_top = [p["left"], p["top"]] if p else None
        theirs.append(p and np.array([*left_top, p["left"] + p["width"], p["top"] + p["height"]]))
    rows = []
    for crops in (ours, theirs):
        taken = [crop for crop in crops if crop is not None and len(crop)]
        # few trials, so that the share of crops tells how often a choice is accepted
        rows.append((len(taken) / count, np.array(taken)))
    assert abs(rows[0][0] - rows[1][0]) < 4 * np.sqrt(0.5 / count)
    features = []
    for _, crops in rows:
        wh = crops[:, 2:] - crops[:, :2]
        alive = [survivors(crop, boxes).sum() for crop in crops]
        features.append(np.column_stack([crops, wh, wh[:, 0] / wh[:, 1], alive]))
    assert_same_distribution(*features)


@pytest.mark.parametrize("sampler", ["caffe", "torchvision"])
@pytest.mark.parametrize("min_iou", [0.0, 0.1, 0.3])
def test_crop_accepts_if_any_object_reaches_the_iou(sampler, min_iou):
    crops = draw_crops(IoUCrop((min_iou,), sampler=sampler), CROWD, 300)
    taken = [crop for crop in crops if crop is not None]
    assert 120 < len(taken)  # demanding it of all five objects accepts none of 300
    for crop in taken:
        alive = survivors(crop, CROWD)
        assert alive.any() and box_iou(crop, CROWD[alive]).max() >= min_iou - 1e-6
        assert (crop == crop.round()).all() and (crop >= 0).all()
        assert (crop[2:] <= (WIDTH, HEIGHT)).all() and (crop[2:] > crop[:2]).all()
    worst = [box_iou(crop, CROWD).min() for crop in taken]
    assert min_iou == 0 or min(worst) < min_iou
    assert min(survivors(crop, CROWD).sum() for crop in taken) < len(CROWD)


def plain_mmdet_crop(min_iou, boxes):
    """MMDetection's rule with 5 trials, straight from its definition; None if none succeeds."""
    for _ in range(5):
        w, h = np.random.uniform(0.3, 1) * WIDTH, np.random.uniform(0.3, 1) * HEIGHT
        if not 0.5 <= h / w <= 2:
            continue
        x, y = np.random.uniform(0, WIDTH - w), np.random.uniform(0, HEIGHT - h)
        crop = np.array([x, y, x + w, y + h]).astype(int)
        if box_iou(crop, boxes).min() >= min_iou and survivors(crop, boxes).any():
            return crop
    return None


def test_a_crop_that_gets_no_boxes_says_so(caplog):
    """As from Detectron2's DatasetMapper."""
    logger._LOG_COUNTER.clear()  # of messages that are logged once
    assert isinstance(IoUCrop()(T.AugInput(IMAGE)), NoOpTransform)
    assert "IoUCrop crops nothing" in caplog.text and "SSDDatasetMapper" in caplog.text
    caplog.clear()
    logger._LOG_COUNTER.clear()
    IoUCrop()(T.AugInput(IMAGE, boxes=np.zeros((0, 4))))
    assert not caplog.text


@pytest.mark.parametrize("min_iou", [0.0, 0.1, 0.3])
def test_crop_of_mmdetection(min_iou):
    boxes = np.array([[10, 8, 120, 80], [90, 10, 158, 110]], np.float32)
    crop = IoUCrop((min_iou,), trials=5, sampler="torchvision", objects="all")
    # a choice that fails is drawn again
    ours = draw_crops(crop, boxes, 2000)
    theirs = []
    while len(theirs) < 2000:
        keep = np.random.rand() < 0.5
        drawn = None if keep else plain_mmdet_crop(min_iou, boxes)
        if keep or drawn is not None:
            theirs.append(drawn)
    shares = [np.mean([c is None for c in crops]) for crops in (ours, theirs)]
    assert abs(shares[0] - shares[1]) < 4 * np.sqrt(0.5 / 2000)
    ours, theirs = (np.array([c for c in crops if c is not None]) for crops in (ours, theirs))
    wh = [crops[:, 2:] - crops[:, :2] for crops in (ours, theirs)]
    # MMDetection cuts corners to whole pixels, here the size: up to a pixel apart
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 3
    assert np.abs(wh[0].mean(0) - wh[1].mean(0)).max() < 3
    alive = [np.mean([survivors(c, boxes).all() for c in crops]) for crops in (ours, theirs)]
    assert abs(alive[0] - alive[1]) < 0.06 and alive[0] < 1  # objects that are dropped count too
    assert min(box_iou(c, boxes).min() for c in ours) >= min_iou - 1e-6


@pytest.mark.parametrize("sampler", ["caffe", "torchvision"])
def test_crop_of_a_crowd_that_asks_all_objects(sampler):
    crops = draw_crops(IoUCrop((0.1,), sampler=sampler, objects="all"), CROWD, 100)
    assert set(crops) == {None}


def test_caffe_scale_and_aspect():
    everywhere = np.array(
        [[x, y, x + 2, y + 2] for x in range(0, 158, 4) for y in range(0, 118, 4)]
    )
    crops = draw_crops(IoUCrop((0.0,), (0.3, 1.0), (0.5, 2.0)), everywhere.astype(np.float32), 3000)
    crops = np.array([crop for crop in crops if crop is not None])
    sides = (crops[:, 2:] - crops[:, :2]) / (WIDTH, HEIGHT)
    scale, aspect = np.sqrt(sides.prod(1)), sides[:, 0] / sides[:, 1]
    assert scale.min() > 0.28 and 0.98 < scale.max() <= 1
    assert 0.47 < aspect.min() < 0.55 and 1.85 < aspect.max() < 2.1
    # the first trial nearly always succeeds here: what is accepted is what was drawn
    uniform = np.random.uniform(0.3, 1.0, 20000)
    bounds = np.maximum(0.5, uniform**2), np.minimum(2.0, 1 / uniform**2)
    expected = np.column_stack([uniform, np.random.uniform(*bounds)])
    assert_same_distribution(np.column_stack([scale + 0.003, aspect]), expected)


def test_caffe_chooses_among_the_successes_only():
    # No crop of at most 0.3 of the image reaches 0.9 with this object, so of the 3 choices
    # (0.0, 0.9, keep) two remain, each taken half of the time.
    crops = draw_crops(IoUCrop((0.0, 0.9), scale=(0.3, 0.3)), LARGE, 1000)
    assert 0.44 < np.mean([crop is None for crop in crops]) < 0.56
    # all succeed: 1 of 5 keeps the image
    crops = draw_crops(IoUCrop((0.0, 0.0, 0.0, 0.0)), LARGE, 1000)
    assert 0.15 < np.mean([crop is None for crop in crops]) < 0.25
    # none succeeds
    crops = draw_crops(IoUCrop((0.9, 0.9), scale=(0.3, 0.3)), LARGE, 50)
    assert all(crop is None for crop in crops)


@pytest.mark.parametrize("sampler", ["caffe", "torchvision"])
def test_crop_corner_cases(sampler):
    crop = IoUCrop(sampler=sampler)
    assert isinstance(crop.get_transform(IMAGE, None), NoOpTransform)
    assert isinstance(crop.get_transform(IMAGE, np.zeros((0, 4))), NoOpTransform)
    tiny = np.array([[70, 60, 71, 61]], np.float32)
    crops = [c for c in draw_crops(crop, tiny, 200) if c is not None]
    assert crops and all(survivors(c, tiny).all() for c in crops)
    one_pixel = np.zeros((1, 1, 3), np.uint8)
    crop.get_transform(one_pixel, np.array([[0.0, 0, 1, 1]]))
    # a choice that can't succeed ends with the image kept, not in an endless loop
    impossible = IoUCrop((1.0,), scale=(0.3, 0.3), trials=2, sampler=sampler)
    assert set(draw_crops(impossible, tiny, 20)) == {None}


# ---------------------------------------------------------------------------- composition


@pytest.mark.parametrize("flip", ["horizontal", "vertical"])
def test_composed_warp_is_the_chain(flip):
    """The same seed gives the boxes and, but for the single sampling, pixels of each step."""
    blurred = np.repeat(np.linspace(0, 255, WIDTH)[None], HEIGHT, 0).astype(np.uint8)
    blurred = np.stack([blurred, blurred // 2, np.full_like(blurred, 77)], 2)
    steps = [
        Expand(0.5, 4.0, (9, 9, 9)),
        IoUCrop(),
        Resize((60, 80)),
        T.RandomFlip(0.5, horizontal=flip == "horizontal", vertical=flip == "vertical"),
    ]
    outcomes = set()
    for seed in range(60):
        composed, eager = (T.AugInput(blurred.copy(), boxes=CROWD.copy()) for _ in range(2))
        np.random.seed(seed)
        transforms = T.AugmentationList([ComposedWarp(steps)])(composed)
        np.random.seed(seed)
        T.AugmentationList(steps)(eager)
        warp = transforms[0]
        assert isinstance(warp, WarpTransform) and warp.source_size == (HEIGHT, WIDTH)
        assert composed.image.shape == (60, 80, 3) and len(composed.boxes) == len(CROWD)
        np.testing.assert_allclose(composed.boxes, eager.boxes, atol=1e-3)
        assert np.abs(composed.image.astype(int) - eager.image).max() <= 2
        assert centers_inside(composed.boxes, (60, 80)).any()
        outcomes.add((warp.region[0] > warp.region[2], warp.region[1] > warp.region[3]))
    assert len(outcomes) == 2


def test_photometric_first_or_last():
    photometric, rest = PhotometricDistortion(), [Expand(1.0, 4.0, (90, 90, 90)), Resize((60, 80))]
    for chain, last in (([photometric, *rest], False), ([*rest, photometric], True)):
        filled = set()
        for _ in range(20):
            transform = ComposedWarp(chain).get_transform(IMAGE, None)
            assert transform.photometric_last is last
            filled.add(tuple(transform.apply_image(IMAGE)[[0, -1], [-1, 0]].ravel()))
        assert ({(90,) * 6} == filled) is not last


def test_build_augmentation_reads_the_config():
    cfg = get_cfg()
    add_ssd_config(cfg)
    cfg.MODEL.SSD.INPUT_SIZE = [96, 64]
    cfg.MODEL.PIXEL_MEAN = [103.53, 116.28, 123.675]
    test = build_augmentation(cfg, is_train=False)
    assert test.get_transform(IMAGE).output_size == (96, 64)
    assert test.get_transform(IMAGE).region == (0, 0, WIDTH, HEIGHT)

    train = build_augmentation(cfg, is_train=True)
    photometric, expand, crop, resize, flip = train.augmentations
    assert expand.fill == (104, 116, 124) and photometric.image_format == "BGR"
    assert crop.sampler == "caffe" and resize.output_size == [96, 64] and flip.horizontal
    seen = set()
    for _ in range(40):
        aug_input = T.AugInput(IMAGE, boxes=CROWD)
        transform = train(aug_input)
        assert isinstance(transform, PhotometricWarp)
        assert aug_input.image.shape == (96, 64, 3) and aug_input.image.dtype == np.uint8
        assert aug_input.boxes.shape == CROWD.shape
        seen.add(transform.warp.region)
    assert len(seen) > 30

    cfg.INPUT.PHOTOMETRIC.LAST = True
    cfg.INPUT.PHOTOMETRIC.STYLE, cfg.INPUT.PHOTOMETRIC.BRIGHTNESS = "torchvision", 0.125
    cfg.INPUT.IOU_CROP.OBJECTS = "all"
    train = build_augmentation(cfg, is_train=True)
    expand, crop, resize, flip, photometric = train.augmentations
    assert crop.objects == "all" and photometric.style == "torchvision"
    transform = train.get_transform(IMAGE, CROWD)
    assert type(transform.photometric) is TorchvisionPhotometricTransform
    assert transform.photometric_last

    for key in ("PHOTOMETRIC", "EXPAND", "IOU_CROP"):
        cfg.INPUT[key].ENABLED = False
    cfg.INPUT.RANDOM_FLIP = "none"
    train = build_augmentation(cfg, is_train=True)
    assert train.get_transform(IMAGE, None).region == (0, 0, WIDTH, HEIGHT)
    cfg.INPUT.RANDOM_FLIP = "vertical"
    train = build_augmentation(cfg, is_train=True)
    regions = {train.get_transform(IMAGE, None).region for _ in range(20)}
    assert regions == {(0, 0, WIDTH, HEIGHT), (0, HEIGHT, WIDTH, 0)}


def test_everything_drawn_comes_from_the_seed():
    cfg = get_cfg()
    add_ssd_config(cfg)
    cfg.INPUT.PHOTOMETRIC.SWAP_CHANNELS_PROB = 0.5
    train = build_augmentation(cfg, is_train=True)
    draws = []
    for _ in range(2):
        np.random.seed(7)
        draws.append([repr(train.get_transform(IMAGE, CROWD)) for _ in range(20)])
    assert draws[0] == draws[1] and len(set(draws[0])) == 20


def test_errors_name_the_config_key():
    for build, key in (
        (lambda: IoUCrop(sampler="mmdet"), "'mmdet'"),
        (lambda: IoUCrop(objects="some"), "INPUT.IOU_CROP.OBJECTS must be .* got 'some'"),
        (lambda: PhotometricDistortion(style="tv"), "INPUT.PHOTOMETRIC.STYLE must be .* got 'tv'"),
        (
            lambda: PhotometricDistortion(brightness=32, style="torchvision"),
            "INPUT.PHOTOMETRIC.BRIGHTNESS must be 0 to 1 .* got 32",
        ),
        (lambda: IoUCrop(trials=0), "INPUT.IOU_CROP.TRIALS must be .* got 0"),
        (lambda: IoUCrop(scale=(0.5, 1.5)), "INPUT.IOU_CROP.SCALE"),
        (lambda: IoUCrop(aspect_ratio=(1.2, 2)), "INPUT.IOU_CROP.ASPECT_RATIO"),
        (lambda: IoUCrop(min_ious=(0.1, 1.1)), "INPUT.IOU_CROP.MIN_IOUS"),
        (lambda: Expand(prob=2), "INPUT.EXPAND.PROB must be .* got 2"),
        (lambda: Expand(max_ratio=0.5), "INPUT.EXPAND.MAX_RATIO"),
        (lambda: PhotometricDistortion(contrast=(1.5, 0.5)), "INPUT.PHOTOMETRIC.CONTRAST"),
        (lambda: PhotometricDistortion(contrast=(0, np.inf)), "INPUT.PHOTOMETRIC.CONTRAST"),
        (lambda: PhotometricDistortion(saturation=(0, np.inf)), "INPUT.PHOTOMETRIC.SATURATION"),
        (lambda: PhotometricDistortion(hue=-1), "INPUT.PHOTOMETRIC"),
        (lambda: PhotometricDistortion(image_format="L"), "INPUT.FORMAT"),
        (lambda: Resize((0, 8)), "MODEL.SSD.INPUT_SIZE"),
        (
            lambda: ComposedWarp([Resize((8, 8)), PhotometricDistortion(), Resize((8, 8))]),
            "photometric one first or last",
        ),
        (lambda: ComposedWarp([PhotometricDistortion()] * 2), "photometric one first or last"),
    ):
        with pytest.raises(ValueError, match=key):
            build()
    with pytest.raises(ValueError, match="can't compose"):
        ComposedWarp([T.RandomRotation([30, 30])]).get_transform(IMAGE, None)
    cfg = get_cfg()
    add_ssd_config(cfg)
    cfg.INPUT.RANDOM_FLIP = "diagonal"
    with pytest.raises(ValueError, match="INPUT.RANDOM_FLIP must be .* got 'diagonal'"):
        build_augmentation(cfg, is_train=True)
