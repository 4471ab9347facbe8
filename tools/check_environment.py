"""Says what an environment lacks to run SSD: one line per problem, with the command that mends it.

Run with the environment's own python: ``python tools/check_environment.py [MODULE ...]``, where the
modules are further ones that have to import (``make test`` names pytest). Exit code 1 if there is a
problem. Older Pythons must be able to run this file, too.
"""

import argparse
import importlib
import importlib.util
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PIP = "%s -m pip install" % sys.executable
INSTALL_DETECTRON2 = "%s %s" % (
    sys.executable,
    os.path.join(ROOT, "tools", "install_detectron2.py"),
)
DETECTRON2_MODULES = ("engine", "evaluation", "modeling", "model_zoo")
PACKAGES = {"PIL": "Pillow", "hydra": "hydra-core", "yaml": "PyYAML"}  # where pip's name differs


def problem(what, found, expected, mend):
    return "%s: found %s; expected %s; mend it with: %s" % (what, found, expected, mend)


def first_line(error):
    """The type and the first line of an exception's text, as an error is named in one line."""
    return "%s: %s" % (type(error).__name__, (str(error).splitlines() or [""])[0])


def pip_version(name):
    """The version that pip knows, which may lack the ``+cu130`` of ``__version__``; or none."""
    from importlib.metadata import distributions  # Python 3.8

    return next((found.version for found in distributions(name=name)), "of no known version")


def check_python(version=sys.version_info):
    if tuple(version[:2]) < (3, 10):
        found = "%d.%d (%s)" % (version[0], version[1], sys.executable)
        yield problem("Python", found, "3.10 or newer", "make install PYTHON3=/path/to/python3.11")


def check_module(name, package, mend=None):
    """A module that has to import; ``package`` is what pip calls it."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken binary raises anything
        missing = isinstance(error, ModuleNotFoundError) and error.name == name.split(".")[0]
        found = "none" if missing else "one that fails with %s" % first_line(error)
        again = "" if missing else "--force-reinstall --no-deps "
        yield problem(name, found, "one that imports", mend or "%s %s%s" % (PIP, again, package))


def check_torch():
    """torch, and a torchvision whose compiled operators load and run with this torch."""
    try:
        import torch

        major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        found = "none" if missing else "one that fails with %s" % first_line(error)
        yield problem("torch", found, "2.3 or newer", PIP + " torch torchvision")
        return
    if (major, minor) < (2, 3):
        mend = PIP + " --upgrade torch torchvision"
        yield problem("torch", torch.__version__, "2.3 or newer", mend)
        return
    # torch 2.0 came with torchvision 0.15, and both have counted up together since.
    wanted = "0.%d" % (minor + 15) if major == 2 else "the release for it"
    mend = PIP + " --force-reinstall --no-deps torchvision"
    if major == 2:
        mend = PIP + " --force-reinstall --no-deps 'torchvision==%s.*'" % wanted
    if "+" in pip_version("torch"):  # not the package index's own build
        mend += " --index-url <the one that torch %s came from>" % torch.__version__
    try:
        import torchvision

        torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torchvision"
        if "getpwuid" in str(error):  # torch asks for the user's name
            mend = "export USER=any_name, as this user id has none"
        failing = "%s, which fails with %s" % (pip_version("torchvision"), first_line(error))
        expected = "%s, built for torch %s" % (wanted, torch.__version__)
        yield problem("torchvision", "none" if missing else failing, expected, mend)


def check_detectron2():
    """One Detectron2 on the path, and its main modules import."""
    folders = {os.path.realpath(os.path.join(p or ".", "detectron2")) for p in sys.path}
    folders = sorted(f for f in folders if os.path.isfile(os.path.join(f, "__init__.py")))
    if len(folders) > 1:
        yield problem(
            "detectron2",
            " and ".join(folders),
            "one of them",
            "%s -m pip uninstall detectron2 (or shorten PYTHONPATH)" % sys.executable,
        )
    try:
        for name in DETECTRON2_MODULES:
            importlib.import_module("detectron2." + name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing == "detectron2":
            found, mend = "none", INSTALL_DETECTRON2
        elif missing == "pkg_resources":
            found, mend = "one that needs pkg_resources", PIP + " 'setuptools<81'"
        elif missing and not missing.startswith("detectron2"):
            missing = missing.split(".")[0]
            found = "one that needs %s" % missing
            mend = "%s %s" % (PIP, PACKAGES.get(missing, missing))
        else:
            found = "one that fails with %s" % first_line(error)
            mend = INSTALL_DETECTRON2
        yield problem("detectron2", found, "one that imports", mend)


def is_installed():
    """Whether ``import ssd`` gives this checkout in any working directory."""
    spec = importlib.util.find_spec("ssd")
    origin = spec and spec.origin or ""
    return os.path.realpath(origin) == os.path.realpath(os.path.join(ROOT, "ssd", "__init__.py"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="further modules to import")
    parser.add_argument("--python-only", action="store_true", help="only the Python version")
    parser.add_argument(
        "--is-installed", action="store_true", help="only whether this checkout is installed"
    )
    args = parser.parse_args()
    if args.is_installed:
        return 0 if is_installed() else 1

    problems = list(check_python())
    if not problems and not args.python_only:
        problems += check_torch()
        # Detectron2 cannot import without torch and torchvision: name the cause, not the effect.
        if not problems:
            problems += check_detectron2()
        elif importlib.util.find_spec("detectron2") is None:
            expected = "one that imports, after torch"
            problems.append(problem("detectron2", "none", expected, INSTALL_DETECTRON2))
        problems += check_module("cv2", "opencv-python-headless")
        problems += check_module("pycocotools.mask", "pycocotools")
        for name in args.modules:
            problems += check_module(name, name)
    for line in problems:
        print(line)
    if not problems and not args.python_only:
        modules = [sys.modules[name] for name in ("torch", "torchvision", "detectron2", "cv2")]
        versions = ["%s %s" % (module.__name__, module.__version__) for module in modules]
        versions.insert(0, "Python " + sys.version.split()[0])
        print("Environment is complete: " + ", ".join(versions))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
