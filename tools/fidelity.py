#!/usr/bin/env python
"""How exactly the labs' models equal other projects': fidelity.py [--output docs/fidelity.md]

Computes the difference in each quantity, from the normalised input to losses, gradients and
detections, and writes the table; tests/tools/test_fidelity.py holds the same rows to their
tolerances. The labs' own settings hold, but for MODEL.DEVICE, MODEL.WEIGHTS and, where the text
says so, MODEL.SSD.CHANNELS_LAST.
"""

import argparse
import functools
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

import detectron2
import torch
import torchvision
from benchmark import git
from lineages import independent, mmdet, settings, sources
from lineages import torchvision as tv
from lineages.rows import ROOT, Row


def _golden_rows(kind: str) -> Tuple[Row, ...]:
    if path := mmdet.golden_file(kind):
        return mmdet.rows_of(path)
    return (Row(mmdet.LABS[kind], mmdet.SOURCE, "all", None, 0, "", "no golden file"),)


def _caffe_rows() -> Tuple[Row, ...]:
    text = "cases computed by hand: tests/modeling/test_caffe.py"
    names = ("PriorBox", "MultiBoxLoss", "DetectionOutput")
    return tuple(Row("ssd_vgg16_size300", "Caffe", name, None, 0, "", text) for name in names)


class Section(NamedTuple):
    title: str
    text: str
    jobs: List[Tuple[str, Callable[[], Tuple[Row, ...]]]]  # lab, rows


def _jobs(function: Callable, labs: Sequence[str]) -> List[Tuple[str, Callable]]:
    return [(lab, functools.partial(function, lab)) for lab in labs]


SECTIONS = [
    Section(
        "torchvision",
        "The installed torchvision's own code on one side, ours on the other. Its random weights "
        "are written to a file and read through `MODEL.WEIGHTS`.",
        _jobs(tv.rows_of, list(tv.MODELS)),
    ),
    Section(
        "MMDetection",
        "Arrays that MMDetection 3.3.0's own code has computed (tests/data/golden). Its parameters "
        "are read through `MODEL.WEIGHTS`.",
        [(lab, functools.partial(_golden_rows, kind)) for kind, lab in mmdet.LABS.items()],
    ),
    Section(
        "Independent networks",
        "For these **the source's own code isn't run**: the other side is an independent network "
        "in plain torch (tools/lineages/sources.py), written from the source's definition. Random "
        "weights are carried over by position.",
        _jobs(independent.network_rows, list(sources.NETWORKS)),
    ),
    Section(
        "Default boxes",
        "Against loops in float64 with the numbers that the source lists. Those of torchvision and "
        "MMDetection are above.",
        _jobs(independent.box_rows, list(sources.BOXES)),
    ),
    Section("Caffe's layers", "Caffe can't be run here.", [("ssd_vgg16_size300", _caffe_rows)]),
]


def compute(pattern: str = "") -> Dict[str, List[Row]]:
    """{section's title: rows} of the labs whose name matches the regular expression."""
    return {
        section.title: [
            row for lab, rows in section.jobs if re.search(pattern, lab) for row in rows()
        ]
        for section in SECTIONS
    }


_ARROW = " ↔ "
_HEADER = "| lab ↔ source | quantity | largest difference | tolerance | compared |"


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1e}"


def table(rows: Sequence[Row]) -> str:
    """Markdown; lab and source stand in the first of their rows."""
    lines, above = [_HEADER, "|---|---|---|---|---|"], None
    for row in rows:
        name = "" if row[:2] == above else f"**{row.lab}**{_ARROW}{row.source}"
        above, numbers = row[:2], "– | –"
        if row.difference is not None:
            unit = f" {row.unit}" if row.unit and row.difference else ""
            mark = "" if row.is_equal else "**"
            numbers = f"{mark}{_number(row.difference)}{unit}{mark} | {_number(row.tolerance)}"
        lines.append(f"| {name} | {row.quantity} | {numbers} | {row.note} |")
    return "\n".join(lines) + "\n"


def keys_in(document: str) -> List[Tuple[str, str, str]]:
    """(lab, source, quantity) of each row of the document's tables of differences."""
    keys, above = [], ()
    for line in document.split(settings.TITLE)[0].splitlines():
        if line.startswith("| ") and line != _HEADER:
            name, quantity = (cell.strip() for cell in line.split("|")[1:3])
            above = tuple(name.replace("**", "").split(_ARROW)) if name else above
            keys.append((*above, quantity))
    return keys


def _conditions(seconds: float) -> str:
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    changed = " and what wasn't committed yet" if git("status", "--porcelain") else ""
    return (
        f"Command: `python tools/fidelity.py`, {time.strftime('%Y-%m-%d')}, "
        f"commit {commit}{changed}; {seconds:.0f} s on a {platform.machine()} CPU, "
        f"{torch.get_num_threads()} of {os.cpu_count()} cores, no GPU. "
        f"Python {platform.python_version()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, Detectron2 {detectron2.__version__}."
    )


def render(rows: Dict[str, List[Row]], seconds: float) -> str:
    """The whole document."""
    found = sum(rows.values(), [])
    numbers = [row for row in found if row.difference is not None]
    equal = sum(row.is_equal for row in numbers)
    parts = [
        "# Fidelity: how exactly the labs equal their sources\n",
        "Generated by tools/fidelity.py; tests/tools/test_fidelity.py holds every row to its "
        "tolerance.\n",
        _conditions(seconds) + "\n",
        f"{equal} of {len(numbers)} differences are within their tolerance. A lab's own settings "
        "hold everywhere, without overrides but for device, weights and memory format "
        "(`MODEL.SSD.CHANNELS_LAST False`, in which CPUs sum more exactly; MMDetection's rows of "
        "paths have the labs' own format). All weights are random: no published SSD's weights were "
        "at hand, so no published AP has been measured again.\n",
        '"of mean": in units of a level\'s mean absolute value, worst level. "rel.": relative.\n',
    ]
    for section in SECTIONS:
        parts += [f"## {section.title}\n", section.text + "\n", table(rows[section.title])]
    return "\n".join([*parts, settings.settings_markdown()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT / "docs/fidelity.md"
    parser.add_argument("--output", default=default, type=Path, help="file to write")
    parser.add_argument(
        "--only", default="", metavar="PATTERN",
        help="only labs whose name matches this regular expression; prints, writes no file",
    )  # fmt: skip
    arguments = parser.parse_args()
    start = time.time()
    rows = compute(arguments.only)
    found = sum(rows.values(), [])
    if not found:
        parser.error(f"--only {arguments.only!r} fits no lab")
    if arguments.only:
        print(table(found))
    else:
        arguments.output.write_text(render(rows, time.time() - start))
    wrong = [row for row in found if not row.is_equal]
    for row in wrong:
        print("not equal:", *row[:5])
    print(f"{len(found) - len(wrong)} of {len(found)} rows are equal within their tolerance")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
