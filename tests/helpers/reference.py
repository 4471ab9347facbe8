"""Other code bases' SSDs, evaluated with torch.nn.functional on parameters under their own names.

Independent of ``ssd``: networks, default boxes and detection are written from each source's facts
(names, shapes, layouts, test settings), on a plain dictionary of tensors. A parameter is made when
an evaluation first asks for it, so each name and shape stands once, where it is used.

R default boxes, A per cell, K foreground classes.
"""

import math
import zlib
from dataclasses import dataclass, replace
from typing import Callable, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms


def noise(name: str, *shape: int) -> Tensor:
    """Normally distributed float32, the same for the same name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator)


def random_image(size: int) -> Tensor:
    """(3, size, size) uint8, RGB: patches in random colours, and noise."""
    colours = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
    image = F.interpolate(colours, size)[0] + 30 * noise("image", 3, size, size)
    return image.round().clamp(0, 255).to(torch.uint8)


class Parameters(dict):
    """A state dict: the source's names to tensors. One that is missing is filled by a rule.

    The rule: normally distributed values by the name. A convolution's weights are multiplied by
    the power of two that brings the standard deviation of its output closest to ``std``, so that
    depth doesn't change the size of activations and scores are spread.
    """

    def vector(self, name: str, size: int, mean: float, std: float, x: Tensor) -> Tensor:
        if name not in self:
            self[name] = mean + std * noise(name, size)
        return self[name].to(x.dtype)

    def conv(
        self, name: str, x: Tensor, channels: int, kernel: int, stride: int = 1, padding: int = 0,
        *, dilation: int = 1, groups: int = 1, bias: bool = True, std: float = 1.0,
        offset: Callable = lambda y: 0.0,
    ) -> Tensor:  # fmt: skip
        """``offset`` (of the output without biases) is added to new biases."""
        key, missing = name + ".weight", name + ".weight" not in self
        if missing:
            self[key] = noise(key, channels, x.shape[1] // groups, kernel, kernel)
        y = F.conv2d(x, self[key].to(x.dtype), None, stride, padding, dilation, groups)
        if missing:
            scale = 2.0 ** round(math.log2(std / y.std()))
            self[key] *= scale
            y *= scale
        if not bias:
            return y
        if name + ".bias" not in self:
            self[name + ".bias"] = 0.1 * noise(name + ".bias", channels) + offset(y)
        return y + self[name + ".bias"].to(x.dtype)[:, None, None]

    def linear(self, name: str, x: Tensor, channels: int) -> Tensor:
        """(1, in) to (1, channels)."""
        key = name + ".weight"
        if key not in self:
            self[key] = noise(key, channels, x.shape[1]) / x.square().sum().sqrt().float()
        return F.linear(x, self[key].to(x.dtype), self.vector(name + ".bias", channels, 0, 0.1, x))

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        size = x.shape[1]
        mean = self.vector(name + ".running_mean", size, 0, 0.1, x)
        if name + ".running_var" not in self:
            self[name + ".running_var"] = 1 + 0.2 * noise(name + ".running_var", size).abs()
            self[name + ".num_batches_tracked"] = torch.tensor(1000)
        variance = self[name + ".running_var"].to(x.dtype)
        weight = self.vector(name + ".weight", size, 1, 0.1, x)
        bias = self.vector(name + ".bias", size, 0, 0.1, x)
        return F.batch_norm(x, mean, variance, weight, bias, eps=1e-5)

    def conv_bn(self, conv: str, norm: str, x: Tensor, *args, **kwargs) -> Tensor:
        return self.batch_norm(norm, self.conv(conv, x, *args, bias=False, **kwargs))

    def l2_norm(self, name: str, x: Tensor) -> Tensor:
        length = x.square().sum(1, keepdim=True).sqrt() + 1e-10
        return self.vector(name, x.shape[1], 20, 1, x)[:, None, None] * x / length


# --- Feature maps: (p, image (1, 3, H, W)) → one map per level --------------------------------

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# channels, kernel, stride, padding
_EXTRA_300 = (
    (256, 1, 1, 0), (512, 3, 2, 1), (128, 1, 1, 0), (256, 3, 2, 1),
    (128, 1, 1, 0), (256, 3, 1, 0), (128, 1, 1, 0), (256, 3, 1, 0),
)  # fmt: skip
_EXTRA_512 = (*_EXTRA_300[:4], *_EXTRA_300[2:4] * 2, (128, 1, 1, 0), (256, 4, 1, 1))


def vgg_names(pattern: str) -> list:
    """Of the 15 convolutions, by their places in a list with ReLUs and pools."""
    return [pattern.format(i) for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28, 31, 33)]


def pairs(pattern: str, second: int = 1) -> list:
    """Names of four extra layers of two convolutions, whose places are 0 and ``second``."""
    return [pattern.format(i, j) for i in range(4) for j in (0, second)]


def vgg(
    names: list, extra: list, norm: str, batch_norm: bool = False, layers=_EXTRA_300,
    halved: Tuple[int, ...] = (1, 2, 3, 4),
) -> Callable:  # fmt: skip
    """VGG16 and extra layers, with names of their convolutions and of the norm.

    The map is halved after the stages ``halved``; the remaining pool is 3×3, stride 1.
    """

    def features(p: Parameters, x: Tensor) -> list:
        left = iter(names)
        for stage, widths in enumerate(_STAGES, 1):
            for width in widths:
                x = F.relu(p.conv(next(left), x, width, 3, padding=1))
            if stage == 4:
                maps = [p.batch_norm(norm, x) if batch_norm else p.l2_norm(norm, x)]
            halve = stage in halved
            x = F.max_pool2d(x, 2, ceil_mode=True) if halve else F.max_pool2d(x, 3, 1, 1)
        x = F.relu(p.conv(next(left), x, 1024, 3, padding=6, dilation=6))
        x = F.relu(p.conv(next(left), x, 1024, 1))
        return [*maps, x, *extra_layers(p, x, extra, layers)]

    return features


def extra_layers(p: Parameters, x: Tensor, names: list, layers) -> list:
    """Convolutions with ReLU; every second one is a level."""
    maps = []
    for name, layer in zip(names, layers):
        x = F.relu(p.conv(name, x, *layer))
        maps.append(x)
    return maps[1::2]


def nvidia_resnet50(p: Parameters, x: Tensor) -> list:
    prefix = "feature_extractor.feature_extractor."
    x = F.relu(p.conv_bn(prefix + "0", prefix + "1", x, 64, 7, 2, 3))
    x = F.max_pool2d(x, 3, 2, 1)
    for layer, width, count, stride in ((4, 64, 3, 1), (5, 128, 4, 2), (6, 256, 6, 1)):
        for i in range(count):
            name = f"{prefix}{layer}.{i}."
            s = stride if i == 0 else 1
            y = F.relu(p.conv_bn(name + "conv1", name + "bn1", x, width, 1))
            y = F.relu(p.conv_bn(name + "conv2", name + "bn2", y, width, 3, s, 1))
            y = p.conv_bn(name + "conv3", name + "bn3", y, 4 * width, 1)
            if i == 0:
                x = p.conv_bn(name + "downsample.0", name + "downsample.1", x, 4 * width, 1, s)
            x = F.relu(x + y)
    maps = [x]
    for i, (mid, width, stride, padding) in enumerate(
        ((256, 512, 2, 1), (256, 512, 2, 1), (128, 256, 2, 1), (128, 256, 1, 0), (128, 256, 1, 0))
    ):
        name = f"additional_blocks.{i}."
        x = F.relu(p.conv_bn(name + "0", name + "1", x, mid, 1))
        x = F.relu(p.conv_bn(name + "3", name + "4", x, width, 3, stride, padding))
        maps.append(x)
    return maps


def qfgaohao_mobilenet_v1(p: Parameters, x: Tensor) -> list:
    x = F.relu(p.conv_bn("base_net.0.0", "base_net.0.1", x, 32, 3, 2, 1))
    maps, strides = [], (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    widths = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    for i, (width, stride) in enumerate(zip(widths, strides), 1):
        name = f"base_net.{i}."
        x = F.relu(
            p.conv_bn(name + "0", name + "1", x, x.shape[1], 3, stride, 1, groups=x.shape[1])
        )
        x = F.relu(p.conv_bn(name + "3", name + "4", x, width, 1))
        maps += [x] if i in (11, 13) else []
    layers = (*_EXTRA_300[:4], *_EXTRA_300[2:4] * 2)
    return maps + extra_layers(p, x, pairs("extras.{}.{}", second=2), layers)


def inverted_residual(
    p: Parameters, name: str, keys, x: Tensor, hidden: int, width: int, kernel: int, stride: int,
    act: Callable, squeeze: int = 0,
) -> Tuple[Tensor, Tensor]:  # fmt: skip
    """Output and expansion. ``keys``: of convolution and norm for [expansion,] depthwise,
    projection. ``squeeze``: channels of squeeze-and-excitation, which precedes the activation.
    """
    keys = [(f"{name}.conv.{conv}", f"{name}.conv.{norm}") for conv, norm in keys]
    y = act(p.conv_bn(*keys[0], x, hidden, 1)) if len(keys) == 3 else x
    expansion = y
    y = p.conv_bn(*keys[-2], y, hidden, kernel, stride, kernel // 2, groups=hidden)
    if squeeze:
        gate = F.relu(p.linear(f"{name}.conv.5.fc.0", y.mean((2, 3)), squeeze))
        gate = p.linear(f"{name}.conv.5.fc.2", gate, hidden)
        y = y * (F.relu6(gate + 3) / 6)[:, :, None, None]
    y = p.conv_bn(*keys[-1], act(y), width, 1)
    return (x + y if stride == 1 and x.shape[1] == width else y), expansion


# expansion, channels, blocks, stride
_V2 = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip
_NESTED = (("0.0", "0.1"), ("1.0", "1.1"), ("2", "3"))  # torchvision's names in a block
_FLAT = (("0", "1"), ("3", "4"), ("6", "7"))


def mobilenet_v2(base: str, extra: str, nested: bool) -> Callable:
    """lufficc's (nested names, level 0 after block 13) or qfgaohao's (in block 14)."""
    keys, first = (_NESTED, (("0.0", "0.1"), ("1", "2"))) if nested else (_FLAT, _FLAT[:2])

    def features(p: Parameters, x: Tensor) -> list:
        x = F.relu6(p.conv_bn(f"{base}.0.0", f"{base}.0.1", x, 32, 3, 2, 1))
        outputs, expansions = [x], [x]
        for factor, width, count, stride in _V2:
            for i in range(count):
                name, block = f"{base}.{len(outputs)}", first if factor == 1 else keys
                s, hidden = stride if i == 0 else 1, factor * x.shape[1]
                x, e = inverted_residual(p, name, block, x, hidden, width, 3, s, F.relu6)
                outputs.append(x)
                expansions.append(e)
        x = F.relu6(p.conv_bn(f"{base}.18.0", f"{base}.18.1", x, 1280, 1))
        maps = [outputs[13] if nested else expansions[14], x]
        for i, (hidden, width) in enumerate(((256, 512), (128, 256), (128, 256), (64, 64))):
            x, _ = inverted_residual(p, f"{extra}.{i}", keys, x, hidden, width, 3, 2, F.relu6)
            maps.append(x)
        return maps

    return features


# kernel, expansion, channels, squeeze, h-swish, stride
_V3 = (
    (3, 16, 16, 0, False, 1), (3, 64, 24, 0, False, 2), (3, 72, 24, 0, False, 1),
    (5, 72, 40, 24, False, 2), (5, 120, 40, 32, False, 1), (5, 120, 40, 32, False, 1),
    (3, 240, 80, 0, True, 2), (3, 200, 80, 0, True, 1), (3, 184, 80, 0, True, 1),
    (3, 184, 80, 0, True, 1), (3, 480, 112, 120, True, 1), (3, 672, 112, 168, True, 1),
    (5, 672, 160, 168, True, 2), (5, 960, 160, 240, True, 1), (5, 960, 160, 240, True, 1),
)  # fmt: skip


def lufficc_mobilenet_v3(p: Parameters, x: Tensor) -> list:
    base, keys = "backbone.features", (("0", "1"), ("3", "4"), ("7", "8"))
    x = F.hardswish(p.conv_bn(f"{base}.0.0", f"{base}.0.1", x, 16, 3, 2, 1))
    for i, (kernel, hidden, width, squeeze, swish, stride) in enumerate(_V3, 1):
        block, act = (("0", "1"), ("4", "5")) if i == 1 else keys, F.hardswish if swish else F.relu
        x, _ = inverted_residual(
            p, f"{base}.{i}", block, x, hidden, width, kernel, stride, act, squeeze
        )
        if i == 12:
            maps = [x]
    x = F.hardswish(p.conv_bn(f"{base}.16.0", f"{base}.16.1", x, 960, 1))
    maps.append(x)
    for i, (hidden, width, squeeze) in enumerate(
        ((192, 512, 48), (128, 256, 32), (128, 256, 32), (64, 64, 16))
    ):
        x, _ = inverted_residual(
            p, f"backbone.extras.{i}", keys, x, hidden, width, 3, 2, F.hardswish, squeeze
        )
        maps.append(x)
    return maps


# --- Predictors: (p, map, kind "cls" or "box", level, channels, std=, offset=) → map ------------


def plain_head(cls: str, box: str) -> Callable:
    """A 3×3 convolution; ``cls`` and ``box`` have the level's place in their names."""

    def head(p, x, kind, level, channels, **kwargs):
        name = (cls if kind == "cls" else box).format(level)
        return p.conv(name, x, channels, 3, padding=1, **kwargs)

    return head


