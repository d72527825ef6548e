"""From what a row says of a conversation to validated chat messages."""

import json
import re
from collections.abc import Iterable
from typing import Any

from lathe.data.read_files import Fault, RepeatedKey, kind

# {"role", "content"}; an assistant's may have "tool_calls", a tool's "name" and "tool_call_id".
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")

# Who speaks in ShareGPT's `from`, and the role that is.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
CALLING = ("function_call", "tool_call")


class RowFault(Exception):  # noqa: N818
    """A row that cannot become a conversation; carries the Fault."""

    def __init__(self, reason: str, field: str | None, problem: str) -> None:
        super().__init__(problem)
        self.fault = Fault(reason, field, problem)


class TextRule:
    """Lets plain text pass, and nothing else: none of the `control_tokens`, which would end their own turn."""

    def __init__(self, control_tokens: re.Pattern[str]) -> None:
        self.control_tokens = control_tokens

    def __call__(self, value: Any, field: str) -> str:
        """Return the text; raises RowFault that names the `field`."""
        if not isinstance(value, str):
            raise RowFault("not_text", field, f"is {kind(value)}; expected text")
        if "\0" in value:
            raise RowFault("invalid_unicode", field, "holds a NUL character; expected text without")
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                code = f"\\u{ord(value[error.start]):04x}"
                raise RowFault("invalid_unicode", field, f"holds half a surrogate pair ({code})") from None
        if token := self.control_tokens.search(value):
            raise RowFault("control_token", field, f"holds the model's control token {token[0]!r}")
        return value


def conversation(text: TextRule, value: Any, field: str, *, sharegpt: bool = False) -> list[Message]:
    """Return a list of {role, content} objects, or of ShareGPT's {from, value}, as messages; raises RowFault.

    The order is that of a conversation: a system message perhaps, then user and assistant in turns with the answers of
    tools between, the assistant last.
    """
    messages = turns(text, value, field, sharegpt=sharegpt)
    check_order(messages, field, start=len(value) - len(messages), key="from" if sharegpt else "role")
    return messages


def turns(text: TextRule, value: Any, field: str, *, sharegpt: bool = False) -> list[Message]:
    """Return the messages in whatever order they stand; an empty system message in front is left out."""
    if not isinstance(value, list):
        keys = "{from, value}" if sharegpt else "{role, content}"
        raise RowFault("not_a_list", field, f"is {kind(value)}; expected a list of {keys} objects")
    messages = []
    for index, item in enumerate(value):
        message, content = _message(text, item, f"{field}[{index}]", sharegpt=sharegpt)
        if message["content"].strip() or message.get("tool_calls") or message["role"] == "tool":
            messages.append(message)
        elif message["role"] != "system" or index > 0:  # many sources fill in "" where there is no system message
            reason = "empty_answer" if message["role"] == "assistant" else "empty_prompt"
            raise RowFault(reason, content, "is empty; expected text")
    return messages


def check_order(messages: list[Message], field: str, *, start: int = 0, key: str = "role") -> None:
    """Raise RowFault where a message follows one that it cannot follow, or the last is not the assistant's."""
    if not messages:
        raise RowFault("no_answer", field, "is empty; expected at least a user and an assistant message")
    previous: Message | None = None
    for index, message in enumerate(messages, start):
        expected = _followers(previous)
        if message["role"] not in expected:
            before = f"follows {_who(previous)}" if previous else "comes first"
            raise RowFault(
                "roles_out_of_order",
                f"{field}[{index}].{key}",
                f"{message['role']} {before}; expected {' or '.join(expected)}",
            )
        previous = message
    if messages[-1]["role"] != "assistant":
        raise RowFault("no_answer", field, f"ends with {messages[-1]['role']}; expected an assistant message last")


