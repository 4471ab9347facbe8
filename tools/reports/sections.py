"""The page's parts, each as a string of HTML."""

import os
from html import escape
from typing import NamedTuple, Sequence

import numpy as np

from reports import analysis
from reports.analysis import KINDS, THRESHOLDS
from reports.charts import Line, line_chart, thin
from reports.gallery import thumbnail
from reports.runs import Evaluation, Run
from reports.tables import (
    Bar,
    confusion_table,
    difference,
    folded,
    heat_map,
    make_table,
    most_confused,
    rounded,
    side_by_side,
)
from ssd.data.mapper import read_image

COCO_SUMMARY = (
    ("AP", "IoU 0.50 to 0.95, all sizes"),
    ("AP50", "IoU 0.50"),
    ("AP75", "IoU 0.75"),
    ("APs", "objects below 32² pixels"),
    ("APm", "32² to 96² pixels"),
    ("APl", "above 96² pixels"),
    ("AR1", "recall with one detection per image"),
    ("AR10", "with ten"),
    ("AR100", "with a hundred"),
    ("ARs", "with a hundred, objects below 32² pixels"),
    ("ARm", "32² to 96² pixels"),
    ("ARl", "above 96² pixels"),
)
MEANING = {
    "class": "right place, wrong class: IoU at least 0.5 with an object of another class",
    "localisation": "right class, box off: IoU 0.1 to 0.5",
    "both": "wrong class and box off: IoU 0.1 to 0.5 with an object of another class",
    "duplicate": "the object is already found by a detection of a higher score",
    "background": "nothing there: IoU below 0.1 with every object",
    "missed": "no detection finds the object, nor would one if its class or box were right",
}
MANY_CLASSES = 20  # from here on tables fold and the confusion matrix is a picture
MOST_CLASSES = 100  # in the picture of the confusion matrix and in the curves by class
RECALLS = np.linspace(0, 1, 101)


class Entry(NamedTuple):
    """A run in a chart or table."""

    letter: str  # "" for a single run
    style: int
    run: Run

    def line(self, x, y, **options) -> Line:
        options = {"label": self.letter, "name": self.run.name, **options}
        return Line(np.asarray(x), np.asarray(y), style=self.style, **options)


class Evaluated(NamedTuple):
    entry: Entry
    result: Evaluation


def overview(entries: Sequence[Entry]) -> str:
    rows = []
    for entry in entries:
        run, settings = entry.run, entry.run.settings
        iterations, _ = run.series.get("total_loss", ((), ()))
        times = run.series.get("time", ((), ()))[1]
        folder = f'<span class="path">{escape(run.folder)}</span>'
        rows.append([
            f"{_key(entry)} {folder}",
            f"{iterations[-1] + 1:.0f}" if len(iterations) else "–",
            f"{np.median(times):.3g}" if len(times) else "–",
            *(escape(settings.get(f"SOLVER.{key}", "–")) for key in ("IMS_PER_BATCH", "BASE_LR")),
        ])  # fmt: skip
    head = ["run", "iterations", "s / iteration", "batch", "learning rate"]
    notes = [
        f"<li>{f'<b>{entry.letter}</b> ' if entry.letter else ''}{escape(note)}</li>"
        for entry in entries
        for note in entry.run.notes
    ]
    box = f'<div class="note" id="notes"><b>Notes</b><ul>{"".join(notes)}</ul></div>'
    return make_table(head, rows) + (box if notes else "")


def settings_that_differ(entries: Sequence[Entry]) -> str:
    """A table of the config keys that not all runs have the same; "" if there is none."""
    known = [entry for entry in entries if entry.run.settings]
    keys = sorted({key for entry in known for key in entry.run.settings} - {"OUTPUT_DIR"})
    rows = []
    for key in keys:
        values = [entry.run.settings.get(key, "–") for entry in known]
        if len(set(values)) > 1:
            rows.append([f"<code>{escape(key)}</code>", *(escape(v) for v in values)])
    if not rows:
        return ""
    return folded(
        f"Settings that differ: {len(rows)}",
        make_table(["key", *(_key(entry) for entry in known)], rows),
        len(rows) <= 12,
    )


