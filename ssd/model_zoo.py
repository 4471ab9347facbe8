"""Names to configs and published weights: the functions of ``detectron2.model_zoo``, and zoo://.

A name is a lab's, such as "ssd_vgg16_size300" ("ssd_vgg16_size300/config.yaml" is the same), or
that of published weights, such as "ssd300_coco_mmdet", which stands for the lab that defines their
network. A lab's own weights are the first of ``weights_names(lab)``.

``MODEL.WEIGHTS zoo://NAME`` are published weights for everything that reads through Detectron2's
``PathManager``: the file of that name in the current folder or in Detectron2's cache
(``$FVCORE_CACHE``, by default ``~/.torch/iopath_cache``), or else a download into that cache.
"""

import difflib
import hashlib
import logging
import os
from pathlib import Path
from typing import List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathHandler, PathManager
from torch import nn

from ssd.checkpoint import SSDCheckpointer
from ssd.checkpoint.published import PUBLISHED, Weights, lab_folder
from ssd.config import load_config

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file", "names", "weights_names"]

logger = logging.getLogger(__name__)

PREFIX = "zoo://"


def names() -> List[str]:
    """Names of all labs."""
    return sorted(path.parent.name for path in lab_folder().glob("*/config.yaml"))


def weights_names(lab: Optional[str] = None) -> List[str]:
    """Names of all published weights, or of a lab's.

    Of a lab's those that a program can download come first, then those with just its settings.
    """
    if lab is None:
        return list(PUBLISHED)
    found = [name for name, weights in PUBLISHED.items() if weights.lab == lab]
    return sorted(found, key=lambda name: (bool(PUBLISHED[name].file), bool(PUBLISHED[name].opts)))


def get_config_file(name: str) -> str:
    """Path of a lab's ``config.yaml``.

    Raises:
        RuntimeError: there is no such name; the nearest names and all of them are given.
    """
    return str(lab_folder() / _lab(name) / "config.yaml")


def get_checkpoint_url(name: str) -> str:
    """Address of published weights; of Caffe's that of a page.

    Raises:
        RuntimeError: there is no such name, or nothing is published for the lab.
    """
    return PUBLISHED[_published(name)].url


def get_config(name: str, trained: bool = False, opts: Sequence[str] = ()) -> CfgNode:
    """A lab's config, not frozen; see also :func:`ssd.load_config`. Nothing is downloaded.

    Args:
        trained: ``MODEL.WEIGHTS`` becomes the published weights' zoo://NAME, and keys in which
            their definition differs from the lab's are set to it. If False, the config is just
            the lab's, whose ``MODEL.WEIGHTS`` are usually a backbone's.
        opts: overrides as KEY VALUE pairs.

    Raises:
        RuntimeError: there is no such name, or ``trained`` and nothing is published for the lab.
    """
    config_file = get_config_file(name)
    if trained:
        weights = _published(name)
        opts = ["MODEL.WEIGHTS", PREFIX + weights, *PUBLISHED[weights].opts, *opts]
    cfg = load_config(config_file, opts)
    cfg.defrost()
    return cfg


def get(name: str, trained: bool = False, device: Optional[str] = None) -> nn.Module:
    """A lab's model in training mode, with its weights.

    Args:
        trained: the published weights, which must fill the model. If False, those of the config's
            ``MODEL.WEIGHTS``, as far as they fit, as when training starts.
        device: instead of the config's ``MODEL.DEVICE``.

    Raises:
        FileNotFoundError: the config's weights aren't there, or published ones that only a
            browser can download.
        OSError: the download fails.
        ValueError: the published weights can't be read, don't fit, or aren't the published ones.
        See also :func:`get_config`.
    """
    cfg = get_config(name, trained)
    if device is not None:
        cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    SSDCheckpointer(model, cfg=cfg, strict=trained).load(cfg.MODEL.WEIGHTS)
    return model


class _ZooHandler(PathHandler):
    """zoo://NAME is the local file of published weights."""

    def _get_supported_prefixes(self) -> List[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, **kwargs) -> str:
        try:
            name = _published(path.removeprefix(PREFIX))
        except RuntimeError as error:
            raise ValueError(f"MODEL.WEIGHTS {path}: {error}") from None
        weights = PUBLISHED[name]
        logger.info("%s: %s, published for %s", path, weights.result, weights.lab)
        return _check_hash(_find_file(path, weights, **kwargs), weights)


# Another import of this module, such as importlib.reload's, replaces the handler.
PathManager.register_handler(_ZooHandler(), allow_override=True)


def _find_file(path: str, weights: Weights, **kwargs) -> str:
    if os.path.isfile(weights.file_name):
        return os.path.abspath(weights.file_name)
    by_hand = f"put {weights.file_name} into the current folder, {os.getcwd()}"
    if weights.file:  # the address isn't the file's
        raise FileNotFoundError(
            f"MODEL.WEIGHTS {path} can't be downloaded by a program: open {weights.url} in a "
            f"browser, unpack what it gives, and {by_hand}"
        )
    try:
        return PathManager.get_local_path(weights.url, **kwargs)
    except OSError as error:
        raise OSError(
            f"MODEL.WEIGHTS {path}: no download from {weights.url} ({error}); or {by_hand}"
        ) from error


def _check_hash(file: str, weights: Weights) -> str:
    if weights.sha256 is not None:
        found = hashlib.sha256(Path(file).read_bytes()).hexdigest()[: len(weights.sha256)]
        if found != weights.sha256:
            raise ValueError(
                f"{file} is not the published {weights.url}: its SHA-256 starts "
                f"with {found}, expected {weights.sha256}. It may be a broken download: delete it "
                "and try again. Weights of your own: rename the file, set MODEL.WEIGHTS to it"
            )
    return file


def _lab(name: str) -> str:
    """The lab of a lab's or weights' name."""
    name, labs = name.removesuffix("/config.yaml"), names()
    if name in PUBLISHED:
        return PUBLISHED[name].lab
    if name in labs:
        return name
    near = difflib.get_close_matches(name, [*labs, *PUBLISHED], n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise RuntimeError(
        f"no lab and no published weights are named {name!r}{hint} The labs are "
        f"{', '.join(labs)}; the weights are {', '.join(PUBLISHED)}"
    )


def _published(name: str) -> str:
    """The weights of a lab's or weights' name."""
    lab = _lab(name)
    found = [name] if name in PUBLISHED else weights_names(lab)
    if not found:
        with_weights = sorted({weights.lab for weights in PUBLISHED.values()})
        raise RuntimeError(
            f"no weights are published for {lab!r}, only for {', '.join(with_weights)}. "
            "Train it, or set MODEL.WEIGHTS to a file of yours"
        )
    return found[0]
