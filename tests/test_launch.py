"""Arguments of the launcher; tests/test_train_net.py launches several processes."""

import pytest

from ssd.launch import argument_parser, launch


def test_several_machines_need_an_address():
    args = argument_parser().parse_args(["--num-machines", "2"])
    with pytest.raises(ValueError, match="--dist-url"):
        launch(print, args)


def test_one_process_is_launched_in_place(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    args = argument_parser().parse_args([])
    seen = []
    launch(seen.append, args)
    assert seen == [args]