def training(entries: Sequence[Entry]) -> str:
    """Losses, the learning rate, and results of evaluations during the training."""
    keys = sorted({key for entry in entries for key in entry.run.series})
    # "validation/loss_cls" belongs into the chart of "loss_cls"
    losses = sorted({key.split("/")[-1] for key in keys if "loss" in key})
    losses.sort(key=lambda name: name != "total_loss")
    charts = []
    for name in losses:
        lines = []
        for entry in entries:
            for key in keys:
                if key.split("/")[-1] == name and key in entry.run.series:
                    where = key[: -len(name)].rstrip("/")
                    x, y = thin(*entry.run.series[key])
                    label = " ".join(filter(None, (entry.letter, where, f"{y[-1]:.3g}")))
                    lines.append(entry.line(x, y, label=label, markers=bool(where)))
        charts.append(line_chart(lines, name, "iteration", x_range=(0, 0), log=True))
    for key in keys:
        is_result = "/".join(key.split("/")[-2:]) in ("bbox/AP", "bbox/AP50", "voc/mAP")
        if not is_result and key != "lr":
            continue
        lines = []
        for entry in entries:
            x, y = thin(*entry.run.series.get(key, ((), ())))
            if len(x) > 1:
                label = f"{entry.letter} {y[-1]:.1f}" if is_result else entry.letter
                markers = is_result and len(x) <= 60
                lines.append(entry.line(x, y, label=label.strip(), markers=markers))
        if lines:
            title = f"{key}, %" if is_result else "learning rate"
            origin = {"x_range": (0, 0), "y_range": (0, 0)}
            charts.append(line_chart(lines, title, "iteration", **origin))
    if not charts:
        return "<p>No run has a <code>metrics.json</code> with losses.</p>"
    return f"<p>Losses have a logarithmic axis.</p>{side_by_side(charts)}"


def results(evaluated: Sequence[Evaluated]) -> str:
    """COCO's twelve numbers by run."""
    rows = []
    for number, (name, meaning) in enumerate(COCO_SUMMARY):
        values = [x.result.stats[number] for x in evaluated]
        cells = [rounded(values[0])]
        cells += [f"{rounded(v)}{difference(v - values[0])}" for v in values[1:]]
        rows.append([f'<b>{name}</b> <span class="faint">{meaning}</span>', *cells])
    first = evaluated[0].result
    objects = int((~first.objects.crowd).sum())
    heads = [_key(x.entry) or "%" for x in evaluated]
    return (
        f"<p>{len(first.images)} images, {objects} objects, {len(first.class_names)} classes.</p>"
        + make_table(["COCO's summary, %", *heads], rows)
    )


def classes(evaluated: Sequence[Evaluated]) -> str:
    names = list(dict.fromkeys(name for x in evaluated for name in x.result.class_names))
    rows = []
    for name in names:
        cells = [escape(name), ""]
        for x in evaluated:
            found = name in x.result.class_names
            k = x.result.class_names.index(name) if found else 0
            if found:
                cells[1] = str(_positives(x.result, k))
            for values in (x.result.ap, x.result.ap50):
                cells.append(Bar(values[k], 100) if found else "–")
        rows.append(cells)
    table = make_table(["class", "objects"], rows, groups=_groups(evaluated, [["AP", "AP50"]]))
    return folded(f"AP of {len(names)} classes, %", table, len(names) <= MANY_CLASSES)


def precision_recall(evaluated: Sequence[Evaluated]) -> str:
    unit = {"x_range": (0, 1), "y_range": (0, 1)}
    charts = []
    for iou in evaluated[0].result.curves:
        lines = []
        for x in evaluated:
            curves = x.result.curves[iou]
            mean = curves[:, ~np.isnan(curves[0])].mean(1)
            lines.append(x.entry.line(RECALLS, mean))
        title = f"mean of the classes, IoU {iou}"
        charts.append(line_chart(lines, title, "recall", "precision", **unit))
    counts = {
        name: _positives(x.result, k)
        for x in evaluated
        for k, name in enumerate(x.result.class_names)
    }
    names = [name for name, count in counts.items() if count]
    shown = sorted(names, key=lambda name: -counts[name])[:MOST_CLASSES]
    by_class = []
    for name in sorted(shown, key=names.index):
        lines = []
        for x in evaluated:
            if name in x.result.class_names:
                k = x.result.class_names.index(name)
                label = f"{x.entry.letter} {rounded(x.result.ap50[k])}".strip()
                curve = x.result.curves[0.5][::2, k]
                lines.append(x.entry.line(RECALLS[::2], curve, label=label))
        by_class.append(line_chart(lines, name, size=(225, 135), **unit))
    left_out = len(names) - len(shown)
    text = "By class at IoU 0.5; numbers: AP50"
    if left_out:
        text += f"; {left_out} rarer classes are left out"
    return side_by_side(charts) + folded(text, side_by_side(by_class), len(shown) <= MANY_CLASSES)


