"""Summary of an evaluation: the few numbers that a table of experiments is read for."""

from collections.abc import Mapping, Sequence
from typing import Any

from lathe.evaluation.best_artifact import choose_best_artifact


def summarize(
    report: Mapping[str, Mapping[str, Any]], types: Sequence[str], primary_metric: str, *, passed: bool
) -> dict[str, Any]:
    """Return the content of `metrics/evaluate/summary.json`, of which DVC makes columns.

    `report` is that on validation: {artifact: {score: value or None}}. The summary has the primary score of each
    artifact, the KL divergence of each that has one, the best file with its size, and whether all gates hold.
    """
    best = choose_best_artifact(report, types, primary_metric)
    columns: dict[str, dict[str, Any]] = {primary_metric: _select(report, list(report), primary_metric)}
    if primary_metric != "kl":
        columns["kl"] = _select(report, list(report), "kl")
    return {**columns, "best": {"file": best, "bytes": report[best]["bytes"]}, "gates_passed": passed}


def _select(report: Mapping[str, Mapping[str, Any]], names: Sequence[str], metric: str) -> dict[str, Any]:
    return {name: value for name in names if (value := report[name].get(metric)) is not None}
