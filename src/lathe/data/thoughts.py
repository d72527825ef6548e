"""Thoughts and parts of a message: what reasoning models' clients write beside the answer, and lists of text parts."""

from typing import Any

from lathe.data.json_values import describe_value
from lathe.data.row_checks import RowFault, TextValidator, is_empty
from lathe.models.message_form import THOUGHT, THOUGHT_KEYS

# Other names of a thought that is a text.
OTHER_THOUGHT_KEYS = ("thought", "thoughts", "think", "reasoning_text", "chain_of_thought", "cot", "scratchpad")
# Lists of parts, as OpenRouter and LiteLLM give them, by the keys that hold a part's text.
THOUGHT_LISTS = {"reasoning_details": ("text", "summary"), "thinking_blocks": ("thinking",)}
ALL_THOUGHT_KEYS = (*THOUGHT_KEYS, *OTHER_THOUGHT_KEYS, *THOUGHT_LISTS)

# Types of the parts of a content that hold text, as clients of OpenAI's and Anthropic's servers write them.
TEXT_PARTS = ("text", "input_text", "output_text")


def find_thoughts(check_text: TextValidator, values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the thoughts among the keys of a message or the columns of a row, by key; raises RowFault.

    `prefix` is what stands before a key in the field of a fault.
    """
    found = {key: values[key] for key in ALL_THOUGHT_KEYS if not is_empty(values.get(key))}
    texts = {key: value for key, value in found.items() if key not in THOUGHT_LISTS}
    thoughts = {key: check_text(value, prefix + key) for key, value in texts.items()}
    for key in found.keys() - texts.keys():
        # Where the thought is given as a text too, its parts may be encrypted or a summary.
        if not thoughts and (thought := _join_thought_parts(check_text, found[key], prefix + key, THOUGHT_LISTS[key])):
            thoughts[key] = thought
    return thoughts


def read_thought(check_text: TextValidator, value: dict[str, Any], field: str, message: dict[str, Any]) -> None:
    """Add the thought before an answer to the message, by any of the names that it has; raises RowFault.

    A thought that the message has already is that of its content's parts.
    """
    thoughts = find_thoughts(check_text, value, f"{field}.")
    if message.get(THOUGHT):
        thoughts["content"] = message[THOUGHT]
    if not thoughts:
        return
    key, thought = next(iter(thoughts.items()))
    if message["role"] != "assistant":
        raise RowFault("thought", f"{field}.{key}", f"is a {message['role']} message's; expected only the assistant's")
    for other, second in thoughts.items():
        if second != thought:
            raise RowFault("thought", f"{field}.{other}", f"differs from {key}; expected one thought")
    if "</think>" in message["content"]:
        raise RowFault(
            "thought", f"{field}.{key}", "is given, and the content has a <think> block too; expected one of them"
        )
    message[THOUGHT] = thought


def read_content(check_text: TextValidator, value: Any, field: str) -> tuple[str, str]:
    """Return text and thought: a text, or those of a list of parts; raises RowFault for parts of other kinds."""
    if not isinstance(value, list):
        return check_text(value, field), ""
    texts, thoughts = [], []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        place = f"{field}[{index}]"
        if kind == "thinking" and isinstance(part.get("thinking"), str):  # as Anthropic's clients write a thought
            thoughts.append(check_text(part["thinking"], f"{place}.thinking"))
            _note_unused_keys(check_text, part, ("type", "thinking"))
            continue
        # Bedrock's parts have no type.
        is_text = kind in TEXT_PARTS or (kind is None and isinstance(part, dict) and set(part) == {"text"})
        if not is_text or "text" not in part:
            shown = f"has the type {kind!r}" if kind not in (None, *TEXT_PARTS) else f"is {describe_value(part)}"
            raise RowFault("not_text", place, f"{shown}; expected parts of type text, with their text")
        texts.append(check_text(part["text"], f"{place}.text"))
        _note_unused_keys(check_text, part, ("type", "text"))
    # Checked again as a whole: what is in order part by part may not be where two of them meet.
    joined = [check_text("".join(parts), field) if len(parts) > 1 else "".join(parts) for parts in (texts, thoughts)]
    return joined[0], joined[1]


def _join_thought_parts(check_text: TextValidator, value: Any, field: str, keys: tuple[str, ...]) -> str:
    texts = []
    for index, part in enumerate(value if isinstance(value, list) else [value]):
        given = [key for key in keys if isinstance(part, dict) and isinstance(part.get(key), str)]
        if not given:
            raise RowFault(
                "thought", f"{field}[{index}]", f"is {describe_value(part)} without {' or '.join(keys)}; expected text"
            )
        texts.append(check_text(part[given[0]], f"{field}[{index}].{given[0]}"))
    return check_text("".join(texts), field)


def _note_unused_keys(check_text: TextValidator, part: dict[str, Any], read: tuple[str, ...]) -> None:
    for key in part.keys() - read:
        if not is_empty(part[key]):
            check_text.unused.add(f"key {key} of content parts")
