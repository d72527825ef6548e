"""Chat messages: validated from the columns of a record, with every fault named by reason and field."""

import re
from typing import Any

from lathe.data.anthropic_parts import expand_tool_parts
from lathe.data.json_values import describe_value, load_json
from lathe.data.row_checks import RowFault, TextValidator, format_names, is_empty, note_unused, refuse_repeated_key
from lathe.data.thoughts import ALL_THOUGHT_KEYS, read_content, read_thought
from lathe.data.tools import load_calls, parse_tool_calls
from lathe.models.message_form import THOUGHT

# {"role", "content"}, perhaps "name"; the assistant's may have "tool_calls", a thought in "reasoning_content", and
# "train": False where it is context only; a tool's "tool_call_id".
Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
# OpenAI's newer and older names, and Llama's of what a tool returns.
OTHER_ROLES = {"developer": "system", "function": "tool", "ipython": "tool"}

# Whether an answer is to be learnt, true or false: axolotl's and ms-swift's names. OpenAI's is `weight`, 0 or 1.
MARKS = ("train", "training", "loss")
# The keys of a message that are read.
_KEYS = {*ALL_THOUGHT_KEYS, "tool_calls", "function_call", "tool_call_id", "name", "weight", *MARKS}
MESSAGE_KEYS = frozenset({"role", "content", *_KEYS})
SHAREGPT_KEYS = frozenset({"from", "value", *_KEYS})

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
TOOL_CALL_SPEAKERS = ("function_call", "tool_call")
LIST_OF_OBJECTS = re.compile(r"\s*\[\s*\{")
TRANSCRIPT_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def parse_conversation(
    check_text: TextValidator, value: Any, field: str, *, sharegpt: bool = False, is_pair: bool = False
) -> list[Message]:
    """Return a list of {role, content} objects, or of ShareGPT's {from, value}, as messages; raises RowFault.

    They must be in the order of a conversation: an optional system message, then user and assistant in turns, with the
    replies of tools in between; the assistant's message comes last. What comes after the last answer that is to be
    learnt is left out: nothing learns from it. In a preference pair (`is_pair`) that must be the last one.
    """
    value = _transpose(value)
    messages = parse_messages(check_text, value, field, sharegpt=sharegpt)
    start = max(0, len(value) - len(messages))  # of the first message; parts with calls may have become several
    check_order(messages, field, start=start, key="from" if sharegpt else "role")
    learnt = [index for index, message in enumerate(messages) if is_learnt(message)]
    if not learnt:
        raise RowFault("no_answer", field, "marks every answer as context (weight 0); expected one to learn")
    if is_pair:
        require_learnt(messages, field)
    return messages[: learnt[-1] + 1]


def require_learnt(messages: list[Message], field: str) -> None:
    """Raise RowFault if the last message, an answer of a preference pair, is marked as context."""
    if not is_learnt(messages[-1]):
        raise RowFault("mark", field, "marks the last answer as context; expected one to learn in a preference pair")


def is_learnt(message: Message) -> bool:
    """Tell whether a message is an answer that is to be learnt."""
    return message["role"] == "assistant" and message.get("train", True)


def parse_messages(check_text: TextValidator, value: Any, field: str, *, sharegpt: bool = False) -> list[Message]:
    """Return the messages without checking their order; drops an empty system message at the beginning."""
    value = _transpose(value)
    if not isinstance(value, list):
        keys = "{from, value}" if sharegpt else "{role, content}"
        raise RowFault("not_a_list", field, f"is {describe_value(value)}; expected a list of {keys} objects")
    messages = []
    for index, item in enumerate(value) if sharegpt else expand_tool_parts(value):
        message, content_field = _parse_message(check_text, item, f"{field}[{index}]", sharegpt=sharegpt)
        if message["content"].strip() or message.get("tool_calls") or message["role"] == "tool":
            messages.append(message)
        elif message["role"] != "system" or index > 0:  # many datasets write "" for no system message
            reason = "empty_answer" if message["role"] == "assistant" else "empty_prompt"
            raise RowFault(reason, content_field, "is empty; expected text")
    return messages


def find_messages(value: Any) -> list[Any] | None:
    """Return a column's value if it is a list of messages, or JSON text of one as a cell of a table has it.

    None for anything else, such as a text or a list of texts.
    """
    if isinstance(value, str):
        if value[:1] not in "[ \n\r\t" or not LIST_OF_OBJECTS.match(value):
            return None
        try:
            value = load_json(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not value:
        return None
    return value if all(isinstance(item, dict) and item.keys() & {"role", "from"} for item in value) else None


def parse_turns(check_text: TextValidator, value: Any, field: str) -> list[Message]:
    """Return the messages of a list, or a single one, whose keys say whether they are ShareGPT's; raises RowFault."""
    turns = [value] if isinstance(value, dict) and value.keys() & {"role", "from"} else value
    first = turns[0] if isinstance(turns, list) and turns else None
    sharegpt = isinstance(first, dict) and "from" in first and "role" not in first
    return parse_messages(check_text, turns, field, sharegpt=sharegpt)


def _transpose(value: Any) -> Any:
    """Return messages of an object of lists, {role: [...], content: [...]}, as older `datasets` keep them."""
    if not isinstance(value, dict):
        return value
    lengths = {len(column) if isinstance(column, list) else -1 for column in value.values()}
    if len(lengths) != 1 or -1 in lengths or not value.keys() & {"role", "from"}:
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]


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


