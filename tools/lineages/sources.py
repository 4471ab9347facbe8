"""SSDs as other projects define them, for tools/fidelity.py; nothing here uses ssd/ or labs/.

Networks in plain torch (torchvision's VGG16, MobileNetV2 and ResNet-50 as bodies) and default boxes
in plain float64 loops, both from the sources' definitions: their code isn't run. Numbers are
written out as the sources list them.
"""

import functools
import math
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, Sequence, Tuple

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet50
from torchvision.models.vgg import cfgs, make_layers

__all__ = ["BOXES", "NETWORKS", "Boxes", "Network", "SourceDetector", "layers", "shape_order"]

# --- Default boxes -----------------------------------------------------------------------------

Level = Tuple[Tuple[int, int], List[Tuple[float, ...]]]  # (rows, columns), boxes (x1, y1, x2, y2)


def _cell(low: float, high: float, ratios: Sequence[float]) -> List[Tuple[float, float]]:
    """Width and height of a cell's boxes: squares of min and √(min·max), then wide and tall."""
    shapes = [(low, low), (math.sqrt(low * high), math.sqrt(low * high))]
    for ratio in ratios:
        shapes.append((low * math.sqrt(ratio), low / math.sqrt(ratio)))
        shapes.append((low / math.sqrt(ratio), low * math.sqrt(ratio)))
    return shapes


def _corners(cx: float, cy: float, w: float, h: float) -> Tuple[float, ...]:
    return (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)


def caffe(maps, steps, sizes, ratios) -> Iterator[Level]:
    """PriorBox without clipping, also MMDetection's: pixels, offset 0.5. Steps are (y, x)."""
    for level, (rows, columns) in enumerate(maps):
        boxes = []
        for y in range(rows):
            for x in range(columns):
                cy, cx = (y + 0.5) * steps[level][0], (x + 0.5) * steps[level][1]
                for w, h in _cell(sizes[level], sizes[level + 1], ratios[level]):
                    boxes.append(_corners(cx, cy, w, h))
        yield (rows, columns), boxes


def clamped(side, maps, steps, sizes, ratios) -> Iterator[Level]:
    """lufficc's and qfgaohao's: centre, width and height as fractions, each clamped to [0, 1]."""
    for level, rows in enumerate(maps):
        boxes, scale = [], side / steps[level]
        for y in range(rows):
            for x in range(rows):
                for w, h in _cell(sizes[level] / side, sizes[level + 1] / side, ratios[level]):
                    values = ((x + 0.5) / scale, (y + 0.5) / scale, w, h)
                    values = (min(max(value, 0.0), 1.0) for value in values)
                    boxes.append(tuple(side * value for value in _corners(*values)))
        yield (rows, rows), boxes


def nvidia(side, maps, steps, scales, ratios) -> Iterator[Level]:
    """As above, but all cells of the first shape come first, then all of the second."""
    for level, rows in enumerate(maps):
        boxes, scale = [], side / steps[level]
        for w, h in _cell(scales[level] / side, scales[level + 1] / side, ratios[level]):
            for y in range(rows):
                for x in range(rows):
                    values = ((x + 0.5) / scale, (y + 0.5) / scale, w, h)
                    values = (min(max(value, 0.0), 1.0) for value in values)
                    boxes.append(tuple(side * value for value in _corners(*values)))
        yield (rows, rows), boxes


def tensorflow(side, maps, third) -> Iterator[Level]:
    """The multiple-grid anchors: the interpolated square is last, the first level has three."""
    scales = [0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0]
    for level, rows in enumerate(maps):
        scale = scales[level]
        specs = [(scale, 1.0), (scale, 2.0), (scale, 0.5), (scale, 3.0), (scale, third)]
        specs.append((math.sqrt(scale * scales[level + 1]), 1.0))
        if level == 0:  # reduce_boxes_in_lowest_layer
            specs = [(0.1, 1.0), (scale, 2.0), (scale, 0.5)]
        boxes = []
        for y in range(rows):
            for x in range(rows):
                for size, ratio in specs:
                    w, h = size * math.sqrt(ratio), size / math.sqrt(ratio)
                    box = _corners((x + 0.5) / rows, (y + 0.5) / rows, w, h)
                    boxes.append(tuple(side * value for value in box))
        yield (rows, rows), boxes


