"""The config keys of SSD: each with its unit, default and source.

``_WITHOUT_EFFECT`` names Detectron2's keys that have none here, and ``_OF_RESNETS`` those that only
its own ResNets read.

Only adds keys; a value of Detectron2's own that SSD needs otherwise (``MIN_SIZE_TEST``, the pixel
mean, warm-up …) stands in ``labs/_base_/*.yaml``. The defaults here are SSD300 on COCO.
"""

import difflib
import logging
import os
import re
from typing import Any, Dict, List, Optional, Sequence

import torch
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ssd.checks import is_ssd

__all__ = ["add_ssd_config", "load_config"]


def add_ssd_config(cfg: CN) -> None:
    """Adds the keys of SSD to ``cfg`` in place. Existing keys keep their values."""
    if "SSD" in cfg.MODEL:
        return
    _add_ssd_keys(cfg)
    _add_backbone_keys(cfg)
    _add_input_keys(cfg)
    _add_run_keys(cfg)


def _add_ssd_keys(cfg: CN) -> None:
    ssd = cfg.MODEL.SSD = CN()
    # (height, width) of the network's input in pixels; the only place where it stands.
    ssd.INPUT_SIZE = [300, 300]
    ssd.NUM_CLASSES = 80  # K foreground classes, any K >= 1; class K is the background
    # Fine-tuning from a detector with other classes: for each own class the weights' class, by
    # number (from 0, without background) or name, or -1 for a fresh start. Empty: classes of equal
    # name keep their weights (see ssd.checkpoint.classes).
    ssd.CLASS_MAP = []

    # The backbone that SSD extends: a name in BACKBONE_REGISTRY, and those of its outputs that
    # the head reads (the last one also feeds the extra layers).
    ssd.BOTTOM_UP = "build_vgg16_backbone"
    ssd.IN_FEATURES = ["conv4_3", "fc7"]
    # Those of them that are normalised for the head only, and by what: ParseNet's "L2Norm", of
    # initial scale 20 (paper, 3.1), or "BN", BatchNorm in its place (qfgaohao's VGG).
    ssd.L2_NORM_FEATURES = ["conv4_3"]
    ssd.L2_NORM = "L2Norm"
    # One row per extra level: bottleneck channels, output channels, kernel, stride, padding.
    ssd.EXTRA_LAYERS = [
        [256, 512, 3, 2, 1],
        [128, 256, 3, 2, 1],
        [128, 256, 3, 1, 0],
        [128, 256, 3, 1, 0],
    ]
    # A 1×1 bottleneck and a strided convolution ("conv", paper); 1×1, strided depthwise, 1×1
    # ("separable", SSDLite); the same without activation at the end ("inverted", lufficc and
    # qfgaohao) and with squeeze-and-excitation ("inverted_se", lufficc's MobileNetV3).
    ssd.EXTRA_BLOCK = "conv"
    ssd.EXTRA_ACTIVATION = "ReLU"  # a class name in torch.nn
    # Predictors: a 3×3 convolution ("conv"), depthwise 3×3 and 1×1 ("lite", MobileNetV2 paper,
    # 6.2), or "lite" but for a 1×1 convolution at the last level ("lite_last_1x1", lufficc).
    ssd.HEAD = "conv"
    # Normalisation in extra layers and "lite" predictors: "", "BN", "SyncBN", "FrozenBN", "GN", …
    ssd.NORM = ""
    ssd.SAME_PADDING = False  # strided convolutions pad as in TensorFlow (below and right first)
    ssd.CHANNELS_LAST = True  # memory format of the convolutions: the same results, faster

    boxes = ssd.DEFAULT_BOXES = CN()
    boxes.MIN_SIZES = [21.0, 45.0, 99.0, 153.0, 207.0, 261.0]  # pixels of the input, one per level
    boxes.MAX_SIZE = 315.0  # of the last level; a level's max is the next one's min
    boxes.ASPECT_RATIOS = [[2.0], [2.0, 3.0], [2.0, 3.0], [2.0, 3.0], [2.0], [2.0]]
    # Distance of the centres in pixels, (y, x) or one number for both. Explicit since the
    # released weights need 64, 100, 300 where 300 / 5 = 60. Empty: input size / map size.
    boxes.STEPS = [8.0, 16.0, 32.0, 64.0, 100.0, 300.0]
    # What is clipped to the input: "none" (Caffe, MMDetection), "xyxy" (Caffe's clip: true), the
    # values "cxcywh" (lufficc, amdegroot, qfgaohao, NVIDIA) or "wh" (torchvision).
    boxes.CLIP = "none"
    # > 0: the first level has one square of this side in place of two (TensorFlow's
    # reduce_boxes_in_lowest_layer)
    boxes.FIRST_SQUARE = 0.0

    matching = ssd.MATCHING = CN()
    matching.IOU_THRESHOLD = 0.5
    # Which default box an object takes first: "argmax", its best one, in order, a later object
    # overwrites (MMDetection, torchvision), or "bipartite", greedily distinct ones (Caffe).
    matching.BEST = "argmax"

    loss = ssd.LOSS = CN()
    loss.NEG_POS_RATIO = 3.0  # hard negatives per positive of an image
    loss.NEGATIVES_WITHOUT_POSITIVES = 0  # hard negatives of an image without objects
    # "image": sum over images of max(1, positives) (MMDetection);
    # "batch": max(1, positives of the global batch) (Caffe, torchvision, lufficc);
    # "each": every image by its own positives, then the mean over images (NVIDIA).
    loss.NORMALIZER = "image"
    loss.SMOOTH_L1_BETA = 1.0
    loss.BOX_WEIGHT = 1.0

    # "softmax" with cross entropy, or "sigmoid" with binary cross entropy (TensorFlow)
    ssd.SCORE_FUNCTION = "softmax"
    ssd.BBOX_REG_WEIGHTS = [10.0, 10.0, 5.0, 5.0]  # 1 / variances of dx, dy, dw, dh
    # Clamp of the decoded dw and dh at ln(1000/16): "both" ends (MMDetection), the "upper" one
    # (torchvision), or "none" (Caffe, lufficc).
    ssd.BBOX_REG_CLAMP = "both"
    ssd.SCORE_THRESH_TEST = 0.02
    # At most this many (box, class) pairs of each "level" (MMDetection) or of each "class" (Caffe,
    # torchvision) enter NMS, its best ones.
    ssd.TOPK_CANDIDATES_TEST = 1000
    ssd.TOPK_PER = "level"
    ssd.NMS_THRESH_TEST = 0.45
    # Detections are clipped to the image "before_nms" (MMDetection, torchvision) or "after_nms",
    # where those outside it compete for DETECTIONS_PER_IMAGE (Caffe).
    ssd.CLIP_TEST = "before_nms"


