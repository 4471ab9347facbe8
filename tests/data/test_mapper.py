import copy
import os

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathHandler, PathManager
from PIL import Image

from ssd.data.mapper import SSDDatasetMapper, read_image

COLOR = (200, 100, 40)  # RGB
PLAIN = (
    "INPUT.PHOTOMETRIC.ENABLED False INPUT.EXPAND.ENABLED False INPUT.IOU_CROP.ENABLED False "
    "INPUT.RANDOM_FLIP none"
).split()


@pytest.fixture
def mapper(tiny_cfg):
    return SSDDatasetMapper(tiny_cfg(*PLAIN), True)


@pytest.fixture
def picture(tmp_path):
    """A function (name, mode, size=(40, 30), **save) → path of an image filled with COLOR."""

    def save(name, mode="RGB", size=(40, 30), **kwargs):
        path = tmp_path / name
        Image.new("RGB", size, COLOR).convert(mode).save(path, **kwargs)
        return str(path)

    return save


def record(file_name, boxes=(), size=(30, 40), mode=BoxMode.XYXY_ABS, **extra):
    """The dict of an image of ``size`` (height, width); object i has class i."""
    annotations = [
        {"bbox": list(box), "bbox_mode": mode, "category_id": i, "iscrowd": 0}
        for i, box in enumerate(boxes)
    ]
    record = {"file_name": file_name, "image_id": 1, "height": size[0], "width": size[1]}
    return {**record, "annotations": annotations, **extra}


def boxes_of(sample):
    return sample["instances"].gt_boxes.tensor.tolist()


def classes_of(sample):
    return sample["instances"].gt_classes.tolist()


def test_images_behind_a_path_handler(picture, tmp_path):
    """Detectron2's way to read images from elsewhere, s3:// for example."""

    class Elsewhere(PathHandler):
        def _get_supported_prefixes(self):
            return ["elsewhere://"]

        def _open(self, path, mode="r", buffering=-1, **kwargs):
            return open(path.replace("elsewhere://", f"{tmp_path}/"), mode)

    picture("a.png")
    PathManager.register_handler(Elsewhere())
    assert (read_image("elsewhere://a.png", "RGB") == COLOR).all()
    with pytest.raises(FileNotFoundError, match="elsewhere://b.png"):
        read_image("elsewhere://b.png", "RGB")


def test_missing_image_names_path_and_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/my/data")
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg.*DETECTRON2_DATASETS.*/my/data"):
        read_image(str(tmp_path / "absent.jpg"))


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\xff\xd8\xff"])
def test_empty_and_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.jpg is"):
        read_image(str(path))


def test_a_header_of_more_pixels_than_opencv_takes(tmp_path):
    content = bytearray(cv2.imencode(".bmp", np.zeros((4, 4, 3), np.uint8))[1].tobytes())
    content[18:26] = (60000).to_bytes(4, "little") * 2
    (tmp_path / "bomb.bmp").write_bytes(content)
    with pytest.raises(ValueError, match=r"bomb\.bmp is empty or no readable image"):
        read_image(str(tmp_path / "bomb.bmp"))


def test_what_never_ends_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match=r"pipe\.jpg is no regular file"):
        read_image(str(tmp_path / "pipe.jpg"))


@pytest.mark.parametrize("name, reason", [
    ("noise.jpg", "is truncated"), ("noise.png", "no readable image"),
])  # fmt: skip
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_truncated_file_is_an_error(tmp_path, name, reason, share):
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    read_image(str(path))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=f"{name} .*{reason}"):
        read_image(str(path))


def test_progressive_jpeg_with_thumbnail_and_trailing_bytes_is_whole(picture, tmp_path):
    path = picture("photo.jpg", progressive=True)
    thumbnail = (tmp_path / "photo.jpg").read_bytes()
    Image.new("RGB", (40, 30)).save(path, progressive=True, exif=b"Exif\0\0" + thumbnail)
    with open(path, "ab") as file:
        file.write(b"\0" * 100)
    assert read_image(path).shape == (30, 40, 3)
    data = open(path, "rb").read()
    open(path, "wb").write(data[:-130])  # the thumbnail is whole
    with pytest.raises(ValueError, match="photo.jpg is truncated"):
        read_image(path)


def test_a_long_padding_is_found_quickly(picture):
    path = picture("photo.jpg")
    data = open(path, "rb").read()
    with open(path, "wb") as file:
        file.write(data[:-9] + b"\xff" * 10**6)  # as of a flash memory
    with pytest.raises(ValueError, match="photo.jpg is truncated"):
        read_image(path)


