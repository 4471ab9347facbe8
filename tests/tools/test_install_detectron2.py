"""The installation: the renaming, the replacement, what is said of an environment, make's targets.

No network: the wheel is a small one made here, and pip, where it would be called, is a stand-in.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREE = {
    "__init__.py": "from .utils import NAME\n",
    "utils.py": 'NAME = "LabGym.detectron2.utils"\n',
    "engine.py": "import LabGym.detectron2.data\n",
    "modeling/__init__.py": "from LabGym.detectron2.utils import NAME\n",
    "model_zoo.py": "",
    "data/__init__.py": "from . import catalog\nfrom .catalog import MetadataCatalog\n",
    "data/catalog.py": "MetadataCatalog = object()\n",
    "evaluation/__init__.py": "",
    "evaluation/coco_evaluation.py": "from LabGym.detectron2.data import MetadataCatalog\n",
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def installer(monkeypatch, tmp_path):
    """The script, with a wheel of ``TREE`` instead of a download, and pip's calls recorded."""
    module = load("install_detectron2")
    module.calls = []
    monkeypatch.setattr(module, "pip", lambda *arguments: module.calls.append(arguments))
    monkeypatch.setattr(module, "github_answers", lambda: False)
    monkeypatch.setattr(module, "download_wheel", lambda folder: write_wheel(tmp_path, TREE))
    return module


def write_wheel(folder, tree):
    wheel = folder / "fake.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in tree.items():
            archive.writestr("LabGym/detectron2/" + name, text)
        archive.writestr("LabGym/gui.py", "import LabGym\n")
    return wheel


def test_extract_renames_everything_and_takes_only_that_folder(installer, tmp_path):
    installer.extract(write_wheel(tmp_path, TREE), tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    package = {str(path.relative_to(tmp_path / "out/detectron2")): path for path in files
               if path.parts[len(tmp_path.parts) + 1] == "detectron2"}  # fmt: skip
    assert set(package) == set(TREE)
    assert package["utils.py"].read_text() == 'NAME = "detectron2.utils"\n'
    assert package["engine.py"].read_text() == "import detectron2.data\n"
    assert not [path for path in package.values() if "LabGym" in path.read_text()]
    # pip removes what RECORD lists.
    (record,) = (path for path in files if path.name == "RECORD")
    listed = {line.split(",")[0] for line in record.read_text().splitlines()}
    assert listed == {str(path.relative_to(tmp_path / "out")) for path in files}


@pytest.mark.parametrize("left", ["import LabGym\n", "from labgym import x\n", '"LABGYM"'])
def test_extract_refuses_a_name_that_is_left(installer, tmp_path, left):
    with pytest.raises(RuntimeError, match="utils.py still names LabGym"):
        installer.extract(write_wheel(tmp_path, {**TREE, "utils.py": left}), tmp_path / "out")


def test_extract_refuses_a_wheel_without_detectron2(installer, tmp_path):
    with pytest.raises(RuntimeError, match="has no LabGym/detectron2/__init__.py"):
        installer.extract(write_wheel(tmp_path, {}), tmp_path / "out")


def test_download_refuses_another_wheel(monkeypatch, tmp_path):
    module = load("install_detectron2")
    monkeypatch.setattr(module, "pip", lambda *arguments: write_wheel(tmp_path, TREE))
    with pytest.raises(RuntimeError, match=f"expected {module.WHEEL_SHA256}"):
        module.download_wheel(tmp_path)


def test_target_gets_one_detectron2_and_a_second_run_leaves_it(installer, tmp_path, capsys):
    target = tmp_path / "site"
    assert installer.main(["--which", "--target", str(target)]) == 1
    assert installer.main(["--target", str(target)]) == 0
    line = f"Detectron2 0.6 from the copy inside the wheel LabGym==3.1.2, renamed, without compiled _C, in {target / 'detectron2'}"  # noqa: E501
    assert capsys.readouterr().out.splitlines()[-1] == "Installed: " + line
    assert sorted(os.listdir(target)) == ["detectron2", "detectron2-0.6.dist-info"]
    (known,) = distributions(path=[str(target)])
    assert (known.metadata["Name"], known.version) == ("detectron2", "0.6")
    assert installer.calls == []  # the dependencies are the environment's business

    installer.download_wheel = None
    assert installer.main(["--target", str(target)]) == 0
    assert capsys.readouterr().out == f"Already there: {line}\n"
    assert installer.main(["--which", "--target", str(target)]) == 0
    assert capsys.readouterr().out == line + "\n"


def test_a_broken_earlier_one_is_replaced_whole(installer, tmp_path):
    target = tmp_path / "site"
    assert installer.main(["--target", str(target)]) == 0
    (target / "detectron2/engine.py").write_text("import LabGym.gone\n")
    (target / "detectron2/stale.py").write_text("")
    assert installer.main(["--target", str(target)]) == 0
    assert not (target / "detectron2/stale.py").exists()
    assert sorted(os.listdir(target)) == ["detectron2", "detectron2-0.6.dist-info"]


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"engine.py": "raise ImportError('no engine')"}, "no engine"),
        ({"evaluation/coco_evaluation.py": "MetadataCatalog = object()"}, "two MetadataCatalog"),
        ({"engine.py": "import sys; sys.modules['Lab' 'Gym.x'] = sys"}, "imports LabGym.x"),
    ],
)
def test_one_that_fails_is_not_put_in_place(installer, tmp_path, capsys, tree, message):
    target = tmp_path / "site"
    wheel = write_wheel(tmp_path, {**TREE, **tree})
    installer.download_wheel = lambda folder: wheel
    assert installer.main(["--target", str(target)]) == 1
    assert message in capsys.readouterr().err
    assert os.listdir(target) == []


