"""Where the marks of a plot lie: figures in, coordinates of an SVG out; the template draws them.

A plot is drawn for the width of a phone, so that its text is legible there; it may grow by a third elsewhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lathe.reports.values import Value

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 22, 40
LETTER = 6.3  # mean width of one in labels
LINE = 13  # height of one

MOST_POINTS = 400  # of a curve: more cannot be told apart
FEW_POINTS = 12  # are drawn as dots too: one alone would not be seen
LOG_FROM = 30  # ratio of largest to smallest from which an axis is logarithmic


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels. `unit` is what one of the ticks' numbers stands for: 0.01 for percent."""

    low: float
    high: float
    first: float
    last: float
    unit: float
    log: bool
    ticks: list[tuple[float, str]]

    def place(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, at = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return round(self.first + (self.last - self.first) * (at - low) / (high - low), 2)


@dataclass(frozen=True)
class Mark:
    """A point; `bar` are the pixels of its interval's ends, `label` those of its name, and to which side it goes."""

    name: str
    x: float
    y: float
    of_x: Value
    of_y: Value
    bar: tuple[float | None, float | None]
    label: tuple[float, float, str]


@dataclass(frozen=True)
class Line:
    """A curve through rows of a file, broken where they have no number; `dots` are its points where they are few."""

    name: str
    file: str
    paths: list[str]
    dots: list[tuple[str, str]]
    last: Value


@dataclass(frozen=True)
class Plot:
    """One drawing; `described` tells in words what it shows."""

    title: str
    x_label: str
    y_label: str
    x: Axis
    y: Axis
    described: str
    marks: list[Mark] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)


@dataclass(frozen=True)
class Point:
    """An artifact in a plot of two of its figures; `low` and `high` end the interval of the second."""

    name: str
    x: Value
    y: Value
    low: Value | None = None
    high: Value | None = None