@dataclass(frozen=True)
class Boxes:
    """The default boxes of a lab's source."""

    source: str
    make: Callable[[], Iterator[Level]]
    note: str
    shape_major: bool = False  # all cells of a shape before the next shape
    square_last: bool = False  # of six boxes, the square of √(min·max) is the last
    tolerance: float = 1e-3  # pixels
    suffix: str = ""  # of the row's name, where a lab has two
    zoo: bool = False  # for the settings that the model zoo has with the published weights


def shape_order(count: int, square_last: bool) -> List[int]:
    """For each of our boxes of a cell, its place among the source's."""
    return [0, 5, 1, 2, 3, 4] if square_last and count == 6 else list(range(count))


def _square(*values):
    return [(value, value) for value in values]


_MAPS_300, _STEPS_300 = (38, 19, 10, 5, 3, 1), (8, 16, 32, 64, 100, 300)
_RATIOS_300 = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
_MAPS_512, _STEPS_512 = (64, 32, 16, 8, 4, 2, 1), (8, 16, 32, 64, 128, 256, 512)
_RATIOS_512 = [[2], [2, 3], [2, 3], [2, 3], [2, 3], [2], [2]]
_SIZES_LIGHT, _RATIOS_LIGHT = [60, 105, 150, 195, 240, 285, 330], [[2, 3]] * 6


