"""Experiments beside one another: what was changed, what came of it on the same rows, what it cost, in one sentence.

Scores are those that each revision recorded. Differences to the first one are taken on the rows that both answered,
from the answers in DVC's cache, and tested by swapping them row by row; nothing is checked out.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lathe.experiments.comparison import Comparison, Setting, Side, _number, compare

if TYPE_CHECKING:
    pass


def run(names: Sequence[str], *, split: str, artifact: str | None, as_json: bool) -> None:
    """Compare and print."""
    found = compare(names, split=split, artifact=artifact)
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write("\n".join(_lines(found)) + "\n")


# What is printed


def _lines(found: Comparison) -> Iterator[str]:
    sides = found.sides
    names = [side.name for side in sides]
    rows = [["", *names], ["commit", *((side.commit or "")[:10] for side in sides)]]
    rows += [[key, *map(_value, values)] for key, values in found.parameters.items()]
    if not found.parameters:
        rows.append(["parameters", *("the same" for _ in sides)])
    yield from _table(rows)
    yield ""
    rows = [[found.split, *(side.artifact for side in sides)]]
    rows += [[name, *(_score(side, name) for side in sides)] for name in _metrics(sides)]
    yield from _table(rows)
    if found.differences:
        yield ""
        rows = [[f"difference to {names[0]}", "", "95 % interval", "p", "rows"]]
        for each in found.differences:
            ends = "" if each.low is None else f"[{each.low:+.4g}, {each.high:+.4g}]"
            rows.append([f"{each.name} {each.metric}", f"{each.delta:+.4g}", ends, f"{each.p:.3g}", str(each.rows)])
        yield from _table(rows)
    if found.settings:
        yield ""
        rows = [["seeds", *(f"{setting.names[0]}, {len(setting.seeds)}" for setting in found.settings)]]
        rows += [[name, *(_spread(setting, name) for setting in found.settings)] for name in _metrics(sides)]
        yield from _table(rows)
    yield ""
    costs = list(dict.fromkeys(key for side in sides for key in side.cost))
    yield from _table([["cost", *names], *([key, *(_cost_of(side, key) for side in sides)] for key in costs)])
    yield ""
    for warning in found.warnings:
        yield f"warning: {warning}"
    yield found.verdict


def _metrics(sides: Sequence[Side]) -> list[str]:
    return list(dict.fromkeys(name for side in sides for name in side.scores))


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _score(side: Side, name: str) -> str:
    ends = side.intervals.get(name)
    return _number(side.scores.get(name)) + (f" [{_number(ends[0])}, {_number(ends[1])}]" if ends else "")


def _spread(setting: Setting, name: str) -> str:
    spread = setting.spread.get(name)
    return _number(setting.mean.get(name)) + (f" ± {spread:.2g}" if spread is not None else "")


def _cost_of(side: Side, key: str) -> str:
    value = side.cost.get(key)
    if value is None:
        return "not known" if key in side.cost else ""
    return f"{value:,.0f}" if key.endswith("bytes") else f"{value:,.1f}"
