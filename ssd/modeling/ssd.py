"""SSD: Single Shot MultiBox Detector (arXiv 1512.02325)."""

import contextlib
import copy
import functools
from typing import Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.evaluation import inference_context
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_anchor_generator, build_backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from detectron2.utils import comm
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ssd.checks import check_choice, check_model
from ssd.cuda_graph import CudaGraph
from ssd.modeling.blocks import pad_as_tensorflow, set_batch_norm
from ssd.modeling.default_boxes import DefaultBoxGenerator, check_centers
from ssd.modeling.head import SSDHead, SSDLiteHead
from ssd.modeling.multibox import encode_boxes, loss_divisor, match_default_boxes, multibox_loss
from ssd.modeling.postprocessing import best_detections, detect, output_transform

__all__ = ["SSD"]


@META_ARCH_REGISTRY.register()
class SSD(DenseDetector):
    """SSD on any backbone. See :class:`DenseDetector` for inputs and outputs.

    Images of another size than the network's input are resized on the model's device, and boxes
    come back in the caller's ``height`` and ``width``, or else in the given image's own size.

    In evaluation mode :meth:`infer` and :meth:`detect` take the place of DenseDetector's
    ``forward_inference``, which isn't called: a CUDA graph holds the network, too.

    Attributes:
        default_boxes: (R, 4) XYXY in pixels of the network's input.
        inference_dtype: of the network in evaluation mode, by autocast; None: that of its weights.
        cuda_graph: calls :meth:`infer` in evaluation mode, if there is one.
    """

    inference_dtype: Optional[torch.dtype] = None
    cuda_graph: Optional[CudaGraph] = None

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: SSDHead,
        default_box_generator: DefaultBoxGenerator,
        input_size: Tuple[int, int],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "BGR",
        matching: Dict,
        loss: Dict,
        loss_normalizer: str,
        box_weight: float = 1.0,
        detection: Dict,
        topk_per: str = "level",
        bbox_reg_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
        channels_last: bool = True,
    ):
        """
        Args:
            input_size: (height, width) in pixels.
            input_format: order of the channels of the given images, for visualisation.
            matching: keyword arguments of :func:`match_default_boxes`.
            loss: keyword arguments of :func:`multibox_loss`.
            loss_normalizer: see :func:`loss_divisor`.
            box_weight: of the localization loss (α of the paper's eq. 1).
            detection: keyword arguments of :func:`detect`.
            topk_per: "level" or "class", the groups of ``detection["topk_candidates"]``.
            channels_last: memory format of convolutions.
        """
        super().__init__(
            backbone,
            head,
            head_in_features=list(backbone.output_shape()),
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        self.input_size = tuple(input_size)
        self.input_format = input_format
        self.num_classes = head.num_classes
        self.matching, self.loss_normalizer = matching, loss_normalizer
        # MODEL.COMPILE replaces these two
        self.multibox_loss = functools.partial(multibox_loss, **loss)
        self.best_detections = best_detections
        self.box_weight, self.detection = box_weight, detection
        # on the device: a list would have to be copied there in each step
        weights = torch.tensor(bbox_reg_weights)
        self.register_buffer("bbox_reg_weights", weights, persistent=False)
        self.channels_last = channels_last

        map_sizes = self._feature_map_sizes()
        boxes = default_box_generator.per_level(map_sizes)
        check_centers(boxes, map_sizes, self.input_size)
        self.boxes_per_level = [len(level) for level in boxes]
        self.register_buffer("default_boxes", torch.cat(boxes), persistent=False)
        check_choice("MODEL.SSD.TOPK_PER", topk_per, ("level", "class"))
        if topk_per == "level":
            levels = [torch.full((len(level), 1), i) for i, level in enumerate(boxes)]
            group, self.num_groups = torch.cat(levels), len(boxes)
        else:
            group, self.num_groups = torch.arange(self.num_classes)[None], self.num_classes
        self.register_buffer("candidate_group", group, persistent=False)
        self.to(memory_format=self.memory_format)

    @classmethod
    def from_config(cls, cfg):
        ssd = cfg.MODEL.SSD
        check_model(cfg)
        backbone = build_backbone(cfg)
        shapes = list(backbone.output_shape().values())
        generator = build_anchor_generator(cfg, shapes)
        if not hasattr(generator, "per_level"):
            raise ValueError(
                f"MODEL.ANCHOR_GENERATOR.NAME {cfg.MODEL.ANCHOR_GENERATOR.NAME!r} has no method "
                "per_level, expected 'DefaultBoxGenerator'; labs/_base_ has all that an SSD needs"
            )
        head_args = ([s.channels for s in shapes], generator.num_anchors, ssd.NUM_CLASSES)
        if ssd.HEAD == "conv":
            head = SSDHead(*head_args)
        else:
            head = SSDLiteHead(*head_args, norm=ssd.NORM, last_1x1=ssd.HEAD == "lite_last_1x1")
        if ssd.SAME_PADDING:
            pad_as_tensorflow(backbone)
        return {
            "backbone": set_batch_norm(backbone, cfg),
            "head": set_batch_norm(head, cfg),
            "default_box_generator": generator,
            "input_size": ssd.INPUT_SIZE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "matching": {
                "iou_threshold": ssd.MATCHING.IOU_THRESHOLD,
                "best": ssd.MATCHING.BEST,
            },
            "loss": {
                "neg_pos_ratio": ssd.LOSS.NEG_POS_RATIO,
                "negatives_without_positives": ssd.LOSS.NEGATIVES_WITHOUT_POSITIVES,
                "smooth_l1_beta": ssd.LOSS.SMOOTH_L1_BETA,
                "score_function": ssd.SCORE_FUNCTION,
            },
            "loss_normalizer": ssd.LOSS.NORMALIZER,
            "box_weight": ssd.LOSS.BOX_WEIGHT,
            "detection": {
                "score_function": ssd.SCORE_FUNCTION,
                "score_thresh": ssd.SCORE_THRESH_TEST,
                "topk_candidates": ssd.TOPK_CANDIDATES_TEST,
                "nms_thresh": ssd.NMS_THRESH_TEST,
                "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
                "bbox_reg_clamp": ssd.BBOX_REG_CLAMP,
                "clip": ssd.CLIP_TEST,
            },
            "topk_per": ssd.TOPK_PER,
            "bbox_reg_weights": ssd.BBOX_REG_WEIGHTS,
            "channels_last": ssd.CHANNELS_LAST,
        }

    def forward(self, batched_inputs: List[Dict]):
        if torch.jit.is_tracing():
            raise RuntimeError(
                "torch.jit.trace can't follow the search for detections: trace backbone and head "
                "(tools/analyze_model.py counts operations)"
            )
        images = self.preprocess_image(batched_inputs)
        if self.training:
            features = self.backbone(images.tensor)
            features = [features[name] for name in self.head_in_features]
            if not all("instances" in x for x in batched_inputs):
                raise ValueError(
                    "training needs each image's 'instances' (from a mapper for training, and a "
                    "record with 'annotations'); model.eval() first for detections"
                )
            gt_instances = [x["instances"] for x in batched_inputs]
            return self.forward_training(images, features, self.head(features), gt_instances)
        sizes = [
            (x.get("height", height), x.get("width", width))
            for x, (height, width) in zip(batched_inputs, images.image_sizes)
        ]
        output = output_transform(sizes, self.input_size).to(self.device, non_blocking=True)
        graph = self.cuda_graph
        with graph.turn if graph else contextlib.nullcontext():
            if graph:
                logits, deltas, *first = graph(self.infer, images.tensor, output)
                first = [x.clone() for x in first]  # the graph's own are those of the next call
            else:
                logits, deltas, *first = self.infer(images.tensor, output)
            results = self.detect(logits, deltas, sizes, first=first)
        return [{"instances": instances} for instances in results]

    def _apply(self, *args, **kwargs):
        boxes = self.default_boxes
        moved = super()._apply(*args, **kwargs)
        if self.default_boxes.element_size() < 4:  # bfloat16 would round them to 2 pixels
            self.default_boxes = boxes.to(self.device, torch.float32)
        if self.cuda_graph:  # it reads the weights' old memory
            self.cuda_graph.forget()
        return moved

    def infer(self, images: Tensor, output: Tensor) -> Tuple[Tensor, ...]:
        """The network and the first attempt to find detections, of fixed shapes.

        Args:
            images: (N, 3, H, W), normalised, of the network's input size.
            output: (N, 4), see :func:`output_transform`.

        Returns:
            logits (N, R, K + 1), offsets (N, R, 4), and what :func:`best_detections` finds.
        """
        dtype, precision = self.inference_dtype, contextlib.nullcontext()
        if dtype or self.cuda_graph:  # which replays one, whatever the caller's autocast is
            precision = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        with precision:
            features = self.backbone(images)
            features = [features[name] for name in self.head_in_features]
            logits, deltas = self._flatten(self.head(features))
        return self.find(logits, deltas, output)

    def find(
        self, logits: Tensor, deltas: Tensor, output: Optional[Tensor] = None
    ) -> Tuple[Tensor, ...]:
        """As :meth:`infer`, from the network's logits and offsets on."""
        boxes, settings = self.default_boxes, self._detection_settings()
        first = self.best_detections(logits, deltas, boxes, self.input_size, output, **settings)
        return logits, deltas, *first

    @property
    def memory_format(self) -> torch.memory_format:  # as an attribute torch.save couldn't write it
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def preprocess_image(self, batched_inputs: List[Dict]) -> ImageList:
        """Resizes where needed, batches and normalises; keeps the sizes of the given images."""
        images = [x["image"] for x in batched_inputs]
        sizes = [tuple(image.shape[-2:]) for image in images]
        if len({(image.shape, image.dtype, image.device) for image in images}) == 1:
            batch = self._resize(self._stack(images))
        else:
            batch = torch.cat([self._resize(self._stack([image])) for image in images])
        if batch.is_floating_point():  # resized, in float32
            batch = batch.to(self.pixel_mean.dtype)
        batch = (batch - self.pixel_mean).div_(self.pixel_std)
        return ImageList(batch.contiguous(memory_format=self.memory_format), sizes)

    def _stack(self, images: List[Tensor]) -> Tensor:
        """A batch on the model's device, copied from memory that a GPU reads without waiting."""
        if images[0].is_cuda or self.device.type != "cuda":
            return torch.stack(images).to(self.device)
        if images[0].is_pinned():  # by the loader
            if (batch := _as_one(images)) is not None:
                return batch.to(self.device, non_blocking=True)
            return torch.stack([x.to(self.device, non_blocking=True) for x in images])
        pinned = images[0].new_empty((len(images), *images[0].shape), pin_memory=True)
        return torch.stack(images, out=pinned).to(self.device, non_blocking=True)

    def _to_device(self, x: Tensor) -> Tensor:
        if self.device.type == "cuda" and not x.is_cuda:
            x = x.pin_memory()
        return x.to(self.device, non_blocking=True)

    def forward_training(
        self,
        images: ImageList,
        features: List[Tensor],
        predictions: Tuple[List[Tensor], List[Tensor]],
        gt_instances: List[Instances],
    ) -> Dict[str, Tensor]:
        """Losses of N images, divided over the global batch.

        Args:
            images, features: not used; they are in :class:`DenseDetector`'s signature.
            predictions, gt_instances: see :meth:`losses`.

        Returns:
            ``loss_cls`` and ``loss_box_reg``.
        """
        losses, divisor = self.losses(predictions, gt_instances)
        divisor = divisor.float()
        if divisor.dim() == 0:  # of the global batch
            if (world_size := comm.get_world_size()) > 1:
                torch.distributed.all_reduce(divisor)
                divisor = divisor / world_size  # DistributedDataParallel averages the gradients
            divisor = divisor.clamp(min=1.0 / world_size)
        return {name: (loss / divisor).sum() for name, loss in losses.items()}

    def losses(
        self, predictions: Tuple[List[Tensor], List[Tensor]], gt_instances: List[Instances]
    ) -> Tuple[Dict[str, Tensor], Tensor]:
        """Losses of each of N images, not yet divided; validation losses are these, too.

        Args:
            predictions: of each level, see :meth:`SSDHead.forward`.
            gt_instances: ``gt_boxes`` in the given image's pixels and ``gt_classes`` in [0, K);
                those without area are ignored. An image may have none.

        Returns:
            ``loss_cls`` and ``loss_box_reg``, (N,) each, and :func:`loss_divisor` of these images.
        """
        logits, deltas = self._flatten(predictions)
        gt_boxes, gt_classes, gt_valid = self._pad_ground_truth(gt_instances)

        matched = match_default_boxes(gt_boxes, gt_valid, self.default_boxes, **self.matching)
        positive, gt_index = matched >= 0, matched.clamp(min=0)
        labels = torch.where(positive, gt_classes.gather(1, gt_index), self.num_classes)
        boxes = gt_boxes.gather(1, gt_index[:, :, None].expand(-1, -1, 4))
        boxes = torch.where(positive[:, :, None], boxes, self.default_boxes)  # offsets 0
        targets = encode_boxes(boxes, self.default_boxes, self.bbox_reg_weights)

        loss_cls, loss_box_reg = self.multibox_loss(logits, deltas, labels, targets)
        losses = {"loss_cls": loss_cls, "loss_box_reg": self.box_weight * loss_box_reg}
        return losses, loss_divisor(matched, self.loss_normalizer)

    def detect(self, logits: Tensor, deltas: Tensor, sizes=None, **kwargs) -> List[Instances]:
        """:func:`ssd.modeling.postprocessing.detect` with this model's settings."""
        boxes, settings = self.default_boxes, self._detection_settings()
        return detect(logits, deltas, boxes, self.input_size, sizes, **settings, **kwargs)

    def _detection_settings(self) -> Dict:
        return {
            "group": self.candidate_group,
            "num_groups": self.num_groups,
            "bbox_reg_weights": self.bbox_reg_weights,
            **self.detection,
        }

    def _flatten(self, predictions: Tuple[List[Tensor], List[Tensor]]) -> Tuple[Tensor, Tensor]:
        logits, deltas = self.head.flatten(*predictions)
        if logits.shape[1] != len(self.default_boxes):
            raise ValueError(
                f"the head predicts {logits.shape[1]} boxes, but there are "
                f"{len(self.default_boxes)} default boxes for MODEL.SSD.INPUT_SIZE "
                f"{self.input_size}"
            )
        return logits, deltas

    def _pad_ground_truth(self, gt_instances: List[Instances]) -> Tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, M, 4) in pixels of the network's input, classes (N, M), validity (N, M)."""
        height, width = self.input_size
        scales = [(width / x.image_size[1], height / x.image_size[0]) * 2 for x in gt_instances]
        # padded where they are, on the host: the device gets three tensors, whatever N
        boxes = pad_sequence([x.gt_boxes.tensor for x in gt_instances], batch_first=True)
        classes = pad_sequence([x.gt_classes.long() for x in gt_instances], batch_first=True)
        counts = torch.tensor([len(x) for x in gt_instances], device=boxes.device)
        if not boxes.shape[1]:
            boxes, classes = F.pad(boxes, (0, 0, 0, 1)), F.pad(classes, (0, 1))
        boxes = boxes.to(self.default_boxes.dtype) * boxes.new_tensor(scales)[:, None]
        valid = torch.arange(boxes.shape[1], device=boxes.device) < counts[:, None]
        valid &= (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)  # False for NaN
        if classes.device.type == "cpu":  # a GPU's would have to be waited for
            _check_classes(classes, valid, self.num_classes)
        return tuple(map(self._to_device, (boxes, classes, valid)))

    def _resize(self, images: Tensor) -> Tensor:
        """(N, C, H, W), of another size, to the network's input size: bilinear without
        antialiasing, float32."""
        if images.shape[-2:] == self.input_size:
            return images
        if 0 in images.shape:
            shape = tuple(images.shape[1:])
            raise ValueError(f"the image is empty: (channels, height, width) {shape}")
        return F.interpolate(images.float(), self.input_size, mode="bilinear", align_corners=False)

    def _feature_map_sizes(self) -> List[Tuple[int, int]]:
        """(height, width) of each level's map, from a run without data (torch's meta device), or
        with zeros for a backbone that makes tensors of its own or reads numbers."""
        tensors = [*self.backbone.named_parameters(), *self.backbone.named_buffers()]
        state = {name: x.to("meta") for name, x in tensors}
        image = torch.zeros(1, len(self.pixel_mean), *self.input_size, device=self.device)
        try:
            with inference_context(self.backbone), torch.no_grad():
                try:
                    # a copy, of the same tensors: it may keep what it makes
                    backbone = copy.deepcopy(self.backbone, {id(x): x for _, x in tensors})
                    features = torch.func.functional_call(backbone, state, image.to("meta"))
                except Exception:  # whatever a backbone does that needs numbers
                    features = self.backbone(image)
        except RuntimeError as error:
            raise ValueError(
                f"MODEL.SSD.INPUT_SIZE {self.input_size} doesn't suit the backbone and "
                f"MODEL.SSD.EXTRA_LAYERS: {error}"
            ) from error
        sizes = [tuple(features[name].shape[-2:]) for name in self.head_in_features]
        if not all(map(min, sizes)):  # torch's meta device allows it
            raise ValueError(
                f"MODEL.SSD.INPUT_SIZE {self.input_size} doesn't suit the backbone and "
                f"MODEL.SSD.EXTRA_LAYERS, which make maps of (height, width) {sizes}"
            )
        return sizes


def _check_classes(classes: Tensor, valid: Tensor, num_classes: int) -> None:
    for wrong in classes[valid & ((classes < 0) | (classes >= num_classes))].tolist():
        raise ValueError(
            f"gt_classes must be 0 to {num_classes - 1} (MODEL.SSD.NUM_CLASSES is {num_classes}), "
            f"got {wrong}"
        )


def _as_one(images: Sequence[Tensor]) -> Optional[Tensor]:
    """The batch (N, C, H, W), without a copy, of N images (C, H, W) that lie one behind the other
    in one memory, as those that come from a loader's worker; None for others."""
    first, start, size = images[0], images[0].storage_offset(), images[0].numel()
    for i, x in enumerate(images):
        if x.requires_grad or not x.is_contiguous() or x.storage_offset() != start + i * size:
            return None
    memories = [x.untyped_storage() for x in images]
    if len({(memory.data_ptr(), memory.nbytes()) for memory in memories}) > 1:
        return None
    return first.as_strided((len(images), *first.shape), (size, *first.stride()))
