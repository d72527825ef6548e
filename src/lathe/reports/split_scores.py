"""Scores of one split, or of one task, by artifact, as the page shows them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lathe.config.scores import NOT_SCORES
from lathe.reports.values import Value


def list_metrics(report: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the metrics of all artifacts of a report, as they come."""
    return list(dict.fromkeys(name for scores in report.values() for name in scores if name not in NOT_SCORES))


@dataclass(frozen=True)
class SplitScores:
    """The scores of one split by artifact, as `evaluate` wrote them."""

    report: Value

    @property
    def artifacts(self) -> list[str]:
        """The scored artifacts, as they came about."""
        return list(self.report.content)

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics that some artifact has a number for."""
        names = list_metrics(self.report.content)
        return [name for name in names if any(self.score(artifact, name) for artifact in self.artifacts)]

    @cached_property
    def differences(self) -> list[tuple[str, str]]:
        """Each artifact with each that it is compared with."""
        pairs = [(name, delta.content["to"]) for name in self.artifacts for delta in self._listed(name, "deltas")]
        return list(dict.fromkeys(pairs))

    @cached_property
    def compared(self) -> list[str]:
        """The metrics that there are differences of."""
        compared = {delta.content["metric"] for name in self.artifacts for delta in self._listed(name, "deltas")}
        return [name for name in self.metrics if name in compared]

    @property
    def lower_is_better(self) -> set[str]:
        """The scores of a task that are better if lower."""
        return {name for scores in self.report.content.values() for name in scores.get("lower_is_better", ())}

    def score(self, artifact: str, metric: str) -> Value | None:
        """Return a metric's value."""
        return self.report.get(artifact, metric)

    def interval(self, artifact: str, metric: str) -> Value | None:
        """Return the object with `low` and `high`."""
        listed = self._listed(artifact, "intervals")
        return next((score for score in listed if score.content["metric"] == metric), None)

    def delta(self, artifact: str, to: str, metric: str) -> Value | None:
        """Return the object with `delta`, `low`, `high` and `p`."""
        listed = self._listed(artifact, "deltas")
        deltas = (delta for delta in listed if delta.content["metric"] == metric and delta.content["to"] == to)
        return next((delta for delta in deltas if delta.get("delta")), None)

    def spread(self, artifact: str) -> list[Value]:
        """Return the objects with `metric` and `deviation` of sampled answers."""
        return self._listed(artifact, "spread")

    def _listed(self, artifact: str, name: str) -> list[Value]:
        return list(self.report.get(artifact, name) or ())
