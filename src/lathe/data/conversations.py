"""From a raw row's columns to a validated conversation."""

import re
import string
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from lathe.data.reading import Fault, RepeatedKey, kind
from lathe.errors import InputError

if TYPE_CHECKING:
    from lathe.params import DatasetPreset

Message = dict[str, str]

ROLES = ("system", "user", "assistant")


class RowFault(Exception):  # noqa: N818
    """A row that cannot become a conversation; carries the Fault."""

    def __init__(self, reason: str, field: str | None, problem: str) -> None:
        super().__init__(problem)
        self.fault = Fault(reason, field, problem)


class Columns:
    """How the columns of a dataset become messages: as its preset says, or as its column names tell.

    `used` are the columns that every row must have, `description` is what the report says of them.
    """

    def __init__(
        self, preset: "DatasetPreset", names: Iterable[str], file: str, control_tokens: re.Pattern[str]
    ) -> None:
        """Choose by the preset, else by the first row's column `names`; raises InputError where neither tells.

        No text may hold one of the `control_tokens`: it would end its own turn.
        """
        names = list(names)
        text = _TextRule(control_tokens)
        messages, prompt, completion = preset.messages, preset.prompt, preset.completion
        template = preset.prompt_template
        self.detected = not (messages or prompt or completion or template)
        if self.detected:
            if "messages" in names:
                messages = "messages"
            elif "prompt" in names and "completion" in names:
                prompt, completion = "prompt", "completion"
            else:
                raise InputError(
                    f"{file}: has the columns {_listed(names)}; expected messages, or prompt and completion; "
                    "name yours in the dataset's preset (messages, prompt + completion, prompt_template + completion)"
                )
        self.used: tuple[str, ...]
        self.read: Callable[[dict[str, Any]], list[Message]]
        self.description: dict[str, Any]
        if messages:
            self.used, self.read = (messages,), lambda row: _conversation(text, row[messages], messages)
            self.description = {"messages": messages}
        elif template and completion:
            parts = _template_parts(template)
            self.used = (*dict.fromkeys(column for _, column in parts if column), completion)
            self.read = lambda row: _pair(
                _filled(text, parts, row), "prompt_template", text(row[completion], completion), completion
            )
            self.description = {"prompt_template": template, "completion": completion}
        elif prompt and completion:
            self.used = (prompt, completion)
            self.read = lambda row: _pair(
                text(row[prompt], prompt), prompt, text(row[completion], completion), completion
            )
            self.description = {"prompt": prompt, "completion": completion}
        else:
            raise InputError(
                "presets.yaml: the dataset names only half of its columns; completion goes with one of prompt, "
                "prompt_template"
            )

    def conversation(self, row: dict[str, Any]) -> list[Message]:
        """Return the row's messages; raises RowFault."""
        for column in self.used:
            if column not in row:
                raise RowFault("missing_column", column, f"is missing; the row has {_listed(row)}")
        return self.read(row)

    def require(self, names: Iterable[str], file: str) -> None:
        """Raise InputError where a column is in no row of the file."""
        names = list(names)
        for column in self.used:
            if column not in names:
                raise InputError(
                    f"{file}: no row has the column {column!r}, which the dataset's preset names; "
                    f"its columns: {_listed(names)}"
                )


class _TextRule:
    """Lets plain text pass, and nothing else."""

    def __init__(self, control_tokens: re.Pattern[str]) -> None:
        self.control_tokens = control_tokens

    def __call__(self, value: Any, field: str) -> str:
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


def _conversation(text: _TextRule, value: Any, field: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowFault("not_a_list", field, f"is {kind(value)}; expected a list of {{role, content}} objects")
    messages = []
    for index, item in enumerate(value):
        message = _message(text, item, f"{field}[{index}]")
        if message["content"].strip():
            messages.append(message)
        elif message["role"] != "system" or index > 0:  # many sources fill in "" where there is no system message
            reason = "empty_answer" if message["role"] == "assistant" else "empty_prompt"
            raise RowFault(reason, f"{field}[{index}].content", "is empty; expected text")
    _check_order(messages, field, start=len(value) - len(messages))
    return messages


def _message(text: _TextRule, value: Any, field: str) -> Message:
    if isinstance(value, RepeatedKey):
        raise RowFault("duplicate_key", f"{field}.{value.key}", "occurs twice in one object; expected once")
    if not isinstance(value, dict):
        raise RowFault("not_an_object", field, f"is {kind(value)}; expected an object with role and content")
    for key in ("role", "content"):
        if key not in value:
            raise RowFault("missing_key", f"{field}.{key}", f"is missing; the message has {_listed(value)}")
    role = value["role"]
    if role not in ROLES:
        raise RowFault("unknown_role", f"{field}.role", f"is {kind(role)}; expected one of {', '.join(ROLES)}")
    for key in ("tool_calls", "function_call"):
        if value.get(key):
            raise RowFault("tool_call", f"{field}.{key}", "is not supported; expected text messages only")
    return {"role": role, "content": text(value["content"], f"{field}.content")}


def _check_order(messages: list[Message], field: str, *, start: int) -> None:
    if not messages:
        raise RowFault("no_answer", field, "is empty; expected at least a user and an assistant message")
    for index, message in enumerate(messages):
        first = index == 0
        previous = None if first else messages[index - 1]["role"]
        expected = {None: "system or user", "system": "user", "user": "assistant", "assistant": "user"}[previous]
        if message["role"] not in expected.split(" or "):
            before = "comes first" if first else f"follows {previous}"
            raise RowFault(
                "roles_out_of_order",
                f"{field}[{start + index}].role",
                f"{message['role']} {before}; expected {expected}",
            )
    if messages[-1]["role"] != "assistant":
        raise RowFault("no_answer", field, f"ends with {messages[-1]['role']}; expected an assistant message last")


def _pair(prompt: str, prompt_field: str, answer: str, answer_field: str) -> list[Message]:
    if not prompt.strip():
        raise RowFault("empty_prompt", prompt_field, "is empty; expected text")
    if not answer.strip():
        raise RowFault("empty_answer", answer_field, "is empty; expected text")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _template_parts(template: str) -> list[tuple[str, str | None]]:
    """Return (literal text, column behind it) pairs of a prompt template."""
    remedy = "write {column} for a column and {{ or }} for a brace"
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"presets.yaml: prompt_template {template!r}: {error}; {remedy}") from None
    for _, column, format_spec, conversion in parsed:
        if column is not None and (not column or format_spec or conversion):
            raise InputError(f"presets.yaml: prompt_template {template!r}: a field is only a name; {remedy}")
    if not any(column for _, column, _, _ in parsed):
        raise InputError(f"presets.yaml: prompt_template {template!r}: names no column; {remedy}")
    return [(literal, column) for literal, column, _, _ in parsed]


def _filled(text: _TextRule, parts: list[tuple[str, str | None]], row: dict[str, Any]) -> str:
    return "".join(literal + (text(row[column], column) if column else "") for literal, column in parts)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:12]) + (", ..." if len(names) > 12 else "")
    return shown or "none"
