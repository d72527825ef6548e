"""Command `lathe results`: the runs as a table that fits a terminal, or as JSON."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from lathe.common.text import format_table, readable_bytes, readable_seconds, write_lines
from lathe.evaluation.metric_order import orient_score
from lathe.experiments.results import RunResult, read_results

NARROWEST = 20  # columns for the changed keys, however narrow the terminal


def _best_first(result: RunResult) -> tuple[Any, ...]:
    scored = result.metric is not None and result.score is not None
    return (not scored, result.metric or "", -orient_score(result.metric or "", result.score) if scored else 0)


SORTS: dict[str, Callable[[RunResult], Any]] = {
    "name": lambda result: result.name,
    "score": _best_first,
    "size": lambda result: (result.bytes is None, result.bytes or 0),
    "seconds": lambda result: (result.seconds is None, result.seconds or 0),
}


def run(*, sort: str | None, as_json: bool) -> None:
    """Print the results; `sort` is one of SORTS, None for the newest first."""
    results = read_results()
    if sort:
        results.sort(key=SORTS[sort])
    if as_json:
        sys.stdout.write(json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False) + "\n")
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    write_lines(format_results(results, width=width))


def format_results(results: Sequence[RunResult], *, width: int | None) -> Iterator[str]:
    """Yield the lines of the table: a row for each result, at most `width` columns wide where that can be."""
    if not any(result.score is not None for result in results):
        yield "nothing has been evaluated yet; run `make repro`, or `lathe run RECIPE`"
        return
    metrics = {result.metric for result in results if result.score is not None}
    title = next(iter(metrics)) or "" if len(metrics) == 1 else "score"
    head = ["run", title, "file", "gates", "size", "time", "date"]
    rows = [head, *(_format_row(result, named=len(metrics) > 1) for result in results)]
    room = max(NARROWEST, width - max(map(len, format_table(rows))) - 2) if width else None
    changes = ["changed", *(_format_changes(result, room) for result in results)]
    yield from format_table([[*row, change] for row, change in zip(rows, changes, strict=True)])


def _format_row(result: RunResult, *, named: bool) -> list[str]:
    score = "" if result.score is None else f"{result.score:.4g}"
    if result.low is not None and result.high is not None:
        score += f" [{result.low:.3g}, {result.high:.3g}]"
    return [
        result.name,
        f"{result.metric} {score}" if named and score else score,
        result.artifact or "",
        {True: "passed", False: "failed", None: ""}[result.gates_passed],
        readable_bytes(result.bytes) if result.bytes else "",
        readable_seconds(result.seconds) if result.seconds else "",
        result.date[:16].replace("T", " "),
    ]


def _format_changes(result: RunResult, room: int | None) -> str:
    shown: list[str] = []
    for number, (key, (_, value)) in enumerate(result.changed.items()):
        entry = f"{key}={'null' if value is None else value}"
        left = len(result.changed) - number
        if room and shown and len(", ".join([*shown, entry])) + (8 if left > 1 else 0) > room:
            return f"{', '.join(shown)} +{left}"
        shown.append(entry)
    text = ", ".join(shown)
    return text[: room - 1] + "…" if room and len(text) > room else text