def errors(evaluated: Sequence[Evaluated]) -> str:
    found = [(_costs(x.result), *_counts(x.result)) for x in evaluated]
    largest = max((float(cost.max()) for cost, _, _ in found), default=0)
    rows = []
    for number, kind in enumerate(KINDS):
        cells = [f'<b>{kind}</b><br/><span class="faint">{MEANING[kind]}</span>']
        for cost, *counts in found:
            cells.append(Bar(cost[number], largest, ".2f"))
            cells += [str(count[number]) for count in counts]
        rows.append(cells)
    heads = [["costs, AP50", f"score ≥ {x.result.threshold:.2f}", "all"] for x in evaluated]
    groups = _groups(evaluated, heads)
    return (
        "<p>What each detection that finds no object did wrong, and by how many points AP50 would "
        "rise if that kind of mistake alone were put right (all scores count for this). The kinds "
        "are those of TIDE (arXiv 2008.08115).</p>" + make_table(["kind"], rows, groups=groups)
    )


def calibration(evaluated: Sequence[Evaluated]) -> str:
    unit = {"x_range": (0, 1), "y_range": (0, 1)}
    lines, errors, tables = [], [], []
    for x in evaluated:
        c = x.result.calibration
        known = c.count > 0
        lines.append(x.entry.line(c.confidence[known], c.precision[known], markers=True))
        rows = [
            [f"{i / 10:.1f} to {(i + 1) / 10:.1f}", str(n), f"{s:.3f}", f"{p:.3f}"]
            for i, (n, s, p) in enumerate(zip(c.count, c.confidence, c.precision))
            if n
        ]
        head = ["score", "detections", "mean score", "share of hits"]
        kept = x.result.kept & (x.result.mistakes.kind != analysis.IGNORED)
        above = analysis.calibration(x.result.detections.score[kept], x.result.hits[kept])
        both = [f"<b>{rounded(error, '.3f')}</b>" for error in (c.error, above.error)]
        errors.append(
            f"<p>{_key(x.entry)} Expected calibration error: {both[0]}; of the detections with "
            f"score ≥ {x.result.threshold:.2f}: {both[1]}</p>"
        )
        tables.append(f"<div>{_key(x.entry)}{make_table(head, rows)}</div>")
    chart = line_chart(
        lines, "share of hits by score", "mean score", "hits at IoU 0.5", diagonal=True, **unit
    )
    return (
        "<p>Of detections with score 0.7, seven in ten should be hits: the dotted line. Above it "
        "the scores are too low, below it too high.</p>" + "".join(errors) + chart
        + folded("The numbers", side_by_side(tables), False)
    )  # fmt: skip


def thresholds(evaluated: Sequence[Evaluated]) -> str:
    charts = []
    for field, title in (("f1", "F1"), ("precision", "precision"), ("recall", "recall")):
        lines, crosses = [], []
        for x in evaluated:
            best = analysis.best_point(x.result.points)
            values = getattr(x.result.points, field)
            lines.append(x.entry.line(THRESHOLDS, values))
            value = getattr(best, field)
            name = f"{x.entry.run.name}: {title} {value:.3f} at {best.threshold:.2f}"
            crosses.append((best.threshold, value, x.entry.style, name))
        title = f"{title} of all classes together"
        charts.append(
            line_chart(
                lines, title, "score threshold", x_range=(0, 1), y_range=(0, 1), crosses=crosses
            )
        )
    names = list(dict.fromkeys(name for x in evaluated for name in x.result.class_names))
    rows = []
    for name in ["", *names]:
        cells = [escape(name) or "<b>all together</b>"]
        for x in evaluated:
            point = analysis.best_point(x.result.points)
            if name:
                known = name in x.result.class_names
                point = known and x.result.class_points[x.result.class_names.index(name)]
            cells.append(f"<b>{point.threshold:.2f}</b>" if point else "–")
            cells += [f"{v:.3f}" for v in point[1:]] if point else ["–"] * 3
        rows.append(cells)
    groups = _groups(evaluated, [["threshold", "precision", "recall", "F1"]])
    table = make_table(["class"], rows, groups=groups)
    return (
        "<p>F1 is the harmonic mean of precision and recall at IoU 0.5; the marks are at its "
        "highest.</p>" + side_by_side(charts)
        + folded("The threshold of the best F1, by class", table, len(names) <= MANY_CLASSES)
    )  # fmt: skip


