"""Reads and writes checkpoints as data: nothing is unpickled that could run code."""

import logging
import os
import pickle
import re
from typing import Any, Dict, Iterable, Optional

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor

from ssd.checkpoint import mmdet, mobilenet, torchvision, vgg

__all__ = ["SSDCheckpointer"]

logger = logging.getLogger(__name__)

_TORCHVISION = "https://download.pytorch.org/models/"
_WHERE = {
    "vgg16_reducedfc.pth": "https://s3.amazonaws.com/amdegroot-models/vgg16_reducedfc.pth",
    "mobilenet_v1_with_relu_69_5.pth": (
        "https://storage.googleapis.com/models-hao/mobilenet_v1_with_relu_69_5.pth"
    ),
    "mobilenetv3-large-1cd25616.pth": (
        "https://github.com/d-li14/mobilenetv3.pytorch/raw/master/pretrained/"
        "mobilenetv3-large-1cd25616.pth"
    ),
    **{
        name: _TORCHVISION + name
        for name in (
            "vgg16-397923af.pth",
            "vgg16_features-amdegroot-88682ab5.pth",
            "mobilenet_v2-b0353104.pth",
            "resnet50-0676ba61.pth",
        )
    },
}


class SSDCheckpointer(DetectionCheckpointer):
    """A DetectionCheckpointer that recognises foreign weights and never leaves half a file.

    Reads, recognised by their parameter names: our own; MMDetection 3.x SSD and SSDLite;
    torchvision's SSD300 and SSDLite; of backbones VGG16 reduced-fc and torchvision's ``vgg16``,
    ``mobilenet_v2``, ``mobilenet_v3_large`` and ResNets, qfgaohao's MobileNetV1, d-li14's V3.
    """

    def __init__(self, model, save_dir: str = "", *, cfg=None, strict: bool = False, **kwargs):
        """
        Args:
            cfg: says the order and scale of the input's channels, for VGG16 weights.
            strict: weights must fill the model completely (evaluation); otherwise what doesn't
                fit stays fresh and is named in the log (training). With SOLVER.EMA.ENABLED
                evaluation takes the averaged weights of a file that has them.
        """
        super().__init__(model, save_dir, **kwargs)
        self._pixel_std = tuple(cfg.MODEL.PIXEL_STD) if cfg else (1.0, 1.0, 1.0)
        self._input_format = cfg.INPUT.FORMAT if cfg else "RGB"
        self._strict = strict
        self._use_average = bool(strict and cfg and cfg.SOLVER.EMA.ENABLED)

    def load(self, path: str, checkpointables: Optional[Iterable[str]] = None) -> Dict[str, Any]:
        """See :class:`DetectionCheckpointer`.

        Raises:
            FileNotFoundError: names ``MODEL.WEIGHTS`` and where known weights come from.
            ValueError: for a file that isn't a checkpoint, or doesn't fit.
        """
        if path and "://" not in path and not os.path.isfile(path):
            where = _WHERE.get(os.path.basename(path))
            hint = f"; it can be downloaded from {where}" if where else ""
            raise FileNotFoundError(
                f"MODEL.WEIGHTS {path!r} does not exist (current folder: {os.getcwd()}){hint}"
            )
        if self._strict and not path:
            raise ValueError("evaluation needs weights: MODEL.WEIGHTS is empty")
        self._parsed_url_during_load = None  # Detectron2 leaves it behind when a load fails
        return super().load(path, checkpointables)

    def save(self, name: str, tag: bool = True, **extra) -> None:
        """Writes ``NAME.pth`` beside, then renames it: an error leaves the earlier file whole.

        Args:
            tag: whether ``--resume`` goes on from this file.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        data = {"model": self.model.state_dict()}
        data.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        data.update(extra)
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        _write_atomically(path, lambda file: torch.save(data, file))
        if tag:
            self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        _write_atomically(path, lambda file: file.write(last_filename_basename.encode()))

    def _load_file(self, filename: str) -> Dict[str, Any]:
        if filename.endswith((".pkl", ".pyth")):
            raise ValueError(
                f"MODEL.WEIGHTS {filename}: pickle files can run code when they are read; "
                "convert it to .pth first"
            )
        try:
            data = torch.load(filename, map_location="cpu", weights_only=True)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # torch raises nearly anything for a broken file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if isinstance(error, pickle.UnpicklingError):  # torch's advice is to read it unsafely
                unsafe = re.search(r"GLOBAL (\S+)", str(error))
                reason = f"holds {unsafe[1]}, which could run code" if unsafe else "no torch file"
            raise ValueError(
                f"MODEL.WEIGHTS {filename} is not a readable checkpoint: {reason}"
            ) from None
        if isinstance(data, dict) and self._use_average:
            if "ema" in data:
                logger.info("Taking the averaged weights (SOLVER.EMA)")
                data["model"] = data.pop("ema")
            else:
                logger.warning("There are no averaged weights (SOLVER.EMA) in %s", filename)
        if isinstance(data, dict) and "model" not in data:
            data = {"model": data.get("state_dict", data)}
        state = data["model"] if isinstance(data, dict) else None
        if not (isinstance(state, dict) and state) or not all(
            isinstance(value, Tensor) for value in state.values()
        ):
            raise ValueError(f"MODEL.WEIGHTS {filename} holds no dictionary of weights")
        return data

    def _load_model(self, checkpoint: Dict[str, Any]):
        state = {name.removeprefix("module."): x for name, x in checkpoint["model"].items()}
        if mmdet.recognises(state):
            logger.info("Found an MMDetection SSD")
            state = mmdet.convert(state)
        elif torchvision.recognises(state):
            logger.info("Found a torchvision SSD; its background class goes from first to last")
            state = torchvision.convert(state)
        elif kind := torchvision.recognises_backbone(state):
            logger.info("Found torchvision's %s", kind)
            state = torchvision.convert_backbone(state, self._pixel_std, self._input_format)
        elif kind := mobilenet.recognises(state):
            logger.info("Found a %s classifier", kind)
            state = mobilenet.convert(state, self._pixel_std, self._input_format)
        elif vgg.recognises(state):
            state, found = vgg.convert(state, self._pixel_std, self._input_format)
            logger.info("Found %s", found)
        checkpoint["model"] = state
        result = super()._load_model(checkpoint)
        # fvcore counts those of another shape as missing too
        other_shape = {name: (tuple(a), tuple(b)) for name, a, b in result.incorrect_shapes}
        unfilled = [name for name in result.missing_keys if "num_batches_tracked" not in name]
        needed = [name for name in self.model.state_dict() if "num_batches_tracked" not in name]
        if len(unfilled) >= len(needed):
            raise ValueError(
                "MODEL.WEIGHTS fits nothing in this model: it holds "
                f"{_first(list(state))}; the model needs {_first(unfilled)}"
            )
        if self._strict and unfilled:
            missing = [name for name in unfilled if name not in other_shape]
            shapes = [f"{name} {a} (expected {b})" for name, (a, b) in other_shape.items()]
            problems = [f"missing {_first(missing)}"] if missing else []
            problems += [
                f"of another shape {_first(shapes)}; is MODEL.SSD.NUM_CLASSES that of the weights?"
            ] if shapes else []  # fmt: skip
            raise ValueError(f"MODEL.WEIGHTS doesn't fill the model: {'; '.join(problems)}")
        return result


def _first(names, count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if names[count:] else "")


def _write_atomically(path: str, write) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}; what was saved before is whole (OUTPUT_DIR)", path
        ) from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
