"""Line charts as SVG to stand within an HTML page, whose style sheet gives their colours.

A line is told from others by colour (class s0 … s7), dashes, markers and the label at its end.
"""

from html import escape
from typing import NamedTuple, Optional, Sequence

import numpy as np

STYLES = 8  # that page.html has
_MARKERS = (  # about (0, 0), 8 units wide
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",  # circle
    "M-3.5-3.5h7v7h-7z",  # square
    "M0-4.5L4.5 3.5h-9z",  # triangle
    "M0-5L5 0 0 5-5 0z",  # diamond
    "M0 4.5L4.5-3.5h-9z",
    "M-4-4L4 4M-4 4L4-4",
    "M-5 0H5M0-5V5",
    "M-5-2h10v4h-10z",
)
_LABEL_HEIGHT = 13


class Line(NamedTuple):
    x: np.ndarray  # (P,) finite
    y: np.ndarray  # (P,); NaN is a gap
    label: str = ""  # beside its end
    style: int = 0  # of STYLES
    markers: bool = False  # at each point
    name: str = ""  # what a pointing device shows


def line_chart(
    lines: Sequence[Line], title: str, x_label: str = "", y_label: str = "",
    x_range: Optional[tuple] = None, y_range: Optional[tuple] = None, log: bool = False,
    size: tuple = (400, 240), diagonal: bool = False, crosses: Sequence[tuple] = (),
) -> str:  # fmt: skip
    """A chart as an <svg> element.

    Args:
        x_range, y_range: what the axes span at least; None: what the lines do.
        log: the y axis is logarithmic, and values up to 0 are gaps.
        size: (width, height), to which font sizes relate.
        diagonal: with a thin line y = x.
        crosses: (x, y, style, name) of single points.
    """
    lines = [line for line in lines if len(line.x)]
    if log:
        lines = [x._replace(y=np.where(x.y > 0, x.y, np.nan)) for x in lines]
    width, height = size
    x_axis = _Axis([line.x for line in lines], x_range, False)
    y_axis = _Axis([line.y for line in lines], y_range, log)
    texts = [_number(value, y_axis.step) for value in y_axis.ticks]
    left = 12 + 6.5 * max(map(len, texts), default=1) + (15 if y_label else 0)
    right = width - 16 - 7 * max((len(x.label) for x in lines), default=0)
    top, bottom = 24, height - (38 if x_label else 20)
    x_axis.place(left, right)
    y_axis.place(bottom, top)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" class="chart" role="img" '
        f'aria-label="{escape(_describe(lines, title), quote=True)}">',
        f'<text class="title" x="{left:.0f}" y="14">{escape(title)}</text>',
    ]
    for value, text in zip(y_axis.ticks, texts):
        y = y_axis.at(value)
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        parts.append(f'<text x="{left - 5:.1f}" y="{y + 4:.1f}" class="end">{text}</text>')
    for value in x_axis.ticks:
        x, text = x_axis.at(value), _number(value, x_axis.step)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" class="mid">{text}</text>')
    if x_label:
        x = (left + right) / 2
        parts.append(f'<text x="{x:.1f}" y="{height - 6}" class="mid">{escape(x_label)}</text>')
    if y_label:
        y = (top + bottom) / 2
        parts.append(
            f'<text transform="translate(11 {y:.0f}) rotate(-90)" class="mid">'
            f"{escape(y_label)}</text>"
        )
    if diagonal:
        start, end = (f"{x_axis.at(v):.1f} {y_axis.at(v):.1f}" for v in (0, 1))
        parts.append(f'<path class="diagonal" d="M{start}L{end}"/>')
    parts += [_draw(line, x_axis, y_axis) for line in lines]
    for x, y, style, name in crosses:
        at = f"translate({x_axis.at(x):.1f} {y_axis.at(y):.1f})"
        parts.append(
            f'<path class="mark s{style}" transform="{at}" d="{_MARKERS[style]}">'
            f"<title>{escape(name)}</title></path>"
        )
    parts += _end_labels(lines, x_axis, y_axis)
    return "".join([*parts, "</svg>"])