def test_one_of_another_source_is_not_replaced(installer, tmp_path, capsys):
    old = tmp_path / "site/detectron2/__init__.py"
    old.parent.mkdir(parents=True)
    old.write_text("raise ImportError('old')")
    assert installer.main(["--target", str(tmp_path / "site")]) == 1
    assert f"remove it: rm -r {old.parent}" in capsys.readouterr().err
    assert old.read_text() == "raise ImportError('old')"


def test_which_names_the_commit_that_pip_built(installer, tmp_path, capsys):
    note = '{"url": "https://x/d2.git", "vcs_info": {"vcs": "git", "commit_id": "02b5"}}'
    info = "detectron2-0.7.dist-info/"
    metadata = "Name: detectron2\nVersion: 0.7\n"
    files = {info + "METADATA": metadata, info + "direct_url.json": note, "detectron2/_C.x.so": ""}
    write_modules(tmp_path, {**files, "detectron2/__init__.py": ""})
    assert installer.main(["--which", "--target", str(tmp_path)]) == 0
    line = "Detectron2 0.7 from https://x/d2.git 02b5, with compiled _C, in "
    assert capsys.readouterr().out.startswith(line)


def test_git_is_taken_where_github_answers(installer, tmp_path):
    target = tmp_path / "site"
    target.mkdir()
    installer.github_answers = lambda: True
    installer.verify = lambda site: None
    assert installer.main(["--target", str(target)]) == 0
    (call,) = installer.calls
    assert call[-1] == f"git+{installer.REPOSITORY}@{installer.COMMIT}"
    assert "--no-deps" in call and "--no-build-isolation" in call and str(target) in call


def test_a_failing_build_falls_back_to_the_wheel_only_by_itself(installer, tmp_path, capsys):
    def fail(*arguments):
        raise subprocess.CalledProcessError(1, "pip")

    installer.github_answers, installer.pip = lambda: True, fail
    target = str(tmp_path / "site")
    assert installer.main(["--source", "git", "--target", target]) == 1
    assert not os.path.exists(target)
    assert installer.main(["--target", target]) == 0
    assert "from the copy inside the wheel" in capsys.readouterr().out


def test_github_that_refuses_or_hangs_is_given_up(monkeypatch):
    module = load("install_detectron2")
    monkeypatch.setattr(module, "REPOSITORY", "file:///nonexistent")
    assert not module.github_answers()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"git://127.0.0.1:{silent.getsockname()[1]}/x"
        monkeypatch.setattr(module, "REPOSITORY", url)
        assert not module.github_answers(timeout=0.5)
    monkeypatch.setenv("PATH", "")  # no git
    assert not module.github_answers()


