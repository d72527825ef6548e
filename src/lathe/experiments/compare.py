"""Command `lathe compare`: a comparison of experiments printed as tables with a conclusion, or as JSON.

Scores are those that each revision recorded. Differences to the first one are computed on the rows that both answered,
from the answers in DVC's cache, and tested by a permutation test; nothing is checked out.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from lathe.common.text import format_table, write_lines
from lathe.config.engine_marks import LLAMA_CPP
from lathe.experiments.classifier_comparison import compare_classifiers, concerns_classifier
from lathe.experiments.comparison import ComparedRun, Comparison, SeedGroup, compare, format_number
from lathe.provenance.revisions import find_revision


def run(names: Sequence[str], *, split: str, artifact: str | None, as_json: bool, mixed_engines: bool = False) -> None:
    """Compare and print."""
    comparison = compare_either(names, split=split, artifact=artifact, mixed_engines=mixed_engines)
    if as_json:
        sys.stdout.write(json.dumps(asdict(comparison), indent=2, ensure_ascii=False) + "\n")
    else:
        write_lines(_format_comparison(comparison))


def compare_either(
    names: Sequence[str], *, split: str, artifact: str | None, mixed_engines: bool = False
) -> Comparison:
    """Compare by the pipeline in which the revisions differ; see `compare` and `compare_classifiers`."""
    if artifact is None and len(set(names)) == len(names) > 1:
        revisions = [find_revision(name) for name in names]
        if concerns_classifier(revisions):
            return compare_classifiers(revisions, split=split)
    return compare(names, split=split, artifact=artifact, mixed_engines=mixed_engines)


def _format_comparison(comparison: Comparison) -> Iterator[str]:
    sides = comparison.sides
    names = [side.name for side in sides]
    rows = [["", *names], ["commit", *((side.commit or "")[:10] for side in sides)]]
    rows += [[key, *map(_format_value, values)] for key, values in comparison.parameters.items()]
    if not comparison.parameters:
        rows.append(["parameters", *("the same" for _ in sides)])
    yield from format_table(rows)
    yield ""
    rows = [[comparison.split, *(side.artifact for side in sides)]]
    if any(side.engine != LLAMA_CPP for side in sides):
        rows.append(["engine", *(side.engine for side in sides)])
    rows += [[name, *(_format_score(side, name) for side in sides)] for name in _list_metrics(sides)]
    yield from format_table(rows)
    if comparison.differences:
        yield ""
        rows = [[f"difference to {names[0]}", "", "95 % interval", "p", "detectable", "rows"]]
        for one in comparison.differences:
            interval = "" if one.low is None else f"[{one.low:+.4g}, {one.high:+.4g}]"
            told = "" if one.detectable is None else f"{one.detectable:.3g}"
            rows.append(
                [f"{one.name} {one.metric}", f"{one.delta:+.4g}", interval, f"{one.p:.3g}", told, str(one.rows)]
            )
        yield from format_table(rows)
    if comparison.settings:
        yield ""
        rows = [["seeds", *(f"{group.names[0]}, {len(group.seeds)}" for group in comparison.settings)]]
        rows += [
            [name, *(_format_spread(group, name) for group in comparison.settings)] for name in _list_metrics(sides)
        ]
        yield from format_table(rows)
    yield ""
    costs = list(dict.fromkeys(key for side in sides for key in side.cost))
    yield from format_table([["cost", *names], *([key, *(_format_cost(side, key) for side in sides)] for key in costs)])
    yield ""
    for warning in comparison.warnings:
        yield f"warning: {warning}"
    yield comparison.verdict


def _list_metrics(sides: Sequence[ComparedRun]) -> list[str]:
    return list(dict.fromkeys(name for side in sides for name in side.scores))


def _format_value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _format_score(side: ComparedRun, name: str) -> str:
    ends = side.intervals.get(name)
    return format_number(side.scores.get(name)) + (
        f" [{format_number(ends[0])}, {format_number(ends[1])}]" if ends else ""
    )


def _format_spread(group: SeedGroup, name: str) -> str:
    spread = group.spread.get(name)
    return format_number(group.mean.get(name)) + (f" ± {spread:.2g}" if spread is not None else "")


def _format_cost(side: ComparedRun, key: str) -> str:
    value = side.cost.get(key)
    if value is None:
        return "not known" if key in side.cost else ""
    return f"{value:,.0f}" if key.endswith("bytes") else f"{value:,.1f}"
