"""Occurrences: how often something happened, with the first few cases to show in a report."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Case = TypeVar("Case")

MAX_SHOWN = 5


@dataclass(slots=True)
class Occurrences(Generic[Case]):
    """The number of cases, and the first MAX_SHOWN of them."""

    count: int = 0
    first: list[Case] = field(default_factory=list)

    def add(self, make_case: Callable[[], Case]) -> None:
        """Count one more case; `make_case` is called only while cases are still collected."""
        self.count += 1
        if len(self.first) < MAX_SHOWN:
            self.first.append(make_case())

    def extend(self, later: "Occurrences[Case]") -> None:
        """Add the occurrences of rows that follow those counted so far."""
        self.count += later.count
        self.first += later.first[: MAX_SHOWN - len(self.first)]


def merge_occurrences(parts: Iterable[dict[str, Occurrences[Case]]]) -> dict[str, Occurrences[Case]]:
    """Return the occurrences by name of several parts of the rows, given in the order of the rows."""
    merged: dict[str, Occurrences[Case]] = {}
    for part in parts:
        for name, occurrences in part.items():
            merged.setdefault(name, Occurrences()).extend(occurrences)
    return merged


def describe_excess(unusable: int, rows: int, allowed: float) -> str | None:
    """Say that more rows are unusable than `preprocess.max_dropped_fraction` allows; None if not."""
    if unusable <= allowed * rows:
        return None
    limit = f"preprocess.max_dropped_fraction {allowed} allows; correct them or raise it"
    return f"{unusable} of {rows} rows are unusable, more than {limit}"