def _add_backbone_keys(cfg: CN) -> None:
    # VGG16: the pool after conv4 keeps the map and the one after conv5 halves it (the earlier
    # Detectron2 fork), instead of the other way round
    cfg.MODEL.VGG = CN({"LATE_POOL": False})

    mobilenet = cfg.MODEL.MOBILENET = CN()
    mobilenet.WIDTH_MULT = 1.0
    mobilenet.NORM = "BN"  # or "SyncBN" (statistics of all GPUs), "FrozenBN", …
    mobilenet.REDUCED_TAIL = False  # V3: half the channels in the last layers (its table 6)
    # V3: squeeze-and-excitation before the activation (lufficc) or after it (torchvision)
    mobilenet.SQUEEZE_FIRST = False

    # 1: res4 keeps the resolution of res3 (NVIDIA's SSD300-ResNet50); read by
    # build_ssd_resnet_backbone only
    cfg.MODEL.RESNETS.RES4_STRIDE = 2
    # Detectron2's RegNet, which has no config keys of its own; default: RegNetX-200MF
    # (arXiv 2003.13678).
    regnet = cfg.MODEL.REGNET = CN()
    regnet.DEPTH = 13
    regnet.W_A = 36.44
    regnet.W_0 = 24
    regnet.W_M = 2.49
    regnet.GROUP_WIDTH = 8
    regnet.SE_RATIO = 0.0
    regnet.NORM = "BN"

    # Of every BatchNorm in an SSD, and in our backbones elsewhere; torch's momentum (the weight of
    # the new batch).
    cfg.MODEL.BATCH_NORM = CN({"EPS": 1e-5, "MOMENTUM": 0.1})


