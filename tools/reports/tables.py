"""Tables, and what else of the page holds numbers, as strings of HTML."""

from html import escape
from typing import NamedTuple, Sequence

import numpy as np


class Bar(NamedTuple):
    """A cell with a number and a bar of its share of ``full``."""

    value: float
    full: float
    format: str = ".1f"


def make_table(
    head: Sequence[str],
    rows: Sequence[Sequence],
    left: Sequence[int] = (),
    groups: Sequence[tuple[str, Sequence[str]]] = (),
) -> str:
    """Of cells that are HTML or Bar.

    Args:
        head: of the columns.
        left: numbers of the columns that hold text.
        groups: further columns, by groups with a title of their own.
    """
    titles = ""
    if any(title for title, _ in groups):
        titles = "".join(
            f'<th class="group" colspan="{len(x)}">{title}</th>' for title, x in groups
        )
        titles = f'<tr><th colspan="{len(head)}" class="group"></th>{titles}</tr>'
    head = [*head, *(column for _, columns in groups for column in columns)]
    aligned = [' class="left"' if number in left else "" for number in range(len(head))]
    lines = []
    for row in rows:
        cells = []
        for number, cell in enumerate(row):
            if isinstance(cell, Bar):
                share = max(0.0, cell.value / cell.full * 100) if cell.full > 0 else 0.0
                share = f' class="bar" style="--v:{share:.1f}%"' if share == share else ""
                cells.append(f"<td{share}>{rounded(cell.value, cell.format)}</td>")
            else:
                cells.append(f"<td{aligned[number]}>{cell}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(f"<th{place}>{cell}</th>" for place, cell in zip(aligned, head))
    return (
        f'<div class="wide"><table><thead>{titles}<tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def side_by_side(parts: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(parts)}</div>'


def folded(title: str, body: str, is_open: bool) -> str:
    opened = ' open="open"' if is_open else ""
    return f"<details{opened}><summary>{escape(title)}</summary>{body}</details>"


def rounded(value: float, style: str = ".1f") -> str:
    return "–" if np.isnan(value) else f"{value:{style}}"


def difference(value: float) -> str:
    return "" if np.isnan(value) else f' <span class="faint">({value:+.1f})</span>'


def confusion_table(matrix: np.ndarray, names: Sequence[str]) -> str:
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    heads = "".join(f"<th>{escape(name)}</th>" for name in [*names, "not found"])
    lines = []
    for i, name in enumerate([*names, "no object"]):
        cells = []
        for j, count in enumerate(matrix[i]):
            right = ' class="right"' if i == j and i < len(names) else ""
            cells.append(f'<td{right} style="--v:{shares[i, j]:.0f}%">{count or ""}</td>')
        lines.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table class="confusion"><thead><tr><th>object \\ detection</th>{heads}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def heat_map(matrix: np.ndarray, names: Sequence[str]) -> str:
    """A square for each pair that occurs, darker by its share of the row."""
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    rows, columns = [*names, "no object"], [*names, "not found"]
    cell, left = 8, 110
    side = cell * len(matrix)
    parts = [
        f'<svg class="heat" viewBox="0 0 {left + side} {side + 2}" width="{left + side}" '
        f'role="img" aria-label="Confusion matrix">'
        f'<rect class="frame" x="{left}" width="{side}" height="{side}"/>'
    ]
    for i, name in enumerate(rows):
        parts.append(
            f'<text x="0" y="{cell * i + 7.5}" style="font-size:8px">{escape(name[:22])}</text>'
        )
    for i, j in zip(*np.nonzero(matrix)):
        kind = "right" if i == j else "wrong"
        text = f"{rows[i]} → {columns[j]}: {matrix[i, j]}"
        parts.append(
            f'<rect class="{kind}" x="{left + cell * j}" y="{cell * i}" width="{cell}" '
            f'height="{cell}" opacity="{0.08 + 0.92 * shares[i, j]:.2f}">'
            f"<title>{escape(text)}</title></rect>"
        )
    return folded("The matrix as a picture", "".join([*parts, "</svg>"]), True)


def most_confused(matrix: np.ndarray, names: Sequence[str], most: int = 25) -> str:
    between = matrix[:-1, :-1] * (1 - np.eye(len(names), dtype=int))
    share = between / np.maximum(matrix[:-1].sum(1, keepdims=True), 1)
    rows = []
    for at in np.argsort(-between, axis=None, kind="stable")[:most]:
        i, j = np.unravel_index(at, between.shape)
        if between[i, j]:
            cells = escape(names[i]), escape(names[j]), str(between[i, j])
            rows.append([*cells, Bar(100 * share[i, j], 100)])
    head = ["object", "taken for", "times", "% of the objects"]
    return folded("Most confused", make_table(head, rows, left=(1,)), True)
