"""Dotted keys: nested mappings walked, flattened and compared by keys such as `training.learning_rate`."""

from collections.abc import Iterator, Mapping
from typing import Any


def walk(tree: Mapping[Any, Any], parents: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield every value that is no mapping, or an empty one, with the keys that lead to it."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from walk(value, (*parents, key))
        else:
            yield (*parents, key), value


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return every value that is no mapping by its dotted key, which begins with `prefix`."""
    return {prefix + ".".join(map(str, path)): value for path, value in walk(tree)}


def get_value(tree: Any, key: str) -> Any:
    """Return the value of a dotted key; None where there is none."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def compare(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ, in their order, with both values; None where a side has none."""
    return {key: (then.get(key), now.get(key)) for key in {**then, **now} if then.get(key) != now.get(key)}
