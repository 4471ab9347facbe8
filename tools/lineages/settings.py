"""Where the sources disagree, and what each lab sets: the second half of docs/fidelity.md."""

from typing import Callable, List, Sequence, Tuple

from lineages.rows import ROOT, lab_config

__all__ = ["TITLE", "settings_markdown"]

TITLE = "## Where sources disagree, and what each lab sets"
Column = Tuple[str, str, Callable]  # title, config key, cfg → text


def _number(value: float) -> str:
    return f"{value:g}"


def _list(values: Sequence[float]) -> str:
    """As few words as possible: one number if all are the same."""
    values = [_number(value) for value in values]
    return values[0] if len(set(values)) == 1 else " ".join(values)


def _if(enabled: bool, text: str) -> str:
    return text if enabled else "–"


def _crop(cfg) -> str:
    crop = cfg.INPUT.IOU_CROP
    return _if(crop.ENABLED, f"{crop.SAMPLER}, {crop.TRIALS}")


def _distortion(cfg) -> str:
    photo = cfg.INPUT.PHOTOMETRIC
    return _if(photo.ENABLED, f"{photo.STYLE}, p {_number(photo.PROB)}")


def _photo(text: Callable) -> Callable:
    return lambda cfg: _if(cfg.INPUT.PHOTOMETRIC.ENABLED, text(cfg.INPUT.PHOTOMETRIC))


def _schedule(cfg) -> str:
    solver = cfg.SOLVER
    epochs = bool(solver.MAX_EPOCHS)
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        return f"cosine, each {solver.COSINE_STEP if epochs else 'iteration'}"
    steps = solver.STEPS_EPOCHS if epochs else [f"{_number(step / 1000)}k" for step in solver.STEPS]
    return f"×{_number(solver.GAMMA)} at {', '.join(map(str, steps))}"


def _length(cfg) -> str:
    solver = cfg.SOLVER
    if not solver.MAX_EPOCHS:
        return f"{_number(solver.MAX_ITER / 1000)}k iterations"
    repeat = solver.REPEAT_DATASET
    return f"{solver.MAX_EPOCHS} epochs" + (f", data × {repeat}" if repeat > 1 else "")


def _warmup(cfg) -> str:
    solver = cfg.SOLVER
    return _if(solver.WARMUP_ITERS, f"{solver.WARMUP_ITERS} from ×{solver.WARMUP_FACTOR:.3g}")


def _batch(cfg) -> str:
    return f"{cfg.SOLVER.IMS_PER_BATCH}, {_number(cfg.SOLVER.BASE_LR)}"


def _decay(cfg) -> str:
    solver = cfg.SOLVER
    values = (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM, solver.WEIGHT_DECAY_BIAS)
    return " / ".join(map(_number, values))


TABLES: List[Tuple[str, List[Column]]] = [
    (
        "Input and default boxes",
        [
            ("input", "INPUT_SIZE", lambda c: "×".join(map(str, c.MODEL.SSD.INPUT_SIZE))),
            ("order", "INPUT.FORMAT", lambda c: c.INPUT.FORMAT),
            ("mean", "PIXEL_MEAN", lambda c: _list(c.MODEL.PIXEL_MEAN)),
            ("std", "PIXEL_STD", lambda c: _list(c.MODEL.PIXEL_STD)),
            ("classes", "NUM_CLASSES", lambda c: str(c.MODEL.SSD.NUM_CLASSES)),
            ("box clip", "DEFAULT_BOXES.CLIP", lambda c: c.MODEL.SSD.DEFAULT_BOXES.CLIP),
            (
                "padding",
                "SAME_PADDING",
                lambda c: "TensorFlow" if c.MODEL.SSD.SAME_PADDING else "torch",
            ),
        ],
    ),
    (
        "Matching and loss",
        [
            ("first match", "MATCHING.BEST", lambda c: c.MODEL.SSD.MATCHING.BEST),
            ("divisor", "LOSS.NORMALIZER", lambda c: c.MODEL.SSD.LOSS.NORMALIZER),
            (
                "negatives without objects",
                "LOSS.NEGATIVES_WITHOUT_POSITIVES",
                lambda c: str(c.MODEL.SSD.LOSS.NEGATIVES_WITHOUT_POSITIVES),
            ),
            ("scores", "SCORE_FUNCTION", lambda c: c.MODEL.SSD.SCORE_FUNCTION),
            (
                "images without objects",
                "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
                lambda c: "left out" if c.DATALOADER.FILTER_EMPTY_ANNOTATIONS else "used",
            ),
        ],
    ),
    (
        "Detection",
        [
            ("score >", "SCORE_THRESH_TEST", lambda c: _number(c.MODEL.SSD.SCORE_THRESH_TEST)),
            (
                "candidates",
                "TOPK_CANDIDATES_TEST, TOPK_PER",
                lambda c: f"{c.MODEL.SSD.TOPK_CANDIDATES_TEST} per {c.MODEL.SSD.TOPK_PER}",
            ),
            ("NMS >", "NMS_THRESH_TEST", lambda c: _number(c.MODEL.SSD.NMS_THRESH_TEST)),
            ("clip", "CLIP_TEST", lambda c: c.MODEL.SSD.CLIP_TEST.replace("_", " ")),
            ("kept", "TEST.DETECTIONS_PER_IMAGE", lambda c: str(c.TEST.DETECTIONS_PER_IMAGE)),
            ("decode clamp", "BBOX_REG_CLAMP", lambda c: c.MODEL.SSD.BBOX_REG_CLAMP),
        ],
    ),
    (
        "Augmentation",
        [
            ("crop: sampler, trials", "IOU_CROP.SAMPLER, TRIALS", _crop),
            (
                "objects",
                "IOU_CROP.OBJECTS",
                lambda c: _if(c.INPUT.IOU_CROP.ENABLED, c.INPUT.IOU_CROP.OBJECTS),
            ),
            (
                "IoU ≥",
                "IOU_CROP.MIN_IOUS",
                lambda c: _if(c.INPUT.IOU_CROP.ENABLED, _list(c.INPUT.IOU_CROP.MIN_IOUS)),
            ),
            (
                "expand",
                "EXPAND.MAX_RATIO",
                lambda c: _if(c.INPUT.EXPAND.ENABLED, f"1–{_number(c.INPUT.EXPAND.MAX_RATIO)}"),
            ),
            ("distortion: style", "PHOTOMETRIC.STYLE, PROB", _distortion),
            ("brightness", "PHOTOMETRIC.BRIGHTNESS", _photo(lambda p: f"±{_number(p.BRIGHTNESS)}")),
            ("hue", "PHOTOMETRIC.HUE, × 2°", _photo(lambda p: f"±{_number(2 * p.HUE)}°")),
            (
                "channel order",
                "PHOTOMETRIC.SWAP_CHANNELS_PROB",
                _photo(lambda p: f"p {_number(p.SWAP_CHANNELS_PROB)}"),
            ),
            (
                "when",
                "PHOTOMETRIC.LAST",
                _photo(lambda p: "after the warp" if p.LAST else "before"),
            ),
        ],
    ),
    (
        "Optimizer and schedule",
        [
            ("batch, rate", "IMS_PER_BATCH, BASE_LR", _batch),
            ("rate falls", "STEPS, STEPS_EPOCHS, COSINE_STEP", _schedule),
            ("length", "MAX_ITER, MAX_EPOCHS, REPEAT_DATASET", _length),
            ("warm-up", "WARMUP_ITERS, WARMUP_FACTOR", _warmup),
            ("decay: weights / norm / biases", "WEIGHT_DECAY, …_NORM, …_BIAS", _decay),
            ("biases' rate", "BIAS_LR_FACTOR", lambda c: f"×{_number(c.SOLVER.BIAS_LR_FACTOR)}"),
        ],
    ),
]