def confusion(evaluated: Evaluated) -> str:
    result = evaluated.result
    matrix = analysis.confusion_matrix(
        result.detections, result.objects, result.pairs, result.mistakes, result.kept,
        len(result.class_names),
    )  # fmt: skip
    text = (
        f"<h3>{_key(evaluated.entry)} score ≥ {result.threshold:.2f}</h3>"
        "<p>Rows: the object; columns: the detection that belongs to it (IoU at least 0.5). "
        "Without an object are also duplicates and boxes that are too far off. Shades are shares "
        "of the row.</p>"
    )
    if len(result.class_names) <= MANY_CLASSES:
        return text + confusion_table(matrix, result.class_names)
    picture = heat_map(matrix, result.class_names) if len(matrix) <= MOST_CLASSES + 1 else ""
    return text + picture + most_confused(matrix, result.class_names)


def galleries(evaluated: Evaluated, pictures: int) -> str:
    """Of each kind, the costliest first, up to ``pictures`` thumbnails."""
    result = evaluated.result
    cost, (kept, _) = _costs(result), _counts(result)
    parts, unreadable = [], []
    for kind in np.argsort(-cost, kind="stable"):
        figures = []
        for number in analysis.worst(
            result.detections, result.objects, result.mistakes, result.kept, kind, pictures
        ):
            try:
                figures.append(_figure(result, kind, number))
            except (OSError, ValueError) as error:
                unreadable.append(str(error))
        text = f"<b>{KINDS[kind]}</b>: {kept[kind] or 'none'}"
        body = f'<div class="gallery">{"".join(figures)}</div>' if figures else ""
        parts.append(f"<p>{text}</p>{body}")
    if unreadable:
        text = f"{len(unreadable)} pictures can't be shown; the first: {unreadable[0]}"
        parts.insert(0, f'<p class="note">{escape(text)}</p>')
    title = f"<h3>{_key(evaluated.entry)} score ≥ {result.threshold:.2f}</h3>"
    return "".join([title, *parts])


def _key(entry: Entry) -> str:
    """The run's letter beside its line; "" for a single run."""
    if not entry.letter:
        return ""
    return (
        f'<span class="key s{entry.style}" title="{escape(entry.run.folder, quote=True)}">'
        '<svg width="26" height="8" class="chart" aria-hidden="true">'
        f'<path class="line" d="M0 4H26"/></svg>{entry.letter} {escape(entry.run.name)}</span>'
    )


def _groups(evaluated: Sequence[Evaluated], heads: Sequence[Sequence[str]]) -> list[tuple]:
    """(title, columns) of each run; ``heads`` of each, or one for all."""
    heads = heads * len(evaluated) if len(heads) == 1 else heads
    return [(_key(x.entry), columns) for x, columns in zip(evaluated, heads)]


def _positives(result: Evaluation, label: int) -> int:
    return int(((result.objects.label == label) & ~result.objects.crowd).sum())


def _costs(result: Evaluation) -> np.ndarray:
    return analysis.costs(
        result.detections, result.objects, result.mistakes, len(result.class_names)
    )


def _counts(result: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """(6,) mistakes of each kind from the threshold up, and of all scores."""
    everything = np.ones(len(result.kept), bool)
    return tuple(
        analysis.count_kinds(result.objects, result.mistakes, kept)
        for kept in (result.kept, everything)
    )


def _figure(result: Evaluation, kind: int, number: int) -> str:
    d, o, names = result.detections, result.objects, result.class_names
    if kind == analysis.MISSED:
        image, box, target = o.image[number], None, number
        width, height = o.box[number, 2:]
        caption = f"{names[o.label[number]]}, {width:.0f} × {height:.0f} pixels"
    else:
        image, box, target = d.image[number], d.box[number], result.mistakes.target[number]
        caption = f"{names[d.label[number]]} {d.score[number]:.2f}"
        if target >= 0:
            caption += f"; object: {names[o.label[target]]}, IoU {result.mistakes.iou[number]:.2f}"
    record = result.images[image]
    size = record.get("height"), record.get("width")
    pixels = read_image(record["file_name"], "BGR", size)
    uri = thumbnail(pixels, box, o.box[target] if target >= 0 else None)
    caption = escape(caption, quote=True)
    file_name = escape(os.path.basename(record["file_name"]))
    return (
        f'<figure><img loading="lazy" alt="{caption}" src="{uri}"/><figcaption>{caption}<br/>'
        f'<span class="faint">{file_name}</span></figcaption></figure>'
    )
