"""Reading checkpoint files: each format, and files that are broken or would run code."""

import argparse
import io
import math
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from protobuf import field, varint
from weights import OLD, Hostile, saved

from ssd.checkpoint.files import read_file

needs_stand_ins = pytest.mark.skipif(
    not hasattr(torch.serialization, "safe_globals"), reason="torch < 2.5 takes no stand-ins"
)


def weights():
    return {"a.weight": torch.arange(24.0).reshape(2, 3, 4), "a.count": torch.tensor(7)}


@pytest.fixture
def read(tmp_path):
    def read_bytes(content, name="weights.bin"):
        (tmp_path / name).write_bytes(content)
        return read_file(str(tmp_path / name))

    return read_bytes


@pytest.fixture
def refusal(read):
    """The text of the one clear error for such a content."""

    def refuse(content):
        with pytest.raises(ValueError, match=r"^MODEL\.WEIGHTS .*weights\.bin ") as error:
            read(content)
        text = str(error.value)
        assert "\n" not in text and len(text) < 500
        assert "weights_only" not in text, "advises to read it unsafely"
        return text

    return refuse


def assert_same(state, expected):
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name


# torch


@pytest.mark.parametrize("kwargs", [{}, OLD], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["a.pth", "a.pkl", "a.caffemodel", "a.safetensors", "a"])
def test_torch_file_under_any_name(read, kwargs, name):
    data = {"model": weights(), "iteration": 4, "optimizer": {"state": {0: {"step": 3}}}}
    result = read(saved(data, **kwargs), name)
    assert_same(result.pop("model"), weights())
    assert result == {"iteration": 4, "optimizer": {"state": {0: {"step": 3}}}}


def test_state_dict_of_a_module(read):
    module = torch.nn.BatchNorm2d(3)
    assert_same(read(saved(module.state_dict())), module.state_dict())


class HistoryBuffer:
    """Pickled as MMEngine's is since 0.7.3: with its own methods in the state."""

    def __init__(self):
        self.log = np.arange(3.0)

    def min(self):
        raise NotImplementedError

    def __getstate__(self):
        return {**self.__dict__, "statistics_methods": {"min": HistoryBuffer.min}}

    def __setstate__(self, state):
        raise NotImplementedError


class CfgNode(dict):
    pass


def importable(monkeypatch, cls, module):
    """Lets ``cls`` be pickled as if ``module`` had it; to be undone before reading."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    setattr(sys.modules[module], cls.__name__, cls)
    monkeypatch.setattr(cls, "__module__", module)


@needs_stand_ins
@pytest.mark.parametrize("kwargs", [{}, OLD], ids=["zip", "legacy"])
def test_training_checkpoint_with_objects_of_other_packages(read, kwargs, tmp_path):
    node = CfgNode(lr=0.1)
    node.frozen = True
    data = {
        "state_dict": weights(),
        "message_hub": {"log_scalars": OrderedDict(loss=HistoryBuffer())},
        "meta": {"best": np.float64(0.5), "epoch": np.int64(3), "classes": np.array(["a", "b"])},
        "cfg": node,
        "args": argparse.Namespace(lr=0.1, out=tmp_path),
        "means": np.array([1.0, 2.0], ">f8"),
        "losses": deque([1.0, 2.0], maxlen=20),
        "counts": defaultdict(int, {"a": 1}),
    }
    with pytest.MonkeyPatch.context() as patch:
        importable(patch, HistoryBuffer, "mmengine.logging.history_buffer")
        importable(patch, CfgNode, "yacs.config")
        content = saved(data, **kwargs)
    assert "mmengine" not in sys.modules
    result = read(content)
    assert result.keys() == data.keys()
    assert_same(result["state_dict"], weights())
    assert result["means"].tolist() == [1.0, 2.0]
    assert result["cfg"] == {"lr": 0.1}
    assert (result["losses"], result["counts"]) == ([1.0, 2.0], {"a": 1})
    assert "mmengine" not in sys.modules


def test_stand_ins_are_not_left_in_torch(read, tmp_path):
    content = saved({"model": weights(), "args": argparse.Namespace(lr=0.1)})
    if hasattr(torch.serialization, "safe_globals"):
        read(content)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(content), weights_only=True)


def test_an_unknown_class_is_named(refusal):
    with pytest.MonkeyPatch.context() as patch:
        importable(patch, CfgNode, "some.package")
        content = saved({"model": weights(), "cfg": CfgNode()})
    assert "holds some.package.CfgNode, which could run code" in refusal(content)


@pytest.mark.parametrize("data", [[torch.zeros(3)], torch.zeros(3), 5, None])
def test_no_dictionary(refusal, data):
    assert "holds no dictionary of weights" in refusal(saved(data))
    assert "holds no dictionary of weights" in refusal(saved(data, **OLD))


def test_tensor_larger_than_its_file(refusal):
    assert "(1000000, 1000000)" in refusal(saved({"a": torch.zeros(1, 1).expand(10**6, 10**6)}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused(refusal, tmp_path):
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "script.pt"))
    assert "TorchScript" in refusal((tmp_path / "script.pt").read_bytes())


def rezipped(edit=lambda name, content: content, **kwargs):
    """A torch file packed again."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(weights()))) as old:
        with zipfile.ZipFile(buffer, "w", **kwargs) as new:
            for name in old.namelist():
                new.writestr(name, edit(name, old.read(name)))
    return buffer.getvalue()