def _parse_message(check_text: TextValidator, value: Any, field: str, *, sharegpt: bool) -> tuple[Message, str]:
    """Return the message, and the field that its content was read from."""
    refuse_repeated_key(value, field)
    # A ShareGPT dataset may hold {role, content} objects nevertheless: its keys decide.
    sharegpt = sharegpt and not (isinstance(value, dict) and "role" in value and "from" not in value)
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    if not isinstance(value, dict):
        raise RowFault(
            "not_an_object", field, f"is {describe_value(value)}; expected an object with {role_key} and {content_key}"
        )
    calls, calls_field = _find_calls(value, field)
    for key in (role_key, content_key):
        if key not in value and not (key == content_key and calls):
            remedy = "; ShareGPT's keys are read with format: sharegpt" if not sharegpt and "from" in value else ""
            raise RowFault(
                "missing_key", f"{field}.{key}", f"is missing; the message has {format_names(value)}{remedy}"
            )
    role = _parse_role(value[role_key], f"{field}.{role_key}", sharegpt=sharegpt)
    content_field = f"{field}.{content_key}"
    if value.keys() - (role_key, content_key):
        note_unused(check_text, value, SHAREGPT_KEYS if sharegpt else MESSAGE_KEYS, field)
    if sharegpt and str(value[role_key]).lower() in TOOL_CALL_SPEAKERS:
        calls = load_calls(value[content_key], content_field)
        return {
            "role": role,
            "content": "",
            "tool_calls": parse_tool_calls(check_text, calls, content_field),
        }, content_field
    if calls and role != "assistant":
        raise RowFault("tool_call", calls_field, f"are a {role} message's; expected only the assistant's")
    if len(value) == 2 and isinstance(value.get(content_key), str):  # as most messages are
        return {"role": role, "content": check_text(value[content_key], content_field)}, content_field
    is_absent = calls and value.get(content_key) is None
    content, thought = ("", "") if is_absent else read_content(check_text, value[content_key], content_field)
    message: Message = {"role": role, "content": content}
    if thought:
        message[THOUGHT] = thought
    read_thought(check_text, value, field, message)
    if calls:
        message["tool_calls"] = parse_tool_calls(check_text, calls, calls_field)
    if not _read_mark(value, field, role) and role == "assistant":
        message["train"] = False
    named = {key: value[key] for key in ("name", "tool_call_id") if not is_empty(value.get(key))}
    if role != "tool" and "tool_call_id" in named:
        raise RowFault("tool_call", f"{field}.tool_call_id", f"is a {role} message's; expected only a tool's")
    message |= {key: check_text(text, f"{field}.{key}") for key, text in named.items()}
    return message, content_field


def _find_calls(value: dict[str, Any], field: str) -> tuple[Any, str]:
    """Return the calls of a message and their field: `tool_calls`, or OpenAI's older `function_call`, which is one."""
    calls, call = value.get("tool_calls"), value.get("function_call")
    if is_empty(call):
        return (None if is_empty(calls) else calls), f"{field}.tool_calls"
    if not is_empty(calls):
        raise RowFault("tool_call", f"{field}.function_call", "is given beside tool_calls; expected one of them")
    return [call], f"{field}.function_call"


def _read_mark(value: dict[str, Any], field: str, role: str) -> bool:
    """Return whether a message is to be learnt, by its weight and its marks; raises RowFault."""
    weight = value.get("weight")
    if weight is not None and (isinstance(weight, str) or weight not in (0, 1)):
        raise RowFault(
            "mark", f"{field}.weight", f"is {describe_value(weight)}; expected 0 or 1: an answer counts or not"
        )
    marks = {key: value[key] for key in MARKS if value.get(key) is not None}
    for key, mark in marks.items():
        if not isinstance(mark, bool):
            raise RowFault("mark", f"{field}.{key}", f"is {describe_value(mark)}; expected true or false")
        if mark and role != "assistant":
            raise RowFault("mark", f"{field}.{key}", f"is true for a {role} message; only the assistant's are learnt")
    return weight != 0 and all(marks.values())


def _parse_role(value: Any, field: str, *, sharegpt: bool) -> str:
    if not sharegpt:
        if isinstance(value, str) and value in OTHER_ROLES:
            return OTHER_ROLES[value]
        if value not in ROLES:
            raise RowFault("unknown_role", field, f"is {describe_value(value)}; expected one of {', '.join(ROLES)}")
        return str(value)
    role = SPEAKERS.get(value.lower()) if isinstance(value, str) else None
    if role is None:
        raise RowFault("unknown_role", field, f"is {describe_value(value)}; expected one of {', '.join(SPEAKERS)}")
    return role


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