def test_jpeg_in_front_of_a_video_is_whole(picture):
    """As telephones write it: by chance the video has the bytes of any marker."""
    path = picture("photo.jpg")
    expected, data = read_image(path), open(path, "rb").read()
    video = b"\0\0\0\x18ftypmp42\xff\xd8\0\xff\xda\0\x0c"
    for whole in (data, data[:-2]):
        with open(path, "wb") as file:
            file.write(whole + video)
        if whole is data:
            assert np.array_equal(read_image(path), expected)
        else:
            with pytest.raises(ValueError, match="photo.jpg is truncated"):
                read_image(path)


@pytest.mark.parametrize("name, mode", [
    ("rgb.png", "RGB"), ("palette.png", "P"), ("alpha.png", "RGBA"), ("cmyk.jpg", "CMYK"),
    ("rgb.webp", "RGB"), ("rgb.bmp", "RGB"),
])  # fmt: skip
def test_colours_of_all_kinds_of_files(picture, name, mode):
    image = read_image(picture(name, mode))
    assert image.shape == (30, 40, 3) and image.dtype == np.uint8
    np.testing.assert_allclose(image.reshape(-1, 3).mean(0), COLOR, atol=6)


@pytest.mark.parametrize("name", ["grey.jpg", "grey.png"])
def test_greyscale_becomes_three_equal_channels(picture, name):
    image = read_image(picture(name, "L"))
    assert image.shape == (30, 40, 3)
    assert (image == image[..., :1]).all() and abs(image.mean() - 123) < 3  # 0.3 R + 0.6 G + 0.1 B


def test_16_bit_png_is_scaled_to_8_bits(tmp_path):
    for name, pixels in (
        ("color.png", np.full((30, 40, 3), (0x2800, 0x6400, 0xC800), np.uint16)),
        ("grey.png", np.full((30, 40), 0x6400, np.uint16)),
    ):
        cv2.imwrite(str(tmp_path / name), pixels)  # BGR
        image = read_image(str(tmp_path / name))
        assert image.dtype == np.uint8
        expected = COLOR if name == "color.png" else (100, 100, 100)
        np.testing.assert_allclose(image[0, 0], expected, atol=1)


def test_channel_order_is_the_configs(picture, tiny_cfg):
    path = picture("rgb.png")
    for image_format, expected in (("RGB", COLOR), ("BGR", COLOR[::-1])):
        mapper = SSDDatasetMapper(tiny_cfg(*PLAIN, "INPUT.FORMAT", image_format), False)
        assert tuple(mapper(record(path))["image"][:, 5, 5].tolist()) == expected
    with pytest.raises(ValueError, match="INPUT.FORMAT.*'L'"):
        read_image(path, "L")


@pytest.mark.parametrize("size", [(40, 30), (30, 40)])  # as shown, as stored
def test_exif_rotation_follows_the_size_of_the_annotation(tmp_path, mapper, size):
    stored = np.zeros((30, 40, 3), np.uint8)
    stored[:15, :20] = 255  # the top left quarter; at the top right when shown
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    path = str(tmp_path / "rotated.jpg")
    Image.fromarray(stored).save(path, quality=95, exif=exif)
    sample = mapper(record(path, [[1, 2, 11, 22]], size))
    height, width = size
    assert (sample["height"], sample["width"]) == size
    np.testing.assert_allclose(
        boxes_of(sample),
        [[96 / width, 192 / height, 96 * 11 / width, 96 * 22 / height]],
        rtol=1e-6,
    )
    left, right = sample["image"][0, 20, 20], sample["image"][0, 20, 75]
    assert (right > 200 and left < 50) if size == (40, 30) else (left > 200 and right < 50)


def test_another_size_than_the_annotation_says_is_an_error(picture, mapper):
    with pytest.raises(ValueError, match=r"a\.png is 40x30 pixels.*annotation says 50x20"):
        mapper(record(picture("a.png"), size=(20, 50)))
    with pytest.raises(ValueError, match=r"a\.png is 40x30 pixels.*annotation says 0x0"):
        mapper(record(picture("a.png"), size=(0, 0)))


def test_defective_boxes_and_crowds_go_with_their_classes(picture, mapper):
    nan, inf = float("nan"), float("inf")
    boxes = [
        [5, 5, 5, 20], [5, 9, 20, 9], [20, 5, 5, 20], [nan, 5, 10, 20], [5, 5, 10, nan],
        [50, 5, 60, 20], [-9, -9, 0, 0], [4, 3, 20, 15], [0, 0, 40, 30], [10, 10, 20, 20],
        [5, 5, inf, 20], [-inf, 5, 20, 20], [-9, 5, 1e-9, 20], [5, 5, 20, 5.0001],
    ]  # fmt: skip
    given = record(picture("a.png"), boxes)
    given["annotations"][8]["iscrowd"] = 1
    sample = mapper(given)
    assert classes_of(sample) == [7, 9]
    expected = np.array([boxes[7], boxes[9]]) * [2.4, 3.2, 2.4, 3.2]
    np.testing.assert_allclose(boxes_of(sample), expected, rtol=1e-6)


