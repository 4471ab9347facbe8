"""Reads the files that published weights come in as data: nothing in them can run code."""

import contextlib
import io
import math
import os
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from typing import Any, Dict

import numpy as np
import torch
from torch import Tensor

__all__ = ["read_file"]

_TORCH_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # 0x1950a86a20f9469cfc6c, as pickled


class _Inert:
    """Stands for an object of another package: keeps what it was made of and does nothing."""

    state: Any = None

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.args = args
        return self

    def __setstate__(self, state):
        self.state = state


class _Dict(_Inert):
    # torch fills dictionaries and lists of the built-in types only
    def __new__(cls, *args):
        return OrderedDict(args[0] if args and isinstance(args[0], (dict, list)) else ())


class _List(_Inert):
    def __new__(cls, *args):
        return []


class _Bytes(_Inert):
    # how pickle writes bytes for Python 2
    def __new__(cls, text="", encoding="latin1"):
        return text.encode("latin1")


# What training checkpoints hold besides weights. Only the name is looked at, nothing is imported.
# getattr: MMEngine's HistoryBuffer holds its own methods, as getattr(HistoryBuffer, "min").
_STAND_INS = {
    _Inert: """
        numpy.dtype numpy.ndarray
        numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct
        numpy.core.multiarray.scalar numpy._core.multiarray.scalar
        numpy.core.numeric._frombuffer numpy._core.numeric._frombuffer
        mmengine.logging.history_buffer.HistoryBuffer builtins.getattr
        builtins.bool builtins.dict builtins.float builtins.int builtins.list builtins.set
        builtins.str builtins.tuple argparse.Namespace
        pathlib.PosixPath pathlib.PurePosixPath pathlib.WindowsPath pathlib.PureWindowsPath
        pathlib._local.PosixPath pathlib._local.WindowsPath""",
    _Dict: """
        collections.OrderedDict collections.defaultdict addict.addict.Dict
        yacs.config.CfgNode fvcore.common.config.CfgNode detectron2.config.config.CfgNode
        mmcv.utils.config.ConfigDict mmengine.config.config.ConfigDict""",
    _List: "collections.deque",
    _Bytes: "_codecs.encode builtins.bytes",
}


def _stand_in(path: str, base: type) -> type:
    module, _, name = path.rpartition(".")
    return type(name, (base,), {"__module__": module, "__qualname__": name})


_ALLOWED = {path: _stand_in(path, base) for base, t in _STAND_INS.items() for path in t.split()}

# Of caffe.proto what holds weights: name, number, type; * is repeated. Packed numbers are read as
# bytes, which is at once instead of seconds; not packed, which Caffe never writes, is refused.
_NET_PARAMETER = {
    "BlobShape": "dim 1 int64*",
    "BlobProto": "num 1 int32, channels 2 int32, height 3 int32, width 4 int32, data 5 bytes*, "
    "shape 7 BlobShape, double_data 8 bytes*",
    "V0LayerParameter": "name 1 string, blobs 50 BlobProto*",
    "V1LayerParameter": "layer 1 V0LayerParameter, name 4 string, blobs 6 BlobProto*",
    "LayerParameter": "name 1 string, blobs 7 BlobProto*",
    "NetParameter": "layers 2 V1LayerParameter*, layer 100 LayerParameter*",
}


def read_file(path: str) -> Dict[str, Any]:
    """Reads a checkpoint, whose format is recognised by its content.

    - torch's zip and legacy files: the dictionary that was saved. Configs, paths, histories and
      numpy values beside the weights are read as inert stand-ins (torch >= 2.5; before, refused).
    - safetensors: ``{"model": ..., "metadata": the header's, if there is one}``.
    - Pickle: Detectron2's model zoo files as they are; other dictionaries are taken for Caffe2's,
      ``{"model": ..., "__author__": "Caffe2", "matching_heuristics": True}``. Torch tensors in a
      plain pickle are refused.
    - Caffe's ``.caffemodel``: ``{"model": {"conv1_1.weight": ..., "conv1_1.bias": ...}}``, float32,
      further blobs of a layer as ``.2``, ``.3``. A blob of old shape 1 x 1 x 1 x N gives (N,).

    Numpy arrays among the weights become tensors. All tensors are on the CPU.

    Raises:
        ValueError: for any other, broken, truncated or hostile file.
        OSError, MemoryError: from the operating system.
    """
    try:
        size = os.path.getsize(path)
        data = _plain(_read(path, size), size)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch and pickle raise nearly anything for a broken file
        raise ValueError(
            f"MODEL.WEIGHTS {path} is not a readable checkpoint: {_reason(error)}"
        ) from None
    if not isinstance(data, dict):
        raise ValueError(f"MODEL.WEIGHTS {path} holds no dictionary of weights")
    return data


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's advice is to read it unsafely
        unsafe = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error))
        return f"holds {unsafe[1]}, which could run code" if unsafe else "no torch file"
    if isinstance(error, EOFError):
        return "it is truncated"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read(path: str, size: int) -> Any:
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if not head:
        raise ValueError("it is empty")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError("it is a web page, not the weights; download them again")
    if text.startswith(b"version https://git-lfs"):
        raise ValueError("it is a git-lfs pointer, not the weights; get them by git lfs pull")
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(path, size)
    if head[4:9] == b"\0\0\0\0{":  # after the length of the header, in 8 bytes
        return _read_safetensors(path)
    with open(path, "rb") as file:
        content = file.read()
    if _TORCH_MAGIC in head[:32]:
        return _torch_load(io.BytesIO(content))
    if head[:1] in (b"\x80", b"(", b"}", b"]", b"c"):
        return _read_pickle(content)
    return _read_caffe(content)


