"""From generated answers to one report per split: scores by artifact, and what each step cost."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lathe.jsonl import read_jsonl
from lathe.scores import score

# What every later artifact is compared with: what training gave, what quantization took.
REFERENCES = ("base", "merged")


def evaluate(
    generated: Path, facts: Path, artifacts: Sequence[str], split: str, metrics: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Score `generated/<artifact>/<split>.jsonl` for every artifact.

    Returns, by artifact: each metric between 0 and 1 (null where it does not apply), the perplexity of the references,
    the share of answers that ended by themselves, the file's bytes, and in `deltas` the metrics' differences to base
    and to merged (a list, because DVC makes columns of everything else). `facts/<artifact>.json` holds what `generate`
    measured.
    """
    report: dict[str, dict[str, Any]] = {}
    for artifact in artifacts:
        rows = read_jsonl(generated / artifact / f"{split}.jsonl")
        measured = json.loads((facts / f"{artifact}.json").read_text(encoding="utf-8"))
        scores = score(metrics, [row["completion"] for row in rows], [row["reference"] for row in rows])
        report[artifact] = {
            **{name: _rounded(value) for name, value in scores.items()},
            "perplexity": measured[split]["perplexity"],
            "stop_rate": measured[split]["stop_rate"],
            "bytes": measured["bytes"],
        }
    for artifact in artifacts:
        report[artifact]["deltas"] = [
            {"to": reference, **_difference(report[artifact], report[reference], metrics)}
            for reference in REFERENCES[: artifacts.index(artifact)]
        ]
    return report


def best(report: dict[str, dict[str, Any]], candidates: Sequence[str]) -> str:
    """Return the candidate with the highest validation exact match; the smallest file of equals."""
    return max(candidates, key=lambda name: (report[name]["exact_match"], -report[name]["bytes"]))


def plot_rows(reports: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Flatten the reports of all splits to one row per split, artifact and metric, for `dvc plots`."""
    return [
        {
            "split": split,
            "artifact": artifact,
            "metric": metric,
            "score": value,
            "megabytes": round(scores["bytes"] / 1e6, 3),
        }
        for split, report in reports.items()
        for artifact, scores in report.items()
        for metric, value in scores.items()
        if metric not in {"bytes", "deltas", "perplexity"} and value is not None
    ]


def _difference(ours: dict[str, Any], theirs: dict[str, Any], metrics: Sequence[str]) -> dict[str, float | None]:
    return {
        name: None if ours[name] is None or theirs[name] is None else _rounded(ours[name] - theirs[name])
        for name in metrics
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
