"""Arguments of the launcher; tests/test_train_net.py launches several processes."""

import signal

import pytest

from ssd.launch import argument_parser, launch, stop_signals


def test_several_machines_need_an_address():
    args = argument_parser().parse_args(["--num-machines", "2"])
    with pytest.raises(ValueError, match="--dist-url"):
        launch(print, args)


def test_a_hangup_stops_but_under_nohup():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, stops in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            assert (signal.SIGHUP in stop_signals()) == stops
            assert {signal.SIGINT, signal.SIGTERM} <= set(stop_signals())
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_process_is_launched_in_place(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    args = argument_parser().parse_args([])
    seen = []
    launch(seen.append, args)
    assert seen == [args]
