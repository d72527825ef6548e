"""Null arguments of tool calls that no call had: a table gives each object the keys of all others, with null.

Of Arrow and Parquet they are left out as the file is read. Here they are found where such a table was written as JSON.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

MAX_DEPTH = 8  # of a row that is looked into


def is_padded(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Tell whether rows were written from a table that made their objects alike.

    Then all messages have the same keys, those of users with null among them; or calls of different functions all have
    the same arguments, with null among them.
    """
    messages: list[Mapping[str, Any]] = []
    calls: list[Mapping[str, Any]] = []
    for row in rows:
        for value in _iterate_objects(row, MAX_DEPTH):
            if "role" in value or "from" in value:
                messages.append(value)
            elif isinstance(value.get("arguments"), dict) and "name" in value:
                calls.append(value)
    if not calls:
        return False
    requests = [message for message in messages if message.get("role", message.get("from")) in ("user", "human")]
    if _are_alike(messages) and any(None in request.values() for request in requests):
        return True
    arguments = [call["arguments"] for call in calls]
    several = len({str(call["name"]) for call in calls}) > 1
    return several and _are_alike(arguments) and any(None in given.values() for given in arguments)


def remove_null_arguments(
    messages: Iterable[dict[str, Any]], tools: Sequence[Mapping[str, Any]], *, all_: bool
) -> bool:
    """Remove null arguments from calls in place; return whether there were any.

    Without `all_`, only those that the called function, as it is defined in `tools`, does not have.
    """
    known = {}
    for tool in tools:
        schema = tool["function"].get("parameters", {})
        if "properties" in schema and not schema.get("additionalProperties"):
            known[tool["function"]["name"]] = schema["properties"].keys()
    removed = False
    for message in messages:
        for call in message.get("tool_calls", ()):
            function = call["function"]
            arguments = function["arguments"]
            if all_:
                kept = _remove_nulls(arguments)
            else:
                names = known.get(function["name"], arguments.keys())
                kept = {key: value for key, value in arguments.items() if value is not None or key in names}
            removed = removed or kept != arguments
            function["arguments"] = kept
    return removed


def _iterate_objects(value: Any, depth: int) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, dict):
        yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner if depth else ():
        if isinstance(item, dict | list):
            yield from _iterate_objects(item, depth - 1)


def _are_alike(objects: Sequence[Mapping[str, Any]]) -> bool:
    return len({frozenset(each) for each in objects}) == 1


def _remove_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_remove_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _remove_nulls(inner) for key, inner in value.items() if inner is not None}