def lite_head(cls: str, box: str, suffix: str = "") -> Callable:
    """Depthwise 3×3 with a bias, BatchNorm, ReLU6, 1×1; at the last level only 1×1."""

    def head(p, x, kind, level, channels, **kwargs):
        name = (cls if kind == "cls" else box).format(level)
        if level < 5:
            name += suffix
            x = p.conv(name + ".0", x, x.shape[1], 3, padding=1, groups=x.shape[1])
            x, name = F.relu6(p.batch_norm(name + ".1", x)), name + ".3"
        return p.conv(name, x, channels, 1, **kwargs)

    return head


# --- Default boxes, detection -----------------------------------------------------------------


@dataclass(frozen=True)
class DefaultBoxes:
    """Pixels of the input. ``steps`` None: size / map size."""

    size: int
    maps: Tuple[int, ...]
    steps: Optional[Tuple[float, ...]]
    min_sizes: Tuple[float, ...]
    max_size: float
    ratios: Tuple[Tuple[float, ...], ...]
    clip: bool = False  # cx, cy, w, h to [0, size]

    def shapes(self) -> list:
        """Per level the (w, h) of a cell's boxes."""
        sizes = [*self.min_sizes, self.max_size]
        result = []
        for small, large, ratios in zip(sizes, sizes[1:], self.ratios):
            shapes = [(small, small), (math.sqrt(small * large),) * 2]
            for r in ratios:
                wide, tall = small * math.sqrt(r), small / math.sqrt(r)
                shapes += [(wide, tall), (tall, wide)]
            result.append(shapes)
        return result

    def boxes(self, shape_major: bool) -> Tensor:
        """(R, 4) float64, centre and size: by level, y, x, shape (or level, shape, y, x)."""
        rows = []
        for level, shapes in enumerate(self.shapes()):
            cells, m = [], self.maps[level]
            step = self.steps[level] if self.steps else self.size / m
            for y in range(m):
                for x in range(m):
                    cells.append([((x + 0.5) * step, (y + 0.5) * step, *s) for s in shapes])
            boxes = torch.tensor(cells, dtype=torch.float64)
            rows.append((boxes.transpose(0, 1) if shape_major else boxes).reshape(-1, 4))
        boxes = torch.cat(rows)
        return boxes.clamp(0, self.size) if self.clip else boxes