def thin(x: np.ndarray, y: np.ndarray, most: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """At most ``most`` points: the means of neighbours."""
    if len(x) <= most:
        return x, y
    parts = np.array_split(np.arange(len(x)), most)
    return tuple(np.array([v[part].mean() for part in parts]) for v in (x, y))


class _Axis:
    def __init__(self, values: Sequence[np.ndarray], span: Optional[tuple], log: bool):
        values = np.concatenate([np.zeros(0), *values, np.array(span or (), float)])
        values = values[np.isfinite(values)]
        low, high = (values.min(), values.max()) if len(values) else (0.1 if log else 0.0, 1.0)
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.log, self.low, self.high = log, low, high
        self.ticks, self.step = _log_ticks(low, high) if log else _ticks(low, high)

    def place(self, start: float, end: float) -> None:
        self.start, self.end = start, end

    def at(self, value):
        scale = np.log if self.log else np.asarray
        low, high = scale(self.low), scale(self.high)
        return self.start + (self.end - self.start) * (scale(value) - low) / (high - low)


def _ticks(low: float, high: float) -> tuple[list[float], float]:
    raw = (high - low) / 4
    power = 10 ** np.floor(np.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999)
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return [float(i * step) for i in np.arange(first, last + 1)], step


def _log_ticks(low: float, high: float) -> tuple[list[float], float]:
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5), range(1, 10)):
        ticks = [float(f * p) for p in powers for f in factors if low <= f * p <= high]
        if len(ticks) > 2:
            return ticks, min(ticks)
    return _ticks(low, high)


def _number(value: float, step: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10000 and value % 1000 == 0:
        return f"{value / 1000:g}k"
    if step < 1e-4:
        return f"{value:.2g}"
    decimals = max(0, -int(np.floor(np.log10(step) + 1e-9)))
    text = f"{value:.{decimals + 1}f}"  # a step may be 2.5 times a power of ten
    return text.rstrip("0").rstrip(".")


def _draw(line: Line, x_axis: _Axis, y_axis: _Axis) -> str:
    xs, ys = x_axis.at(line.x), y_axis.at(line.y)
    command, parts, marks = "M", [], []
    for x, y in zip(xs.tolist(), ys.tolist()):
        if y != y:  # NaN
            command = "M"
            continue
        parts.append(f"{command}{x:.1f} {y:.1f}")
        command = "L"
        if line.markers:
            at = f"translate({x:.1f} {y:.1f})"
            marks.append(f'<path transform="{at}" d="{_MARKERS[line.style]}"/>')
    name = f"<title>{escape(line.name)}</title>" if line.name else ""
    path = f'<path class="line" d="{"".join(parts)}"/>'
    return f'<g class="s{line.style}">{name}{path}<g class="mark">{"".join(marks)}</g></g>'


def _end_labels(lines: Sequence[Line], x_axis: _Axis, y_axis: _Axis) -> list[str]:
    """Beside the lines' ends, moved apart where they would overlap."""
    places = []
    for line in lines:
        known = np.flatnonzero(np.isfinite(line.y))
        if line.label and len(known):
            places.append([float(y_axis.at(line.y[known[-1]])), float(x_axis.end), line])
    places.sort(key=lambda place: place[0])
    for before, place in zip(places, places[1:]):
        place[0] = max(place[0], before[0] + _LABEL_HEIGHT)
    floor = y_axis.start
    for place in reversed(places):
        place[0] = min(place[0], floor)
        floor = place[0] - _LABEL_HEIGHT
    return [
        f'<text class="label s{line.style}" x="{x + 8:.1f}" y="{y + 4:.1f}">'
        f"{escape(line.label)}</text>"
        for y, x, line in places
    ]


def _describe(lines: Sequence[Line], title: str) -> str:
    """What a screen reader says."""
    ends = []
    for line in lines:
        known = line.y[np.isfinite(line.y)]
        if len(known):
            ends.append(f"{line.name or line.label} from {known[0]:.4g} to {known[-1]:.4g}".strip())
    return f"{title}: {'; '.join(ends) or 'no values'}"
