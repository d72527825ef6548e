"""Tools: definitions of functions and calls of them, validated, in one form whatever form they have in the file.

A definition is OpenAI's {type, function: {name, description, parameters: a JSON Schema}}, a call
{type, id, function: {name, arguments: an object}}.
"""

import json
from typing import Any

from lathe.data.json_values import describe_value, load_json
from lathe.data.row_checks import RowFault, TextValidator, format_names, is_empty, refuse_repeated_key

Tool = dict[str, Any]


def parse_tools(check_text: TextValidator, value: Any, field: str) -> list[Tool]:
    """Return definitions of tools, given as a list, one object, or JSON text of either; raises RowFault.

    An item is OpenAI's, with or without its wrapping {type, function}, or Anthropic's with `input_schema`. Keys with
    null, with which `datasets` fills objects, are left out.
    """
    if is_empty(value):
        return []
    if isinstance(value, str):
        value = _load_json(value, field, "tools")
    tools: dict[str, Tool] = {}
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        place = f"{field}[{index}]"
        tool = _parse_tool(check_text, _load_json(item, place, "tools") if isinstance(item, str) else item, place)
        name = tool["function"]["name"]
        if name in tools:
            raise RowFault("tools", f"{place}.name", f"is {name!r}, as of a tool before it; expected each name once")
        tools[name] = tool
    return list(tools.values())


def _parse_tool(check_text: TextValidator, item: Any, field: str) -> Tool:
    text = _write_json(item, field, "tools")
    checked = check_text(text, field)
    item = _remove_nulls(item if checked == text else json.loads(checked))
    if not isinstance(item, dict):
        raise RowFault("tools", field, f"is {describe_value(item)}; expected an object with name and parameters")
    if item.get("type", "function") != "function":
        raise RowFault("tools", f"{field}.type", f"is {describe_value(item['type'])}; expected 'function'")
    function = item.get("function", item)
    if not isinstance(function, dict):
        raise RowFault("tools", f"{field}.function", f"is {describe_value(function)}; expected an object with name")
    outer = {key: inner for key, inner in item.items() if key != "function"} if "function" in item else {}
    function = {key: inner for key, inner in function.items() if key != "type" or function is not item}
    if "input_schema" in function and "parameters" not in function:
        function["parameters"] = function.pop("input_schema")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        shown = (
            f"is {describe_value(name)}" if "name" in function else f"is missing; the tool has {format_names(function)}"
        )
        raise RowFault("tools", f"{field}.name", f"{shown}; expected the function's name")
    if "description" in function and not isinstance(function["description"], str):
        shown = describe_value(function["description"])
        raise RowFault("tools", f"{field}.description", f"is {shown}; expected text")
    if "parameters" in function:
        _check_schema(function["parameters"], f"{field}.parameters")
    return {"type": "function", "function": function, **{key: inner for key, inner in outer.items() if key != "type"}}


def _check_schema(schema: Any, field: str) -> None:
    """Raise RowFault unless it is the JSON Schema of an object."""
    if not isinstance(schema, dict):
        raise RowFault("tools", field, f"is {describe_value(schema)}; expected the JSON Schema of an object")
    if schema.get("type", "object") != "object":
        raise RowFault("tools", f"{field}.type", f"is {describe_value(schema['type'])}; expected 'object'")
    if schema and "type" not in schema and "properties" not in schema:
        raise RowFault(
            "tools", field, f"has {format_names(schema)}; expected a JSON Schema: {{type: object, properties: …}}"
        )
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise RowFault("tools", f"{field}.properties", f"is {describe_value(properties)}; expected an object")
    for name, of_property in properties.items():
        if not isinstance(of_property, dict | bool):
            raise RowFault(
                "tools", f"{field}.properties.{name}", f"is {describe_value(of_property)}; expected a JSON Schema"
            )
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise RowFault("tools", f"{field}.required", f"is {describe_value(required)}; expected a list of names")


def _remove_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_remove_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    # Of a schema that allows null, it may be the default.
    nullable = '"null"' in json.dumps([value.get(key) for key in ("type", "anyOf", "oneOf")]) or value.get("nullable")
    return {
        key: _remove_nulls(inner)
        for key, inner in value.items()
        if inner is not None or (key == "default" and nullable)
    }


