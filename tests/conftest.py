"""Fixtures of all tests: CPU, one thread, 16 + 4 rendered images instead of a download."""

import logging
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Commands that tests start have one thread, too, and import this checkout.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

import pytest  # noqa: E402
import torch  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.utils.logger import setup_logger  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from ssd.config import load_config  # noqa: E402
from ssd.data.shapes import render_shapes  # noqa: E402

torch.set_num_threads(1)

# A model that trains an iteration in a fraction of a second.
TINY = (
    "MODEL.DEVICE cpu MODEL.SSD.INPUT_SIZE [96,96] MODEL.MOBILENET.WIDTH_MULT 0.25 "
    "SOLVER.IMS_PER_BATCH 4 SOLVER.MAX_ITER 4 SOLVER.WARMUP_ITERS 0 DATALOADER.NUM_WORKERS 0 "
    "TEST.VIS_IMAGES 0 TEST.EVAL_PERIOD 0 INPUT.EXPAND.ENABLED True INPUT.IOU_CROP.ENABLED True"
).split()

# The slowest files. The first two share the rows on MMDetection, which a process computes once.
SLOWEST = ["test_fidelity", "test_golden", "test_train_net", "test_lineages", "test_engine"]


def pytest_collection_modifyitems(items):
    """The slowest files first, so that processes of pytest-xdist end at about the same time."""
    items.sort(key=lambda item: [*SLOWEST, item.path.stem].index(item.path.stem))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives a process whole files, in the order above."""
    from xdist.scheduler import LoadFileScheduling

    class FileScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = Path(super()._split_scope(nodeid)).stem
            return SLOWEST[0] if file == SLOWEST[1] else file

    config.option.loadscopereorder = False
    return FileScheduling(config, log)


@pytest.fixture(autouse=True)
def fresh_loggers():
    """Undoes setup_logger, which writes to closed folders and hides messages from caplog."""
    yield
    for name in ("ssd", "detectron2", "fvcore"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    setup_logger.cache_clear()


@pytest.fixture
def log(caplog):
    """What is logged, from INFO on."""
    caplog.set_level("INFO")
    return caplog


@pytest.fixture
def fake_gpu():
    """A context whose tensors on "cuda" have no numbers: what would have to read one raises."""
    try:
        with FakeTensorMode():
            torch.empty(2, 3, device="cuda")[..., :-1]
    except (AssertionError, RuntimeError):  # a torch without CUDA, or before 2.6 without a GPU
        pytest.skip("this torch can't imitate a GPU")
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.fixture(scope="session")
def repo():
    return ROOT


@pytest.fixture(scope="session")
def datasets_folder(tmp_path_factory):
    """A folder for DETECTRON2_DATASETS that holds few shapes."""
    folder = tmp_path_factory.mktemp("datasets")
    render_shapes(str(folder / "shapes"), "train", 16)
    render_shapes(str(folder / "shapes"), "val", 4)
    return folder


@pytest.fixture(scope="session")
def tiny_opts():
    return TINY


@pytest.fixture
def tiny_cfg(repo, datasets_folder, tmp_path, monkeypatch):
    """A function (KEY, VALUE, …) → the quickstart lab's config, made tiny, with these overrides."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_folder))

    def load(*opts):
        opts = [*TINY, "OUTPUT_DIR", str(tmp_path / "output"), *opts]
        return load_config(str(repo / "labs/quickstart/config.yaml"), opts)

    return load


@pytest.fixture
def register():
    """A function (dicts, class names) → name of a data set that is registered for this test."""
    names = []

    def add(dicts, classes):
        names.append(f"t_registered_{len(names)}")
        DatasetCatalog.register(names[-1], lambda: dicts)
        MetadataCatalog.get(names[-1]).thing_classes = list(classes)
        return names[-1]

    yield add
    for name in names:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


@pytest.fixture(scope="session")
def bccd(repo):
    """The folder that holds the BCCD photographs, beside the repository."""
    folder = repo.parent / "shared" / "data"
    if not (folder / "bccd" / "Annotations").is_dir():
        pytest.skip("no BCCD data set")
    return folder


def _assert_equal(a, b, where="value"):
    """Compares nested dictionaries and lists of tensors and values bit by bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            _assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            _assert_equal(x, y, f"{where}[{i}]")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


@pytest.fixture(scope="session")
def assert_equal():
    return _assert_equal
