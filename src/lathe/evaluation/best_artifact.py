"""The best artifact: the one with the best primary score on validation."""

from collections.abc import Mapping, Sequence
from typing import Any

from lathe.evaluation.metrics import goodness


def best(report: Mapping[str, Mapping[str, Any]], candidates: Sequence[str], metric: str) -> str:
    """Return the candidate with the best validation score of that name; the smallest file of equals."""
    return max(candidates, key=lambda name: (goodness(metric, report[name][metric]), -report[name]["bytes"]))
