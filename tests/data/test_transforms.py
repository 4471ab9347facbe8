import pickle

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from ssd.data.transforms import (
    PhotometricTransform,
    PhotometricWarp,
    TorchvisionPhotometricTransform,
    WarpTransform,
    centers_inside,
)

FILL = (104, 117, 123)
HEIGHT, WIDTH = 120, 160


def textured(height=HEIGHT, width=WIDTH, seed=0):
    """Shapes, a gradient and fine noise, so that misplaced samples are seen."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width]
    image = np.stack([255 * x / width, 255 * y / height, 127 + 120 * np.sin(x / 5 + y / 9)], 2)
    image = image.astype(np.uint8)
    for _ in range(12):
        center = (int(rng.randint(width)), int(rng.randint(height)))
        cv2.circle(image, center, int(rng.randint(4, 20)), rng.randint(0, 256, 3).tolist(), -1)
    noise = rng.randint(-20, 21, image.shape)
    return np.clip(image.astype(int) + noise, 0, 255).astype(np.uint8)


def separate_steps(image, canvas, crop, size, flip, fill=FILL):
    """Expand, crop, resize and flip, one after the other, on a canvas built in full.

    canvas: (left, top, width, height) of the canvas; crop: XYXY on the canvas.
    """
    left, top, width, height = canvas
    shape = (height, width) + image.shape[2:]
    full = np.empty(shape, image.dtype)
    full[:] = fill if image.ndim == 3 else fill[0]
    full[top : top + image.shape[0], left : left + image.shape[1]] = image
    x0, y0, x1, y1 = crop
    out = cv2.resize(full[y0:y1, x0:x1], size[::-1], interpolation=cv2.INTER_LINEAR)
    return out[:, ::-1] if flip else out


def one_warp(image, canvas, crop, size, flip, fill=FILL):
    left, top = canvas[:2]
    x0, y0, x1, y1 = crop[0] - left, crop[1] - top, crop[2] - left, crop[3] - top
    region = (x1, y0, x0, y1) if flip else (x0, y0, x1, y1)
    return WarpTransform(region, size, image.shape[:2], fill)


CHAINS = [
    # canvas (left, top, width, height), crop, output size
    ((0, 0, WIDTH, HEIGHT), (13, 7, 90, 101), (64, 64)),
    ((0, 0, WIDTH, HEIGHT), (40, 30, 60, 45), (64, 80)),
    ((30, 90, 400, 300), (0, 0, 400, 300), (64, 80)),
    ((30, 90, 400, 300), (11, 17, 300, 280), (100, 90)),
    ((30, 20, 200, 180), (60, 0, 170, 100), (150, 160)),  # magnifies; ends inside the image
    ((30, 20, 200, 180), (0, 60, 100, 180), (64, 64)),
    ((5, 5, 640, 480), (0, 0, 640, 480), (40, 40)),  # a factor of 16 without antialiasing
]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("chain", CHAINS)
def test_warp_equals_the_separate_steps(chain, flip):
    image = textured()
    expected = separate_steps(image, *chain, flip)
    warped = one_warp(image, *chain, flip).apply_image(image)
    assert warped.dtype == np.uint8 and warped.shape == expected.shape
    error = np.abs(warped.astype(int) - expected)
    if chain[0] == (0, 0, WIDTH, HEIGHT):
        assert error.max() == 0
    # OpenCV before 5 rounds the place of a sample to 1/32 pixel
    assert error.max() <= 8 and error.mean() < 0.3


def test_expanding_alone_moves_pixels_unchanged():
    image = textured()
    canvas, crop, size = (31, 22, 300, 200), (0, 0, 300, 200), (200, 300)
    warped = one_warp(image, canvas, crop, size, False).apply_image(image)
    assert np.array_equal(warped, separate_steps(image, canvas, crop, size, False))


def test_region_without_any_image_is_fill():
    warp = WarpTransform((-50, -40, -10, -5), (6, 8), (HEIGHT, WIDTH), FILL)
    assert np.array_equal(warp.apply_image(textured()), np.full((6, 8, 3), FILL, np.uint8))


@pytest.mark.parametrize("chain", CHAINS)
def test_float_and_grayscale(chain):
    colour = textured()
    warp = one_warp(colour, *chain, True)
    as_float = warp.apply_image(colour.astype(np.float32))
    assert as_float.dtype == np.float32
    assert np.abs(as_float - warp.apply_image(colour)).max() <= 1.01

    gray = colour[:, :, 0]
    one_channel = one_warp(gray, *chain, True, fill=(104,))
    assert np.array_equal(one_channel.apply_image(gray), warp.apply_image(colour)[:, :, 0])
    assert np.array_equal(
        one_channel.apply_image(gray[:, :, None]), one_channel.apply_image(gray)[:, :, None]
    )


def test_coords_boxes_and_inverse():
    warp = WarpTransform((-20.0, 10.0, 60.0, 50.0), (80, 40), (HEIGHT, WIDTH), FILL)
    assert np.array_equal(
        warp.apply_coords(np.array([[-20.0, 10.0], [60, 50], [20, 30]])),
        [[0, 0], [40, 80], [20, 40]],
    )
    mirrored = WarpTransform((60.0, 10.0, -20.0, 50.0), (80, 40), (HEIGHT, WIDTH), FILL)
    boxes = np.array([[0.0, 20.0, 20.0, 30.0], [500, 500, 600, 600]], np.float32)
    for transform, x in ((warp, (10, 20)), (mirrored, (20, 30))):
        mapped = transform.apply_box(boxes)
        assert mapped.dtype == np.float32 and len(mapped) == 2  # neither dropped nor clipped
        assert np.array_equal(mapped[0], [x[0], 20, x[1], 40])
        back = transform.inverse()
        assert (back.output_size, back.source_size) == ((HEIGHT, WIDTH), (80, 40))
        np.testing.assert_allclose(back.apply_box(mapped), boxes, atol=1e-4)
        np.testing.assert_allclose(back.inverse().region, transform.region, atol=1e-9)
    assert warp.apply_box(np.zeros((0, 4))).shape == (0, 4)


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_follow_the_pixels(flip):
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[40:64, 80:120] = 255
    warp = one_warp(image, (30, 20, 300, 260), (20, 10, 220, 210), (100, 100), flip, (0, 0, 0))
    rows, columns = np.nonzero(warp.apply_image(image)[:, :, 0] > 127)
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(warp.apply_box(np.array([[80.0, 40, 120, 64]]))[0], found, atol=0.51)


def test_inverse_restores_the_pixels():
    image = cv2.GaussianBlur(textured(), (0, 0), 3)
    for region in ((-20, -10, 180, 140), (180, 140, -20, -10)):
        warp = WarpTransform(region, (450, 600), (HEIGHT, WIDTH), FILL)
        back = warp.inverse().apply_image(warp.apply_image(image))
        assert np.abs(back.astype(int) - image)[2:-2, 2:-2].max() <= 5


def test_composition():
    image = cv2.GaussianBlur(textured(), (0, 0), 2)
    expand = WarpTransform((-30, -20, 200, 180), (200, 230), (HEIGHT, WIDTH), FILL)
    crop = WarpTransform((25, 10, 215, 190), (180, 190), (200, 230))
    resize = WarpTransform((0, 0, 190, 180), (90, 70), (180, 190))
    flip = WarpTransform((70, 0, 0, 90), (90, 70), (90, 70))
    chain = [expand, crop, resize, flip]
    left = expand.then(crop).then(resize).then(flip)
    right = expand.then(crop.then(resize.then(flip)))
    np.testing.assert_allclose(left.region, right.region, atol=1e-9)
    np.testing.assert_allclose(left.region, (185, -10, -5, 170), atol=1e-9)
    assert left.fill == right.fill == FILL
    assert (left.output_size, left.source_size) == ((90, 70), (HEIGHT, WIDTH))

    points, stepwise = np.array([[3.0, 4.0], [-7, 300]]), np.array([[3.0, 4.0], [-7, 300]])
    pixels = image
    for step in chain:
        stepwise, pixels = step.apply_coords(stepwise), step.apply_image(pixels)
    np.testing.assert_allclose(left.apply_coords(points), stepwise, atol=1e-9)
    assert np.abs(left.apply_image(image).astype(int) - pixels).max() <= 2


def test_segmentation():
    labels = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    crop = WarpTransform((70, 20, 10, 50), (30, 60), (HEIGHT, WIDTH))
    assert np.array_equal(crop.apply_segmentation(labels), labels[20:50, 10:70][:, ::-1])
    half = WarpTransform((0, 0, WIDTH, HEIGHT), (HEIGHT * 2, WIDTH * 2), (HEIGHT, WIDTH))
    assert np.array_equal(half.apply_segmentation(labels), labels.repeat(2, 0).repeat(2, 1))
    expand = WarpTransform((-5, -6, 160, 120), (126, 165), (HEIGHT, WIDTH))
    out = expand.apply_segmentation(labels.astype(np.uint8))
    assert (out[:6] == 255).all() and (out[:, :5] == 255).all() and out.dtype == np.uint8
    assert np.array_equal(out[6:, 5:], labels.astype(np.uint8))


def test_nothing_in_a_transform_is_random_and_repr_is_complete():
    image = textured()
    arguments = (1.2, False, 0.8, -7.5, (2, 0, 1), "RGB")
    photometric = PhotometricTransform(12.3, *arguments)
    blending = TorchvisionPhotometricTransform(1.1, *arguments)
    warp = WarpTransform((-20, 10, 60, 50.5), (80, 40), (HEIGHT, WIDTH), FILL)
    last = PhotometricWarp(photometric, warp, photometric_last=True)
    for transform in (photometric, blending, warp, PhotometricWarp(blending, warp), last):
        before = image.copy()
        first = transform.apply_image(image)
        assert np.array_equal(first, transform.apply_image(image))
        assert np.array_equal(image, before)  # the input is not written to
        for twin in (eval(repr(transform)), pickle.loads(pickle.dumps(transform))):
            assert repr(twin) == repr(transform)
            assert np.array_equal(first, twin.apply_image(image))


def test_warp_errors():
    with pytest.raises(ValueError, match=r"region is \(0, 0, 0, 5\)"):
        WarpTransform((0, 0, 0, 5), (8, 8), (8, 8))
    with pytest.raises(ValueError, match="region is"):
        WarpTransform((0, 0, float("nan"), 5), (8, 8), (8, 8))
    with pytest.raises(ValueError, match=r"output_size is \(0, 8\).*MODEL.SSD.INPUT_SIZE"):
        WarpTransform((0, 0, 8, 8), (0, 8), (8, 8))
    warp = WarpTransform((-8, 0, 8, 8), (8, 16), (8, 8), FILL)
    with pytest.raises(ValueError, match=r"\(9, 8\).*expected source_size \(8, 8\)"):
        warp.apply_image(np.zeros((9, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="fill is"):
        warp.apply_image(np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"images of \(8, 8\)"):
        warp.then(warp)
    crop = WarpTransform((2, 2, 6, 6), (8, 8), (8, 8))
    with pytest.raises(ValueError, match="expand first"):
        crop.then(warp)
    with pytest.raises(ValueError, match="two fill values"):
        warp.then(WarpTransform((-1, 0, 16, 8), (8, 8), (8, 16), (0, 0, 0)))


def test_centers_inside():
    boxes = np.array([[0, 0, 10, 10], [-10, 0, 10, 10], [15, 0, 27, 8], [0, 9, 5, 30]])
    assert centers_inside(boxes, (20, 22)).tolist() == [True, False, True, True]
    assert centers_inside(boxes, (19, 21)).tolist() == [True, False, False, False]
    assert centers_inside(np.zeros((0, 4)), (20, 20)).shape == (0,)


def float_formula(image, brightness, contrast, contrast_first, saturation, hue, order, rgb):
    """The formula of PhotometricTransform's docstring, in float throughout."""
    x = np.clip(image.astype(np.float64) + brightness, 0, 255)
    if contrast_first:
        x = np.clip(x * contrast, 0, 255)
    red, green, blue = np.moveaxis(x if rgb else x[..., ::-1], 2, 0)
    value = x.max(2)
    chroma = value - x.min(2)
    safe = np.where(chroma > 0, chroma, 1)
    sextant = np.where(
        value == red,
        (green - blue) / safe,
        np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sextant = np.where(chroma > 0, sextant + hue / 30, 0)  # 30 units of 2 degrees
    s = np.clip(255 * chroma / np.where(value > 0, value, 1) * saturation, 0, 255) / 255
    channels = []
    for n in (5, 3, 1):  # red, green, blue
        k = (n + sextant) % 6
        channels.append(value - value * s * np.clip(np.minimum(k, 4 - k), 0, 1))
    x = np.stack(channels if rgb else channels[::-1], 2)
    if not contrast_first:
        x = np.clip(x * contrast, 0, 255)
    return x[..., list(order)]


@pytest.mark.parametrize(
    "change, bound, mean_bound",
    [
        # without HSV: one rounding, that is half a level
        (dict(), 0, 0),
        (dict(brightness=-31.7), 0.5, 0.3),
        (dict(contrast=1.43), 0.5, 0.3),
        (dict(contrast=0.51, contrast_first=False), 0.5, 0.3),
        (dict(brightness=31.2, contrast=0.77), 0.5, 0.3),
        (dict(brightness=31.2, contrast=1.4, contrast_first=False), 0.5, 0.3),
        (dict(channel_order=(2, 0, 1)), 0, 0),
        # with it
        (dict(saturation=0.5), 6, 1),
        (dict(saturation=1.5), 7, 1.2),
        (dict(hue=17.5), 11, 1.5),
        (dict(hue=-18.0), 7, 1.2),
        (dict(brightness=20, contrast=1.3, saturation=1.4, hue=9.3), 11, 1.5),
        (dict(contrast=0.6, contrast_first=False, saturation=0.7, hue=-12), 5, 1),
        (dict(contrast=1.5, contrast_first=False, saturation=1.2, hue=5.5), 15, 2),
        (dict(saturation=1.3, hue=4, channel_order=(1, 0, 2)), 9, 1.5),
    ],
)
@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_photometric_follows_the_float_formula(change, bound, mean_bound, image_format):
    full = dict(brightness=0, contrast=1, contrast_first=True, saturation=1, hue=0)
    full.update(channel_order=(0, 1, 2))
    full.update(change)
    noise = np.random.RandomState(1).randint(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    for image in (textured(), noise):
        out = PhotometricTransform(**full, image_format=image_format).apply_image(image)
        assert out.dtype == np.uint8
        error = np.abs(out - float_formula(image, *full.values(), image_format == "RGB"))
        assert error.max() <= bound + 1e-6 and error.mean() <= mean_bound + 1e-6


def torchvision_distort(image, brightness, contrast, contrast_first, saturation, hue, order, rgb):
    x = torch.from_numpy(np.ascontiguousarray(image if rgb else image[..., ::-1])).permute(2, 0, 1)
    x = F.adjust_brightness(x, brightness)
    if contrast_first:
        x = F.adjust_contrast(x, contrast)
    x = F.adjust_saturation(x, saturation)
    if hue:
        x = F.adjust_hue(x, hue / 180)
    if not contrast_first:
        x = F.adjust_contrast(x, contrast)
    x = x.permute(1, 2, 0).numpy()
    return (x if rgb else x[..., ::-1])[..., list(order)]


@pytest.mark.parametrize(
    "change, bound, mean_bound",
    [
        # one step: torchvision cuts the fraction off where we round
        (dict(), 0, 0),
        (dict(brightness=0.88), 1, 1),
        (dict(brightness=1.12), 1, 1),
        (dict(contrast=0.51), 1, 1),
        (dict(contrast=1.49, contrast_first=False), 1, 1),
        (dict(saturation=0.5), 1, 1),
        (dict(saturation=1.5), 1, 1),
        (dict(channel_order=(2, 0, 1)), 0, 0),
        # steps multiply what those before them cut off; hue has units of 2 degrees
        (dict(brightness=1.1, contrast=1.4, saturation=0.6, channel_order=(1, 2, 0)), 4, 1.7),
        (dict(brightness=0.9, contrast=0.7, contrast_first=False, saturation=1.4), 4, 1.7),
        (dict(hue=8.8), 8, 1),
        (dict(hue=-9), 8, 1),
        (dict(brightness=1.1, contrast=1.3, saturation=1.4, hue=5.3), 14, 1.7),
        (dict(brightness=0.9, contrast=1.3, contrast_first=False, saturation=0.7, hue=-5), 14, 1.7),
    ],
)
@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_torchvision_style_equals_torchvision(
    change, bound, mean_bound, image_format, datasets_folder
):
    full = dict(brightness=1, contrast=1, contrast_first=True, saturation=1, hue=0)
    full.update(channel_order=(0, 1, 2))
    full.update(change)
    shapes = cv2.imread(str(next((datasets_folder / "shapes/val/images").iterdir())))
    for image in (textured(), shapes):
        transform = TorchvisionPhotometricTransform(**full, image_format=image_format)
        expected = torchvision_distort(image, *full.values(), image_format == "RGB")
        error = np.abs(transform.apply_image(image).astype(int) - expected)
        assert error.max() <= bound and error.mean() <= mean_bound


def test_photometric_leaves_geometry():
    photometric = PhotometricTransform(brightness=10)
    boxes = np.array([[1.0, 2, 3, 4]])
    assert np.array_equal(photometric.apply_box(boxes), boxes)
    labels = np.ones((3, 4), np.int64)
    assert photometric.apply_segmentation(labels) is labels


@pytest.mark.parametrize(
    "photometric, bound, mean_bound",
    [
        (PhotometricTransform(20, 1.3), 0, 0.6),
        # OpenCV's conversion to HSV rounds otherwise for the last pixels
        (PhotometricTransform(20, 1.3, False, 1.4, 9.3), 4, 1.5),
        (TorchvisionPhotometricTransform(1.1, saturation=1.4), 0, 0.6),
        # the mean grey is that of the whole image, here of every third row
        (TorchvisionPhotometricTransform(1.1, 0.5), 2, 1),
        (TorchvisionPhotometricTransform(1.1, 1.5, False, 0.7, -5), 4, 1.5),
    ],
)
def test_photometric_warp_equals_its_two_steps(photometric, bound, mean_bound):
    image = cv2.GaussianBlur(textured(), (0, 0), 1)
    shrinking = 0
    for chain in CHAINS:
        warp = one_warp(image, *chain, True)
        both = PhotometricWarp(photometric, warp)
        expected = warp.apply_image(photometric.apply_image(image))  # the fill isn't distorted
        error = np.abs(both.apply_image(image).astype(int) - expected)
        (x0, y0, x1, y1), (height, width) = warp.region, warp.output_size
        if abs((x1 - x0) * (y1 - y0)) > height * width:  # distorted after sampling
            assert error.mean() <= mean_bound
            shrinking += 1
        else:
            # with the edge towards the fill, where rounding comes before and after blending
            assert error.max() <= max(bound, 1 if warp._reaches_outside() else 0)
        boxes = np.array([[3.0, 4, 50, 60]])
        assert np.array_equal(both.apply_box(boxes), warp.apply_box(boxes))
        labels = image[:, :, 0]
        assert np.array_equal(both.apply_segmentation(labels), warp.apply_segmentation(labels))
    assert 0 < shrinking < len(CHAINS)


def test_mean_grey_is_that_of_the_image(bccd):
    photometric = TorchvisionPhotometricTransform(1.1, 0.5, False, 1.3, 4)
    small = textured(79)
    assert photometric.fixed(small).mean_grey == photometric._mean_grey(small)
    for path in sorted((bccd / "bccd" / "JPEGImages").iterdir())[:20]:
        image = cv2.imread(str(path))
        fixed = photometric.fixed(image)
        assert abs(fixed.mean_grey - photometric._mean_grey(image)) < 1
        assert fixed.fixed(image[:10]) is fixed
    assert TorchvisionPhotometricTransform(1.1).fixed(image).mean_grey is None


@pytest.mark.parametrize("style", ["caffe", "torchvision"])
def test_distorting_after_a_shrinking_warp_changes_photographs_little(bccd, style):
    rng = np.random.RandomState(0)
    outside = 0
    for path in sorted((bccd / "bccd" / "JPEGImages").iterdir())[:20]:
        image = cv2.imread(str(path))
        height, width = image.shape[:2]
        factors = rng.uniform(0.5, 1.5), bool(rng.randint(2)), rng.uniform(0.5, 1.5)
        if style == "caffe":
            photometric = PhotometricTransform(rng.uniform(-32, 32), *factors, rng.uniform(-18, 18))
        else:
            photometric = TorchvisionPhotometricTransform(
                rng.uniform(0.875, 1.125), *factors, rng.uniform(-9, 9)
            )
        x0, y0 = rng.randint(-500, 100), rng.randint(-400, 60)
        region = (x0, y0, rng.randint(540, 1200), rng.randint(400, 800))
        warp = WarpTransform(region, (300, 300), (height, width), FILL)
        expected = warp.apply_image(photometric.apply_image(image))
        error = np.abs(PhotometricWarp(photometric, warp).apply_image(image).astype(int) - expected)
        assert error.mean() < 0.6 and error.max() <= 20
        outside += warp._reaches_outside()
    assert 0 < outside


@pytest.mark.parametrize("region, expected", [
    ((0, 0, 100, 80), 1), ((0, 0, 159, 160), 1), ((0, 0, 160, 159), 1), ((0, 0, 160, 160), 2),
    ((160, 160, 0, 0), 2), ((-100, -100, 219, 300), 2), ((-100, -100, 220, 300), 4),
    ((-300, -300, 700, 700), 8), ((-4000, -4000, 4000, 4000), 8),
])  # fmt: skip
def test_reduction_leaves_no_fewer_pixels_than_are_shown(region, expected):
    warp = WarpTransform(region, (80, 80), (120, 160), FILL)
    assert warp.reduction == expected
    assert PhotometricWarp(PhotometricTransform(), warp).reduction == expected


@pytest.mark.parametrize("region", [
    (-301, -200, 700, 620), (700, 620, -301, -200), (3, 5, 317, 238), (-90, 3, 240, 239),
])  # fmt: skip
@pytest.mark.parametrize("size", [(240, 320), (239, 317)])
def test_reduced_warp_shows_the_same(region, size):
    y, x = np.mgrid[:240, :320]
    image = np.stack([x / 2 + 40, y + 10, 250 - x / 2], 2).astype(np.uint8)  # means keep it
    warp = WarpTransform(region, (60, 70), size, FILL)
    for factor in (2, 4):
        half = cv2.resize(image, (320 // factor, 240 // factor), interpolation=cv2.INTER_AREA)
        half = half[: -(-size[0] // factor), : -(-size[1] // factor)]
        reduced = warp.reduced(factor)
        assert reduced.source_size == half.shape[:2]
        out = reduced.apply_image(half).astype(int)
        error = np.abs(out - warp.apply_image(image[: size[0], : size[1]]))
        # towards the fill it fades out over a pixel of the reduced image
        assert np.percentile(error, 94) <= 2 and error.mean() < 1.5
    assert repr(PhotometricWarp(PhotometricTransform(), warp).reduced(2).warp) == repr(
        warp.reduced(2)
    )


def test_photometric_last_distorts_the_result_with_its_fill():
    image = textured()
    photometric = PhotometricTransform(20, 1.3, False, 1.4, 9.3)
    for chain in CHAINS:
        warp = one_warp(image, *chain, True)
        both = PhotometricWarp(photometric, warp, photometric_last=True)
        expected = photometric.apply_image(warp.apply_image(image))
        assert np.array_equal(both.apply_image(image), expected)
        boxes = np.array([[3.0, 4, 50, 60]])
        assert np.array_equal(both.apply_box(boxes), warp.apply_box(boxes))
    assert np.array_equal(expected[-1, 0], photometric.apply_image(np.uint8([[FILL]]))[0, 0])
    assert not np.array_equal(expected[-1, 0], FILL)


def test_photometric_errors():
    with pytest.raises(ValueError, match="'L'.*INPUT.FORMAT"):
        PhotometricTransform(image_format="L")
    with pytest.raises(ValueError, match="contrast -1"):
        PhotometricTransform(contrast=-1)
    with pytest.raises(ValueError, match="permutation"):
        PhotometricTransform(channel_order=(0, 0, 1))
    with pytest.raises(ValueError, match="float32"):
        PhotometricTransform().apply_image(np.zeros((2, 2, 3), np.float32))
