"""Factors: what was changed between two runs, where parameters that change together are one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# A parameter's value in one run and in the other, by its key.
Changes = Mapping[str, tuple[Any, Any]]


def list_changes(parameters: Mapping[str, Sequence[Any]], number: int) -> dict[str, tuple[Any, Any]]:
    """Return what differs between the first run and another, from the values of all runs by key."""
    return {key: (values[0], values[number]) for key, values in parameters.items() if values[number] != values[0]}


def group_factors(changes: Changes, together: Sequence[set[str]], presets: Mapping[str, str]) -> list[str]:
    """Return the keys that were changed independently, without the seed; of those that change together the first.

    `together` are sets of such keys; `presets` names, by the table of presets.yaml, the key that chooses an entry: the
    entry's own keys change with it.
    """
    groups = list(together)
    # The update is scaled by lora_alpha / r: if that is kept, the rank alone was changed.
    if {"lora.r", "lora.lora_alpha"} <= changes.keys():
        (r, other_r), (alpha, other_alpha) = changes["lora.r"], changes["lora.lora_alpha"]
        if alpha * other_r == other_alpha * r:
            groups.append({"lora.r", "lora.lora_alpha"})
    for table, key in presets.items():
        if key in changes:
            groups.append({key, *(name for name in changes if name.startswith(f"{table}."))})
    factors: list[str] = []
    for key in changes:
        group = next((group for group in groups if key in group), {key})
        if key != "seed" and not group & set(factors):
            factors.append(key)
    return factors


def warn_of_factors(both: str, changes: Changes, factors: Sequence[str]) -> Iterator[str]:
    """Yield what a difference between two runs, named in `both`, may come of besides one factor."""
    if len(factors) > 1:
        yield f"{len(factors)} factors differ between {both} ({', '.join(factors)}): any of them may be why"
    if "seed" in changes:
        ours, theirs = changes["seed"]
        yield f"the seeds of {both} differ ({ours} and {theirs}): what chance does is in the difference"
