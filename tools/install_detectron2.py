"""Installs Detectron2 into the environment whose python runs this.

From its official repository at a pinned commit; where GitHub cannot be reached (or the commit does
not build), from the copy of Detectron2 0.6 that the wheel ``LabGym==3.1.2`` on the package index
carries: only that folder (code of Facebook under Apache-2.0, without compiled operators) is taken
out of the wheel, its modules renamed from ``LabGym.detectron2`` back to ``detectron2``. What is
there already and imports is left alone. ``--which`` says which Detectron2 an environment has.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, distributions
from pathlib import Path

REPOSITORY = "https://github.com/facebookresearch/detectron2.git"
COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
WHEEL = "LabGym==3.1.2"
WHEEL_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
WHEEL_SOURCE = f"the copy inside the wheel {WHEEL}, renamed"
# What Detectron2 needs at run time; setuptools because model_zoo of 0.6 imports pkg_resources.
DEPENDENCIES = (
    "fvcore==0.1.5.post20221221 iopath==0.1.9 omegaconf>=2.1,<2.4 hydra-core>=1.1 "
    "pycocotools>=2.0.2 matplotlib tensorboard termcolor>=1.1 yacs>=0.1.8 tabulate cloudpickle "
    "tqdm>4.29.0 Pillow>=7.1 packaging setuptools<81"
).split()
# What has to hold of an installed Detectron2; argument: the folder it has to come from, or nothing.
VERIFY = """
import os, sys
import detectron2.engine, detectron2.evaluation, detectron2.modeling, detectron2.model_zoo
from detectron2.data import MetadataCatalog, catalog
from detectron2.evaluation import coco_evaluation
folder = os.path.realpath(os.path.dirname(detectron2.__file__))
if sys.argv[1] and folder != os.path.realpath(sys.argv[1]):
    sys.exit(f"detectron2 comes from {folder}, expected {sys.argv[1]}")
foreign = [name for name in sys.modules if "labgym" in name.lower()]
if foreign:
    sys.exit(f"detectron2 imports {foreign[0]}, expected no module of LabGym")
if not MetadataCatalog is catalog.MetadataCatalog is coco_evaluation.MetadataCatalog:
    sys.exit("detectron2 has two MetadataCatalog objects, expected one")
