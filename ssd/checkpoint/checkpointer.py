"""Reads and writes checkpoints as data: nothing is unpickled that could run code."""

import logging
import os
import pickle
from typing import Any, Dict, Iterable, Optional

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor

from ssd.checkpoint import mmdet, vgg

__all__ = ["SSDCheckpointer"]

logger = logging.getLogger(__name__)

_WHERE = {
    "vgg16_reducedfc.pth": "https://s3.amazonaws.com/amdegroot-models/vgg16_reducedfc.pth",
    "vgg16-397923af.pth": "https://download.pytorch.org/models/vgg16-397923af.pth",
}


class SSDCheckpointer(DetectionCheckpointer):
    """A DetectionCheckpointer that recognises foreign weights and never leaves half a file.

    Reads, recognised by their parameter names: our own, MMDetection 3.x SSD and SSDLite, VGG16
    reduced-fc, torchvision's ``vgg16``.
    """

    def __init__(self, model, save_dir: str = "", *, cfg=None, strict: bool = False, **kwargs):
        """
        Args:
            cfg: says the order and scale of the input's channels, for VGG16 weights.
            strict: weights must fill the model completely (evaluation); otherwise what doesn't
                fit stays fresh and is named in the log (training).
        """
        super().__init__(model, save_dir, **kwargs)
        self._pixel_std = tuple(cfg.MODEL.PIXEL_STD) if cfg else (1.0, 1.0, 1.0)
        self._input_format = cfg.INPUT.FORMAT if cfg else "RGB"
        self._strict = strict

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
        return super()._load_file(filename)

    def _torch_load(self, filename: str) -> Dict[str, Any]:
        try:
            data = torch.load(filename, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"MODEL.WEIGHTS {filename} is not a readable checkpoint: {reason}"
            ) from None
        if isinstance(data, dict) and "model" not in data and "state_dict" in data:
            data = {"model": data["state_dict"]}
        state = data.get("model", data) if isinstance(data, dict) else None
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"MODEL.WEIGHTS {filename} holds no dictionary of weights")
        return data

    def _load_model(self, checkpoint: Dict[str, Any]):
        state = checkpoint["model"]
        total = len(state)
        backbone_only = False
        if mmdet.recognises(state):
            logger.info("Found an MMDetection SSD (%d entries)", total)
            state = mmdet.convert(state)
        elif vgg.recognises(state):
            state, found = vgg.convert(state, self._pixel_std, self._input_format)
            backbone_only = True
            logger.info("Found %s", found)
        result = super()._load_model({**checkpoint, "model": state})
        skipped = [
            f"{name} {tuple(a)} (expected {tuple(b)})" for name, a, b in result.incorrect_shapes
        ]
        missing = [name for name in result.missing_keys if "num_batches_tracked" not in name]
        if len(missing) + len(skipped) >= len(self.model.state_dict()):
            raise ValueError(
                "MODEL.WEIGHTS fits nothing in this model: it holds "
                f"{', '.join(list(state)[:3])}, …; the model needs {', '.join(missing[:3])}, …"
            )
        if self._strict and (missing or skipped or backbone_only):
            raise ValueError(
                "MODEL.WEIGHTS doesn't fill the model: missing "
                f"{_first(missing)}; of another shape {_first(skipped)}. "
                "Is MODEL.SSD.NUM_CLASSES that of the weights?"
            )
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
