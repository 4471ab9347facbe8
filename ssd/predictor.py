"""Detections of single images, with the weights of any lineage."""

from typing import Dict, Union

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Instances

from ssd import model_zoo
from ssd.checkpoint import SSDCheckpointer
from ssd.checkpoint.classes import known_classes
from ssd.inference import optimize

__all__ = ["Predictor"]


class Predictor(DefaultPredictor):
    """Detectron2's DefaultPredictor for every file that :class:`SSDCheckpointer` reads.

    Attributes:
        cfg: a copy of the config.
        model: in evaluation mode, see :func:`ssd.inference.optimize`.
        metadata: of ``DATASETS.TEST``'s first data set, if there is one; with COCO's or VOC's class
            names where it has none yet.

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
        SSDCheckpointer(model, cfg=self.cfg, strict=True).load(cfg.MODEL.WEIGHTS)
        self.model = optimize(model.eval(), self.cfg)
        if cfg.DATASETS.TEST:
            self.metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
            if not self.metadata.get("thing_classes"):  # as long as its JSON isn't read
                names = known_classes(cfg.MODEL.SSD.NUM_CLASSES)
                self.metadata = Metadata(thing_classes=names) if names else self.metadata
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
        shape = getattr(original_image, "shape", None)
        if shape is None or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise ValueError(
                "Predictor needs an image (height, width, 3) in BGR order, got "
                f"{type(original_image).__name__ if shape is None else f'shape {shape}'}; "
                "cv2.imread gives None for a file that it can't read"
            )
        return super().__call__(original_image)
