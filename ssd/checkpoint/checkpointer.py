"""Reads and writes checkpoints as data: nothing is unpickled that could run code."""

import io
import logging
import os
from typing import Any, Dict, Iterable, List, Optional, Tuple

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from ssd.checkpoint.classes import (
    carry_rows,
    dataset_classes,
    known_classes,
    match_classes,
    parse_class_map,
    same_classes,
)
from ssd.checkpoint.files import read_file
from ssd.checkpoint.lineage import Lineage, State, count_classes, predictors
from ssd.checkpoint.published import BACKBONE_URLS
from ssd.checkpoint.recognition import (
    class_names,
    definition,
    differences,
    find_weights,
    identify,
)

__all__ = ["SSDCheckpointer", "write_atomically"]

logger = logging.getLogger(__name__)


class SSDCheckpointer(DetectionCheckpointer):
    """A DetectionCheckpointer that recognises foreign weights and never leaves half a file.

    Reads our own files and those of every lineage in docs/checkpoints.md, detectors and backbones,
    recognised by their parameters' names. It says in one line what it found and did, and warns
    where the config has other default boxes, another input or other classes than the weights were
    made with.

    Attributes:
        classes: names of the classes of the file that was read last; None if it holds none.
        lineage: of that file; None if it has our own names.
    """

    def __init__(self, model, save_dir: str = "", *, cfg=None, strict: bool = False, **kwargs):
        """
        Args:
            cfg: its channels' order and scale adapt the first layer; the class names of its data
                set, or MODEL.SSD.CLASS_MAP, say which classes of a detector training starts from.
            strict: weights must fill the model completely (evaluation); otherwise what doesn't
                fit stays fresh and is named in the log (training). With SOLVER.EMA.ENABLED
                evaluation takes the averaged weights of a file that has them.
        """
        super().__init__(model, save_dir, **kwargs)
        self._cfg = cfg
        self._strict = strict
        self._use_average = bool(strict and cfg and cfg.SOLVER.EMA.ENABLED)
        self._resuming = False
        self.classes: Optional[List[str]] = None
        self.lineage: Optional[Lineage] = None

    def load(self, path: str, checkpointables: Optional[Iterable[str]] = None) -> Dict[str, Any]:
        """See :class:`DetectionCheckpointer`.

        Raises:
            FileNotFoundError: names ``MODEL.WEIGHTS`` and where known weights come from.
            ValueError: for a file that isn't a checkpoint, or doesn't fit.
        """
        if path and "://" not in path and not os.path.isfile(path):
            where = BACKBONE_URLS.get(os.path.basename(path))
            hint = f"; it can be downloaded from {where}" if where else ""
            raise FileNotFoundError(
                f"MODEL.WEIGHTS {path!r} does not exist (current folder: {os.getcwd()}){hint}"
            )
        if self._strict and not path:
            raise ValueError("evaluation needs weights: MODEL.WEIGHTS is empty")
        # resume_or_load gives [] for what isn't one
        resuming = bool(self.save_dir) and checkpointables is None
        self._resuming = resuming and path == self.get_checkpoint_file()
        self._path = path
        self._parsed_url_during_load = None  # Detectron2 leaves it behind when a load fails
        return super().load(path, checkpointables)

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """See fvcore's :class:`Checkpointer`.

        Raises:
            ValueError: of several processes some would go on from another checkpoint, as where
                machines have folders of their own.
        """
        if resume:
            found = self.has_checkpoint() and os.path.basename(self.get_checkpoint_file())
            if len(names := set(comm.all_gather(found or "none"))) > 1:
                raise ValueError(
                    f"--resume: in {self.save_dir} the processes find different checkpoints, "
                    f"{', '.join(sorted(names))}; copy the folder to all machines"
                )
        return super().resume_or_load(path, resume=resume)

    def save(self, name: str, tag: bool = True, **extra) -> None:
        """Writes ``NAME.pth`` beside, then renames it: an error leaves the earlier file whole.

        Args:
            tag: whether ``--resume`` goes on from this file.

        Raises:
            FloatingPointError: a weight isn't finite; nothing is written.
            OSError: it can't be written.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        data = {"model": self.model.state_dict()}
        tensors = {k: x for k, x in data["model"].items() if isinstance(x, torch.Tensor)}
        bad = [key for key, x in tensors.items() if not x.isfinite().all()]
        if bad:
            raise FloatingPointError(
                f"{name}.pth is not saved: {_first(bad)} hold NaN or infinite values. Lower "
                "SOLVER.BASE_LR or raise SOLVER.WARMUP_ITERS; --resume goes on from what was saved"
            )
        if names := _own_classes(self._cfg):
            data["classes"] = names
        data.update({key: item.state_dict() for key, item in self.checkpointables.items()})
        data.update(extra)
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        write_atomically(path, lambda file: torch.save(data, file))
        if tag:
            self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, lambda file: file.write(last_filename_basename.encode()))

    def _load_file(self, filename: str) -> Dict[str, Any]:
        data = read_file(filename)
        if self._use_average:
            if "ema" in data:
                logger.info("Taking the averaged weights (SOLVER.EMA)")
                data["model"] = data.pop("ema")
            else:
                logger.warning("There are no averaged weights (SOLVER.EMA) in %s", filename)
        elif not self._resuming and "ema" in data:
            logger.warning(
                "%s also holds averaged weights: %s takes those", filename,
                "SOLVER.EMA.ENABLED True" if self._strict else "model_converters/convert.py --ema",
            )  # fmt: skip
        return find_weights(data, filename)

    def _load_model(self, checkpoint: Dict[str, Any]):
        state, found, advice = self._to_ours(checkpoint)
        self.classes = class_names(checkpoint)
        checkpoint.pop("classes", None)
        if self._strict or self._resuming:
            self._check_classes()
        else:
            state = self._carry_classes(state, found)
        own = self.model.state_dict()
        for name, value in state.items():
            if name in own and value.is_floating_point() and not value.isfinite().all():
                raise ValueError(
                    f"MODEL.WEIGHTS {self._path} ({found}): {name} holds NaN or infinite values"
                )
        checkpoint["model"] = state
        checkpoint["matching_heuristics"] = False
        result = super()._load_model(checkpoint)
        checkpoint.pop("matching_heuristics")
        # fvcore counts those of another shape as missing too
        other_shape = {name: (tuple(a), tuple(b)) for name, a, b in result.incorrect_shapes}
        unfilled = [name for name in result.missing_keys if "num_batches_tracked" not in name]
        needed = [name for name in own if "num_batches_tracked" not in name]
        if len(unfilled) >= len(needed):
            raise ValueError(
                f"MODEL.WEIGHTS fits nothing in this model: it holds {_first(list(state))}; the "
                f"model needs {_first(unfilled)}{advice}"
            )
        if (self._strict or self._resuming) and unfilled:
            missing = [name for name in unfilled if name not in other_shape]
            shapes = [f"{name} {a} (expected {b})" for name, (a, b) in other_shape.items()]
            problems = [f"missing {_first(missing)}"] if missing else []
            problems += [
                f"of another shape {_first(shapes)}; is MODEL.SSD.NUM_CLASSES that of the weights?"
            ] if shapes else []  # fmt: skip
            what = "MODEL.WEIGHTS" if self._strict else f"--resume: {self._path}"
            raise ValueError(f"{what} doesn't fill the model: {'; '.join(problems)}{advice}")
        return result

    def _to_ours(self, checkpoint: Dict[str, Any]) -> Tuple[State, str, str]:
        """A file's weights by our names, what they are, and :meth:`_check_definition`'s advice."""
        state, lineage = identify(checkpoint, self.model.state_dict())
        self.lineage = lineage
        if lineage is None:
            return state, "weights", ""
        cfg = self._cfg
        state = lineage.to_ours(state, *([cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_STD] if cfg else []))
        counts = count_classes(state)
        done = f", {counts[0]} classes" if counts else ""
        done += ", background moved from first to last" if lineage.background_first else ""
        if cfg and cfg.INPUT.FORMAT != lineage.input_format:
            done += f", first layer turned from {lineage.input_format} to {cfg.INPUT.FORMAT}"
        logger.info("Found %s%s", lineage.title, done)
        advice = self._check_definition(lineage, counts) if cfg else ""
        return state, lineage.title, advice

    def _check_definition(self, lineage: Lineage, counts: List[int]) -> str:
        """Warns of keys in which the config differs from what the weights were made with; gives
        the lab that fits them, for errors. ``counts``: the classes of each level's predictor."""
        others, advice = differences(self._cfg, lineage.config), ""
        if found := definition(lineage.key, len(counts), counts[0] if counts else 0):
            weights, expected = found
            others += differences(self._cfg, expected)
            advice = f"; the lab of {lineage.title} is {weights.lab}"
            advice += f" with {weights.options}" if weights.opts else ""
        if others:
            logger.warning(
                "%s was made with other values than the config's: %s%s",
                lineage.title, "; ".join(others), advice,
            )  # fmt: skip
        return advice

    def _check_classes(self) -> None:
        """Warns if the data set's classes aren't those that the weights were trained on."""
        names = _own_classes(self._cfg, evaluation=self._strict) if self.classes else None
        if names and len(names) == len(self.classes) and not same_classes(names, self.classes):
            logger.warning(
                "MODEL.WEIGHTS was trained on the classes %s, but the data set's are %s: each "
                "counts as the one in its place",
                _first(self.classes, 10), _first(names, 10),
            )  # fmt: skip

    def _carry_classes(self, state: State, found: str) -> State:
        """The rows of matching classes in the class predictors of a file with other classes."""
        cfg, own = self._cfg, self.model.state_dict()
        if not cfg:
            return state
        given, expected = predictors(state), predictors(own)
        # of other default boxes a layer stays fresh, and is named; its size alone may be the same
        other = [cls for cls, a in given.items() if expected.get(cls, a) != a]
        state = {k: x for k, x in state.items() if k.rpartition(".")[0] not in other}
        levels = {cls: a for cls, a in given.items() if expected.get(cls) == a}
        if not levels:
            return state
        num_source, num_target = count_classes(state)[0], cfg.MODEL.SSD.NUM_CLASSES
        rows = self._source_rows(num_source)
        if max(rows) < 0 or (num_source == num_target and rows == list(range(num_target))):
            return state
        for cls, num_anchors in levels.items():
            for name in (f"{cls}.weight", f"{cls}.bias"):
                if state[name].shape[1:] == own[name].shape[1:]:
                    state[name] = carry_rows(state[name], own[name], num_anchors, rows)
        fresh = [name for name, row in zip(_own_classes(cfg) or range(num_target), rows) if row < 0]
        logger.info(
            "%d of %d classes start from those of %s%s", num_target - len(fresh), num_target, found,
            f"; fresh: {_first([str(name) for name in fresh])}" if fresh else "",
        )  # fmt: skip
        return state

    def _source_rows(self, num_source: int) -> List[int]:
        """For each class of the model the number of that of the file it starts from, or -1."""
        cfg = self._cfg
        num_target = cfg.MODEL.SSD.NUM_CLASSES
        source = self.classes
        if not (source and len(source) == num_source):
            # a foreign detector's are most likely the usual ones; one's own could be any
            source = known_classes(num_source) if self.lineage else None
        if cfg.MODEL.SSD.CLASS_MAP:
            return parse_class_map(cfg.MODEL.SSD.CLASS_MAP, source, num_source, num_target)
        target = _own_classes(cfg)
        if source and target:
            rows = match_classes(source, target)
            in_place = all(row in (-1, number) for number, row in enumerate(rows))
            # as they are, for classes renamed
            return list(range(num_target)) if num_source == num_target and in_place else rows
        if target and num_source != num_target:
            logger.warning(
                "The names of the %d classes of MODEL.WEIGHTS aren't known: MODEL.SSD.CLASS_MAP "
                "says which of them the classes start from, otherwise all are fresh", num_source,
            )  # fmt: skip
        return [-1] * num_target


def _own_classes(cfg, evaluation: bool = False) -> Optional[List[str]]:
    """Names of the config's classes, if its data set is known and has as many.

    An evaluation asks its test sets first, and reads them for this; a training has read its own.
    """
    if not cfg:
        return None
    train, test = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    for name in [*test, *train] if evaluation else [*train, *test]:
        classes = dataset_classes(name, read=evaluation and name in test)
        if classes and len(classes) == cfg.MODEL.SSD.NUM_CLASSES:
            return classes
    return None


def _first(names, count: int = 4) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if names[count:] else "")


class _Output(io.BufferedWriter):
    """Remembers a write that failed, for which torch.save raises an error of its own."""

    error: Optional[OSError] = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def write_atomically(path: str, write) -> None:
    """``write`` gets a file beside ``path``, which then replaces it: an error leaves it whole."""
    temporary, file = f"{path}.{os.getpid()}.tmp", None
    try:
        with _Output(io.FileIO(temporary, "wb")) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        cause = error if isinstance(error, OSError) else getattr(file, "error", None)
        if cause is None:
            raise
        raise OSError(
            cause.errno, f"{cause.strerror}; what was saved before is whole (OUTPUT_DIR)", path
        ) from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
