"""Calls of tools as Anthropic's clients log them: parts of a content, which become messages as OpenAI has them.

An assistant's part `tool_use` is a call; a user's part `tool_result` is what a tool answered.
"""

from collections.abc import Iterator
from typing import Any

_CALL, _RESULT = "tool_use", "tool_result"
_KNOWN = {_CALL: {"type", "id", "name", "input"}, _RESULT: {"type", "tool_use_id", "content"}}


def expand_tool_parts(messages: list[Any]) -> Iterator[tuple[int, Any]]:
    """Yield the messages, and those that stand for parts with calls and results; each with its index in the list.

    Where parts stand in another order than that of messages (a text after a call or before a result), they are left as
    they are.
    """
    for index, message in enumerate(messages):
        expanded = _expand(message) if isinstance(message, dict) else None
        for one in [message] if expanded is None else expanded:
            yield index, one


def _expand(message: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return what a message with calls or results stands for; None for any other."""
    parts = message.get("content")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return None
    kinds = [part.get("type") for part in parts]
    if message.get("role") == "assistant" and _CALL in kinds and not message.get("tool_calls"):
        first = kinds.index(_CALL)
        if set(kinds[first:]) != {_CALL}:
            return None
        calls = [_make_call(part) for part in parts[first:]]
        return [{**_list_more(parts[first:]), **message, "content": parts[:first] or None, "tool_calls": calls}]
    count = kinds.count(_RESULT)
    if message.get("role") != "user" or not count or set(kinds[:count]) != {_RESULT}:
        return None
    rest = [{**message, "content": parts[count:]}] if parts[count:] else []
    return [_make_result(part) for part in parts[:count]] + rest


def _make_result(part: dict[str, Any]) -> dict[str, Any]:
    content = "" if part.get("content") is None else part["content"]
    return {**_list_more([part]), "role": "tool", "tool_call_id": part.get("tool_use_id"), "content": content}


def _make_call(part: dict[str, Any]) -> dict[str, Any]:
    function = {"name": part.get("name"), "arguments": part.get("input")}
    return {"id": part.get("id"), "type": "function", "function": function}


def _list_more(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what else is in the parts, to be counted as other keys of a message are."""
    return {key: value for part in parts for key, value in part.items() if key not in _KNOWN[part["type"]]}