def _add_input_keys(cfg: CN) -> None:
    # In training, decode a JPEG at 1/2, 1/4 or 1/8 where the augmentation shrinks what it shows by
    # at least that factor along both axes: much faster for large photographs. It replaces skipped
    # pixels by means (antialiasing), which testing doesn't.
    cfg.INPUT.REDUCED_DECODING = False

    photo = cfg.INPUT.PHOTOMETRIC = CN({"ENABLED": True})
    # "caffe": brightness is added, contrast and saturation (of HSV) multiply. "torchvision":
    # brightness multiplies, contrast blends with the image's mean grey, saturation with a pixel's.
    photo.STYLE = "caffe"
    photo.PROB = 0.5  # of each of the four operations
    # "caffe": added to the 0-255 values, uniform in ±BRIGHTNESS; "torchvision": a factor, uniform
    # in 1 ± BRIGHTNESS (torchvision: 0.125).
    photo.BRIGHTNESS = 32.0
    photo.CONTRAST = [0.5, 1.5]
    photo.SATURATION = [0.5, 1.5]
    # In OpenCV's 8-bit unit of 2 degrees: 18 is ±36 degrees (Caffe). MMDetection, torchvision and
    # lufficc have ±18 degrees, that is 9.
    photo.HUE = 18.0
    # Of a random order of the channels. Caffe: 0; MMDetection, torchvision, lufficc: 0.5.
    photo.SWAP_CHANNELS_PROB = 0.0
    # After expand, crop, resize and flip, so that the fill is distorted too (MMDetection, which
    # distorts in float and doesn't clip; here values are uint8 and clipped). Else before them.
    photo.LAST = False

    expand = cfg.INPUT.EXPAND = CN({"ENABLED": True})
    expand.PROB = 0.5
    expand.MAX_RATIO = 4.0  # side of the canvas over the image's: uniform in 1 to MAX_RATIO

    crop = cfg.INPUT.IOU_CROP = CN({"ENABLED": True})
    # One of: keep the image, each of MIN_IOUS (0: no bound), which OBJECTS says must reach: "any"
    # object whose centre lies in the crop (Caffe, torchvision, lufficc), or "all" objects of the
    # image, with one centre in the crop (MMDetection).
    crop.MIN_IOUS = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9]
    crop.OBJECTS = "any"
    crop.SCALE = [0.3, 1.0]
    crop.ASPECT_RATIO = [0.5, 2.0]
    crop.TRIALS = 50  # per choice
    # "torchvision": draw one choice, w and h uniform in SCALE, reject other aspects, and choose
    # again after TRIALS; "caffe": scale and aspect drawn, choose among the choices that succeeded.
    crop.SAMPLER = "caffe"


