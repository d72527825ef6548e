"""Summary of a run: its scores, gates, best file, dropped rows, seconds, and what to do next, in a dozen lines."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lathe.common import dotted_keys
from lathe.common.errors import InputError
from lathe.common.metric_files import list_timing_stems
from lathe.common.text import format_table, readable_bytes, readable_seconds
from lathe.config.artifacts import get_file_name
from lathe.config.engine_marks import describe_engines
from lathe.config.export_params import list_gguf_types
from lathe.evaluation.best_artifact import choose_best_artifact
from lathe.provenance.revisions import WORKSPACE, Revision, find_revision
from lathe.reports.split_scores import list_metrics

LATER = "LATHE_SUMMARY_LATER"  # in the environment of the stages: a command prints the summary after them
SPLITS = ("validation", "test")


NEXT = (
    "next: `lathe chat` talks to the best file, `lathe report` writes a page of it all, `lathe results` lists the runs"
)


@contextmanager
def printed_at_the_end() -> Iterator[None]:
    """Keep the last stage from printing the summary: the command that runs DVC prints it after the block."""
    os.environ[LATER] = "1"
    try:
        yield
    finally:
        del os.environ[LATER]


def print_unless_later() -> None:
    """Print the summary of the workspace, unless a command of Lathe that runs DVC will."""
    if LATER not in os.environ:
        print_summary(WORKSPACE)


def print_summary(name: str) -> None:
    """Print the summary of a revision; nothing if it has not been evaluated."""
    lines = list(summarize_run(find_revision(name)))
    sys.stdout.write("".join(f"{line}\n" for line in ["", *lines]) if lines else "")
    sys.stdout.flush()


def summarize_run(revision: Revision) -> Iterator[str]:
    """Yield the lines; none if nothing has been evaluated."""
    reports = {split: revision.read_json(f"metrics/evaluate/{split}.json") for split in SPLITS}
    if not all(reports.values()):
        return
    metric = revision.parameters["evaluate"]["primary_metric"]
    candidates = list_gguf_types(reports["validation"])
    best = choose_best_artifact(reports["validation"], candidates, metric) if candidates else None
    rows = [["file", *(f"{metric} on {split}" for split in SPLITS), "size"]]
    for name, scores in reports["validation"].items():
        cells = [_format_score(reports[split].get(name, {}), metric) for split in SPLITS]
        rows.append([name, *cells, readable_bytes(scores["bytes"]) if scores.get("bytes") else ""])
    yield from format_table(rows)
    if engines := describe_engines(reports["validation"]):
        yield f"answered by {engines}"
    gates = revision.read_json("metrics/evaluate/gates.json")
    if gates and gates["gates"]:
        failed = [name for name, gate in gates["gates"].items() if not gate["passed"]]
        yield f"gates: {'all passed' if not failed else 'FAILED: ' + '; '.join(failed)}"
    if best:
        size = readable_bytes(reports["validation"][best]["bytes"])
        yield f"best file by validation: models/gguf/{get_file_name(best)} ({size})"
    yield from _describe_rows(revision.read_json("metrics/preprocess/report.json"))
    yield from _describe_seconds(revision)
    yield NEXT


def describe_metrics(revision: Revision, split: str) -> Iterator[str]:
    """Yield every score of each artifact on a split with its interval, gates, training and stages of one run.

    Raises InputError if the revision has no scores.
    """
    report = revision.read_json(f"metrics/evaluate/{split}.json")
    if not report:
        raise InputError(
            f"{revision.name}: has no metrics/evaluate/{split}.json; run the pipeline there", code="not-evaluated"
        )
    sizes = ["size", *(readable_bytes(scores["bytes"]) for scores in report.values())]
    yield from format_table([*_list_scores(report, split), sizes])
    if engines := describe_engines(report):
        yield f"answered by {engines}"
    if sampled := (revision.read_json("metrics/evaluate/samples.json") or {}).get(split):
        samples = next(iter(sampled.values()))["samples"]
        yield from format_table(_list_scores(sampled, f"{split}, mean of {samples} sampled answers"))
    for expression, gate in (revision.read_json("metrics/evaluate/gates.json") or {"gates": {}})["gates"].items():
        margin = "a score is missing" if gate["margin"] is None else f"margin {gate['margin']:+.4g}"
        yield f"gate {'passed' if gate['passed'] else 'FAILED'}: {expression} ({margin})"
    for key, value in dotted_keys.flatten(revision.read_json("metrics/train/metrics.json") or {}).items():
        yield f"training, {key}: {value:,.6g}" if isinstance(value, int | float) else f"training, {key}: {value}"
    yield from _describe_rows(revision.read_json("metrics/preprocess/report.json"))
    timings = {stem: timing for stem in list_timing_stems() if (timing := _read_timing(revision, stem))}
    if timings:
        rows = [["stage", "time", "peak memory"]]
        for stem, timing in timings.items():
            rows.append([stem, readable_seconds(timing["seconds"]), readable_bytes(timing["peak_memory_bytes"])])
        yield from format_table(rows)


def read_metrics(revision: Revision) -> dict[str, Any]:
    """Return the content of every JSON file of metrics/ that a run has, by its path."""
    names = [
        "metrics/preprocess/report.json",
        "metrics/train/metrics.json",
        *(f"metrics/evaluate/{name}.json" for name in (*SPLITS, "samples", "gates")),
        *(f"metrics/timings/{stem}.json" for stem in list_timing_stems()),
    ]
    return {name: content for name in names if (content := revision.read_json(name)) is not None}


def _list_scores(report: Mapping[str, Mapping[str, Any]], title: str) -> list[list[str]]:
    """Return the rows of a table: artifacts across, every score below."""
    metrics = list_metrics(report)
    return [
        [title, *report],
        *([metric, *(_format_score(scores, metric) for scores in report.values())] for metric in metrics),
    ]


def _format_score(scores: Mapping[str, Any], metric: str) -> str:
    value = scores.get(metric)
    if value is None:
        return ""
    ends = next((entry for entry in scores["intervals"] if entry["metric"] == metric), None)
    return f"{value:.4g}" + (f" [{ends['low']:.3g}, {ends['high']:.3g}]" if ends else "")


def _describe_rows(report: Mapping[str, Any] | None) -> Iterator[str]:
    if not report:
        return
    reasons: dict[str, int] = {}
    for split in report["splits"]:
        for reason, count in split["dropped"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    rows = report["rows"]
    line = f"rows: {rows['kept']:,} of {rows['read']:,} used"
    if reasons:
        listed = sorted(reasons.items(), key=lambda item: -item[1])
        line += "; left out: " + ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in listed)
    if rows.get("truncated"):
        line += f"; {rows['truncated']:,} truncated"
    yield line


def _describe_seconds(revision: Revision) -> Iterator[str]:
    seconds = {stem: timing["seconds"] for stem in list_timing_stems() if (timing := _read_timing(revision, stem))}
    if seconds:
        longest = sorted(seconds, key=lambda stem: -seconds[stem])[:2]
        parts = ", ".join(f"{stem} {readable_seconds(seconds[stem])}" for stem in longest)
        yield f"time: {readable_seconds(sum(seconds.values()))} for all stages when they last ran ({parts})"


def _read_timing(revision: Revision, stem: str) -> Any:
    return revision.read_json(f"metrics/timings/{stem}.json")
