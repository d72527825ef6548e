"""Plots: coordinates of an SVG from numbers; the template draws them.

A plot has the width of a phone, so that its text is legible there; it may be a third larger elsewhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lathe.reports.values import Value

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 22, 40
LETTER = 6.3  # mean width of a letter in labels
LINE = 13  # height of a line

MOST_POINTS = 400  # of a curve: more cannot be distinguished
FEW_POINTS = 12  # up to so many are drawn as dots too: a single one would be invisible
LOG_FROM = 30  # least ratio of largest to smallest value of a logarithmic axis


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels. `unit` is the value of 1 in the labels of ticks: 0.01 for percent."""

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
    """A point; `bar` are the pixels of its interval's ends, `label` those of its name with the text anchor."""

    name: str
    x: float
    y: float
    of_x: Value
    of_y: Value
    bar: tuple[float | None, float | None]
    label: tuple[float, float, str]


@dataclass(frozen=True)
class Line:
    """A curve through rows of a file, interrupted at rows without a number; `dots` are its points if they are few."""

    name: str
    file: str
    paths: list[str]
    dots: list[tuple[str, str]]
    last: Value


@dataclass(frozen=True)
class Plot:
    """One plot; `described` says in words what it shows."""

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
    """An artifact in a plot of two numbers; `low` and `high` are the interval of the second."""

    name: str
    x: Value
    y: Value
    low: Value | None = None
    high: Value | None = None


def create_axis(
    values: Sequence[float], first: float, last: float, *, unit: float = 1, may_be_log: bool = False
) -> Axis:
    """Return a scale with a margin around all values and about five round ticks."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low >= LOG_FROM:
        return _create_log_axis(low, high, first, last, unit)
    room = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    begin, end = (0.0 if 0 <= low < high / 3 else low - room), high + room
    places = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(begin / unit, end / unit)
    digits = next(d for d in range(16) if all(math.isclose(round(p, d), p, abs_tol=1e-15) for p in places))
    ticks = [(float(place) * unit, f"{place:,.{digits}f}") for place in places]
    return Axis(begin, end, first, last, unit, False, [tick for tick in ticks if begin <= tick[0] <= end])


def _create_log_axis(low: float, high: float, first: float, last: float, unit: float) -> Axis:
    begin, end = low / 1.5, high * 1.5
    powers = range(math.ceil(math.log10(begin / unit)), math.floor(math.log10(end / unit)) + 1)
    every = math.ceil(len(powers) / 6)
    ticks = [(10.0**power * unit, f"{10.0**power:,.{max(0, -power)}f}") for power in powers[::every]]
    return Axis(begin, end, first, last, unit, True, ticks)


def create_x_axis(values: Sequence[float], *, unit: float = 1) -> Axis:
    """Return a horizontal scale."""
    return create_axis(values, LEFT, WIDTH - RIGHT, unit=unit)


def draw_scatter(
    title: str, points: Sequence[Point], x: Axis, *, x_label: str, y_label: str, y_unit: float = 1
) -> Plot:
    """Draw each point with its name next to it, at a place where it hides nothing if there is one."""
    heights = [value.content for point in points for value in (point.y, point.low, point.high) if value is not None]
    y = create_axis(heights, HEIGHT - BOTTOM, TOP, unit=y_unit, may_be_log=True)
    places = [(x.place(point.x.content), y.place(point.y.content)) for point in points]
    bars = [
        (y.place(point.low.content) if point.low else None, y.place(point.high.content) if point.high else None)
        for point in points
    ]
    labels = _place_labels([point.name for point in points], places, bars)
    marks = [Mark(point.name, *places[n], point.x, point.y, bars[n], labels[n]) for n, point in enumerate(points)]
    described = f"{_add_unit(title, y_label)} against {x_label} of {', '.join(point.name for point in points)}."
    return Plot(title, x_label, y_label, x, y, described, marks=marks)


def _place_labels(
    names: Sequence[str], places: Sequence[tuple[float, float]], bars: Sequence[tuple[float | None, float | None]]
) -> list[tuple[float, float, str]]:
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    taken += [(x - 3, high, x + 3, low) for (x, _), (low, high) in zip(places, bars, strict=True) if low and high]
    labels: list[tuple[float, float, str]] = []
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
        boxes = [_measure_label(candidate, width) for candidate in candidates]
        costs = [_measure_overlap(box, taken) for box in boxes]
        chosen = costs.index(min(costs))
        taken.append(boxes[chosen])
        labels.append(candidates[chosen])
    return labels


Box = tuple[float, float, float, float]


def _measure_label(label: tuple[float, float, str], width: float) -> Box:
    x, y, anchor = label
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return (left, y - 10, left + width, y + 3)


def _measure_overlap(box: Box, taken: Sequence[Box]) -> float:
    """Return the area of others that a label covers, plus its part outside of the plot, which counts more."""
    left, top, right, bottom = box
    over = sum(
        max(0.0, min(right, x1) - max(left, x0)) * max(0.0, min(bottom, y1) - max(top, y0)) for x0, y0, x1, y1 in taken
    )
    outside = max(0.0, LEFT - left) + max(0.0, right - WIDTH) + max(0.0, -top) + max(0.0, bottom - (HEIGHT - BOTTOM))
    return over + 100 * outside


def draw_curves(
    title: str,
    series: dict[str, list[Value]],
    *,
    x: str,
    y: str,
    x_label: str,
    y_label: str,
    may_be_log: bool = False,
) -> Plot | None:
    """Draw column `y` over column `x` of the rows of each series; None if they hold no number."""
    drawn = {name: _select_points(rows, x, y) for name, rows in series.items()}
    points = [point for rows in drawn.values() for point in rows if point]
    if not points:
        return None
    right = create_x_axis([at for at, _, _ in points])
    up = create_axis([height for _, height, _ in points], HEIGHT - BOTTOM, TOP, may_be_log=may_be_log)
    lines = [_build_line(name, rows, right, up) for name, rows in drawn.items() if any(rows)]
    described = f"{_add_unit(title, y_label)} by {x_label}: {' and '.join(line.name for line in lines)}."
    return Plot(title, x_label, y_label, right, up, described, lines=lines)


def _add_unit(title: str, unit: str) -> str:
    return f"{title} ({unit})" if unit else title


def _build_line(name: str, rows: Sequence[tuple[float, float, Value] | None], right: Axis, up: Axis) -> Line:
    paths = _build_paths(rows, right, up)
    points = [tuple(point.split(",")) for path in paths for point in path.split()]
    last = next(row[2] for row in reversed(rows) if row)
    return Line(name, last.file, paths, [(x, y) for x, y in points] if len(points) <= FEW_POINTS else [], last)


def _select_points(rows: list[Value], x: str, y: str) -> list[tuple[float, float, Value] | None]:
    every = math.ceil(len(rows) / MOST_POINTS)
    chosen = [row for place, row in enumerate(rows) if place % every == 0 or place == len(rows) - 1]
    return [_read_point(row, x, y) for row in chosen]


def _read_point(row: Value, x: str, y: str) -> tuple[float, float, Value] | None:
    at, height = row.get(x), row.get(y)
    numbers = [value.content for value in (at, height) if value and isinstance(value.content, float)]
    if height is None or len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        return None
    return numbers[0], numbers[1], height


def _build_paths(rows: Sequence[tuple[float, float, Value] | None], right: Axis, up: Axis) -> list[str]:
    paths: list[list[str]] = [[]]
    for row in rows:
        if row is None:
            paths.append([])
        else:
            paths[-1].append(f"{right.place(row[0])},{up.place(row[1])}")
    return [" ".join(path) for path in paths if path]
