"""tools/report.py on runs that are written here: what stands in the page."""

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import report
import yaml
from commands import run
from PIL import Image
from reports import charts

from ssd.data.shapes import CLASSES

ROOT = Path(__file__).resolve().parents[2]

# Of the first objects that overlap no other, one each; all other objects are found.
MISTAKES = ("class", "localisation", "both", "duplicate", "missed")


def shrunk(box, factor=0.6):
    """(x, y, width, height) about the same centre: IoU factor²."""
    x, y, w, h = box
    return [x + w * (1 - factor) / 2, y + h * (1 - factor) / 2, w * factor, h * factor]


def detections_of(truth, mistakes):
    """A hit of score 0.9 for each object, but one of each kind of mistake, of score 0.8."""
    results, left = [], list(mistakes)
    for a in truth["annotations"]:
        others = [
            b["bbox"] for b in truth["annotations"] if b["image_id"] == a["image_id"] and b is not a
        ]
        x, y, w, h = a["bbox"]
        is_alone = not any(
            x < x2 + w2 and x2 < x + w and y < y2 + h2 and y2 < y + h for x2, y2, w2, h2 in others
        )
        kind = left.pop(0) if left and is_alone else "hit"
        wrong = a["category_id"] % len(CLASSES) + 1
        label = wrong if kind in ("class", "both") else a["category_id"]
        box = shrunk(a["bbox"]) if kind in ("localisation", "both") else a["bbox"]
        hit = {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"]}
        if kind in ("hit", "duplicate"):
            results.append({**hit, "score": 0.9})
        if kind not in ("hit", "missed"):
            results.append({**hit, "category_id": label, "bbox": box, "score": 0.8})
    assert not left
    return results


@pytest.fixture
def write_run(datasets_folder, tmp_path, monkeypatch):
    """A function (name, **differences) → the output folder of a run on the four shapes images."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_folder))
    truth = json.loads((datasets_folder / "shapes" / "val.json").read_text())

    def write(name="a", mistakes=MISTAKES, extra=(), register=None, rate=0.1):
        folder = tmp_path / name / "output"
        (folder / "inference" / "shapes_val").mkdir(parents=True)
        register = register or {"shapes_val": {"FORMAT": "shapes", "SPLIT": "val"}}
        solver = {"MAX_ITER": 40, "BASE_LR": rate, "IMS_PER_BATCH": 4}
        config = {"SOLVER": solver, "DATASETS": {"TEST": list(register), "REGISTER": register}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        lines = [
            {"iteration": i, "total_loss": 9 / (i + 1), "loss_cls": 5 / (i + 1), "lr": rate,
             "time": 0.25, "bbox/AP50": 10 + i}
            for i in (0, 19, 39)
        ]  # fmt: skip
        (folder / "metrics.json").write_text("".join(json.dumps(x) + "\n" for x in lines))
        results = [*detections_of(truth, mistakes), *extra]
        path = folder / "inference" / "shapes_val" / "coco_instances_results.json"
        path.write_text(json.dumps(results))
        return folder

    return write


@pytest.fixture
def write_page(monkeypatch, tmp_path):
    """A function (arguments) → the page that report.py writes, as text and as a tree."""

    def write(*arguments):
        path = tmp_path / "page.html"
        arguments = [*map(str, arguments), "--output", str(path)]
        monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
        report.main()
        page = path.read_text()
        return page, ET.fromstring(page)  # well-formed

    return write


def rows(tree, title):
    """Those of the tables below this heading, {first cell: the others} as text."""
    found, below = {}, False
    for element in tree.find("body"):
        if element.tag == "h2":
            below = element.text.startswith(title)
        elif below:
            for row in element.iter("tr"):
                first, *others = ["".join(cell.itertext()).strip() for cell in row]
                found[first] = others
    return found


def notes(tree):
    return [
        "".join(item.itertext()).strip()
        for box in tree.iter("div")
        if box.get("id") == "notes"
        for item in box.iter("li")
    ]


def test_each_mistake_is_counted_and_shown(write_run, datasets_folder):
    background = {"image_id": 1, "category_id": 1, "bbox": [900, 900, 20, 20], "score": 0.7}
    folder = write_run(extra=[background])
    printed = run(ROOT / "tools" / "report.py", folder, "--score-threshold", "0.5")
    path = folder / "report.html"
    assert printed.startswith(f"Wrote {path}")
    page = path.read_text()
    tree = ET.fromstring(page)
    kinds = rows(tree, "Kinds of mistakes")
    for kind in (*MISTAKES, "background"):
        (others,) = (cells for first, cells in kinds.items() if first.startswith(kind))
        # also the object of "both" is missed
        assert others[1:] == (["2", "2"] if kind == "missed" else ["1", "1"]), kind
    truth = json.loads((datasets_folder / "shapes" / "val.json").read_text())["annotations"]
    matrix = rows(tree, "Confusion matrix")
    found = sum(int(matrix[name][i] or 0) for i, name in enumerate(CLASSES))
    assert found == len(truth) - 4  # all but class, localisation, both, missed
    pictures = [image.get("src") for image in tree.iter("img")]
    assert len(pictures) == 7 and all(x.startswith("data:image/jpeg;base64,") for x in pictures)
    assert notes(tree) == []
    # nothing from outside, no script, and light
    assert not re.search(r"https?:|//|<script|@import|url\(", re.sub(r"base64,[^\"]*", "", page))
    assert len(page) < 400_000


def test_perfect_detections(write_run, write_page):
    page, tree = write_page(write_run(mistakes=()), "--pictures", "0")
    summary = list(rows(tree, "Results on shapes_val").values())
    assert summary[1:4] == [["100.0"]] * 3  # AP, AP50, AP75
    kinds = rows(tree, "Kinds of mistakes")
    assert [cells[1:] for first, cells in kinds.items() if first != "kind"] == [["0", "0"]] * 6
    best = rows(tree, "Score thresholds")["all together"]
    assert best == ["0.46", "1.000", "1.000", "1.000"]  # the middle of 0.01 to 0.90
    assert not list(tree.iter("img"))


def test_score_threshold(write_run, write_page):
    _, tree = write_page(write_run(), "--score-threshold", "0.85")
    (missed,) = (c for first, c in rows(tree, "Kinds").items() if first.startswith("missed"))
    assert missed[1:] == ["4", "2"]
    assert "score ≥ 0.85" in rows(tree, "Kinds")["kind"]


def test_runs_side_by_side(write_run, write_page):
    page, tree = write_page(write_run("a", mistakes=()), write_run("b", rate=0.2))
    (ap,) = (c for first, c in rows(tree, "Results on").items() if first.startswith("AP50"))
    assert ap[0] == "100.0" and re.fullmatch(r"[\d.]+ \(-[\d.]+\)", ap[1])
    assert "SOLVER.BASE_LR" in page and "OUTPUT_DIR" not in page
    # lines of both runs, told apart by more than colour
    chart = next(x for x in tree.iter("svg") if x.get("aria-label", "").startswith("total_loss"))
    labels = [x.text for x in chart.iter("text") if "label" in x.get("class", "")]
    assert sorted(labels) == ["A 0.225", "B 0.225"]
    assert {x.get("class") for x in chart.iter("g")} >= {"s0", "s1"}
    assert notes(tree) == []


def cut_metrics(folder):
    with open(folder / "metrics.json", "w") as file:
        file.write('{"iteration": 19, "total_loss": NaN, "lr": 0.1}\n{"iteration": 39, "tot')


def cut_results(folder):
    path = folder / "inference" / "shapes_val" / "coco_instances_results.json"
    path.write_text(path.read_text()[:-30])


def older_config(folder):
    text = (folder / "config.yaml").read_text().replace("BASE_LR", "OLD_KEY")
    (folder / "config.yaml").write_text(text)


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda folder: (folder / "metrics.json").unlink(), ["metrics.json is missing"]),
        (
            cut_metrics,
            [
                "lines that can't be read and are left out: 1",
                "total_loss isn't always finite",
                "has logged no evaluation",
            ],
        ),
        (lambda folder: (folder / "config.yaml").unlink(), ["config.yaml is missing"]),
        (lambda folder: (folder / "config.yaml").write_text("a: ["), ["config.yaml can't be read"]),
        (lambda folder: shutil.rmtree(folder / "inference"), ["results.json is missing"]),
        (cut_results, ["perhaps it is cut off"]),
        (older_config, []),
    ],
)
def test_a_run_that_lacks_something(damage, expected, write_run, write_page):
    folder = write_run()
    damage(folder)
    _, tree = write_page(folder)
    found = notes(tree)
    assert len(found) == len(expected)
    assert all(text in note for text, note in zip(expected, found))


def test_an_empty_folder(write_page, tmp_path):
    _, tree = write_page(tmp_path)
    assert len(notes(tree)) == 2 and "No run has a metrics.json" in "".join(tree.itertext())


def test_a_training_that_was_stopped(write_run, write_page):
    folder = write_run()
    lines = (folder / "metrics.json").read_text().splitlines()
    begin = '{"iteration": 0, "start_iter": 0}'  # after an earlier training in the folder
    (folder / "metrics.json").write_text("\n".join([*lines, begin, *lines[:2]]) + "\n")
    _, tree = write_page(folder)
    assert notes(tree) == ["The training ends at iteration 20 of 40."]


def test_detections_that_the_training_has_not_made(write_run, write_page):
    folder = write_run()
    line = '{"iteration": 0, "start_iter": 0, "total_loss": 3}\n'
    with open(folder / "metrics.json", "a") as file:
        file.write(line + line.replace("0,", "39,", 1).replace('"start_iter": 0, ', ""))
    _, tree = write_page(folder)
    (note,) = notes(tree)
    assert "are of an earlier one in the folder" in note
    with open(folder / "metrics.json", "a") as file:
        file.write('{"iteration": 39, "bbox/AP": NaN}\n')  # without any detection
    assert notes(write_page(folder)[1]) == []


def test_test_time_augmentation_is_an_evaluation_of_its_own(write_run, write_page):
    folder, plain = write_run(), write_run("b")
    shutil.copytree(folder / "inference", folder / "inference_TTA")
    path = folder / "inference_TTA" / "shapes_val" / "coco_instances_results.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:3]))
    page, tree = write_page(folder, plain)
    assert "with test-time augmentation" not in page  # an earlier run's
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["TEST"] = {"AUG": {"ENABLED": True}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    page, tree = write_page(folder, plain)
    assert page.count(">Kinds of mistakes (shapes_val)</h2>") == 1
    assert page.count(">Kinds of mistakes (shapes_val, with test-time augmentation)</h2>") == 1


def test_no_detections(write_run, write_page):
    folder = write_run()
    path = folder / "inference" / "shapes_val" / "coco_instances_results.json"
    path.write_text("[]")
    _, tree = write_page(folder)
    assert notes(tree) == ["shapes_val: there are no detections."]
    (missed,) = (c for first, c in rows(tree, "Kinds").items() if first.startswith("missed"))
    assert missed[0] == "100.00"  # AP50
    assert list(tree.iter("img"))


def test_two_data_sets_of_which_one_was_evaluated(write_run, write_page):
    entries = {name: {"FORMAT": "shapes", "SPLIT": "val"} for name in ("shapes_val", "again")}
    folder = write_run(register=entries)
    page, tree = write_page(folder)
    assert len(notes(tree)) == 1 and "inference/again" in notes(tree)[0]
    assert ">Kinds of mistakes</h2>" in page
    shutil.copytree(folder / "inference" / "shapes_val", folder / "inference" / "again")
    page, tree = write_page(folder)
    assert notes(tree) == []
    assert page.count(">Kinds of mistakes (again)</h2>") == 1


def test_a_data_set_that_isn_t_there(write_run, write_page):
    entry = {"FORMAT": "coco", "ROOT": "gone", "ANNOTATIONS": "val.json", "IMAGES": "images"}
    folder = write_run(register={"shapes_val": entry})
    _, tree = write_page(folder)
    (note,) = notes(tree)
    assert "gone/val.json does not exist" in note and "DETECTRON2_DATASETS" in note


def test_images_that_aren_t_there_and_detections_of_others(
    write_run, write_page, datasets_folder, tmp_path
):
    """The numbers stay; only the gallery lacks."""
    truth = json.loads((datasets_folder / "shapes" / "val.json").read_text())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "val.json").write_text(json.dumps(truth))
    entry = {"FORMAT": "coco", "ROOT": str(tmp_path / "mine"), "IMAGES": "."}
    entry["ANNOTATIONS"] = "val.json"
    stranger = {"image_id": 77, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.9}
    folder = write_run(register={"shapes_val": entry}, extra=[stranger])
    _, tree = write_page(folder)
    (note,) = notes(tree)
    assert "1 of" in note and "are for images that the data set doesn't have" in note
    (lacking,) = (p for p in tree.iter("p") if p.get("class") == "note")
    assert "pictures can't be shown" in lacking.text
    assert rows(tree, "Kinds of mistakes")


def test_names_are_escaped(write_run, write_page, datasets_folder, tmp_path):
    truth = json.loads((datasets_folder / "shapes" / "val.json").read_text())
    truth["categories"][0]["name"] = "<b>&\"'"
    path = tmp_path / "names.json"
    path.write_text(json.dumps(truth))
    entry = {"FORMAT": "coco", "ROOT": str(datasets_folder), "IMAGES": "shapes/val/images"}
    entry["ANNOTATIONS"] = str(path)
    _, tree = write_page(write_run(register={"shapes_val": entry}))
    assert "<b>&\"'" in rows(tree, "Classes")


def test_many_classes_are_folded_and_their_matrix_is_a_picture(
    write_run, write_page, datasets_folder, tmp_path
):
    truth = json.loads((datasets_folder / "shapes" / "val.json").read_text())
    truth["categories"] += [{"id": i, "name": f"class {i}"} for i in range(7, 81)]
    path = tmp_path / "many.json"
    path.write_text(json.dumps(truth))
    entry = {"FORMAT": "coco", "ROOT": str(datasets_folder), "IMAGES": "shapes/val/images"}
    entry["ANNOTATIONS"] = str(path)
    _, tree = write_page(write_run(register={"shapes_val": entry}), "--score-threshold", "0.5")
    folded = {x.find("summary").text: x.get("open") for x in tree.iter("details")}
    assert folded["AP of 80 classes, %"] is None
    (picture,) = (x for x in tree.iter("svg") if x.get("class") == "heat")
    assert len(list(picture.iter("title"))) > 6
    assert rows(tree, "Classes")["class 80"][1:] == ["–", "–"]  # no objects
    # an object was taken for another class once
    confused = [x for x in tree.iter("details") if x.find("summary").text == "Most confused"]
    assert len(list(confused[0].iter("tr"))) == 2


def test_more_runs_than_styles_and_no_folder(monkeypatch, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path)] * (charts.STYLES + 1), "at most 8"),
        ([str(tmp_path / "none")], "no such folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
        with pytest.raises(SystemExit):
            report.main()
        assert message in capsys.readouterr().err


def test_a_chart_with_gaps_and_without_values():
    line = charts.Line(np.arange(4), np.array([1, np.nan, 0, 2]), "last")
    chart = ET.fromstring(charts.line_chart([line], "t", log=True))
    (path,) = (x for x in chart.iter("path") if x.get("class") == "line")
    assert path.get("d").count("M") == 2 and "L" not in path.get("d")  # two single points
    assert ET.fromstring(charts.line_chart([], "none", "x", "y")).get("aria-label").startswith("no")
    zeros = charts.Line(np.arange(4), np.zeros(4), "0")
    ET.fromstring(charts.line_chart([zeros], "loss", x_range=(0, 0), log=True))


@pytest.mark.parametrize("low, high", [(0, 1), (2.4, 2.6), (0.003, 700), (1e-7, 3e-7), (5, 5)])
@pytest.mark.parametrize("log", [False, True])
def test_ticks_lie_within_and_differ(low, high, log):
    line = charts.Line(np.arange(2), np.array([low, high], float))
    chart = ET.fromstring(charts.line_chart([line], "t", log=log))
    texts = [x.text for x in chart.iter("text") if x.get("class") == "end"]
    assert 2 <= len(texts) <= 9 and len(set(texts)) == len(texts)


def test_in_a_browser(write_run, write_page, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium")
    write_page(write_run())
    picture = tmp_path / "page.png"
    options = "--headless --no-sandbox --disable-gpu --window-size=1000,3000".split()
    options += [f"--user-data-dir={tmp_path / 'browser'}", f"--screenshot={picture}"]
    command = [browser, *options, (tmp_path / "page.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        colors = {color: count for count, color in image.convert("RGB").getcolors(1 << 24)}
    assert colors[0x00, 0x72, 0xB2] > 1000  # the lines of charts