def check_environment(*arguments, path=()):
    """Runs the check with the standard library and ``path`` only: exit code and lines."""
    run = subprocess.run(
        [sys.executable, "-S", str(ROOT / "tools/check_environment.py"), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
    )
    assert run.stderr == ""
    return run.returncode, run.stdout.splitlines()


def write_modules(folder, modules):
    for name, text in modules.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


COMPLETE = {
    "torch.py": "__version__ = '2.11.0+cpu'\ntensor = ones = lambda x: x\n",
    "torchvision/__init__.py": "from . import ops\n__version__ = '0.26.0'\n",
    "torchvision/ops.py": "def nms(boxes, scores, threshold): pass\n",
    "cv2.py": "__version__ = '4'\n",
    "pycocotools/mask.py": "",
    "detectron2/__init__.py": "__version__ = '0.6'\n",
    **{f"detectron2/{name}.py": "" for name in ("engine", "evaluation", "modeling", "model_zoo")},
}


def test_check_names_everything_that_is_missing():
    code, lines = check_environment("pytest")
    assert code == 1
    names = ["torch", "detectron2", "cv2", "pycocotools.mask", "pytest"]
    assert [line.split(":")[0] for line in lines] == names
    assert all(": found none; expected " in line and sys.executable in line for line in lines)
    assert lines[0].endswith("-m pip install torch torchvision")
    assert lines[1].endswith(str(ROOT / "tools/install_detectron2.py"))


def test_check_is_content_with_a_complete_environment(tmp_path):
    code, lines = check_environment(path=[write_modules(tmp_path, COMPLETE)])
    assert (code, len(lines)) == (0, 1)
    assert "torch 2.11.0+cpu, torchvision 0.26.0, detectron2 0.6, cv2 4" in lines[0]


@pytest.mark.parametrize(
    "module, text, expected",
    [
        ("torch.py", "__version__ = '2.2.1'", "torch: found 2.2.1; expected 2.3 or newer"),
        ("torch.py", "raise OSError('libx.so')", "torch: found one that fails with OSError: libx"),
        (
            "torchvision/ops.py",
            "def nms(*a): raise NotImplementedError('torchvision::nms')",
            "which fails with NotImplementedError: torchvision::nms; "
            "expected 0.26, built for torch 2.11.0+cpu; mend",
        ),
        ("torchvision/ops.py", "raise KeyError('getpwuid(): uid not found: 7')", "export USER="),
        ("cv2.py", "raise ImportError('libGL.so.1')", "cv2: found one that fails with ImportError"),
        ("detectron2/engine.py", "import yaml", "needs yaml; expected one that imports; mend it"),
        ("detectron2/model_zoo.py", "import pkg_resources", "pip install 'setuptools<81'"),
        ("detectron2/engine.py", "import detectron2.gone", "No module named 'detectron2.gone'"),
    ],
)
def test_check_names_what_is_broken(tmp_path, module, text, expected):
    code, lines = check_environment(path=[write_modules(tmp_path, {**COMPLETE, module: text})])
    assert (code, len(lines)) == (1, 1)
    assert expected in lines[0]


def test_check_names_the_torchvision_for_this_torch(tmp_path):
    version = {"torch-2.11.0.dist-info/METADATA": "Name: torch\nVersion: 2.11.0+cpu\n"}
    broken = {"torchvision/__init__.py": "raise RuntimeError('no operator')"}
    path = [write_modules(tmp_path, {**COMPLETE, **broken, **version})]
    ((line,),) = [check_environment(path=path)[1]]
    assert "'torchvision==0.26.*' --index-url <the one that torch 2.11.0+cpu came from>" in line


def test_check_names_two_detectron2(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    write_modules(first, COMPLETE)
    write_modules(second, {"detectron2/__init__.py": ""})
    code, (line,) = check_environment(path=[first, second])
    assert code == 1
    assert f"found {first}/detectron2 and {second}/detectron2; expected one of them" in line


def test_check_names_an_old_python():
    module = load("check_environment")
    (line,) = module.check_python((3, 9, 18))
    assert line.startswith("Python: found 3.9 (") and "expected 3.10 or newer" in line
    assert list(module.check_python((3, 10, 0))) == []


def test_check_knows_which_checkout_is_installed(tmp_path):
    other = write_modules(tmp_path, {"ssd/__init__.py": ""})
    assert check_environment("--is-installed")[0] == 1
    assert check_environment("--is-installed", path=[other])[0] == 1
    assert check_environment("--is-installed", path=[ROOT])[0] == 0


@pytest.fixture
def make(tmp_path):
    """``make`` in a folder with the Makefile and a python that writes down how it is called."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shutil.copy(ROOT / "Makefile", tmp_path)
    write_modules(tmp_path, {"labs/quickstart/config.yaml": ""})
    python = tmp_path / "fake" / "python"
    write_modules(tmp_path, {"fake/python": f'#!/bin/sh\necho "$PWD: $*" >> {tmp_path}/calls\n'})
    python.chmod(0o755)

    def run(*arguments, python="fake/python"):
        (tmp_path / "calls").write_text("")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
        environment.pop("PYTHON", None)
        given = [f"PYTHON={python}"] if python else []
        result = subprocess.run(["make", *arguments, *given], cwd=tmp_path, env=environment,
                                capture_output=True, text=True)  # fmt: skip
        calls = (tmp_path / "calls").read_text().replace(str(tmp_path), "").splitlines()
        return result, calls

    return run


TRAIN = "/labs/quickstart: ../../train_net.py --config-file ./config.yaml"


def test_make_test_uses_the_given_python_and_installs_no_torch(make):
    result, calls = make("test")
    assert result.returncode == 0
    assert calls[0] == ": tools/check_environment.py pytest"
    assert ": -m pytest -q tests --numprocesses auto --maxprocesses 4" in calls
    assert not [call for call in calls if "pip" in call]  # --is-installed has said yes


def test_make_test_runs_in_one_process_without_xdist(make, tmp_path):
    script = f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n[ "$2" != "import xdist" ]\n'
    (tmp_path / "fake/python").write_text(script)
    result, calls = make("test")
    assert result.returncode == 0 and "-m pytest -q tests" in calls


def test_make_installs_only_the_checkout_into_a_given_environment(make, tmp_path):
    script = f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n[ "$2" != --is-installed ]\n'
    (tmp_path / "fake/python").write_text(script)
    result, calls = make("install")
    assert result.returncode == 0
    assert calls == [
        "tools/check_environment.py",
        "tools/check_environment.py --is-installed",
        "-m pip install -q --no-deps --no-build-isolation -e .",
    ]


def test_make_stops_at_an_incomplete_environment(make, tmp_path):
    (tmp_path / "fake/python").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/calls\nexit 1\n")
    result, calls = make("test")
    assert result.returncode == 2
    assert calls == ["tools/check_environment.py pytest"]


def test_make_refuses_a_python_that_is_none(make):
    result, _ = make("install", python="nowhere/python")
    assert result.returncode == 2
    assert "PYTHON=nowhere/python is not a program" in result.stderr


def test_make_quickstart_trains_once(make, tmp_path):
    assert make("quickstart")[1][-1] == TRAIN
    weights = tmp_path / "labs/quickstart/output/model_final.pth"
    weights.parent.mkdir()
    weights.write_text("")
    os.utime(weights, (2e9, 2e9))
    result, calls = make("quickstart")
    assert "train_net.py" not in "".join(calls)
    assert "results are in labs/quickstart/output" in result.stdout
    assert "make quickstart FORCE=1" in result.stdout
    assert make("quickstart", "FORCE=1")[1][-1] == TRAIN
    assert make("quickstart", "OPTS=A.B '(\"c\",)' D 7")[1][-1] == TRAIN + ' A.B ("c",) D 7'
    os.utime(weights, (1e9, 1e9))  # older than the config
    assert make("quickstart")[1][-1] == TRAIN


def test_make_install_does_nothing_the_second_time(make, tmp_path):
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    first, _ = make("-n", "install", python=None)
    assert "torch==" in first.stdout and "tools/install_detectron2.py" in first.stdout
    write_modules(tmp_path, {".venv/.installed": f"{tmp_path}\n"})
    second, _ = make("-n", "install", python=None)
    assert (second.returncode, "pip" in second.stdout) == (0, False)
    os.utime(tmp_path / "setup.py", (3e9, 3e9))
    assert "pip install" in make("-n", "install", python=None)[0].stdout
    os.utime(tmp_path / "setup.py", (1e9, 1e9))
    write_modules(tmp_path, {".venv/.installed": "/before/it/moved\n"})
    assert "pip install" in make("-n", "install", python=None)[0].stdout