def _torch_load(file) -> Any:
    # not a path: torch would look at its ending, and try an older format, tar
    safe_globals = getattr(torch.serialization, "safe_globals", contextlib.nullcontext)
    with safe_globals(list(_ALLOWED.values())):
        return torch.load(file, map_location="cpu", weights_only=True)


def _read_zip(path: str, size: int) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile:
        raise ValueError("a damaged or truncated zip archive") from None
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    if "constants.pkl" in names:  # before 2.6 torch.load would give it to torch.jit.load
        raise ValueError("a TorchScript program; save its state_dict() instead")
    if "data.pkl" not in names:
        raise ValueError("a zip archive of something else; if it holds the weights, unpack it")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its contents claim to be larger than the file")
    with open(path, "rb") as file:
        return _torch_load(file)


def _read_safetensors(path: str) -> Dict[str, Any]:
    try:
        from safetensors import safe_open
    except ImportError:
        raise ValueError("safetensors files need: pip install safetensors") from None
    with safe_open(path, framework="pt") as file:
        data = {"model": {name: file.get_tensor(name) for name in file.keys()}}
        return {**data, "metadata": file.metadata()} if file.metadata() else data


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        path = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if path not in _ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {path}")
        return _ALLOWED[path]


def _read_pickle(content: bytes) -> Any:
    # Lengths are checked against the content; a forged memo index would take memory in Unpickler
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name.startswith("EXT") or ("PUT" in opcode.name and argument > count):
            raise ValueError(f"a forged {opcode.name} in the pickle")
    data = _Unpickler(io.BytesIO(content), encoding="latin1").load()  # Caffe2's: Python 2
    if not isinstance(data, dict) or isinstance(data.get("model"), dict):
        return data
    blobs = data.get("blobs", data)  # Detectron's have it, ImageNet models don't
    blobs = {name: x for name, x in blobs.items() if not name.endswith("_momentum")}
    return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}


def _plain(value: Any, size: int, depth: int = 2) -> Any:
    """Dictionaries of the built-in type, arrays as tensors, down to the weights' level."""
    if isinstance(value, dict) and depth:
        return {key: _plain(item, size, depth - 1) for key, item in dict.items(value)}
    if isinstance(value, Tensor) and value.numel() * value.element_size() > size:
        raise ValueError(f"a tensor of shape {tuple(value.shape)} in a file of {size} bytes")
    return _tensor(value) if isinstance(value, _Inert) else value


def _tensor(value: _Inert) -> Any:
    """The tensor of what stands for a numpy array, see ``ndarray.__reduce_ex__``."""
    kind = type(value).__name__
    if kind == "_reconstruct":
        shape, dtype, fortran, data = value.state[-4:]
        order = "F" if fortran else "C"
    elif kind == "_frombuffer":
        data, dtype, shape, order = value.args
    else:
        return value
    code = dtype.state[1] + dtype.args[0]  # byte order, kind, bytes
    if not re.fullmatch("[<>=|][biuf][1248]", code):
        return value
    data = data.encode("latin1") if isinstance(data, str) else data
    return _shaped(np.frombuffer(data, code), shape, order)


def _shaped(values: np.ndarray, shape, order: str = "C") -> Tensor:
    if min(shape, default=0) < 0 or math.prod(shape) != values.size:
        raise ValueError(f"an array of shape {tuple(shape)} with {values.size} values")
    native = values.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(values.reshape(shape, order=order), native, order="C"))


def _read_caffe(content: bytes) -> Dict[str, Any]:
    from google.protobuf.message import DecodeError

    net = _net_parameter()()
    with contextlib.suppress(DecodeError):
        net = type(net).FromString(content)
    layers = [x.layer if x.HasField("layer") else x for x in net.layers] + list(net.layer)
    state = {}
    for layer in layers:
        for index, blob in enumerate(layer.blobs):
            leaf = ("weight", "bias")[index] if index < 2 else index
            shape = [blob.num, blob.channels, blob.height, blob.width]
            if blob.HasField("shape"):
                shape = list(blob.shape.dim)
            elif shape[:3] == [1, 1, 1]:
                shape = shape[3:]
            values = np.frombuffer(b"".join(blob.double_data), "<f8").astype("<f4")
            if blob.data:
                values = np.frombuffer(b"".join(blob.data), "<f4")
            state[f"{layer.name}.{leaf}"] = _shaped(values, shape)
    if not state:
        raise ValueError(
            "it is neither torch's, safetensors, a pickle nor a caffemodel (or a truncated one); "
            f"it begins with {content[:8]!r}"
        )
    return {"model": state}


def _net_parameter() -> type:
    """The class of Caffe's NetParameter; fields that are not declared are skipped."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe", syntax="proto2")
    for message, fields in _NET_PARAMETER.items():
        descriptor = file.message_type.add(name=message)
        for name, number, kind in (field.split() for field in fields.split(", ")):
            label = types.LABEL_REPEATED if kind.endswith("*") else types.LABEL_OPTIONAL
            kind = kind.rstrip("*")
            field = descriptor.field.add(name=name, number=int(number), label=label)
            field.type = getattr(types, f"TYPE_{kind.upper()}", types.TYPE_MESSAGE)
            if kind in _NET_PARAMETER:
                field.type_name = f".caffe.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    descriptor = pool.FindMessageTypeByName("caffe.NetParameter")
    if hasattr(message_factory, "GetMessageClass"):  # protobuf >= 4.22
        return message_factory.GetMessageClass(descriptor)
    return message_factory.MessageFactory(pool).GetPrototype(descriptor)
