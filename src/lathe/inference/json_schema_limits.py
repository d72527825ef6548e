"""JSON Schemas that an answer may be held to: small enough that the grammar made of them stays small."""

import json
from typing import Any

MOST_NODES = 1000  # objects, lists and what is in lists of a schema, after its references are resolved
MOST_REPETITIONS = 2000  # of a part, those of the parts around it multiplied
DEEPEST = 32

_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")


class SchemaError(ValueError):
    """A JSON Schema that answers are not held to."""


def resolve_schema(schema: Any) -> dict[str, Any]:
    """Return the schema with its references (`#/$defs/…`) replaced by what they name.

    llama.cpp makes a grammar of it, whose rules may refer to themselves without end, or be repeated 1,000 times 1,000
    times, which ends or blocks the process. Raises SchemaError for references that go in a circle or lead elsewhere,
    for `pattern`, and for schemas that are deeper or larger than the limits above.
    """
    if not isinstance(schema, dict):
        raise SchemaError(f"the JSON Schema is {type(schema).__name__}; expected an object")
    return _Resolver(schema).resolve(schema)


def count_parts(schema: Any) -> int:
    """Return how many parts a resolved schema has, as they are bounded."""
    if not isinstance(schema, dict | list):
        return 0
    inner = schema.values() if isinstance(schema, dict) else schema
    return _count_own_parts(schema) + sum(map(count_parts, inner))


def _count_own_parts(part: dict[str, Any] | list[Any]) -> int:
    """Count an object as one, a list as one more than the values in it: each of an `enum` becomes a rule."""
    return 1 + (sum(not isinstance(value, dict | list) for value in part) if isinstance(part, list) else 0)


class _Resolver:
    def __init__(self, root: dict[str, Any]) -> None:
        self.root, self.nodes = root, 0

    def resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        rest = {key: value for key, value in schema.items() if key not in ("$defs", "definitions")}
        resolved = self._resolve(rest, (), 1, 1)
        assert isinstance(resolved, dict)
        return resolved

    def _resolve(self, part: Any, inside: tuple[str, ...], repetitions: int, depth: int) -> Any:
        if not isinstance(part, dict | list):
            return part
        self.nodes += _count_own_parts(part)
        if self.nodes > MOST_NODES:
            raise SchemaError(f"the JSON Schema has more than {MOST_NODES} parts; make it smaller")
        if depth > DEEPEST:
            raise SchemaError(f"the JSON Schema is more than {DEEPEST} deep; make it flatter")
        if isinstance(part, list):
            return [self._resolve(value, inside, repetitions, depth + 1) for value in part]
        if isinstance(reference := part.get("$ref"), str):
            if reference in inside:
                raise SchemaError(
                    f"the JSON Schema refers to itself by {reference!r}; write out as many levels as needed"
                )
            return self._resolve(self._find(reference), (*inside, reference), repetitions, depth + 1)
        if isinstance(part.get("pattern"), str):
            raise SchemaError("the JSON Schema has a `pattern`, which is not supported; use `enum` or leave it out")
        counts = {key: count for key in _COUNTS if isinstance(count := part.get(key), int)}
        most = max(counts.values(), default=1)
        inner = repetitions * max(most, 1)
        if inner > MOST_REPETITIONS:
            key = max(counts, key=lambda key: counts[key])
            raise SchemaError(
                f"the JSON Schema's {key} {most} makes more than {MOST_REPETITIONS} repetitions, with those around it; "
                "lower them"
            )
        return {key: self._resolve(value, inside, inner, depth + 1) for key, value in part.items()}

    def _find(self, reference: str) -> Any:
        target: Any = self.root
        if not reference.startswith("#/"):
            raise SchemaError(f"the JSON Schema refers to {json.dumps(reference)}; expected #/$defs/NAME")
        for key in reference[2:].split("/"):
            name = key.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, dict) or name not in target:
                raise SchemaError(f"the JSON Schema refers to {json.dumps(reference)}, which it does not hold")
            target = target[name]
        return target
