"""The tables of docs/checkpoints.md."""

import runpy
import sys

import list_checkpoints as tables
import pytest

from ssd.checkpoint.published import PUBLISHED
from ssd.checkpoint.recognition import BACKBONES, DETECTORS


def test_the_document_holds_the_tables(repo):
    text = (repo / "docs/checkpoints.md").read_text()
    for table in (tables.detectors(), tables.backbones(), tables.published()):
        assert table in text, "run python tools/list_checkpoints.py"
    assert all(f"`{name}`" in text for name in PUBLISHED)
    assert all(lineage.title in text for lineage in [*DETECTORS, *BACKBONES])


def test_files_that_the_document_names_exist(repo):
    words = f"{tables.detectors()} {tables.backbones()}".replace(":", " ").replace(";", " ")
    files = {word for word in words.split() if word.startswith(("tests/", "docs/"))}
    assert len(files) > 4
    assert all((repo / file.rstrip(",")).is_file() for file in files)


def test_what_changes_is_said():
    texts = {lineage.key: tables.changes(lineage) for lineage in [*DETECTORS, *BACKBONES]}
    assert texts["mmdet_vgg"] == "nothing"
    assert texts["caffe"] == "background to the last place; BGR to RGB"
    assert texts["nvidia"].endswith("class-major to box-major")
    assert texts["torchvision_resnet"] == "scale of the input"


def test_a_missing_table_is_an_error(repo, tmp_path, monkeypatch):
    page, tool = tmp_path / "page.md", str(repo / "tools/list_checkpoints.py")
    page.write_text("nothing")
    monkeypatch.setattr(sys, "argv", [tool, "--check", str(page)])
    with pytest.raises(SystemExit, match="doesn't hold 3 of these tables$"):
        runpy.run_path(tool, run_name="__main__")
    monkeypatch.setattr(sys, "argv", [tool, "--check", str(repo / "docs/checkpoints.md")])
    runpy.run_path(tool, run_name="__main__")  # no SystemExit
