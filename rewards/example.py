"""Rewards of your own for `training.method: grpo`, named as `function: example:brevity` under `grpo.rewards`.

A function gets an answer, its reference and the processed row, and returns a number from 0 to 1.
"""

from typing import Any


def brevity(completion: str, reference: str, row: dict[str, Any]) -> float:
    """Return 1 for an answer no longer than the reference, and less the longer it is."""
    return min(1.0, len(reference) / max(1, len(completion)))