@dataclass(frozen=True)
class Detection:
    """A source's settings at test time."""

    score: float
    topk: int  # candidates per class, or per level
    keep: int  # detections of an image
    nms: float = 0.45
    per_level: bool = False
    clamp: str = "none"  # of dw, dh at ln(1000/16): "none", "upper", "both"
    clip_first: bool = False  # to the image before NMS, without the empty ones

    def decode(self, deltas: Tensor, default: Tensor) -> Tensor:
        """(R, 4) XYXY."""
        scale, limit = 0.2 * deltas[:, 2:], math.log(1000 / 16)
        if self.clamp != "none":
            scale = scale.clamp(-limit if self.clamp == "both" else None, limit)
        centre = default[:, :2] + 0.1 * deltas[:, :2] * default[:, 2:]
        half = default[:, 2:] * scale.exp() / 2
        return torch.cat([centre - half, centre + half], 1)

    def __call__(self, scores: Tensor, boxes: Tensor, level: Tensor, size: int) -> dict:
        """Scores (R, K), boxes (R, 4), levels (R,) → boxes, scores, classes and levels.

        The boxes are clipped in the end in any case, as every Detectron2 model's are.
        """
        inside = boxes.clamp(0, size)
        not_empty = (inside[:, 2:] > inside[:, :2]).all(1)
        if self.clip_first:
            boxes, scores = inside, scores * not_empty[:, None]
        box, cls = torch.nonzero(scores > self.score, as_tuple=True)
        order = scores[box, cls].argsort(descending=True, stable=True)
        box, cls = box[order], cls[order]
        group = level[box] if self.per_level else cls
        chosen = [torch.nonzero(group == g)[: self.topk, 0] for g in group.unique()]
        index, kept = torch.cat(chosen), []
        for c in cls[index].unique():
            i = index[cls[index] == c].sort().values
            kept.append(i[nms(boxes[box[i]], scores[box[i], c], self.nms)])
        kept = torch.cat(kept).sort().values[: self.keep]  # indices are by descending score
        kept = kept[not_empty[box[kept]]]
        return {
            "boxes": inside[box[kept]],
            "scores": scores[box[kept], cls[kept]],
            "classes": cls[kept],
            "levels": level[box[kept]],
        }