def parse_tool_calls(check_text: TextValidator, value: Any, field: str) -> list[dict[str, Any]]:
    """Return the calls in Lathe's form; arguments are objects, or JSON text of them, as OpenAI writes them."""
    if not isinstance(value, list):
        raise RowFault("tool_call", field, f"is {describe_value(value)}; expected a list of calls")
    calls = []
    for index, item in enumerate(value):
        call_field = f"{field}[{index}]"
        refuse_repeated_key(item, call_field)
        function = item.get("function") if isinstance(item, dict) and "function" in item else item
        refuse_repeated_key(function, f"{call_field}.function")
        if not isinstance(function, dict):
            raise RowFault(
                "tool_call", call_field, f"is {describe_value(function)}; expected an object with name and arguments"
            )
        for key in ("name", "arguments"):
            if key not in function:
                raise RowFault("tool_call", f"{call_field}.{key}", f"is missing; the call has {format_names(function)}")
        if not function["name"]:
            raise RowFault("tool_call", f"{call_field}.name", "is empty; expected the function's name")
        call: dict[str, Any] = {"type": "function"}
        if item.get("id") is not None:
            call["id"] = check_text(item["id"], f"{call_field}.id")
        name = check_text(function["name"], f"{call_field}.name")
        call["function"] = {
            "name": name,
            "arguments": _parse_arguments(check_text, function["arguments"], f"{call_field}.arguments"),
        }
        calls.append(call)
    return calls


def load_calls(value: Any, field: str) -> list[Any]:
    """Return the calls that ShareGPT keeps as JSON text."""
    calls = _load_json(value, field, "tool_call") if isinstance(value, str) else value
    return calls if isinstance(calls, list) else [calls]


def check_calls(
    messages: list[dict[str, Any]], field: str, tools: list[Tool], *, parallel: bool, start: int = 0
) -> None:
    """Raise RowFault if a call is of no tool that is defined, or a result is of no call, or calls may not be parallel.

    Without `tools` any may be called. `start` is the index of the first message in the field's list.
    """
    names = [tool["function"]["name"] for tool in tools]
    ids: set[str] = set()
    for index, message in enumerate(messages, start):
        calls = message.get("tool_calls", [])
        for number, call in enumerate(calls):
            place = f"{field}[{index}].tool_calls[{number}]"
            if names and (name := call["function"]["name"]) not in names:
                raise RowFault(
                    "tool_call", f"{place}.name", f"is {name!r}; expected one of tools: {format_names(names)}"
                )
        if len(calls) > 1 and not parallel:
            raise RowFault(
                "tool_call",
                f"{field}[{index}].tool_calls",
                f"are {len(calls)}, and parallel_tool_calls is false; expected one",
            )
        ids |= {call["id"] for call in calls if "id" in call}
        if ids and (given := message.get("tool_call_id")) is not None and given not in ids:
            raise RowFault(
                "tool_call", f"{field}[{index}].tool_call_id", f"is {given!r}, the id of no call; expected that of one"
            )


def _parse_arguments(check_text: TextValidator, value: Any, field: str) -> dict[str, Any]:
    if isinstance(value, str):  # OpenAI's form: JSON in a string
        value = _load_json(value, field, "tool_call") if value.strip() else {}
    refuse_repeated_key(value, field)
    if not isinstance(value, dict):
        raise RowFault("tool_call", field, f"is {describe_value(value)}; expected an object, or JSON text of one")
    text = _write_json(value, field, "tool_call")
    checked = check_text(text, field)
    return value if checked == text else json.loads(checked)


def _write_json(value: Any, field: str, reason: str) -> str:
    def refuse(part: Any) -> None:
        refuse_repeated_key(part, field)
        raise RowFault(reason, field, f"holds {describe_value(part)}; expected JSON values")

    try:
        return json.dumps(value, ensure_ascii=False, default=refuse, allow_nan=False)
    except ValueError:
        raise RowFault(reason, field, "holds NaN or Infinity, which JSON has not; expected JSON values") from None


def _load_json(value: str, field: str, reason: str) -> Any:
    try:
        return load_json(value)
    except (ValueError, RecursionError):
        raise RowFault(reason, field, f"is {describe_value(value)}; expected JSON") from None


def get_parallel(value: Any, field: str) -> bool:
    """Return OpenAI's `parallel_tool_calls`: whether one turn may have several calls; raises RowFault."""
    if value is not None and not isinstance(value, bool):
        raise RowFault("tool_call", field, f"is {describe_value(value)}; expected true or false")
    return value is not False