"""


def pip(*arguments: str) -> None:
    """Runs pip of this python. Raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def verify(site: str | None) -> None:
    """Imports Detectron2 in a new process: from ``site``, or from wherever the environment has it.

    Raises RuntimeError with the last line of the failure.
    """
    path = os.pathsep.join(p for p in (site, os.environ.get("PYTHONPATH")) if p)
    folder = os.path.join(site, "detectron2") if site else ""
    command = [sys.executable, "-B", "-W", "ignore", "-c", VERIFY, folder]
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run(command, env=environment, cwd=os.sep, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError((run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1])


def find_distribution(site: str | None) -> Distribution | None:
    """What pip knows of the Detectron2 in ``site``, or anywhere in the environment."""
    return next(distributions(name="detectron2", path=[site] if site else sys.path), None)


def describe(site: str | None) -> str | None:
    """One line on that Detectron2: version, source, compiled or not, folder; None without one."""
    find = PathFinder.find_spec if site else importlib.util.find_spec
    spec = find("detectron2", [site] if site else None)
    if spec is None or spec.origin is None:
        return None
    folder, known = Path(spec.origin).parent, find_distribution(site)
    source = known and known.read_text("SOURCE")
    if known and known.read_text("direct_url.json"):  # pip's own note
        note = json.loads(known.read_text("direct_url.json"))
        source = " ".join([note["url"], note.get("vcs_info", {}).get("commit_id", "")]).strip()
    own = re.search(r"(?m)^__version__ = [\"'](.+)[\"']", Path(spec.origin).read_text())
    version = known.version if known else own[1] if own else "(unknown version)"
    compiled = "with" if list(folder.glob("_C*")) else "without"
    return (
        f"Detectron2 {version} from "
        f"{source or 'an unknown source'}, {compiled} compiled _C, in {folder}"
    )


def github_answers(timeout: float = 15) -> bool:
    """Whether git reaches the repository, in the way that pip is going to; seconds."""
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    null = subprocess.DEVNULL  # a helper of git that outlives the timeout would keep a pipe open
    try:
        command = ["git", "ls-remote", REPOSITORY, "HEAD"]
        subprocess.run(command, check=True, env=environment, timeout=timeout,
                       stdin=null, stdout=null, stderr=null)  # fmt: skip
    except (OSError, subprocess.SubprocessError):  # no git, no answer in time, or a refusal
        return False
    return True


def install_from_git(site: str | None) -> None:
    where = ["--target", site, "--upgrade"] if site else ["--force-reinstall"]
    url = f"git+{REPOSITORY}@{COMMIT}"
    print(f"Building Detectron2 from {url}; this takes some minutes", flush=True)
    pip("install", "-q", "--no-build-isolation", "--no-deps", *where, url)
    verify(site)


def download_wheel(folder: Path) -> Path:
    """Downloads the wheel with pip. Raises RuntimeError if it is not the known one."""
    pip("download", "-q", "--no-deps", "--python-version", "3.10", "--only-binary=:all:",
        "--dest", str(folder), WHEEL)  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise RuntimeError(f"{wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}")
    return wheel


def extract(wheel: Path, folder: Path) -> None:
    """Writes ``detectron2/``, renamed, and the ``.dist-info`` for pip into ``folder``.

    Raises RuntimeError if a file still names LabGym after the renaming, or if there is no file.
    """
    prefix, info = "LabGym/detectron2/", "detectron2-0.6.dist-info/"
    metadata = "Metadata-Version: 2.1\nName: detectron2\nVersion: 0.6\nLicense: Apache-2.0\n"
    metadata += "".join(f"Requires-Dist: {dependency}\n" for dependency in DEPENDENCIES)
    files = {"METADATA": metadata, "INSTALLER": "pip\n", "SOURCE": WHEEL_SOURCE}
    files = {info + name: text.encode() for name, text in files.items()}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(prefix) and not name.endswith("/"):
                content = archive.read(name).replace(b"LabGym.detectron2", b"detectron2")
                if b"labgym" in content.lower():
                    raise RuntimeError(f"{name} still names LabGym after the renaming")
                files["detectron2/" + name.removeprefix(prefix)] = content
    if "detectron2/__init__.py" not in files:
        raise RuntimeError(f"{wheel.name} has no {prefix}__init__.py")
    record = info + "RECORD"
    files[record] = "".join(f"{name},,\n" for name in [*files, record]).encode()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def put_in_place(staged: Path, site: Path) -> None:
    """Renames what is in ``staged`` into ``site``; an older one moves beside ``staged`` before."""
    aside = Path(tempfile.mkdtemp(dir=staged.parent))
    for new in sorted(staged.iterdir()):
        place = site / new.name
        if place.exists():
            place.rename(aside / new.name)
        new.rename(place)


def install_from_wheel(site: str | None) -> None:
    """Downloads, renames and verifies beside the final place, and only then renames into it.

    Raises RuntimeError if a Detectron2 of another source is in the way, or if the new one fails.
    """
    folder = Path(site or sysconfig.get_path("purelib"))
    known = find_distribution(str(folder))
    old = folder / "detectron2"
    if old.exists() and not (known and known.read_text("SOURCE")):
        remove = f"{sys.executable} -m pip uninstall detectron2" if known else f"rm -r {old}"
        raise RuntimeError(f"{old} does not import and is not from here; remove it: {remove}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".detectron2-", dir=folder) as work:
        staged = Path(work, "staged")
        extract(download_wheel(Path(work)), staged)
        verify(str(staged))
        put_in_place(staged, folder)
    verify(site)


def install(site: str | None, source: str) -> None:
    """Installs from ``source``. Raises RuntimeError, OSError or CalledProcessError on failure."""
    if importlib.util.find_spec("torch") is None:
        raise RuntimeError("torch is missing; install torch and torchvision first")
    if source == "auto" and not github_answers():
        print("GitHub cannot be reached; taking Detectron2 from the package index", flush=True)
        source = "wheel"
    if site is None:
        pip("install", "-q", *DEPENDENCIES)
    if source != "wheel":
        try:
            return install_from_git(site)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            if source == "git":
                raise
            print(f"{error}\nTaking Detectron2 from the package index instead", flush=True)
    install_from_wheel(site)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", metavar="DIR", help="install Detectron2, and only it, into DIR")
    parser.add_argument("--source", choices=["auto", "git", "wheel"], default="auto")
    parser.add_argument("--which", action="store_true", help="say which one is there, and exit")
    args = parser.parse_args(argv)
    site = os.path.abspath(args.target) if args.target else None
    there = describe(site)
    if args.which:
        print(there or "Detectron2 is not installed")
        return 0 if there else 1
    try:
        if there and not (args.source == "git" and WHEEL_SOURCE in there):
            try:
                verify(site)
                print(f"Already there: {there}")
                return 0
            except RuntimeError as error:
                print(f"{there} does not import: {error}", flush=True)
        install(site, args.source)
        importlib.invalidate_caches()
        print(f"Installed: {describe(site)}")
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        print(f"Detectron2 is not installed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
