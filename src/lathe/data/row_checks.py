"""Checks of a row's values: faults by reason and field, texts that a model can read, keys that nothing reads."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lathe.common.errors import InputError
from lathe.data.json_values import RepeatedKey, describe_value
from lathe.data.read_files import Fault
from lathe.models.unicode_form import UnicodeRule

# Columns of a row and keys of a message that may be ignored: they say where it is from, not what is in it.
IGNORED = frozenset(
    {
        *(
            "id",
            "_id",
            "idx",
            "index",
            "uuid",
            "row_id",
            "prompt_id",
            "message_id",
            "conversation_id",
            "__index_level_0__",
            "Unnamed: 0",
        ),
        *("source", "dataset", "license", "url", "timestamp", "created", "created_at", "updated_at", "date"),
        *("language", "lang"),
    }
)
# What changes what is to be learnt: a row that has it is refused where nothing reads it.
MEANINGFUL = frozenset(
    {
        *("audio", "audios", "image", "images", "video", "videos", "documents", "refusal"),
        *("tools", "functions", "function_call", "tool_calls", "tool_call_id", "parallel_tool_calls"),
        *("reasoning_content", "reasoning", "thinking", "history", "weight", "train", "chat_template_kwargs"),
        *("reasoning_details", "thinking_blocks", "sample_weight", "loss_weight", "loss_scale", "loss_mask"),
    }
)
# The same, where it is a message that has it: columns of these names may be anything.
MEANINGFUL_IN_MESSAGES = MEANINGFUL | {
    *("mask", "masked", "ignore", "trainable", "train_detail", "training_detail", "label", "kto_tag"),
    *("tool_use", "channel", "audio_url", "image_url", "attachments", "files"),
}
_REMEDIES = {
    "chat_template_kwargs": "one value for all rows, as preprocess.chat_template_kwargs",
    "tools": "definitions of tools in the column tools",
    "functions": "definitions of tools in the column tools",
    "refusal": "the text of the answer in content",
    "weight": "0 or 1 as weight of an answer in messages",
    "train": "true or false as train of an answer in messages",
    **dict.fromkeys(
        ("mask", "masked", "ignore", "trainable", "label", "kto_tag"), "true or false as train of an answer in messages"
    ),
    **dict.fromkeys(
        ("train_detail", "training_detail", "loss_mask"), "answers that are learnt whole or not (train: false)"
    ),
    **dict.fromkeys(
        ("loss_weight", "loss_scale", "sample_weight"), "answers that count or not: 0 or 1 as weight of an answer"
    ),
}


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
        self.unused: set[str] = set()  # what of the row at hand has been read by nothing

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
        f"holds {found!r} ({name(found)}), which the model's tokenizer reads as {normal!r} ({name(normal)}) by "
        f"{form}, and llama.cpp does not; expected text in {form}: preprocess.normalize_unicode: true makes it so"
    )


def check_preset_text(check_text: TextValidator, text: str, key: str) -> str:
    """Return a text of the dataset's preset as rows have it; raises InputError if it may not be in a row."""
    try:
        return check_text(text, key)
    except RowFault as error:
        raise InputError(f"presets.yaml: {error.fault}", code="preset-text") from None


def refuse_repeated_key(value: Any, field: str) -> None:
    """Raise RowFault if an object has a key twice."""
    if isinstance(value, RepeatedKey):
        raise RowFault("duplicate_key", f"{field}.{value.key}", "occurs twice in one object; expected once")


def format_names(names: Iterable[str]) -> str:
    """Return the names in quotes for a message, at most twelve of them."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:12]) + (", ..." if len(names) > 12 else "")
    return shown or "none"


def is_empty(value: Any) -> bool:
    """Return whether a value says nothing: null, or an empty text, list or object."""
    return value is None or value in ("", "[]", [], {})


def note_unused(check_text: TextValidator, values: Mapping[str, Any], read: Collection[str], field: str | None) -> None:
    """Note the keys that nothing reads, to be counted; raise RowFault for one that changes what is to be learnt.

    `field` is that of a message, None for a row.
    """
    meaningful = MEANINGFUL if field is None else MEANINGFUL_IN_MESSAGES
    for key in values.keys() - read - IGNORED:
        if is_empty(values[key]):
            continue
        if key in meaningful:
            remedy = _REMEDIES.get(key, f"rows without {key}, or with it as text of a message")
            name = key if field is None else f"{field}.{key}"
            raise RowFault("not_read", name, f"is {describe_value(values[key])}, which is not read; expected {remedy}")
        check_text.unused.add(f"column {key}" if field is None else f"key {key} of messages")