def _caffe_ssd(side: int, percents: Sequence[int], note: str) -> Boxes:
    """Sizes are percents of the input, which the layer truncates to integers."""
    big = side == 512
    maps, steps = (_MAPS_512, _STEPS_512) if big else (_MAPS_300, _STEPS_300)
    ratios = _RATIOS_512 if big else _RATIOS_300
    sizes = [side * percent // 100 for percent in percents]
    return Boxes(
        "Caffe", lambda: caffe(_square(*maps), _square(*steps), sizes, ratios), f"PriorBox, {note}"
    )


_COCO_300 = _caffe_ssd(300, [7, 15, 33, 51, 69, 87, 105], "ssd_coco.py")
_COCO_512 = _caffe_ssd(512, [4, 10, 26, 42, 58, 74, 90, 106], "ssd_coco.py, 512")


def _own(maps, steps, sizes, ratios) -> Boxes:
    return Boxes("own model", lambda: caffe(maps, steps, sizes, ratios), "Caffe's formula")


def _tensorflow(third: float, note: str, **kwargs) -> Boxes:
    return Boxes(
        "TensorFlow",
        lambda: tensorflow(300, (19, 10, 5, 3, 2, 1), third),
        f"multiple-grid anchors, {note}",
        square_last=True,
        **kwargs,
    )


def _clamped(source: str, *numbers, zoo: bool = False) -> Boxes:
    """``numbers``: arguments of :func:`clamped`."""
    settings = "with the model zoo's settings for lufficc's weights; " if zoo else ""
    return Boxes(source, lambda: clamped(*numbers), settings + "cx, cy, w, h clamped", zoo=zoo)


_VGG_300 = (300, _MAPS_300, _STEPS_300, [30, 60, 111, 162, 213, 264, 315], _RATIOS_300)
_VGG_512 = (
    512, _MAPS_512, _STEPS_512, [35.84, 76.8, 153.6, 230.4, 307.2, 384.0, 460.8, 537.65],
    _RATIOS_512,
)  # fmt: skip
_QFGAOHAO_LIGHT = _clamped(
    "qfgaohao/pytorch-ssd", 300, (19, 10, 5, 3, 2, 1), (16, 32, 64, 100, 150, 300), _SIZES_LIGHT,
    _RATIOS_LIGHT,
)  # fmt: skip
_LUFFICC_LIGHT = _clamped(
    "lufficc/SSD", 320, (20, 10, 5, 3, 2, 1), (16, 32, 64, 107, 160, 320), _SIZES_LIGHT,
    _RATIOS_LIGHT,
)  # fmt: skip

# Those of torchvision and MMDetection come from their own code: tools/fidelity.py.
BOXES: Dict[str, List[Boxes]] = {
    "ssd_vgg16_size300": [_COCO_300],
    "ssd_vgg16_size300_expand_aug": [_COCO_300],
    "ssd_vgg16_size512": [_COCO_512],
    "ssd_vgg16_size512_expand_aug": [_COCO_512],
    "ssd_vgg16_size300_voc0712": [
        _caffe_ssd(300, [10, 20, 37, 54, 71, 88, 105], "ssd_pascal.py"),
        _clamped("lufficc/SSD", *_VGG_300, zoo=True),
    ],
    "ssd_vgg16_size512_voc0712": [
        _caffe_ssd(512, [7, 15, 30, 45, 60, 75, 90, 105], "ssd_pascal.py, 512"),
        _clamped("lufficc/SSD", *_VGG_512, zoo=True),
    ],
    "ssd_vgg16_size300_qfgaohao": [_clamped("qfgaohao/pytorch-ssd", *_VGG_300)],
    "ssd_mobilenetv1_size300_voc0712": [_QFGAOHAO_LIGHT],
    "ssdlite_mobilenetv2_size300_voc0712": [_QFGAOHAO_LIGHT],
    "ssdlite_mobilenetv2_size320_voc0712": [_LUFFICC_LIGHT],
    "ssdlite_mobilenetv3_size320_voc0712": [_LUFFICC_LIGHT],
    "ssd_resnet50_size300": [
        Boxes(
            "NVIDIA",
            lambda: nvidia(
                300, _MAPS_300, _STEPS_300, [21, 45, 99, 153, 207, 261, 315], _RATIOS_300
            ),
            "dboxes300_coco, clamped, reordered from shape-major",
            shape_major=True,
        )
    ],
    "ssdlite_mobilenetv2_size300_tf": [
        _tensorflow(1 / 3, "with ratio 1/3; reordered: its interpolated square is last"),
        _tensorflow(0.3333, "as they are", suffix=", its ratio 0.3333", tolerance=0.02),
    ],
    "ssd_vgg16_size512x896": [
        _own(
            [(64, 112), (32, 56), (16, 28), (8, 14), (4, 7), (2, 4), (1, 3)],
            [(8, 8), (16, 16), (32, 32), (64, 64), (128, 128), (256, 224), (512, 896 / 3)],
            [20, 51, 133, 215, 296, 378, 460, 542],
            _RATIOS_512,
        )
    ],
    "bccd_ssd_vgg16_size300": [_COCO_300],
    "bccd_ssdlite_mobilenetv2": [
        _own(
            _square(40, 20, 10, 5, 3),
            _square(8, 16, 32, 64, 320 / 3),
            [20, 40, 80, 130, 200, 300],
            [[2]] * 5,
        )
    ],
    "quickstart": [
        _own(_square(20, 10, 5, 3), _square(8, 16, 32, 160 / 3), [16, 32, 56, 84, 120], [[2]] * 4)
    ],
}

# --- Networks ----------------------------------------------------------------------------------


class SourceDetector(nn.Module):
    """A body in stages, each of which ends at a level, and two predictors per level.

    An add-on stands between the first level and its predictors; the body goes on without it.
    """

    def __init__(self, stages: Sequence[nn.Module], confidences, locations, add_on=None):
        super().__init__()
        # In the order of our layers: backbone, add-on, extra layers.
        self.base, self.add_on = nn.ModuleList(stages[:2]), add_on or nn.Identity()
        self.extras = nn.ModuleList(stages[2:])
        self.confidences, self.locations = nn.ModuleList(confidences), nn.ModuleList(locations)

    def forward(self, x: Tensor) -> Tuple[List[Tensor], List[Tensor], List[Tensor]]:
        """Images (N, 3, H, W) to each level's features and the predictors' maps."""
        features = []
        for stage in (*self.base, *self.extras):
            x = stage(x)
            features.append(x)
        features[0] = self.add_on(features[0])
        return (
            features,
            [predict(x) for predict, x in zip(self.confidences, features)],
            [predict(x) for predict, x in zip(self.locations, features)],
        )


def _conv(inputs, outputs, kernel=1, stride=1, activation=nn.ReLU, **kwargs) -> List[nn.Module]:
    """Convolution without bias, BatchNorm and activation."""
    kwargs = {"padding": kernel // 2, "bias": False, **kwargs}
    conv = nn.Conv2d(inputs, outputs, kernel, stride, **kwargs)
    return [conv, nn.BatchNorm2d(outputs), *([activation()] if activation else [])]


def _heads(make, channels: Sequence[int], counts: Sequence[int], outputs: int):
    """Predictors of all levels: of ``outputs`` confidences, and of 4 offsets per box."""
    return [
        [make(level, c, a * size) for level, (c, a) in enumerate(zip(channels, counts))]
        for size in (outputs, 4)
    ]


def _plain(level, inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _light_lite(level, inputs, outputs):
    """lufficc's and qfgaohao's: the depthwise convolution has a bias before its BatchNorm, and the
    last level is 1×1 only."""
    if level == 5:
        return nn.Conv2d(inputs, outputs, 1)
    depthwise = _conv(inputs, inputs, 3, activation=nn.ReLU6, groups=inputs, bias=True)
    return nn.Sequential(*depthwise, nn.Conv2d(inputs, outputs, 1))


def _tf_lite(level, inputs, outputs):
    depthwise = _conv(inputs, inputs, 3, activation=nn.ReLU6, groups=inputs)
    return nn.Sequential(*depthwise, nn.Conv2d(inputs, outputs, 1))


def _qfgaohao_extra(inputs, middle, outputs, stride=2, padding=1) -> nn.Sequential:
    """With biases, without BatchNorm."""
    strided = nn.Conv2d(middle, outputs, 3, stride, padding)
    return nn.Sequential(nn.Conv2d(inputs, middle, 1), nn.ReLU(), strided, nn.ReLU())


def _qfgaohao_vgg16() -> SourceDetector:
    base = make_layers(cfgs["D"])
    base[16].ceil_mode = True  # the third pool: 75 to 38
    fully = [nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.Conv2d(1024, 1024, 1)]
    stages = [base[:23]]  # conv4_3 with its ReLU
    stages.append(
        nn.Sequential(*base[23:30], nn.MaxPool2d(3, 1, 1), fully[0], nn.ReLU(), fully[1], nn.ReLU())
    )
    stages.append(_qfgaohao_extra(1024, 256, 512))
    stages.append(_qfgaohao_extra(512, 128, 256))
    stages.append(_qfgaohao_extra(256, 128, 256, stride=1, padding=0))
    stages.append(_qfgaohao_extra(256, 128, 256, stride=1, padding=0))
    channels = (512, 1024, 512, 256, 256, 256)
    heads = _heads(_plain, channels, [4, 6, 6, 6, 4, 4], 21)
    return SourceDetector(stages, *heads, add_on=nn.BatchNorm2d(512))


def _qfgaohao_mobilenetv1() -> SourceDetector:
    base, channels = [nn.Sequential(*_conv(3, 32, 3, 2))], 32
    widths = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)] + [(512, 1)] * 5
    for width, stride in [*widths, (1024, 2), (1024, 1)]:
        depthwise = _conv(channels, channels, 3, stride, groups=channels)
        base.append(nn.Sequential(*depthwise, *_conv(channels, width)))
        channels = width
    stages = [nn.Sequential(*base[:12]), nn.Sequential(*base[12:])]
    for inputs, middle, outputs in (
        (1024, 256, 512), (512, 128, 256), (256, 128, 256), (256, 128, 256)
    ):  # fmt: skip
        stages.append(_qfgaohao_extra(inputs, middle, outputs))
    return SourceDetector(stages, *_heads(_plain, (512, 1024, 512, 256, 256, 256), [6] * 6, 21))


def _inside_block_14(base: nn.Sequential) -> List[nn.Module]:
    """MobileNetV2 up to block 14's expansion, which is level 0, and from there; that block has no
    shortcut."""
    first = nn.Sequential(*base[:14], base[14].conv[0])
    return [first, nn.Sequential(*base[14].conv[1:], *base[15:])]


def _light_mobilenetv2(inside: bool) -> SourceDetector:
    """lufficc's, whose level 0 ends block 13, and qfgaohao's, inside block 14."""
    base = mobilenet_v2().features
    stages = _inside_block_14(base) if inside else [base[:14], base[14:]]
    for inputs, hidden, outputs in (
        (1280, 256, 512), (512, 128, 256), (256, 128, 256), (256, 64, 64)
    ):  # fmt: skip
        stages.append(
            nn.Sequential(
                *_conv(inputs, hidden, activation=nn.ReLU6),
                *_conv(hidden, hidden, 3, 2, activation=nn.ReLU6, groups=hidden),
                *_conv(hidden, outputs, activation=None),
            )
        )
    channels = (576 if inside else 96, 1280, 512, 256, 256, 64)
    return SourceDetector(stages, *_heads(_light_lite, channels, [6] * 6, 21))


class _HSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * F.relu6(x + 3) / 6


class _Squeeze(nn.Module):
    """Squeeze-and-excitation of two linear layers with a hard sigmoid."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * (F.relu6(self.fc(x.mean(dim=(2, 3))) + 3) / 6)[:, :, None, None]


class _LufficcBlock(nn.Module):
    """lufficc's MobileNetV3 block: squeeze-and-excitation stands before the activation."""

    def __init__(self, kernel, inputs, hidden, outputs, squeeze, activation, stride):
        super().__init__()
        depthwise = {"stride": stride, "groups": hidden, "activation": None}
        self.conv = nn.Sequential(
            *(_conv(inputs, hidden, activation=activation) if hidden != inputs else []),
            *_conv(hidden, hidden, kernel, **depthwise),
            *([_Squeeze(hidden, squeeze)] if squeeze else []),
            activation(),
            *_conv(hidden, outputs, activation=None),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def _lufficc_mobilenetv3() -> SourceDetector:
    rows = [  # kernel, hidden channels, channels, squeeze width, activation, stride
        (3, 16, 16, 0, nn.ReLU, 1),
        (3, 64, 24, 0, nn.ReLU, 2),
        (3, 72, 24, 0, nn.ReLU, 1),
        (5, 72, 40, 24, nn.ReLU, 2),
        (5, 120, 40, 32, nn.ReLU, 1),
        (5, 120, 40, 32, nn.ReLU, 1),
        (3, 240, 80, 0, _HSwish, 2),
        (3, 200, 80, 0, _HSwish, 1),
        (3, 184, 80, 0, _HSwish, 1),
        (3, 184, 80, 0, _HSwish, 1),
        (3, 480, 112, 120, _HSwish, 1),
        (3, 672, 112, 168, _HSwish, 1),
        (5, 672, 160, 168, _HSwish, 2),
        (5, 960, 160, 240, _HSwish, 1),
        (5, 960, 160, 240, _HSwish, 1),
    ]
    base, channels = [nn.Sequential(*_conv(3, 16, 3, 2, _HSwish))], 16
    for kernel, hidden, outputs, squeeze, activation, stride in rows:
        block = _LufficcBlock(kernel, channels, hidden, outputs, squeeze, activation, stride)
        base.append(block)
        channels = outputs
    base.append(nn.Sequential(*_conv(160, 960, activation=_HSwish)))
    stages = [nn.Sequential(*base[:13]), nn.Sequential(*base[13:])]
    for inputs, hidden, outputs, squeeze in (
        (960, 192, 512, 48), (512, 128, 256, 32), (256, 128, 256, 32), (256, 64, 64, 16)
    ):  # fmt: skip
        stages.append(_LufficcBlock(3, inputs, hidden, outputs, squeeze, _HSwish, 2))
    channels = (112, 960, 512, 256, 256, 64)
    return SourceDetector(stages, *_heads(_light_lite, channels, [6] * 6, 21))


def _nvidia_resnet50() -> SourceDetector:
    body = nn.Sequential(*list(resnet50().children())[:7])
    first = body[6][0]
    for conv in (first.conv1, first.conv2, first.downsample[0]):
        conv.stride = (1, 1)
    stages = [body]
    for inputs, middle, outputs, stride in (
        (1024, 256, 512, 2), (512, 256, 512, 2), (512, 128, 256, 2), (256, 128, 256, 1),
        (256, 128, 256, 1),
    ):  # fmt: skip
        conv = _conv(middle, outputs, 3, stride, padding=1 if stride == 2 else 0)
        stages.append(nn.Sequential(*_conv(inputs, middle), *conv))
    channels = (1024, 512, 512, 256, 256, 256)
    return SourceDetector(stages, *_heads(_plain, channels, [4, 6, 6, 6, 4, 4], 81))


def _same(side: int, conv: nn.Conv2d) -> nn.Sequential:
    """A 3×3 convolution of stride 2 with TensorFlow's padding at an input of this side."""
    conv.padding = (0, 0)
    before = side % 2  # even: nothing before, one after; odd: one and one
    return nn.Sequential(nn.ZeroPad2d((before, 1, before, 1)), conv)


def _tensorflow_mobilenetv2() -> SourceDetector:
    base = mobilenet_v2().features
    base[0][0] = _same(300, base[0][0])
    for index, side in ((2, 150), (4, 75), (7, 38), (14, 19)):
        base[index].conv[1][0] = _same(side, base[index].conv[1][0])
    stages = _inside_block_14(base)
    for inputs, middle, outputs, side in (
        (1280, 256, 512, 10), (512, 128, 256, 5), (256, 128, 256, 3), (256, 64, 128, 2)
    ):  # fmt: skip
        depthwise = _conv(middle, middle, 3, 2, activation=nn.ReLU6, groups=middle)
        depthwise[0] = _same(side, depthwise[0])
        pointwise = [_conv(inputs, middle, activation=nn.ReLU6)]
        pointwise.append(_conv(middle, outputs, activation=nn.ReLU6))
        stages.append(nn.Sequential(*pointwise[0], *depthwise, *pointwise[1]))
    channels = (576, 1280, 512, 256, 256, 128)
    network = SourceDetector(stages, *_heads(_tf_lite, channels, [3] + [6] * 5, 91))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    return network


def layers(module: nn.Module) -> List[nn.Module]:
    """Convolutions, linear layers and BatchNorms in their order; a ResNet block's shortcut first,
    and all predictors of confidences before those of locations."""
    if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
        return [module]
    children = sorted(module.named_children(), key=lambda child: child[0] != "downsample")
    return [layer for _, child in children for layer in layers(child)]


@dataclass(frozen=True)
class Network:
    """The network of a lab's source.

    Channels of a predictor and the boxes of a cell may be ordered otherwise than ours:
    """

    source: str
    make: Callable[[], SourceDetector]
    counts: Sequence[int]  # boxes per cell of each level
    mean: Sequence[float]
    std: Sequence[float]
    note: str
    class_major: bool = False  # channel = class · A + box in place of box · (K + 1) + class
    square_last: bool = False  # see Boxes
    yx_first: bool = False  # offsets are ty, tx, th, tw in place of tx, ty, tw, th
    sigmoid: bool = False  # scores, in place of softmax


_V1 = "MobileNetV1 in torch.nn; ReLU, extra layers without BatchNorm"
_V2 = "torchvision's MobileNetV2, rest in torch.nn; depthwise biases folded"
NETWORKS: Dict[str, Network] = {
    "ssd_mobilenetv1_size300_voc0712": Network(
        "qfgaohao/pytorch-ssd", _qfgaohao_mobilenetv1, [6] * 6, [127] * 3, [128] * 3, _V1
    ),
    "ssd_vgg16_size300_qfgaohao": Network(
        "qfgaohao/pytorch-ssd", _qfgaohao_vgg16, [4, 6, 6, 6, 4, 4], [123, 117, 104], [1] * 3,
        "torchvision's VGG16, rest in torch.nn; BatchNorm on conv4_3 for the head only",
    ),
    "ssdlite_mobilenetv2_size300_voc0712": Network(
        "qfgaohao/pytorch-ssd", functools.partial(_light_mobilenetv2, inside=True), [6] * 6,
        [127] * 3, [128] * 3, _V2 + "; level 0 inside a block",
    ),
    "ssdlite_mobilenetv2_size320_voc0712": Network(
        "lufficc/SSD", functools.partial(_light_mobilenetv2, inside=False), [6] * 6,
        [123, 117, 104], [1] * 3, _V2,
    ),
    "ssdlite_mobilenetv3_size320_voc0712": Network(
        "lufficc/SSD", _lufficc_mobilenetv3, [6] * 6, [123, 117, 104], [1] * 3,
        "all in torch.nn; squeeze of linear layers, before the activation",
    ),
    "ssd_resnet50_size300": Network(
        "NVIDIA", _nvidia_resnet50, [4, 6, 6, 6, 4, 4],
        [255 * x for x in (0.485, 0.456, 0.406)], [255 * x for x in (0.229, 0.224, 0.225)],
        "torchvision's ResNet-50, rest in torch.nn; class-major outputs",
        class_major=True,
    ),
    "ssdlite_mobilenetv2_size300_tf": Network(
        "TensorFlow", _tensorflow_mobilenetv2, [3] + [6] * 5, [127.5] * 3, [127.5] * 3,
        "torchvision's MobileNetV2 with explicit padding, rest in torch.nn; ty tx th tw",
        square_last=True, yx_first=True, sigmoid=True,
    ),
}  # fmt: skip