def test_zip_files_that_lie(read, refusal):
    assert_same(read(rezipped()), weights())
    bomb = rezipped(
        lambda name, x: bytes(10**7) if name.endswith("/data/0") else x,
        compression=zipfile.ZIP_DEFLATED,
    )
    assert "larger than the file" in refusal(bomb)
    more = (24).to_bytes(1, "little"), (10**9).to_bytes(4, "little")
    forged = rezipped(lambda name, x: x.replace(b"K" + more[0] + b"t", b"J" + more[1] + b"t"))
    assert forged != rezipped()
    if torch.__version__ >= "2.6":  # before, torch doesn't look at what it claims
        refusal(forged)
    other = io.BytesIO()
    np.savez(other, a=np.zeros(3))
    assert "zip archive of something else" in refusal(other.getvalue())


# safetensors


def test_safetensors(read, refusal):
    save = pytest.importorskip("safetensors.torch").save
    result = read(save(weights()))
    assert result.keys() == {"model"}
    assert_same(dict(sorted(result["model"].items())), dict(sorted(weights().items())))
    assert read(save(weights(), {"format": "pt"}))["metadata"] == {"format": "pt"}
    whole = save(weights())
    for length in (9, 20, 100, len(whole) - 1):
        refusal(whole[:length])
    refusal(whole.replace(b"[2,3,4]", b"[2,3,9]"))
    refusal(struct.pack("<Q", 2**31) + b"{" + bytes(100))


def test_safetensors_without_the_library(refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in refusal(struct.pack("<Q", 2) + b"{}")


# Detectron2's and Caffe2's pickles


def arrays():
    return {
        "conv1_w": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big_endian": np.arange(3, dtype=">i8"),
        "scalar": np.array(2.5, np.float16),
        "empty": np.zeros((0, 3), np.float32),
        "flag": np.array([True, False]),
    }


def tensors():
    return {
        name: torch.from_numpy(np.ascontiguousarray(x.astype(x.dtype.newbyteorder("="))))
        .reshape(x.shape) for name, x in arrays().items()
    }  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_detectron2_pickle(read, protocol):
    data = {
        "model": OrderedDict(arrays()),
        "__author__": "torchvision",
        "matching_heuristics": True,
    }
    result = read(pickle.dumps(data, protocol=protocol))
    assert_same(result.pop("model"), tensors())
    assert result == {"__author__": "torchvision", "matching_heuristics": True}


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("wrap", [dict, lambda blobs: {"blobs": blobs, "cfg": "NUM_GPUS: 8"}])
def test_caffe2_pickle(read, wrap, protocol):
    blobs = {**arrays(), "conv1_w_momentum": np.zeros(3, np.float32)}
    result = read(pickle.dumps(wrap(blobs), protocol=protocol))
    assert_same(result.pop("model"), tensors())
    assert result == {"__author__": "Caffe2", "matching_heuristics": True}


def python2_pickle(shape=b"(I2\nI2\nt", data=np.arange(4, dtype="<f4").tobytes()):
    """{"blobs": {"w": array}} as Python 2 wrote it: strings of bytes, names of numpy.core."""
    text = lambda x: b"U" + bytes([len(x)]) + x  # noqa: E731
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt" + text(b"b") + b"tR"
        b"(I1\n" + shape + b"cnumpy\ndtype\n(" + text(b"f4") + b"I0\nI1\ntR"
        b"(I3\n" + text(b"<") + b"NNNI-1\nI-1\nI0\ntbI00\n" + text(data) + b"tb"
    )
    return b"\x80\x02}" + text(b"blobs") + b"}" + text(b"w") + array + b"ss."


def test_pickle_of_python_2(read):
    assert_same(read(python2_pickle())["model"], {"w": torch.arange(4.0).reshape(2, 2)})


@pytest.mark.parametrize(
    "shape", [b"(I3\nI2\nt", b"(I-2\nI-2\nt", b"(I100000\nI100000\nI100000\nt", b"(t", b"I4\n"]
)
def test_pickle_with_a_forged_shape(refusal, shape):
    refusal(python2_pickle(shape))