# Known, and not closed by a key. In brief; what a source does is from its code or documentation.
DEVIATIONS = """\
- **All.** Equal are the definitions: random draws, their order and the last batch of an epoch are
  ours. Expand, crop and resize sample the image once, in the sources in several steps. Crowds and
  ignored objects are left out before the augmentation. Detections are clipped to the image.
- **Caffe.** Draws the interpolation of the resize; here it's bilinear. Its crop also counts objects
  whose centre lies outside, which it then drops. BGR images; here RGB, the first layer reversed.
  Its released COCO weights have had 400k (300) and 360k (512) iterations; the labs have the
  paper's 240k.
- **MMDetection.** Distorts colours in float32 without clipping, here in 8 bits with clipping.
  Fills with the mean cut to integers (123, 116, 103), here rounded. Ignored objects count in its
  crop.
- **torchvision.** Returns detections without area, which clipping leaves of boxes outside the
  image; here they are dropped before NMS, so that they take no place among the best. Groups images
  by aspect ratio.
- **lufficc/SSD, qfgaohao/pytorch-ssd.** Distort colours in float32 without clipping. A batch
  without positives gives NaN, here 0. lufficc's crop tests the IoU of all objects, also of those
  that it drops. An earlier MobileNetV3 of lufficc's has 1×1 kernels in the extra layers; that its
  published file belongs to the later one isn't verified.
- **VGG16 on VOC.** The labs are Caffe's definition. The model zoo's weights for them are lufficc's,
  and it sets lufficc's default boxes with them, but 400 candidates per class in place of all.
- **NVIDIA.** IoU > 0.5, here ≥. Tests with PIL's antialiased resize, here without antialiasing.
  Distorts after the resize, in one order. Trains in float16. DALI's own operators and the CUDA
  box encoder weren't read.
- **TensorFlow.** Trains with RMSProp (0.004, ×0.95 every 800k steps) and other crops (coverage of
  objects, not IoU); the lab has MMDetection's schedule and Caffe's crops. Its mining first drops
  near duplicates (NMS at 0.99 of the predicted boxes). Its ratio is 0.3333. It keeps 100 of each
  class after NMS; here 200 enter it. Its resize has no half-pixel centres (not verified).
"""


def settings_markdown() -> str:
    """Tables of all labs' settings and the list of deviations."""
    labs = sorted(path.parent.name for path in (ROOT / "labs").glob("*/config.yaml"))
    configs = {lab: lab_config(lab) for lab in labs}
    parts = [
        TITLE + "\n",
        "Generated from the configs. In brackets the key, under `MODEL`, `MODEL.SSD`, `INPUT` or "
        "`SOLVER`; ssd/config.py says which source has which value.\n",
    ]
    for title, columns in TABLES:
        lines = [
            "| " + " | ".join(["lab", *(f"{name} ({key})" for name, key, _ in columns)]) + " |"
        ]
        lines.append("|" + "---|" * (len(columns) + 1))
        for lab, cfg in configs.items():
            lines.append("| " + " | ".join([lab, *(text(cfg) for _, _, text in columns)]) + " |")
        parts += [f"### {title}\n", "\n".join(lines) + "\n"]
    return "\n".join([*parts, "### Known deviations\n", DEVIATIONS])