@pytest.mark.parametrize("boxes", [[], [[5, 5, 5, 5]]])
def test_image_without_valid_boxes_has_no_instances(picture, mapper, boxes):
    instances = mapper(record(picture("a.png"), boxes))["instances"]
    assert len(instances) == 0
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.dtype == torch.int64
    given = record(picture("a.png"))
    del given["annotations"]
    assert len(mapper(given)["instances"]) == 0


def test_box_partly_outside_is_clipped(picture, mapper):
    sample = mapper(record(picture("a.png"), [[-10, 3, 20, 45]]))
    np.testing.assert_allclose(boxes_of(sample), [[0, 9.6, 48, 96]], rtol=1e-6)


def test_xywh_is_converted(picture, mapper):
    sample = mapper(record(picture("a.png"), [[10, 5, 20, 10]], mode=BoxMode.XYWH_ABS))
    np.testing.assert_allclose(boxes_of(sample), [[24, 16, 72, 48]], rtol=1e-6)


def test_only_objects_with_their_centre_in_the_crop_stay(tmp_path, tiny_cfg):
    path = str(tmp_path / "grid.png")
    Image.new("RGB", (200, 200)).save(path)
    grid = [[x, y, x + 30, y + 30] for x in range(0, 200, 40) for y in range(0, 200, 40)]
    opts = [*PLAIN, "INPUT.IOU_CROP.ENABLED", "True", "INPUT.IOU_CROP.MIN_IOUS", "[0.0]"]
    mapper = SSDDatasetMapper(tiny_cfg(*opts), True)
    dropped = checked = 0
    for seed in range(20):
        np.random.seed(seed)
        instances = mapper(record(path, grid, (200, 200)))["instances"]
        boxes = instances.gt_boxes.tensor
        dropped += len(grid) - len(boxes)
        assert len(boxes) and (boxes >= 0).all() and (boxes <= 96).all()
        # neither side of a box that stays is cut by more than half, up to its own centre
        whole = (boxes[:, 2:] - boxes[:, :2]).max(0).values
        assert ((boxes[:, 2:] - boxes[:, :2]) >= 0.45 * whole).all()
        # of boxes that aren't cut, the distances are those of their classes in the grid
        inside = ((boxes > 0.1) & (boxes < 95.9)).all(1)
        boxes, classes = boxes[inside], instances.gt_classes[inside]
        steps = (boxes[:, 2:] - boxes[:, :2]) / 30 * 40
        cells = torch.stack([classes // 5, classes % 5], 1)
        cells, corners = (x - x[:1] for x in (cells, boxes[:, :2]))
        torch.testing.assert_close(corners, cells * steps, atol=1e-3, rtol=1e-4)
        checked += len(cells)
    assert dropped > 20 and checked > 40


def test_output_is_contiguous_uint8_of_the_input_size(picture, tiny_cfg):
    given = record(picture("a.png"), [[4, 3, 20, 15]], file_id="kept")
    before = copy.deepcopy(given)
    for is_train in (True, False):
        mapper = SSDDatasetMapper(tiny_cfg("MODEL.SSD.INPUT_SIZE", "[64, 96]"), is_train)
        np.random.seed(0)
        sample = mapper(given)
        image = sample["image"]
        assert image.dtype == torch.uint8 and image.shape == (3, 64, 96) and image.is_contiguous()
        assert (sample["height"], sample["width"], sample["file_id"]) == (30, 40, "kept")
        assert ("instances" in sample) == is_train and "annotations" not in sample
    assert given == before


def test_boxes_match_the_picture(tmp_path, tiny_cfg):
    x0, y0, x1, y1 = box = (60, 40, 140, 90)
    image = np.full((150, 200, 3), 100, np.uint8)
    image[y0:y1, x0:x1, 0] = 250
    path = str(tmp_path / "rectangle.png")
    Image.fromarray(image).save(path)
    opts = ["INPUT.PHOTOMETRIC.ENABLED", "False", "MODEL.SSD.INPUT_SIZE", "[160, 160]"]
    mapper = SSDDatasetMapper(tiny_cfg(*opts, "INPUT.EXPAND.MAX_RATIO", "4.0"), True)
    different = set()
    for seed in range(50):
        np.random.seed(seed)
        sample = mapper(record(path, [box], (150, 200)))
        red = sample["image"][0].numpy() > 187  # more than half rectangle, fill is 124
        ys, xs = np.nonzero(red)
        seen = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert np.abs(np.array(boxes_of(sample)[0]) - seen).max() < 1.5, f"seed {seed}"
        different.add(tuple(seen))
    assert len(different) > 30


def smooth_photograph(path, size=(480, 640), **kwargs):
    """Writes a JPEG of ``size`` (height, width) without detail that resizing could lose."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_CUBIC)
    Image.fromarray(pixels).save(path, quality=95, subsampling=0, **kwargs)
    return str(path)


@pytest.mark.parametrize("size", [(480, 640), (375, 501)])
@pytest.mark.parametrize("kwargs", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + b"x" * 999}])
def test_reduced_reading_of_a_jpeg(tmp_path, size, kwargs):
    path = smooth_photograph(tmp_path / "a.jpg", size, **kwargs)
    full = read_image(path, "RGB", size)
    for factor in (2, 4, 8):
        image = read_image(path, "RGB", size, factor)
        if "exif" in kwargs and size[0] % factor:  # EXIF could turn the incomplete pixels
            assert np.array_equal(image, full)
            continue
        assert image.shape == (-(-size[0] // factor), -(-size[1] // factor), 3)
        height, width = size[0] // factor * factor, size[1] // factor * factor
        means = full[:height, :width].reshape(height // factor, factor, -1, factor, 3).mean((1, 3))
        error = np.abs(image[: len(means), : means.shape[1]] - means)
        assert error.mean() < 1 and error.max() < 12
        assert np.array_equal(read_image(path, "BGR", size, factor), image[..., ::-1])


def test_reduced_reading_keeps_to_its_rules(tmp_path):
    path = smooth_photograph(tmp_path / "a.jpg")
    for size in ((476, 640), (480, 642), (240, 320), (640, 480)):
        with pytest.raises(ValueError, match=f"640x480 pixels.*says {size[1]}x{size[0]}"):
            read_image(path, "RGB", size, 2)
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cut.jpg is truncated"):
        read_image(str(tmp_path / "cut.jpg"), "RGB", (480, 640), 2)
    # read in full: another format, an unknown size, one whose annotation is for it as stored
    Image.open(path).save(tmp_path / "a.png")
    assert read_image(str(tmp_path / "a.png"), "RGB", (480, 640), 2).shape == (480, 640, 3)
    assert read_image(path, "RGB", (None, None), 2).shape == (480, 640, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = smooth_photograph(tmp_path / "turned.jpg", exif=exif)
    assert read_image(turned, "RGB", (640, 480), 2).shape == (320, 240, 3)
    assert read_image(turned, "RGB", (480, 640), 2).shape == (480, 640, 3)
    odd = smooth_photograph(tmp_path / "odd.jpg", (482, 481), exif=exif)  # 61x61, as stored and not
    assert read_image(odd, "RGB", (482, 481), 8).shape == (482, 481, 3)


def test_reduced_decoding_shows_the_same_objects(tmp_path, tiny_cfg):
    given = record(smooth_photograph(tmp_path / "a.jpg"), [[100, 50, 500, 400]], (480, 640))
    means = []
    for is_train in (True, False):
        both = []
        for reduced in ("True", "False"):
            mapper = SSDDatasetMapper(tiny_cfg("INPUT.REDUCED_DECODING", reduced), is_train)
            samples = []
            for seed in range(12):
                np.random.seed(seed)
                samples.append(mapper(given))
            both.append(samples)
        for a, b in zip(*both):
            assert not is_train or boxes_of(a) == boxes_of(b)
            means.append((a["image"].int() - b["image"].int()).abs().float().mean().item())
    assert 0 < max(means[:12]) < 2 and max(means[12:]) == 0  # testing is never reduced


def test_a_dict_without_a_size_is_read_as_well(picture, mapper):
    given = record(picture("a.png"), [[4, 3, 20, 15]])
    expected = mapper(given)
    del given["height"], given["width"]
    sample = mapper(given)
    assert torch.equal(sample["image"], expected["image"])
    assert boxes_of(sample) == boxes_of(expected)
    assert (sample["height"], sample["width"]) == (30, 40)


def test_equal_seeds_give_equal_samples(picture, tiny_cfg):
    mapper = SSDDatasetMapper(tiny_cfg(), True)
    given = record(picture("a.png", size=(200, 150)), [[50, 30, 120, 110]], (150, 200))

    def sample(seed):
        np.random.seed(seed)
        sample = mapper(given)
        return sample["image"], boxes_of(sample)

    (first, first_boxes), (again, again_boxes), (other, other_boxes) = map(sample, (7, 7, 8))
    assert torch.equal(first, again) and first_boxes == again_boxes
    assert not torch.equal(first, other) and first_boxes != other_boxes
