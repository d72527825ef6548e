"""The best artifact: the one with the best primary score on validation."""

from collections.abc import Mapping, Sequence
from typing import Any

from lathe.evaluation.metric_order import orient_score


def choose_best_artifact(report: Mapping[str, Mapping[str, Any]], candidates: Sequence[str], metric: str) -> str:
    """Return the candidate with the best score in the validation report; of equally good ones the smallest file."""
    return max(candidates, key=lambda name: (orient_score(metric, report[name][metric]), -report[name]["bytes"]))