def axis(values: Sequence[float], first: float, last: float, *, unit: float = 1, may_be_log: bool = False) -> Axis:
    """Return a scale with room around all values, and about five round ticks on it."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low >= LOG_FROM:
        return _log_axis(low, high, first, last, unit)
    room = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    begin, end = (0.0 if 0 <= low < high / 3 else low - room), high + room
    places = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(begin / unit, end / unit)
    digits = next(d for d in range(16) if all(math.isclose(round(p, d), p, abs_tol=1e-15) for p in places))
    ticks = [(float(place) * unit, f"{place:,.{digits}f}") for place in places]
    return Axis(begin, end, first, last, unit, False, [tick for tick in ticks if begin <= tick[0] <= end])


def _log_axis(low: float, high: float, first: float, last: float, unit: float) -> Axis:
    begin, end = low / 1.5, high * 1.5
    powers = range(math.ceil(math.log10(begin / unit)), math.floor(math.log10(end / unit)) + 1)
    every = math.ceil(len(powers) / 6)
    ticks = [(10.0**power * unit, f"{10.0**power:,.{max(0, -power)}f}") for power in powers[::every]]
    return Axis(begin, end, first, last, unit, True, ticks)


def across(values: Sequence[float], *, unit: float = 1) -> Axis:
    """Return the scale from left to right."""
    return axis(values, LEFT, WIDTH - RIGHT, unit=unit)


def scatter(title: str, points: Sequence[Point], x: Axis, *, x_label: str, y_label: str, y_unit: float = 1) -> Plot:
    """Draw each point with its name beside it, where the name hides nothing if there is such a place."""
    heights = [value.content for point in points for value in (point.y, point.low, point.high) if value is not None]
    y = axis(heights, HEIGHT - BOTTOM, TOP, unit=y_unit, may_be_log=True)
    places = [(x.place(point.x.content), y.place(point.y.content)) for point in points]
    bars = [
        (y.place(point.low.content) if point.low else None, y.place(point.high.content) if point.high else None)
        for point in points
    ]
    labels = _labels([point.name for point in points], places, bars)
    marks = [Mark(point.name, *places[n], point.x, point.y, bars[n], labels[n]) for n, point in enumerate(points)]
    told = f"{_with_unit(title, y_label)} against {x_label} of {', '.join(point.name for point in points)}."
    return Plot(title, x_label, y_label, x, y, told, marks=marks)


def _labels(
    names: Sequence[str], places: Sequence[tuple[float, float]], bars: Sequence[tuple[float | None, float | None]]
) -> list[tuple[float, float, str]]:
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    taken += [(x - 3, high, x + 3, low) for (x, _), (low, high) in zip(places, bars, strict=True) if low and high]
    found: list[tuple[float, float, str]] = []
    for name, (x, y) in zip(names, places, strict=True):
        width = LETTER * len(name)
        candidates = [
            (x + dx, y + dy, anchor)
            for distance in (0, LINE, 2 * LINE, 3 * LINE)
            for dx, dy, anchor in (
                (9, 4 - distance, "start"),
                (-9, 4 - distance, "end"),
                (9, 4 + distance, "start"),
                (-9, 4 + distance, "end"),
                (0, -10 - distance, "middle"),
                (0, 18 + distance, "middle"),
            )
        ]
        boxes = [_box(candidate, width) for candidate in candidates]
        costs = [_hidden(box, taken) for box in boxes]
        chosen = costs.index(min(costs))
        taken.append(boxes[chosen])
        found.append(candidates[chosen])
    return found


Box = tuple[float, float, float, float]


def _box(label: tuple[float, float, str], width: float) -> Box:
    x, y, anchor = label
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return (left, y - 10, left + width, y + 3)


def _hidden(box: Box, taken: Sequence[Box]) -> float:
    """Return the area that a label would hide of others, and what of it would lie outside, which counts more."""
    left, top, right, bottom = box
    over = sum(
        max(0.0, min(right, x1) - max(left, x0)) * max(0.0, min(bottom, y1) - max(top, y0)) for x0, y0, x1, y1 in taken
    )
    outside = max(0.0, LEFT - left) + max(0.0, right - WIDTH) + max(0.0, -top) + max(0.0, bottom - (HEIGHT - BOTTOM))
    return over + 100 * outside


def curves(
    title: str,
    series: dict[str, list[Value]],
    *,
    x: str,
    y: str,
    x_label: str,
    y_label: str,
    may_be_log: bool = False,
) -> Plot | None:
    """Draw columns `y` over `x` of the rows of each series; None where they hold no number."""
    drawn = {name: _drawn(rows, x, y) for name, rows in series.items()}
    points = [point for rows in drawn.values() for point in rows if point]
    if not points:
        return None
    right = across([at for at, _, _ in points])
    up = axis([height for _, height, _ in points], HEIGHT - BOTTOM, TOP, may_be_log=may_be_log)
    lines = [_line(name, rows, right, up) for name, rows in drawn.items() if any(rows)]
    told = f"{_with_unit(title, y_label)} by {x_label}: {' and '.join(line.name for line in lines)}."
    return Plot(title, x_label, y_label, right, up, told, lines=lines)


def _with_unit(title: str, unit: str) -> str:
    return f"{title} ({unit})" if unit else title


def _line(name: str, rows: Sequence[tuple[float, float, Value] | None], right: Axis, up: Axis) -> Line:
    paths = _paths(rows, right, up)
    points = [tuple(point.split(",")) for path in paths for point in path.split()]
    last = next(row[2] for row in reversed(rows) if row)
    return Line(name, last.file, paths, [(x, y) for x, y in points] if len(points) <= FEW_POINTS else [], last)


def _drawn(rows: list[Value], x: str, y: str) -> list[tuple[float, float, Value] | None]:
    every = math.ceil(len(rows) / MOST_POINTS)
    chosen = [row for place, row in enumerate(rows) if place % every == 0 or place == len(rows) - 1]
    return [_point(row, x, y) for row in chosen]


def _point(row: Value, x: str, y: str) -> tuple[float, float, Value] | None:
    at, height = row.get(x), row.get(y)
    numbers = [value.content for value in (at, height) if value and isinstance(value.content, float)]
    if height is None or len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        return None
    return numbers[0], numbers[1], height


def _paths(rows: Sequence[tuple[float, float, Value] | None], right: Axis, up: Axis) -> list[str]:
    paths: list[list[str]] = [[]]
    for row in rows:
        if row is None:
            paths.append([])
        else:
            paths[-1].append(f"{right.place(row[0])},{up.place(row[1])}")
    return [" ".join(path) for path in paths if path]
