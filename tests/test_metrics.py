import json

import pytest
from detectron2.utils.events import EventStorage, JSONWriter
from trainers import train

from ssd.metrics import START, end_last_line, read_metrics


def run(path, start, stop, evaluate_at=(), period=4, late=False):
    """A training's metrics.json by Detectron2's own writer, written every ``period`` iterations:
    its losses are the iteration plus 1000 per earlier run, and with ``late`` are logged after the
    next step, as on GPUs."""
    number = path.read_text().count(START) * 1000 if path.exists() else 0
    writer = JSONWriter(str(path))
    with EventStorage(start) as storage:
        storage.put_scalar(START, start, smoothing_hint=False)
        for iteration in range(start, stop):
            storage.iter = iteration
            logged = iteration - late
            if logged >= start:
                storage.put_scalar("loss", logged + number, smoothing_hint=False, cur_iter=logged)
            storage.put_scalar("lr", 0.1, smoothing_hint=False)
            if iteration in evaluate_at:
                storage.put_scalar("bbox/AP", iteration + number, smoothing_hint=False)
            if (iteration + 1) % period == 0:
                writer.write()
        storage.iter = stop
        writer.write()
    writer.close()


def series(path, name):
    records, broken = read_metrics(str(path))
    iterations = [record["iteration"] for record in records]
    assert broken == 0 and iterations == sorted(iterations)
    return {x["iteration"]: x[name] for x in records if name in x}


def test_a_line_that_is_cut_off_swallows_no_other(tmp_path):
    path = tmp_path / "metrics.json"
    end_last_line(str(path))  # there is none yet
    for text in ("", '{"iteration": 1}\n'):
        path.write_text(text)
        end_last_line(str(path))
        assert path.read_text() == text
    path.write_text(f'{{"iteration": 3, "{START}": 0}}\n{{"iteration": 4, "lo')
    end_last_line(str(path))
    with open(path, "a") as file:
        file.write(f'{{"iteration": 2, "{START}": 2}}\n')
    assert read_metrics(str(path)) == ([{"iteration": 2, START: 2}], 1)


@pytest.mark.parametrize("late", [False, True])
def test_one_run_keeps_every_line(tmp_path, late):
    path = tmp_path / "metrics.json"
    run(path, 0, 20, evaluate_at=(5, 17), late=late)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    written = [line["iteration"] for line in lines]
    assert written != sorted(written)  # as evaluations and late losses come behind
    assert sorted(written) == [x["iteration"] for x in read_metrics(str(path))[0]]
    assert series(path, "bbox/AP") == {5: 5, 17: 17}
    assert list(series(path, "lr")) == [3, 7, 11, 15, 19]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "first, second", [((0, 20), (12, 24)), ((0, 10), (8, 11)), ((0, 9), (5, 7))]
)
def test_a_resumed_run_replaces_what_it_repeats(tmp_path, late, first, second):
    path = tmp_path / "metrics.json"
    run(path, *first, evaluate_at=(1, 6), late=late)
    run(path, *second, evaluate_at=(6, 9, 17), late=late)
    for name in ("loss", "bbox/AP"):
        found = series(path, name)
        assert found and {i for i, x in found.items() if x < 1000} == {
            i for i in found if i < second[0]
        }
    assert max(series(path, "lr")) == second[1] - 1


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("first", [2, 10, 20])
def test_a_new_run_in_the_folder_replaces_all(tmp_path, late, first):
    path = tmp_path / "metrics.json"
    run(path, 0, first, evaluate_at=(1, 5, 17), late=late)
    run(path, 0, 8, late=late)  # killed before its first evaluation
    assert series(path, "bbox/AP") == {}
    assert list(series(path, "lr")) == [3, 7]
    assert all(x >= 1000 for x in series(path, "loss").values())


def test_trainings_mark_where_they_start(tiny_cfg):
    path = f"{tiny_cfg().OUTPUT_DIR}/metrics.json"
    for max_iter, resume, mark in ((3, False, 0), (2, False, 0), (4, True, 2)):
        train(tiny_cfg("SOLVER.MAX_ITER", max_iter), resume=resume)
        records = read_metrics(path)[0]
        assert [x["iteration"] for x in records if START in x][-1] == mark
        assert [x["iteration"] for x in records if "loss_cls" in x][-1] == max_iter - 1
    with open(path) as file:
        assert sum("loss_cls" in line for line in file) == 3
    assert sum("loss_cls" in x for x in records) == 2  # of the first run nothing is left


def test_lines_that_cannot_be_read_are_counted(tmp_path):
    path = tmp_path / "metrics.json"
    lines = ['{"iteration": 1, "loss": NaN}', "", "[1]", '{"loss": 1}', '{"iteration": "x"}']
    path.write_text("\n".join([*lines, "3", '{"iteration": 2, "lo']))
    records, broken = read_metrics(str(path))
    assert broken == 5 and [record["iteration"] for record in records] == [1]
    path.write_bytes(b'\xff\xfe\x00{"it\n' + path.read_bytes())  # of a damaged disk
    assert read_metrics(str(path)) == (records, 6)
    path.write_text("")
    assert read_metrics(str(path)) == ([], 0)