def pair(prompt: str, prompt_field: str, answer: str, answer_field: str) -> list[Message]:
    """Return a request and its answer as two messages; raises RowFault where one of them is empty."""
    if not prompt.strip():
        raise RowFault("empty_prompt", prompt_field, "is empty; expected text")
    if not answer.strip():
        raise RowFault("empty_answer", answer_field, "is empty; expected text")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def listed(names: Iterable[str]) -> str:
    """Return the names as a message shows them, the first twelve of many."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:12]) + (", ..." if len(names) > 12 else "")
    return shown or "none"


def _message(text: TextRule, value: Any, field: str, *, sharegpt: bool) -> tuple[Message, str]:
    """Return the message, and the field that its content came from."""
    _check_keys(value, field)
    # A list under ShareGPT's column name may hold {role, content} objects: the keys tell.
    sharegpt = sharegpt and not (isinstance(value, dict) and "role" in value and "from" not in value)
    speaker, said = ("from", "value") if sharegpt else ("role", "content")
    if not isinstance(value, dict):
        raise RowFault("not_an_object", field, f"is {kind(value)}; expected an object with {speaker} and {said}")
    calls = value.get("tool_calls")
    for key in (speaker, said):
        if key not in value and not (key == said and calls):
            remedy = "; ShareGPT's keys are read with format: sharegpt" if not sharegpt and "from" in value else ""
            raise RowFault("missing_key", f"{field}.{key}", f"is missing; the message has {listed(value)}{remedy}")
    role = _role(value[speaker], f"{field}.{speaker}", sharegpt=sharegpt)
    if value.get("function_call"):
        raise RowFault("tool_call", f"{field}.function_call", "is not supported; expected tool_calls")
    content = f"{field}.{said}"
    if sharegpt and str(value[speaker]).lower() in CALLING:
        calls, content = _parsed_calls(value[said], content), content
        return {"role": role, "content": "", "tool_calls": _tool_calls(text, calls, content)}, content
    if calls and role != "assistant":
        raise RowFault("tool_call", f"{field}.tool_calls", f"are a {role} message's; expected only the assistant's")
    written = "" if calls and value.get(said) is None else text(value[said], content)
    message: Message = {"role": role, "content": written}
    if calls:
        message["tool_calls"] = _tool_calls(text, calls, f"{field}.tool_calls")
    if role == "tool":
        given = {key: value[key] for key in ("name", "tool_call_id") if value.get(key) is not None}
        message |= {key: text(of, f"{field}.{key}") for key, of in given.items()}
    return message, content


def _role(value: Any, field: str, *, sharegpt: bool) -> str:
    if not sharegpt:
        if value not in ROLES:
            raise RowFault("unknown_role", field, f"is {kind(value)}; expected one of {', '.join(ROLES)}")
        return str(value)
    role = SPEAKERS.get(value.lower()) if isinstance(value, str) else None
    if role is None:
        raise RowFault("unknown_role", field, f"is {kind(value)}; expected one of {', '.join(SPEAKERS)}")
    return role


def _tool_calls(text: TextRule, value: Any, field: str) -> list[dict[str, Any]]:
    """Return the calls as chat templates read them: {type, id, function: {name, arguments as an object}}."""
    if not isinstance(value, list):
        raise RowFault("tool_call", field, f"is {kind(value)}; expected a list of calls")
    calls = []
    for index, item in enumerate(value):
        at = f"{field}[{index}]"
        _check_keys(item, at)
        function = item.get("function") if isinstance(item, dict) and "function" in item else item
        _check_keys(function, f"{at}.function")
        if not isinstance(function, dict):
            raise RowFault("tool_call", at, f"is {kind(function)}; expected an object with name and arguments")
        for key in ("name", "arguments"):
            if key not in function:
                raise RowFault("tool_call", f"{at}.{key}", f"is missing; the call has {listed(function)}")
        if not function["name"]:
            raise RowFault("tool_call", f"{at}.name", "is empty; expected the function's name")
        call: dict[str, Any] = {"type": "function"}
        if item.get("id") is not None:
            call["id"] = text(item["id"], f"{at}.id")
        name = text(function["name"], f"{at}.name")
        call["function"] = {"name": name, "arguments": _arguments(text, function["arguments"], f"{at}.arguments")}
        calls.append(call)
    return calls


def _arguments(text: TextRule, value: Any, field: str) -> dict[str, Any]:
    if isinstance(value, str):  # as OpenAI writes them
        value = _json(value, field)
    _check_keys(value, field)
    if not isinstance(value, dict):
        raise RowFault("tool_call", field, f"is {kind(value)}; expected an object, or JSON text of one")

    def refuse(part: Any) -> None:
        _check_keys(part, field)
        raise RowFault("tool_call", field, f"holds {kind(part)}; expected JSON values")

    text(json.dumps(value, ensure_ascii=False, default=refuse), field)
    return value


def _check_keys(value: Any, field: str) -> None:
    if isinstance(value, RepeatedKey):
        raise RowFault("duplicate_key", f"{field}.{value.key}", "occurs twice in one object; expected once")


def _parsed_calls(value: Any, field: str) -> list[Any]:
    calls = _json(value, field) if isinstance(value, str) else value
    return calls if isinstance(calls, list) else [calls]


def _json(value: str, field: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowFault("tool_call", field, f"is {kind(value)}; expected JSON") from None


def _followers(previous: Message | None) -> tuple[str, ...]:
    if previous is None:
        return ("system", "user")
    if previous.get("tool_calls"):
        return ("tool",)
    return {
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),  # a call may be written in the text
        "tool": ("tool", "assistant"),
    }[previous["role"]]


def _who(message: Message) -> str:
    return "the assistant's tool call" if message.get("tool_calls") else str(message["role"])