def test_pickle_of_torch_tensors_is_refused(refusal):
    assert "holds torch." in refusal(pickle.dumps({"model": weights()}))


def test_pickle_of_something_else(refusal):
    assert "holds no dictionary of weights" in refusal(pickle.dumps([1, 2], protocol=2))


# Caffe, encoded by hand


def packed(values, kind="f"):
    return struct.pack(f"<{len(values)}{kind}", *values)


def shaped(dims):
    return field(7, field(1, b"".join(varint(n) for n in dims)))


def old_shaped(dims):
    return b"".join(field(i, n) for i, n in enumerate(dims, start=1))


def blob(*dims, old=False):
    count = math.prod(dims)
    return field(5, packed(range(count))) + (old_shaped(dims) if old else shaped(dims))


def new_layer(name, *blobs):
    skipped = field(2, "Convolution") + field(3, "data") + field(106, field(1, 64)) + field(10, 1)
    return field(100, field(1, name) + skipped + b"".join(field(7, x) for x in blobs))


def v1_layer(name, *blobs):
    return field(2, field(2, "data") + field(4, name) + field(5, 4) + b"".join(
        field(6, x) for x in blobs) + varint(7 << 3 | 5) + packed([1.0]))  # fmt: skip


def v0_layer(name, *blobs):
    inner = field(1, name) + field(2, "conv") + b"".join(field(50, x) for x in blobs)
    return field(2, field(1, inner) + field(2, "data"))


def counting(*dims):
    return torch.arange(float(math.prod(dims))).reshape(dims)


@pytest.mark.parametrize("start", [field(1, "VGG"), b""])
@pytest.mark.parametrize("layer", [new_layer, v1_layer, v0_layer])
@pytest.mark.parametrize("old", [False, True])
def test_caffemodel(read, layer, old, start):
    bias = (1, 1, 1, 4) if old else (4,)
    content = start + layer("data") + layer(
        "conv1_1", blob(4, 3, 2, 2, old=old), blob(*bias, old=old), field(6, packed([9.0]))
        + blob(2, 1, 1, 1, old=old),
    ) + layer("conv4_3_norm", blob(*bias, old=old))  # fmt: skip
    expected = {
        "conv1_1.weight": counting(4, 3, 2, 2),
        "conv1_1.bias": counting(4),
        "conv1_1.2": counting(2, 1, 1, 1),
        "conv4_3_norm.weight": counting(4),
    }
    result = read(content)
    assert result.keys() == {"model"}
    assert_same(result["model"], expected)


def test_caffemodel_encodings(read, refusal):
    parts = field(5, packed([0, 1])) + field(5, packed([2, 3, 4, 5])) + shaped([2, 3])
    doubles = field(8, packed(range(6), "d")) + shaped([2, 3])
    scalar = field(5, packed([0])) + shaped([])
    unpacked_shape = field(5, packed(range(6))) + field(7, field(1, 2) + field(1, 3))
    content = new_layer("a", parts, doubles, scalar, unpacked_shape)
    expected = {"a.weight": counting(2, 3), "a.bias": counting(2, 3), "a.2": torch.tensor(0.0)}
    assert_same(read(content)["model"], {**expected, "a.3": counting(2, 3)})
    unpacked = b"".join(varint(5 << 3 | 5) + packed([x]) for x in range(6)) + shaped([2, 3])
    assert "(2, 3) with 0 values" in refusal(new_layer("a", unpacked))


@pytest.mark.parametrize(
    "shape", [shaped([2, 4]), shaped([-2, -3]), shaped([2**40, 2**40]), old_shaped([2, 3]), b""]
)
def test_caffemodel_with_a_forged_shape(refusal, shape):
    assert "with 6 values" in refusal(new_layer("a", field(5, packed(range(6))) + shape))


# Broken and hostile files


def hostile_names():
    """Pickles that only look a name up, then are a dictionary."""
    # c module name, 0 pop; \x8c short string, \x93 the name on the stack
    names = {"os.system": (b"os", b"system"), "builtins.eval": (b"builtins", b"eval")}
    names |= {"numpy.core.multiarray.fromfile": (b"numpy", b"core.multiarray.fromfile")}
    names |= {"numpy.ndarray.tofile": (b"numpy", b"ndarray.tofile")}
    names |= {"pathlib.Path.unlink": (b"pathlib", b"Path.unlink")}
    names |= {"collections.abc.sys": (b"collections", b"abc.sys")}
    for name, (module, attribute) in names.items():
        lookup = b"\x8c%c%b\x8c%c%b\x93" % (len(module), module, len(attribute), attribute)
        yield pytest.param(name, b"\x80\x04" + lookup + b"0}.", id=f"{name} by protocol 4")
        lookup = b"c" + module + b"\n" + attribute + b"\n"
        yield pytest.param(name, b"\x80\x02" + lookup + b"0}.", id=f"{name} by protocol 2")
        yield pytest.param(name, lookup + b"0}.", id=f"{name} by protocol 0")