def _add_run_keys(cfg: CN) -> None:
    # torch.compile for network, loss and, on GPUs, post-processing: the first iteration takes up to
    # a minute more. What it can't compile runs as it is, with a warning.
    cfg.MODEL.COMPILE = False
    # Data sets named in YAML: {name: {FORMAT: coco | voc | yolo | shapes, ROOT: …, …}}; the keys of
    # an entry are those of ssd.data.datasets.register_datasets.
    cfg.DATASETS.REGISTER = CN(new_allowed=True)

    cfg.SOLVER.AMP.DTYPE = "bfloat16"  # or "float16" (with loss scaling, CUDA only)
    # > 0: BASE_LR is meant for this global batch and scaled linearly to IMS_PER_BATCH.
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0
    # > 0: MAX_ITER and STEPS follow from epochs and replace the config's own. An epoch is a pass
    # over the training images that FILTER_EMPTY_ANNOTATIONS leaves. The rate falls at STEPS_EPOCHS.
    # WARMUP_ITERS and the periods stay in iterations; ssd.solver has the rules.
    cfg.SOLVER.MAX_EPOCHS = 0
    cfg.SOLVER.STEPS_EPOCHS = []
    # Passes over the data that make one unit of the schedule (MMDetection's RepeatDataset: 5); a
    # unit's iterations are rounded up. MAX_EPOCHS and STEPS_EPOCHS count single passes all the
    # same, as multiples of it: MMDetection's 24 epochs are 120 here.
    cfg.SOLVER.REPEAT_DATASET = 1
    # The cosine of WarmupCosineLR falls at every "iteration", or is constant for a unit: "epoch"
    # (MMDetection, torchvision; needs MAX_EPOCHS).
    cfg.SOLVER.COSINE_STEP = "iteration"
    # Exponential moving average of weights and buffers, which evaluations then use; decay per
    # iteration as in YOLOX, at first less: (1 + t) / (10 + t) after t iterations (TensorFlow).
    cfg.SOLVER.EMA = CN({"ENABLED": False, "DECAY": 0.9998})

    cfg.TEST.EVALUATORS = ["coco"]  # "coco" (AP …) and/or "voc" (mAP, 11-point and area)
    cfg.TEST.IMS_PER_BATCH = 8  # of each process
    # The network's in evaluations and in ssd.Predictor: "float32", or by autocast "bfloat16", or
    # "float16" on GPUs.
    cfg.TEST.DTYPE = "float32"
    # On GPUs evaluations and ssd.Predictor record network and post-processing as a CUDA graph: the
    # same results with fewer launches. It holds the memory of its intermediate results.
    cfg.TEST.CUDA_GRAPH = True
    cfg.TEST.BEST_METRIC = ""  # e.g. "bbox/AP50": keep model_best.pth by this metric
    # PATIENCE > 0: the training ends after this many evaluations in a row (each TEST.EVAL_PERIOD)
    # without a new best value of BEST_METRIC.
    cfg.TEST.EARLY_STOPPING = CN({"PATIENCE": 0})
    # Iterations between computations of the losses of the test sets without augmentation, written
    # as validation/loss_cls, validation/loss_box_reg and validation/total_loss; with several test
    # sets as validation/NAME/…. 0: never.
    cfg.TEST.LOSS_PERIOD = 0
    # With TEST.AUG.ENABLED there is a second evaluation, bbox_TTA …, at the end of a training and
    # with --eval-only: the detections of the image, with TEST.AUG.FLIP also of its mirror image,
    # and with CROPS [rows, columns] also of the parts of a grid, each filling the network's input,
    # which helps small objects. Neighbouring parts share CROP_OVERLAP of a part's side.
    # Detectron2's TEST.AUG.MIN_SIZES and MAX_SIZE have no effect.
    cfg.TEST.AUG.CROPS = [1, 1]
    cfg.TEST.AUG.CROP_OVERLAP = 0.25
    # This many pictures of detections go to OUTPUT_DIR/detections. (Detectron2's VIS_PERIOD > 0:
    # every so many iterations TensorBoard gets augmented inputs with ground truth and detections.)
    cfg.TEST.VIS_IMAGES = 0

    # Weights & Biases (pip install wandb) gets the scalars and, with VIS_PERIOD, the pictures of a
    # training, besides TensorBoard. A resumed training is a run of its own, at its iterations.
    cfg.WANDB = CN({"ENABLED": False})
    cfg.WANDB.PROJECT = "ssd"
    cfg.WANDB.NAME = ""  # of the run; empty: W&B invents one