# --- Lineages ---------------------------------------------------------------------------------


FEW = 30  # boxes of a level


@dataclass(frozen=True)
class Lineage:
    features: Callable
    head: Callable
    default_boxes: DefaultBoxes
    detection: Detection
    mean: Tuple[float, ...] = (123, 117, 104)  # in the order of the channels
    std: Tuple[float, ...] = (1, 1, 1)
    order: str = "RGB"
    num_classes: int = 20
    background_last: bool = False
    class_major: bool = False  # channel = output · A + shape, boxes by level, shape, y, x

    def evaluate(self, image: Tensor, p: Parameters, dtype=torch.float32) -> dict:
        """Logits (R, K + 1) and deltas (R, 4) in the source's order for an RGB image (3, H, W)."""
        x = (image if self.order == "RGB" else image.flip(0)).to(dtype)
        mean, std = (torch.tensor(v, dtype=dtype)[:, None, None] for v in (self.mean, self.std))
        x = (x - mean) / std
        logits, deltas = [], []
        for level, x in enumerate(self.features(p, x[None])):
            count, outputs = len(self.default_boxes.shapes()[level]), self.num_classes + 1
            y = self.head(
                p, x, "cls", level, count * outputs, std=3.0, offset=self.background_offset
            )
            logits.append(self.rows(y, outputs))
            deltas.append(self.rows(self.head(p, x, "box", level, count * 4), 4))
        level = torch.arange(len(logits)).repeat_interleave(torch.tensor([len(x) for x in logits]))
        return {"logits": torch.cat(logits), "deltas": torch.cat(deltas), "levels": level}

    def rows(self, y: Tensor, outputs: int) -> Tensor:
        """A predictor's map (1, A · outputs, H, W) to one row per default box."""
        if self.class_major:
            return y.view(outputs, -1).T
        return y.permute(0, 2, 3, 1).reshape(-1, outputs)

    def background_offset(self, y: Tensor) -> Tensor:
        """Biases that let few boxes of each level have a class of probability 0.4."""
        rows = self.rows(y, self.num_classes + 1).float()
        place = self.num_classes if self.background_last else 0
        classes = torch.cat([rows[:, :place], rows[:, place + 1 :]], 1).exp()
        # p = best / (sum + background · e^offset)
        margin = (classes.max(1).values / 0.4 - classes.sum(1)).clamp(min=1e-3).log()
        margin = (margin - rows[:, place]).sort(descending=True).values
        offset = torch.zeros(y.shape[1] // rows.shape[1], rows.shape[1])
        offset[:, place] = margin[min(FEW, len(margin) - 1)]
        return (offset.T if self.class_major else offset).flatten()

    def detect(self, logits: Tensor, deltas: Tensor, levels: Tensor) -> dict:
        scores = logits.double().softmax(1)
        scores = scores[:, :-1] if self.background_last else scores[:, 1:]
        boxes = self.detection.decode(deltas.double(), self.default_boxes.boxes(self.class_major))
        return self.detection(scores, boxes, levels, self.default_boxes.size)


_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
_OF_300 = (300, (38, 19, 10, 5, 3, 1), (8, 16, 32, 64, 100, 300))
_VOC300 = DefaultBoxes(*_OF_300, (30, 60, 111, 162, 213, 264), 315, _RATIOS)
_COCO300 = DefaultBoxes(*_OF_300, (21, 45, 99, 153, 207, 261), 315, _RATIOS)
_LIGHT = ((60, 105, 150, 195, 240, 285), 330, ((2, 3),) * 6, True)
_LIGHT300 = DefaultBoxes(300, (19, 10, 5, 3, 2, 1), (16, 32, 64, 100, 150, 300), *_LIGHT)
_LIGHT320 = DefaultBoxes(320, (20, 10, 5, 3, 2, 1), (16, 32, 64, 107, 160, 320), *_LIGHT)
_FORK512 = DefaultBoxes(
    512, (64, 32, 16, 8, 4, 2, 1), None,
    (20.48, 51.2, 133.12, 215.04, 296.96, 378.88, 460.8), 537.6,
    ((2,), (2, 3), (2, 3), (2, 3), (2, 3), (2,), (2,)),
)  # fmt: skip

_ALL = 10**6  # no limit
_MMDET = Detection(0.02, 1000, 200, per_level=True, clamp="both", clip_first=True)
_LUFFICC = Detection(0.01, _ALL, 100)
_QFGAOHAO = Detection(0.01, 200, _ALL)

_IMAGENET = {"mean": (123.675, 116.28, 103.53)}
_LUFFICC_HEADS = ("box_head.predictor.cls_headers.{}", "box_head.predictor.reg_headers.{}")
_QFGAOHAO_HEADS = ("classification_headers.{}", "regression_headers.{}")


def _mmdet(extra: list, norm: str, head: str, **kwargs) -> Lineage:
    features = vgg(vgg_names("backbone.features.{}"), extra, norm)
    heads = plain_head("bbox_head.cls_convs." + head, "bbox_head.reg_convs." + head)
    return Lineage(features, heads, _COCO300, _MMDET, num_classes=80, **_IMAGENET, **kwargs)


def _old_mmdet(**kwargs) -> Lineage:
    extra = [f"backbone.extra.{i}" for i in range(8)]
    return _mmdet(extra, "backbone.l2_norm.weight", "{}", **kwargs)


def _caffe(boxes: DefaultBoxes, num_classes: int) -> Lineage:
    """Names of blobs: a layer's first is its ``.weight``, the second its ``.bias``."""
    names = [f"conv{s}_{i + 1}" for s, x in enumerate(_STAGES, 1) for i in range(len(x))]
    extra = [f"conv{s}_{i}" for s in (6, 7, 8, 9) for i in (1, 2)]
    sources = ("conv4_3_norm", "fc7", *extra[1::2])

    def head(p, x, kind, level, channels, **kwargs):
        name = sources[level] + ("_mbox_conf" if kind == "cls" else "_mbox_loc")
        return p.conv(name, x, channels, 3, padding=1, **kwargs)

    return Lineage(
        vgg([*names, "fc6", "fc7"], extra, "conv4_3_norm.weight"), head, boxes,
        Detection(0.01, 400, 200), mean=(104, 117, 123), order="BGR", num_classes=num_classes,
    )  # fmt: skip


LINEAGES = {
    "mmdet": _mmdet(
        pairs("neck.extra_layers.{}.{}.conv"), "neck.l2_norm.weight", "{}.0", background_last=True
    ),
    "mmdet_old": _old_mmdet(background_last=True),
    "mmdet_1x": _old_mmdet(),
    "caffe_voc": _caffe(_VOC300, 20),
    "caffe_coco": _caffe(_COCO300, 80),
    "amdegroot": Lineage(
        vgg(vgg_names("vgg.{}"), [f"extras.{i}" for i in range(8)], "L2Norm.weight"),
        plain_head("conf.{}", "loc.{}"),
        replace(_VOC300, clip=True),
        Detection(0.01, 200, _ALL),
    ),
    "lufficc_vgg": Lineage(
        vgg(
            vgg_names("backbone.vgg.{}"),
            [f"backbone.extras.{i}" for i in range(8)],
            "backbone.l2_norm.weight",
        ),
        plain_head(*_LUFFICC_HEADS),
        replace(_VOC300, clip=True),
        _LUFFICC,
    ),
    "lufficc_v2": Lineage(
        mobilenet_v2("backbone.features", "backbone.extras", nested=True),
        lite_head(*_LUFFICC_HEADS, suffix=".conv"),
        _LIGHT320,
        _LUFFICC,
    ),
    "lufficc_v3": Lineage(
        lufficc_mobilenet_v3, lite_head(*_LUFFICC_HEADS, suffix=".conv"), _LIGHT320, _LUFFICC
    ),
    "qfgaohao_vgg": Lineage(
        vgg(
            vgg_names("base_net.{}"),
            pairs("extras.{}.{}", second=2),
            "source_layer_add_ons.0",
            batch_norm=True,
        ),
        plain_head(*_QFGAOHAO_HEADS),
        replace(_VOC300, clip=True),
        _QFGAOHAO,
    ),
    "qfgaohao_v1": Lineage(
        qfgaohao_mobilenet_v1, plain_head(*_QFGAOHAO_HEADS), _LIGHT300, _QFGAOHAO,
        mean=(127, 127, 127), std=(128, 128, 128),
    ),
    "qfgaohao_v2": Lineage(
        mobilenet_v2("base_net", "extras", nested=False), lite_head(*_QFGAOHAO_HEADS),
        _LIGHT300, _QFGAOHAO, mean=(127, 127, 127), std=(128, 128, 128),
    ),
    "nvidia": Lineage(
        nvidia_resnet50, plain_head("conf.{}", "loc.{}"), replace(_COCO300, clip=True),
        Detection(0.05, 200, 200, nms=0.5),
        **_IMAGENET, std=(58.395, 57.12, 57.375), num_classes=80, class_major=True,
    ),
    "fork": Lineage(
        vgg(
            vgg_names("backbone.features.{}"),
            [f"extra_layers.{i}" for i in range(10)],
            "l2norm.weight",
            layers=_EXTRA_512,
            # its POOL_ARGS give the 3×3 pool to stage 4, not 5: conv5 has stride 8
            halved=(1, 2, 3, 5),
        ),
        plain_head("head.cls_subnet.{}", "head.bbox_subnet.{}"),
        _FORK512,
        Detection(0.02, _ALL, 100, clamp="upper"),
        mean=(103.53, 116.28, 123.675), order="BGR", num_classes=80, background_last=True,
    ),
}  # fmt: skip