@pytest.mark.parametrize("name, content", list(hostile_names()))
def test_a_name_that_is_not_allowed_is_not_looked_up(refusal, name, content):
    assert f"holds {name}, which could run code" in refusal(content)


HOSTILE = {
    "zip": lambda x: saved({"model": weights(), "optimizer": x}),
    "legacy": lambda x: saved({"model": weights(), "optimizer": x}, **OLD),
    **{
        f"pickle {protocol}": lambda x, protocol=protocol: pickle.dumps({"model": x}, protocol)
        for protocol in range(6)
    },
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_file_does_not_run(refusal, tmp_path, kind):
    mark = tmp_path / "made"
    content = HOSTILE[kind](Hostile(mark))
    assert f"holds {os.name if os.name == 'nt' else 'posix'}.mkdir" in refusal(content)
    assert not mark.exists()
    if "pickle" in kind:
        pickle.loads(content)
    else:
        torch.load(io.BytesIO(content), weights_only=False)
    assert mark.exists(), "the file was harmless"


@needs_stand_ins
@pytest.mark.parametrize("wrap", [saved, lambda x: pickle.dumps(x, protocol=2)])
def test_getattr_in_a_file_looks_nothing_up(read, wrap):
    class Lookup:
        def __reduce__(self):
            return getattr, (argparse.Namespace, "__init__")

    result = read(wrap({"model": {}, "x": Lookup()}))["x"]
    assert type(result).__name__ == "getattr" and not callable(result)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}\x82\x01.",  # a name by its number in copyreg's registry
        b"\x80\x02}Pname\n0.",  # an object that the program should give
        b"\x80\x02}r\xff\xff\xff\xff.",  # memo of 4 billion entries
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"0}.",  # bytearray of 1 TiB
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"0}.",  # bytes
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",  # frame
        b"\x80\x02}c_codecs\nencode\nM\xff\xffU\x03hex\x86R0.",  # another use of a codec
        b"\x80\x02}c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R0.",  # 2 GiB
    ],
)
def test_forged_pickle(refusal, content):
    refusal(content)


def test_a_dictionarys_methods_are_its_own(read):
    result = read(b"\x80\x02ccollections\nOrderedDict\n)R}U\x05itemsK\x01sbU\x05model}s.")
    assert result == {"model": {}} and callable(result.items)


def test_stand_ins_classes_cannot_be_changed(read, refusal):
    refusal(b"\x80\x02cnumpy\ndtype\n(N}U\x05state(K\x01K\x02tstb0}.")
    assert_same(read(python2_pickle())["model"], {"w": torch.arange(4.0).reshape(2, 2)})


@pytest.mark.parametrize(
    "content, text",
    [
        (b"", "it is empty"),
        (b"\n <!DOCTYPE html><html>Not found</html>", "web page"),
        (b"<html><body>quota</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git-lfs pointer"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01" + bytes(range(256)) * 9, "it begins with"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "it begins with"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "it begins with"),
        (b"hello world\n", "it begins with"),
        (b"(a note)\n", "not a readable checkpoint"),
        (b"\n", "not a readable checkpoint"),
        (b"PK\x03\x04" + bytes(300), "zip archive"),
        (bytes(5000), "it begins with"),
        (b"\x0a" * 5000, "it begins with"),
        (b"\x80", "not a readable checkpoint"),
    ],
)
def test_wrong_type(refusal, content, text):
    assert text in refusal(content)


WHOLE = {
    "zip": lambda: saved({"model": weights()}),
    "legacy": lambda: saved({"model": weights()}, **OLD),
    "pickle": lambda: pickle.dumps({"model": arrays(), "__author__": "x"}, protocol=4),
    "caffemodel": lambda: new_layer("conv1_1", blob(40, 3, 3, 3)),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_truncated(refusal, kind):
    content = WHOLE[kind]()
    for length in {1, 2, 3, 5, 9, 30, *range(40, len(content), 97), len(content) - 1}:
        refusal(content[:length])


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_damaged_anywhere_is_one_clear_error_or_none(tmp_path, kind):
    content, path = WHOLE[kind](), tmp_path / "weights.bin"
    random = np.random.RandomState(0)
    for position in random.randint(len(content), size=150):
        damaged = bytearray(content)
        damaged[position] ^= 1 << random.randint(8)
        path.write_bytes(damaged)
        try:
            assert isinstance(read_file(str(path)), dict)
        except ValueError as error:
            assert str(error).startswith("MODEL.WEIGHTS ")


def test_folder_and_missing_file(tmp_path):
    with pytest.raises(IsADirectoryError):
        read_file(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        read_file(str(tmp_path / "absent.pth"))
