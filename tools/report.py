#!/usr/bin/env python
"""Writes a page about a run, or about several side by side: how it was trained, what it reaches,
and which mistakes it makes.

    python tools/report.py labs/quickstart/output
    python tools/report.py labs/a/output labs/b/output --output comparison.html

A run is the OUTPUT_DIR of a training or an evaluation. Its metrics.json, config.yaml and
inference/<data set>/coco_instances_results.json are read, and the ground truth of the data sets
that the config names (DETECTRON2_DATASETS as in the training). The page says what a run lacks. It
is one HTML file without scripts that refers to nothing outside.
"""

import argparse
import logging
import os
import string
from html import escape
from pathlib import Path

from reports import charts, sections
from reports.runs import read_run
from reports.sections import Entry, Evaluated

TEMPLATE = Path(__file__).parent / "reports" / "page.html"


def build_page(runs, pictures: int) -> str:
    """The page as HTML that is also well-formed XML.

    Args:
        runs: of reports.runs.read_run.
        pictures: thumbnails of each kind of mistake, shared among the runs.
    """
    letters = string.ascii_uppercase if len(runs) > 1 else [""]
    entries = [Entry(letter, i, run) for i, (letter, run) in enumerate(zip(letters, runs))]
    title = escape("Report of " + ", ".join(run.name for run in runs))
    overview = sections.overview(entries) + sections.settings_that_differ(entries)
    parts = [("Training", sections.training(entries))]
    names = list(dict.fromkeys(name for run in runs for name in run.evaluations))
    for name in names:
        of = f" ({escape(name)})" if len(names) > 1 else ""
        evaluated = [
            Evaluated(entry, entry.run.evaluations[name])
            for entry in entries
            if name in entry.run.evaluations
        ]
        each = max(2, pictures // len(evaluated)) if pictures else 0
        parts += [
            (f"Results on {escape(name)}", sections.results(evaluated)),
            (f"Classes{of}", sections.classes(evaluated)),
            (f"Precision and recall{of}", sections.precision_recall(evaluated)),
            (f"Kinds of mistakes{of}", sections.errors(evaluated)),
            (f"Score thresholds{of}", sections.thresholds(evaluated)),
            (f"Calibration{of}", sections.calibration(evaluated)),
            (f"Confusion matrix{of}", "".join(map(sections.confusion, evaluated))),
        ]
        if each:
            galleries = "".join(sections.galleries(x, each) for x in evaluated)
            parts.append((f"Worst mistakes{of}", GALLERY_TEXT + galleries))
    links = " ".join(f'<a href="#s{i}">{name}</a>' for i, (name, _) in enumerate(parts))
    body = [f"<h1>{title}</h1><nav>{links}</nav>{overview}"]
    body += [f'<h2 id="s{i}">{name}</h2>{text}' for i, (name, text) in enumerate(parts)]
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=title, body="\n".join(body))


GALLERY_TEXT = (
    "<p>Full line, orange: the detection. Dashed line, blue: the object. Detections with the "
    "highest scores first, of missed objects the largest; at most two of an image.</p>"
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="OUTPUT_DIR", help="folder of a run")
    parser.add_argument("--output", help="file to write; default: report.html in the first folder")
    parser.add_argument(
        "--score-threshold", type=float, metavar="SCORE",
        help="single detections count from this score up; default: that of each run's best F1",
    )  # fmt: skip
    parser.add_argument(
        "--pictures", type=int, default=12,
        help="of each kind of mistake, for all runs together; default: %(default)s",
    )  # fmt: skip
    args = parser.parse_args()
    for folder in args.runs:
        if not os.path.isdir(folder):
            parser.error(f"no such folder: {folder}")
    if len(args.runs) > charts.STYLES:
        parser.error(f"{len(args.runs)} runs; lines of at most {charts.STYLES} can be told apart")
    logging.basicConfig(format="%(message)s")
    path = args.output or os.path.join(args.runs[0], "report.html")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    page = build_page([read_run(x, args.score_threshold) for x in args.runs], args.pictures)
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:  # of odd names
        file.write(page)
    print(f"Wrote {path} ({os.path.getsize(path) / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
