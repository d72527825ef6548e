"""Counts that remember their first examples."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Example = TypeVar("Example")

EXAMPLES = 3


@dataclass(slots=True)
class Tally(Generic[Example]):
    """How often something was found, and the first few examples of it."""

    count: int = 0
    examples: list[Example] = field(default_factory=list)

    def add(self, example: Callable[[], Example]) -> None:
        """Count one more; `example` is asked only while examples are wanted."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example())

    def merge(self, later: "Tally[Example]") -> None:
        """Add what was found behind."""
        self.count += later.count
        self.examples += later.examples[: EXAMPLES - len(self.examples)]


def merged(tallies: Iterable[dict[str, Tally[Example]]]) -> dict[str, Tally[Example]]:
    """Return the tallies by name that several parts of the rows, in their order, have together."""
    whole: dict[str, Tally[Example]] = {}
    for part in tallies:
        for name, tally in part.items():
            whole.setdefault(name, Tally()).merge(tally)
    return whole
