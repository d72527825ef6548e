"""Chat messages: validated from the columns of a record, with every fault named by reason and field."""

import json
import re
from collections.abc import Iterable
from typing import Any

from lathe.data.read_files import Fault, RepeatedKey, describe_value
from lathe.models.unicode_form import UnicodeRule

# {"role", "content"}; the assistant's may have "tool_calls", and "train": False where it is context only; a tool's
# "name" and "tool_call_id".
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")

# Roles by the names that ShareGPT datasets use in `from`.
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
# Types of the parts of a content that hold text, as clients of OpenAI's and Anthropic's servers write them.
TEXT_PARTS = ("text", "input_text", "output_text")
TOOL_CALL_SPEAKERS = ("function_call", "tool_call")
TRANSCRIPT_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


class RowFault(Exception):  # noqa: N818
    """A record that cannot become an example; `fault` is why: reason, field and problem."""

    def __init__(self, reason: str, field: str | None, problem: str) -> None:
        super().__init__(problem)
        self.fault = Fault(reason, field, problem)


class TextValidator:
    """Accepts plain text and refuses anything else, such as text with one of the model's `control_tokens`.

    A control token in a text would end its turn early or begin another. With a `unicode_rule`, text that the model's
    tokenizer would normalise is normalised here, or refused.
    """

    def __init__(self, control_tokens: re.Pattern[str], unicode_rule: UnicodeRule | None = None) -> None:
        self.control_tokens, self.unicode_rule = control_tokens, unicode_rule

    def __call__(self, value: Any, field: str) -> str:
        """Return the text, normalised if the rule says so; raises RowFault with this `field`."""
        if not isinstance(value, str):
            raise RowFault("not_text", field, f"is {describe_value(value)}; expected text")
        if "\0" in value:
            raise RowFault("invalid_unicode", field, "holds a NUL character; expected text without it")
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                code = f"\\u{ord(value[error.start]):04x}"
                raise RowFault(
                    "invalid_unicode", field, f"holds half a surrogate pair ({code}); expected valid Unicode"
                ) from None
            if self.unicode_rule and (difference := self.unicode_rule.find_difference(value)):
                if not self.unicode_rule.normalizes:
                    raise RowFault("not_normalized", field, _describe_difference(self.unicode_rule.form, *difference))
                value = self.unicode_rule.normalize(value)
        if token := self.control_tokens.search(value):
            raise RowFault(
                "control_token", field, f"holds the model's control token {token[0]!r}; expected text without it"
            )
        return value


def _describe_difference(form: str, found: str, normal: str) -> str:
    def name(text: str) -> str:
        return " ".join(f"U+{ord(character):04X}" for character in text)

    return (
        f"holds {found[:1]!r} ({name(found[:1])}), which the model's tokenizer reads as {normal!r} ({name(normal)}) by "
        f"{form}, and llama.cpp does not; expected text in {form}: preprocess.normalize_unicode: true makes it so"
    )


def parse_conversation(check_text: TextValidator, value: Any, field: str, *, sharegpt: bool = False) -> list[Message]:
    """Return a list of {role, content} objects, or of ShareGPT's {from, value}, as messages; raises RowFault.

    They must be in the order of a conversation: an optional system message, then user and assistant in turns, with the
    replies of tools in between; the assistant's message comes last. What comes after the last answer that is to be
    learnt is left out: nothing learns from it.
    """
    messages = parse_messages(check_text, value, field, sharegpt=sharegpt)
    check_order(messages, field, start=len(value) - len(messages), key="from" if sharegpt else "role")
    learnt = [index for index, message in enumerate(messages) if is_learnt(message)]
    if not learnt:
        raise RowFault("no_answer", field, "marks every answer as context (weight 0); expected one to learn")
    return messages[: learnt[-1] + 1]


def is_learnt(message: Message) -> bool:
    """Tell whether a message is an answer that is to be learnt."""
    return message["role"] == "assistant" and message.get("train", True)


def parse_messages(check_text: TextValidator, value: Any, field: str, *, sharegpt: bool = False) -> list[Message]:
    """Return the messages without checking their order; drops an empty system message at the beginning."""
    if not isinstance(value, list):
        keys = "{from, value}" if sharegpt else "{role, content}"
        raise RowFault("not_a_list", field, f"is {describe_value(value)}; expected a list of {keys} objects")
    messages = []
    for index, item in enumerate(value):
        message, content_field = _parse_message(check_text, item, f"{field}[{index}]", sharegpt=sharegpt)
        if message["content"].strip() or message.get("tool_calls") or message["role"] == "tool":
            messages.append(message)
        elif message["role"] != "system" or index > 0:  # many datasets write "" for no system message
            reason = "empty_answer" if message["role"] == "assistant" else "empty_prompt"
            raise RowFault(reason, content_field, "is empty; expected text")
    return messages