def load_config(config_file: str, opts: Sequence[str] = (), cfg: Optional[CN] = None) -> CN:
    """Reads a lab's config and registers the data sets that it names; on a machine without a GPU
    ``MODEL.DEVICE`` becomes "cpu".

    Args:
        config_file: path of a YAML file; its ``_BASE_`` is followed.
        opts: overrides as KEY VALUE pairs, as on the command line.
        cfg: what knows all keys, left as it is. Default: Detectron2's ``get_cfg()`` after
            :func:`add_ssd_config`; give one for keys of your own.

    Returns:
        the frozen config.

    Raises:
        KeyError: for a misspelt key, with the nearest existing ones.
        FileNotFoundError: if there is no such file.
        ValueError: options with dashes or an odd number of ``opts``, a value of another type than
            the key's, a wrong entry in DATASETS.REGISTER, a file without keys or that is its own
            ``_BASE_``.
        yaml.constructor.ConstructorError: if the YAML would run code; it is never executed.
    """
    from ssd.data.datasets import register_datasets

    cfg = read_config(config_file, opts, cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        _warn(f"No GPU: MODEL.DEVICE is cpu, not {cfg.MODEL.DEVICE}")
        cfg.MODEL.DEVICE = "cpu"
    if is_ssd(cfg) and (keys := _keys_without_effect(cfg)):
        _warn(f"Without effect on an SSD and its own loaders: {', '.join(keys)}")
    for node, key in ((cfg, "OUTPUT_DIR"), (cfg.MODEL, "WEIGHTS")):
        node[key] = os.path.expanduser(node[key])
    register_datasets(cfg)
    cfg.freeze()
    return cfg


def _warn(text: str) -> None:
    if comm.is_main_process():
        logging.getLogger(__name__).warning(text)


# Detectron2's keys, or groups of them, that SSD, its mapper and its loaders don't read.
_WITHOUT_EFFECT = (
    "MODEL.MASK_ON MODEL.KEYPOINT_ON MODEL.LOAD_PROPOSALS MODEL.ANCHOR_GENERATOR.SIZES "
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS MODEL.ANCHOR_GENERATOR.ANGLES "
    "MODEL.ANCHOR_GENERATOR.OFFSET MODEL.PROPOSAL_GENERATOR MODEL.RPN MODEL.ROI_HEADS "
    "MODEL.ROI_BOX_HEAD MODEL.ROI_MASK_HEAD MODEL.ROI_KEYPOINT_HEAD MODEL.SEM_SEG_HEAD "
    "MODEL.PANOPTIC_FPN MODEL.RETINANET INPUT.MIN_SIZE_TRAIN INPUT.MIN_SIZE_TRAIN_SAMPLING "
    "INPUT.MAX_SIZE_TRAIN INPUT.CROP INPUT.MASK_FORMAT DATASETS.PROPOSAL_FILES_TRAIN "
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN DATASETS.PROPOSAL_FILES_TEST "
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST DATALOADER.ASPECT_RATIO_GROUPING "
    "DATALOADER.REPEAT_THRESHOLD DATALOADER.REPEAT_SQRT TEST.AUG.MIN_SIZES TEST.AUG.MAX_SIZE "
    "TEST.KEYPOINT_OKS_SIGMAS"
).split()
_OF_RESNETS = ("MODEL.BACKBONE.FREEZE_AT", "MODEL.RESNETS", "MODEL.FPN")


def _keys_without_effect(cfg: CN) -> List[str]:
    found, unread = _flat(cfg), _WITHOUT_EFFECT
    if re.match("build_(vgg|mobilenet|regnet)", cfg.MODEL.SSD.BOTTOM_UP):
        unread = (*unread, *_OF_RESNETS)
    return [
        key
        for key, value in _flat(get_cfg()).items()
        if any(f"{key}.".startswith(f"{x}.") for x in unread)
        and not isinstance(value, CN)
        and found[key] != value
    ]


def read_config(config_file: str, opts: Sequence[str] = (), cfg: Optional[CN] = None) -> CN:
    """As :func:`load_config`, but registers nothing, keeps the device, and isn't frozen."""
    flags = [x for x in opts if str(x).startswith("--")]
    if flags:
        raise ValueError(f"{flags[0]} has to stand before the KEY VALUE pairs of the config")
    if len(opts) % 2:
        raise ValueError(f"config overrides are KEY VALUE pairs, got {list(map(str, opts))}")
    if cfg is None:
        cfg = get_cfg()
        add_ssd_config(cfg)
    default, cfg = cfg, cfg.clone()
    cfg.defrost()
    if config_file:
        if not PathManager.isfile(config_file):
            raise FileNotFoundError(
                f"--config-file {config_file!r} does not exist (current folder: {os.getcwd()})"
            )
        _merge(cfg, lambda: cfg.merge_from_file(config_file, allow_unsafe=False), config_file)
    _merge(cfg, lambda: cfg.merge_from_list(list(opts)), "the command line")
    found = _flat(cfg)
    for key, value in _flat(default).items():
        if value is not None and found[key] is None:
            raise ValueError(f"config key {key} has no value")
    return cfg


def _merge(cfg: CN, merge, source: str) -> None:
    try:
        merge()
    except (KeyError, AssertionError) as error:
        # yacs: "Non-existent config key: A.B" (file) or "Non-existent key: A.B" (list)
        text = str(error.args[0]) if error.args else ""
        if "Non-existent" not in text:
            raise
        key = text.rsplit(" ", 1)[-1]
        near = difflib.get_close_matches(key, _flat(cfg), n=3, cutoff=0.7)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise KeyError(f"unknown config key {key} in {source}{hint}") from None
    except ValueError as error:
        hint = "; a single value is written [value]" if "<class 'tuple'> vs." in str(error) else ""
        raise ValueError(f"{error}{hint} ({source})") from None
    except RecursionError:
        raise ValueError(f"the _BASE_ of {source} leads back to it") from None
    except (AttributeError, TypeError) as error:  # what YAML gives for it isn't a mapping
        raise ValueError(f"{source} or a _BASE_ of it holds no KEY: VALUE: {error}") from None


def _flat(cfg: CN, prefix: str = "") -> Dict[str, Any]:
    """Values by their whole keys, groups of keys too."""
    values = {}
    for key, value in cfg.items():
        values[prefix + key] = value
        if isinstance(value, CN):
            values.update(_flat(value, f"{prefix}{key}."))
    return values
