"""Scores of calls of tools: those that were read from an answer, against those of its reference."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Call = Mapping[str, Any]  # {"name": …, "arguments": {…}}
CallScore = Callable[[Sequence[Call], Sequence[Call]], float]

_DOES_NOT_COUNT = (0.0, 0.0)


def match_calls(calls: Sequence[Call], expected: Sequence[Call]) -> float:
    """Return 1 if the calls are the expected ones in their order: equal names, and arguments equal as JSON values."""
    return float(are_equal(list(calls), list(expected)))


def compute_call_f1(calls: Sequence[Call], expected: Sequence[Call]) -> float:
    """Return the F1 score of the calls, in any order; 1 if there are none, and none is expected."""
    if not calls and not expected:
        return 1.0
    return 2 * count_equal_calls(calls, expected) / (len(calls) + len(expected))


def score_calls(row: Mapping[str, Any], *, score: CallScore) -> tuple[float, float]:
    """Return (score, 1) for a row with tools; a row without does not count.

    An answer whose calls cannot be told, as the chat template writes none, has none.
    """
    if "reference_calls" not in row:
        return _DOES_NOT_COUNT
    return score(row["calls"] or [], row["reference_calls"]), 1.0


def are_equal(first: Any, second: Any) -> bool:
    """Return whether two JSON values are equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(are_equal(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(are_equal, first, second))
    return (type(first) is type(second) and first == second) or _are_equal_numbers(first, second)


def _are_equal_numbers(first: Any, second: Any) -> bool:
    return isinstance(first, int | float) and isinstance(second, int | float) and first == second


def count_equal_calls(calls: Sequence[Call], expected: Sequence[Call]) -> int:
    """Return how many calls are in both, each counted once."""
    left = list(expected)
    count = 0
    for call in calls:
        found = next((index for index, other in enumerate(left) if are_equal(call, other)), None)
        if found is not None:
            del left[found]
            count += 1
    return count