def check_order(messages: list[Message], field: str, *, start: int = 0, key: str = "role") -> None:
    """Raise RowFault if a message has a role that may not follow the previous one, or the last is not the assistant's.

    `start` is the index of the first message in the field's list, `key` the name that the field uses for the role.
    """
    if not messages:
        raise RowFault("no_answer", field, "is empty; expected at least a user and an assistant message")
    previous: Message | None = None
    for index, message in enumerate(messages, start):
        expected = _get_roles_allowed_after(previous)
        if message["role"] not in expected:
            before = f"follows {_describe_sender(previous)}" if previous else "comes first"
            raise RowFault(
                "roles_out_of_order",
                f"{field}[{index}].{key}",
                f"{message['role']} {before}; expected {' or '.join(expected)}",
            )
        previous = message
    if messages[-1]["role"] != "assistant":
        raise RowFault("no_answer", field, f"ends with {messages[-1]['role']}; expected an assistant message last")


def make_pair(prompt: str, prompt_field: str, answer: str, answer_field: str) -> list[Message]:
    """Return a prompt and its answer as two messages; raises RowFault if one of them is empty."""
    if not prompt.strip():
        raise RowFault("empty_prompt", prompt_field, "is empty; expected text")
    if not answer.strip():
        raise RowFault("empty_answer", answer_field, "is empty; expected text")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def parse_transcript(value: str, field: str) -> list[Message]:
    """Return the messages of a text with `Human:` and `Assistant:` before each turn; raises RowFault."""
    before, *turns = TRANSCRIPT_SPEAKER.split(value)
    if before.strip() or not turns:
        raise RowFault(
            "no_prompt",
            field,
            "is text, and there is no prompt column; expected one, or a transcript that begins with '\\n\\nHuman:'",
        )
    messages = []
    for speaker, content in zip(turns[::2], turns[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if not content.strip():
            raise RowFault(
                "empty_answer" if role == "assistant" else "empty_prompt",
                field,
                f"has an empty turn of {speaker}; expected text",
            )
        messages.append({"role": role, "content": content.strip()})
    return messages


def format_names(names: Iterable[str]) -> str:
    """Return the names in quotes for a message, at most twelve of them."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:12]) + (", ..." if len(names) > 12 else "")
    return shown or "none"


def _parse_message(check_text: TextValidator, value: Any, field: str, *, sharegpt: bool) -> tuple[Message, str]:
    """Return the message, and the field that its content was read from."""
    _refuse_repeated_key(value, field)
    # A ShareGPT dataset may hold {role, content} objects nevertheless: its keys decide.
    sharegpt = sharegpt and not (isinstance(value, dict) and "role" in value and "from" not in value)
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    if not isinstance(value, dict):
        raise RowFault(
            "not_an_object", field, f"is {describe_value(value)}; expected an object with {role_key} and {content_key}"
        )
    calls = value.get("tool_calls")
    for key in (role_key, content_key):
        if key not in value and not (key == content_key and calls):
            remedy = "; ShareGPT's keys are read with format: sharegpt" if not sharegpt and "from" in value else ""
            raise RowFault(
                "missing_key", f"{field}.{key}", f"is missing; the message has {format_names(value)}{remedy}"
            )
    role = _parse_role(value[role_key], f"{field}.{role_key}", sharegpt=sharegpt)
    if value.get("function_call"):
        raise RowFault("tool_call", f"{field}.function_call", "is not supported; expected tool_calls")
    content_field = f"{field}.{content_key}"
    if sharegpt and str(value[role_key]).lower() in TOOL_CALL_SPEAKERS:
        calls = _load_calls(value[content_key], content_field)
        return {
            "role": role,
            "content": "",
            "tool_calls": _parse_tool_calls(check_text, calls, content_field),
        }, content_field
    if calls and role != "assistant":
        raise RowFault("tool_call", f"{field}.tool_calls", f"are a {role} message's; expected only the assistant's")
    is_empty = calls and value.get(content_key) is None
    checked = "" if is_empty else _read_content(check_text, value[content_key], content_field)
    message: Message = {"role": role, "content": checked}
    if calls:
        message["tool_calls"] = _parse_tool_calls(check_text, calls, f"{field}.tool_calls")
    if not _read_mark(value, field, role) and role == "assistant":
        message["train"] = False
    if role == "tool":
        named = {key: value[key] for key in ("name", "tool_call_id") if value.get(key) is not None}
        message |= {key: check_text(text, f"{field}.{key}") for key, text in named.items()}
    return message, content_field


def _read_mark(value: dict[str, Any], field: str, role: str) -> bool:
    """Return whether a message is to be learnt, by OpenAI's `weight` or axolotl's `train`; raises RowFault."""
    weight, train = value.get("weight"), value.get("train")
    if weight is not None and (isinstance(weight, str) or weight not in (0, 1)):
        raise RowFault(
            "mark", f"{field}.weight", f"is {describe_value(weight)}; expected 0 or 1: an answer counts or not"
        )
    if train is not None and not isinstance(train, bool):
        raise RowFault("mark", f"{field}.train", f"is {describe_value(train)}; expected true or false")
    if train and role != "assistant":
        raise RowFault("mark", f"{field}.train", f"is true for a {role} message; only the assistant's are learnt")
    return weight != 0 and train is not False


def _read_content(check_text: TextValidator, value: Any, field: str) -> str:
    """Return a text, or the texts of a list of parts one after another; raises RowFault for parts of other kinds."""
    if not isinstance(value, list):
        return check_text(value, field)
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS or "text" not in part:
            shown = f"has the type {kind!r}" if kind not in (None, *TEXT_PARTS) else f"is {describe_value(part)}"
            raise RowFault("not_text", f"{field}[{index}]", f"{shown}; expected parts of type text, with their text")
        texts.append(check_text(part["text"], f"{field}[{index}].text"))
    return "".join(texts)


def _parse_role(value: Any, field: str, *, sharegpt: bool) -> str:
    if not sharegpt:
        if value not in ROLES:
            raise RowFault("unknown_role", field, f"is {describe_value(value)}; expected one of {', '.join(ROLES)}")
        return str(value)
    role = SPEAKERS.get(value.lower()) if isinstance(value, str) else None
    if role is None:
        raise RowFault("unknown_role", field, f"is {describe_value(value)}; expected one of {', '.join(SPEAKERS)}")
    return role


def _parse_tool_calls(check_text: TextValidator, value: Any, field: str) -> list[dict[str, Any]]:
    """Return the calls in the form that chat templates expect: {type, id, function: {name, arguments: an object}}."""
    if not isinstance(value, list):
        raise RowFault("tool_call", field, f"is {describe_value(value)}; expected a list of calls")
    calls = []
    for index, item in enumerate(value):
        call_field = f"{field}[{index}]"
        _refuse_repeated_key(item, call_field)
        function = item.get("function") if isinstance(item, dict) and "function" in item else item
        _refuse_repeated_key(function, f"{call_field}.function")
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


def _parse_arguments(check_text: TextValidator, value: Any, field: str) -> dict[str, Any]:
    if isinstance(value, str):  # OpenAI's form: JSON in a string
        value = _load_json(value, field)
    _refuse_repeated_key(value, field)
    if not isinstance(value, dict):
        raise RowFault("tool_call", field, f"is {describe_value(value)}; expected an object, or JSON text of one")

    def refuse(part: Any) -> None:
        _refuse_repeated_key(part, field)
        raise RowFault("tool_call", field, f"holds {describe_value(part)}; expected JSON values")

    text = json.dumps(value, ensure_ascii=False, default=refuse)
    checked = check_text(text, field)
    return value if checked == text else json.loads(checked)


def _refuse_repeated_key(value: Any, field: str) -> None:
    if isinstance(value, RepeatedKey):
        raise RowFault("duplicate_key", f"{field}.{value.key}", "occurs twice in one object; expected once")


def _load_calls(value: Any, field: str) -> list[Any]:
    calls = _load_json(value, field) if isinstance(value, str) else value
    return calls if isinstance(calls, list) else [calls]


def _load_json(value: str, field: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowFault("tool_call", field, f"is {describe_value(value)}; expected JSON") from None


def _get_roles_allowed_after(previous: Message | None) -> tuple[str, ...]:
    if previous is None:
        return ("system", "user")
    if previous.get("tool_calls"):
        return ("tool",)
    return {
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),  # some models write a tool call in the text of their answer
        "tool": ("tool", "assistant"),
    }[previous["role"]]


def _describe_sender(message: Message) -> str:
    return "the assistant's tool call" if message.get("tool_calls") else str(message["role"])
