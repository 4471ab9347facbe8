import json

import pytest
from detectron2.utils.events import EventStorage, JSONWriter

from ssd.metrics import read_metrics


def run(path, start, stop, evaluate_at=(), period=4, late=False):
    """A training's metrics.json by Detectron2's own writer, flushed every ``period`` iterations:
    its losses are the iteration plus 1000 per earlier run, and with ``late`` are logged after the
    next step, as on GPUs."""
    number = path.read_text().count("begin") * 1000 if path.exists() else 0
    writer = JSONWriter(str(path))
    with EventStorage(start) as storage:
        storage.put_scalar("begin", 0, smoothing_hint=False)
        for iteration in range(start, stop):
            storage.iter = iteration
            logged = iteration - late
            if logged >= start:
                storage.put_scalar("loss", logged + number, smoothing_hint=False, cur_iter=logged)
            storage.put_scalar("lr", 0.1, smoothing_hint=False)
            if iteration in evaluate_at:
                storage.put_scalar("bbox/AP", iteration + number, smoothing_hint=False)
            if iteration == start or (iteration + 1) % period == 0:
                writer.write()
    writer.close()


def series(path, name):
    records, broken = read_metrics(str(path))
    iterations = [record["iteration"] for record in records]
    assert broken == 0 and iterations == sorted(iterations)
    return {x["iteration"]: x[name] for x in records if name in x}


@pytest.mark.parametrize("late", [False, True])
def test_one_run_keeps_every_line(tmp_path, late):
    path = tmp_path / "metrics.json"
    run(path, 0, 20, evaluate_at=(5, 17), late=late)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    written = [line["iteration"] for line in lines]
    assert written != sorted(written)  # as evaluations and late losses come behind
    assert sorted(written) == [x["iteration"] for x in read_metrics(str(path))[0]]
    assert series(path, "bbox/AP") == {5: 5, 17: 17}
    assert list(series(path, "lr")) == [0, 3, 7, 11, 15, 19]


@pytest.mark.parametrize("late", [False, True])
def test_a_resumed_run_replaces_what_it_repeats(tmp_path, late):
    path = tmp_path / "metrics.json"
    run(path, 0, 20, evaluate_at=(5, 17), late=late)
    run(path, 12, 24, evaluate_at=(17, 22), late=late)
    assert series(path, "bbox/AP") == {5: 5, 17: 1017, 22: 1022}
    assert list(series(path, "lr")) == [0, 3, 7, 11, 12, 15, 19, 23]
    assert {i: x >= 1000 for i, x in series(path, "loss").items()} == {
        i: i >= 12 for i in series(path, "loss")
    }


@pytest.mark.parametrize("late", [False, True])
def test_a_new_run_in_the_folder_replaces_all(tmp_path, late):
    path = tmp_path / "metrics.json"
    run(path, 0, 20, evaluate_at=(5, 17), late=late)
    run(path, 0, 8, late=late)  # killed before its first evaluation
    assert series(path, "bbox/AP") == {}
    assert list(series(path, "lr")) == [0, 3, 7]
    assert all(x >= 1000 for x in series(path, "loss").values())


def test_lines_that_cannot_be_read_are_counted(tmp_path):
    path = tmp_path / "metrics.json"
    lines = ['{"iteration": 1, "loss": NaN}', "", "[1]", '{"loss": 1}', '{"iteration": "x"}']
    path.write_text("\n".join([*lines, "3", '{"iteration": 2, "lo']))
    records, broken = read_metrics(str(path))
    assert broken == 5 and [record["iteration"] for record in records] == [1]
    path.write_text("")
    assert read_metrics(str(path)) == ([], 0)
