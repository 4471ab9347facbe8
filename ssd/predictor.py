"""Detections of images, with the weights of any lineage."""

from typing import Dict, List, Sequence, Union

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Instances

from ssd import model_zoo
from ssd.checkpoint import SSDCheckpointer
from ssd.checkpoint.classes import dataset_classes, known_classes, same_classes
from ssd.inference import optimize

__all__ = ["Predictor"]


class Predictor(DefaultPredictor):
    """Detectron2's DefaultPredictor for every file that :class:`SSDCheckpointer` reads.

    Attributes:
        cfg: a copy of the config.
        model: in evaluation mode, see :func:`ssd.inference.optimize`.
        metadata: of ``DATASETS.TEST``'s first data set, if that is there and has the classes of the
            weights; else with the class names in the weights' file; if there are none, COCO's or
            VOC's for foreign weights of as many classes, or "class 0", "class 1", ….

    Example::

        instances = Predictor("ssd300_coco_mmdet")(cv2.imread("photograph.jpg"))["instances"]
    """

    def __init__(self, cfg: Union[CfgNode, str]):
        """
        Args:
            cfg: a config, whose ``MODEL.WEIGHTS`` must fill the model, or a name of
                :mod:`ssd.model_zoo`: of published weights, or of a lab that has some.

        Raises:
            See :meth:`SSDCheckpointer.load` and :func:`ssd.model_zoo.get`.
        """
        if isinstance(cfg, str):
            cfg = model_zoo.get_config(cfg, trained=True)
        # Not DefaultPredictor's: its checkpointer reads no other lineage's files.
        self.cfg = cfg.clone()
        model = build_model(self.cfg)
        checkpointer = SSDCheckpointer(model, cfg=self.cfg, strict=True)
        checkpointer.load(cfg.MODEL.WEIGHTS)
        self.model = optimize(model.eval(), self.cfg)
        self.metadata = _metadata(self.cfg, checkpointer)
        side = cfg.INPUT.MIN_SIZE_TEST  # 0 in the labs: the model itself resizes, on its device
        self.aug = ResizeShortestEdge([side, side], cfg.INPUT.MAX_SIZE_TEST)
        self.input_format = cfg.INPUT.FORMAT

    def __call__(self, original_image: np.ndarray) -> Dict[str, Instances]:
        """
        Args:
            original_image: (H, W, 3) uint8 in BGR order, as ``cv2.imread`` gives it.

        Returns:
            ``instances`` with ``pred_boxes`` (D, 4) XYXY in the image's pixels, ``scores`` (D,) in
            falling order and ``pred_classes`` (D,) in [0, K); D may be 0.

        Raises:
            ValueError: for something else than an image of three channels.
        """
        return self.batch([original_image])[0]

    def batch(self, images: Sequence[np.ndarray]) -> List[Dict[str, Instances]]:
        """As calls with each of the images, which may have different sizes, but in one batch.

        Without images an empty list.
        """
        inputs = []
        for image in images:
            shape = getattr(image, "shape", None)
            if shape is None or len(shape) != 3 or shape[2] != 3 or 0 in shape:
                raise ValueError(
                    "Predictor needs an image (height, width, 3) in BGR order, got "
                    f"{type(image).__name__ if shape is None else f'shape {shape}'}; "
                    "cv2.imread gives None for a file that it can't read"
                )
            height, width = shape[:2]
            if self.input_format == "RGB":
                image = image[:, :, ::-1]
            image = self.aug.get_transform(image).apply_image(image)
            image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
            inputs.append({"image": image, "height": height, "width": width})
        if not inputs:
            return []
        with torch.no_grad():
            return self.model(inputs)


def _metadata(cfg: CfgNode, checkpointer: SSDCheckpointer) -> Metadata:
    count, trained_on = cfg.MODEL.SSD.NUM_CLASSES, checkpointer.classes
    if trained_on and len(trained_on) != count:
        trained_on = None
    for name in cfg.DATASETS.TEST[:1]:
        names = dataset_classes(name, read=True)
        if names and len(names) == count and same_classes(names, trained_on or names):
            return MetadataCatalog.get(name)
    if trained_on:
        return Metadata(thing_classes=trained_on)
    names = known_classes(count) if checkpointer.lineage else None
    if not names:
        return Metadata(thing_classes=[f"class {i}" for i in range(count)])
    labels = {i + 1: i for i in range(90)} if count == 90 else None  # class i is COCO's i + 1
    return Metadata(thing_classes=names, thing_dataset_id_to_contiguous_id=labels)
