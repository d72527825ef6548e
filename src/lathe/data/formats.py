"""Dataset formats: how the columns of a record become chat messages."""

import re
import string
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from lathe.common.errors import InputError
from lathe.data.messages import (
    Message,
    RowFault,
    TextValidator,
    check_order,
    format_names,
    make_pair,
    parse_conversation,
    parse_messages,
    parse_transcript,
)
from lathe.data.read_files import describe_value
from lathe.models.unicode_form import UnicodeRule

if TYPE_CHECKING:
    from lathe.config.presets import DatasetPreset

# The columns that a format is detected by, and reads unless the preset names others.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "preference": ("chosen", "rejected"),
    "classification": ("text", "label"),
}

ALPACA_INPUT = "input"  # optional, and may be empty
SYSTEM = "system"  # optional, in every format; a list of messages may begin with its own system message
REJECTED = "rejected"  # optional beside a list of messages: a worse alternative to the last of them
TOOLS = "tools"
WANTED = "label"  # optional beside an answer, true or false, as TRL's unpaired preferences have it


class RecordConverter:
    """Converts records to examples, by the format that the preset names or that the column names fit.

    `required` are the columns that every record must have, `description` is what the report says about the format,
    `detected` whether it was chosen by the column names.
    """

    def __init__(
        self,
        preset: "DatasetPreset",
        names: Iterable[str],
        file: str,
        control_tokens: re.Pattern[str],
        unicode_rule: UnicodeRule | None = None,
    ) -> None:
        """Choose the format by the preset, else by the column `names` of the first record in `file`.

        Texts that hold one of the `control_tokens`, or do not follow the `unicode_rule`, will be refused. Raises
        InputError if no format fits, or several do.
        """
        names = list(names)
        check_text = TextValidator(control_tokens, unicode_rule)
        named = _get_preset_format(preset)
        self.detected = not named
        form = named or _detect_format(names, file)
        self.format = _FORMAT_CLASSES[form](check_text, preset, form, names)
        self.required = self.format.required
        self.description = {"format": form, **self.format.description}
        if WANTED not in self.required:
            self.description |= _select_present(names, wanted=WANTED)

    def convert(self, record: dict[str, Any]) -> list[Message]:
        """Return the record's messages; raises RowFault."""
        for column in self.required:
            if column not in record:
                raise RowFault("missing_column", column, f"is missing; the row has {format_names(record)}")
        if WANTED not in self.required and record.get(WANTED) is False:
            raise RowFault(
                "unwanted_answer", WANTED, "is false: the answer is not wanted; expected true, or no such row"
            )
        return self.format.convert(record)

    def get_extra_fields(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return what the example has beside its messages; the record must have been accepted by `convert`.

        A preference pair has `rejected`: a list of one message, the worse alternative to the last of `messages`.
        """
        return self.format.get_extra_fields(record)

    def require_columns(self, names: Iterable[str], file: str) -> None:
        """Raise InputError if a required column is not among the `names` of a file's columns."""
        names = list(names)
        for column in self.required:
            if column not in names:
                why = (
                    f"which the format {self.description['format']} needs"
                    if self.detected
                    else "which the dataset's preset names"
                )
                raise InputError(
                    f"{file}: no row has the column {column!r}, {why}; its columns: {format_names(names)}",
                    code="missing-column",
                )


def _get_preset_format(preset: "DatasetPreset") -> str | None:
    if preset.format:
        return preset.format
    if preset.messages:
        return "messages"
    if preset.rejected:
        return "preference"
    if preset.labels:
        return "classification"
    if preset.completion and (preset.prompt or preset.prompt_template):
        return "prompt_completion"
    if preset.completion or preset.prompt or preset.prompt_template:
        raise InputError(
            "presets.yaml: the dataset names only half of its columns; name completion, and one of prompt, "
            "prompt_template",
            code="incomplete-columns",
        )
    return None


def _detect_format(names: list[str], file: str) -> str:
    fitting = [form for form, columns in FORMATS.items() if set(columns) <= set(names)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InputError(
            f"{file}: its columns {format_names(names)} fit the formats {' and '.join(fitting)}; choose one "
            f"in the dataset's preset (format: {fitting[0]})",
            code="ambiguous-format",
        )
    known = "; ".join(" + ".join(columns) for columns in FORMATS.values())
    raise InputError(
        f"{file}: has the columns {format_names(names)}; expected those of a format ({known}); name yours in the "
        "dataset's preset (messages, prompt + completion, prompt_template + completion)",
        code="unknown-format",
    )


class _MessagesFormat:
    """One column with the whole conversation."""

    def __init__(self, check_text: TextValidator, preset: "DatasetPreset", form: str, names: list[str]) -> None:
        self.check_text, self.system, self.sharegpt = check_text, _choose_system_column(preset), form == "sharegpt"
        self.column = preset.messages or FORMATS[form][0]
        self.required = (self.column,)
        self.description: dict[str, Any] = {
            "messages": self.column,
            **_select_present(names, rejected=REJECTED, system=self.system),
        }

    def convert(self, record: dict[str, Any]) -> list[Message]:
        if record.get(TOOLS) not in (None, "", "[]", [], {}):
            raise RowFault("tools", TOOLS, "is not supported; write the definitions of the tools in a system message")
        messages = parse_conversation(self.check_text, record[self.column], self.column, sharegpt=self.sharegpt)
        if rejected := self._parse_rejected(record):
            if rejected[0]["role"] == "assistant":
                rejected = [*messages[:-1], *rejected]
            check_order(rejected, REJECTED)
            _check_pair(messages, self.column, rejected, REJECTED)
        return _add_system_message(self.check_text, self.system, record, messages)

    def get_extra_fields(self, record: dict[str, Any]) -> dict[str, Any]:
        return {"rejected": rejected[-1:]} if (rejected := self._parse_rejected(record)) else {}

    def _parse_rejected(self, record: dict[str, Any]) -> list[Message]:
        value = record.get(REJECTED)
        if value is None or self.column == REJECTED:
            return []
        if isinstance(value, str):
            value = [{"role": "assistant", "content": value}]
        return parse_messages(self.check_text, value, REJECTED, sharegpt=self.sharegpt)


class _PromptAnswerFormat:
    """A prompt and an answer, from columns of their own."""

    def __init__(self, check_text: TextValidator, preset: "DatasetPreset", form: str, names: list[str]) -> None:
        self.check_text, self.system = check_text, _choose_system_column(preset)
        self.prompt_columns = _PromptColumns(check_text, preset, form, names)
        self.answer_column = preset.completion or FORMATS[form][1]
        self.check_answer: Callable[[Any, str], str] = check_text
        self.required: tuple[str, ...] = (*self.prompt_columns.required, self.answer_column)
        self.description: dict[str, Any] = {
            **self.prompt_columns.description,
            "completion": self.answer_column,
            **_select_present(names, system=self.system),
        }
        if form == "classification":
            self.check_answer = _LabelReader(check_text, preset.labels)
            if preset.labels:
                self.description["labels"] = preset.labels

    def convert(self, record: dict[str, Any]) -> list[Message]:
        answer = self.check_answer(record[self.answer_column], self.answer_column)
        messages = make_pair(self.prompt_columns.read(record), self.prompt_columns.field, answer, self.answer_column)
        return _add_system_message(self.check_text, self.system, record, messages)

    def get_extra_fields(self, record: dict[str, Any]) -> dict[str, Any]:
        return {}


class _PreferenceFormat:
    r"""A preference pair: a better and a worse answer to one prompt; `chosen` is the one that is trained on.

    Both are texts, or both are lists of messages. A list that begins with an assistant message continues the prompt;
    any other list is the whole conversation. Texts without a prompt are transcripts that begin with "\n\nHuman:".
    """

    def __init__(self, check_text: TextValidator, preset: "DatasetPreset", form: str, names: list[str]) -> None:
        self.check_text, self.system = check_text, _choose_system_column(preset)
        self.prompt_columns = _PromptColumns(check_text, preset, form, names) if preset.prompt_template else None
        self.prompt = self.prompt_columns.field if self.prompt_columns else preset.prompt or "prompt"
        self.chosen = preset.completion or FORMATS[form][0]
        self.rejected = preset.rejected or FORMATS[form][1]
        named = (preset.prompt,) if preset.prompt else ()
        self.required = (*(self.prompt_columns.required if self.prompt_columns else named), self.chosen, self.rejected)
        self.description: dict[str, Any] = {
            **(self.prompt_columns.description if self.prompt_columns else _select_present(names, prompt=self.prompt)),
            "completion": self.chosen,
            "rejected": self.rejected,
            **_select_present(names, system=self.system),
        }

    def convert(self, record: dict[str, Any]) -> list[Message]:
        chosen, rejected = self._parse_side(record, self.chosen), self._parse_side(record, self.rejected)
        _check_pair(chosen, self.chosen, rejected, self.rejected)
        return _add_system_message(self.check_text, self.system, record, chosen)

    def get_extra_fields(self, record: dict[str, Any]) -> dict[str, Any]:
        return {"rejected": self._parse_side(record, self.rejected)[-1:]}

    def _parse_side(self, record: dict[str, Any], column: str) -> list[Message]:
        value = record[column]
        if isinstance(record[self.chosen], list) != isinstance(value, list):
            raise RowFault(
                "not_alike",
                column,
                f"is {describe_value(value)} but {self.chosen} is {describe_value(record[self.chosen])}; expected both "
                "alike",
            )
        prompt = self._parse_prompt(record)
        if isinstance(value, list):
            messages = parse_messages(self.check_text, value, column)
            if messages and messages[0]["role"] == "assistant" and prompt:
                messages = [*prompt, *messages]
            elif prompt and not _contains_prompt(messages, prompt):
                raise RowFault(
                    "different_prompts",
                    column,
                    f"does not hold the {self.prompt}; expected a conversation that begins with it",
                )
        elif prompt:
            answer = self.check_text(value, column)
            if not answer.strip():
                raise RowFault("empty_answer", column, "is empty; expected text")
            messages = [*prompt, {"role": "assistant", "content": answer}]
        else:
            messages = parse_transcript(self.check_text(value, column), column)
        check_order(messages, column)
        return messages

    def _parse_prompt(self, record: dict[str, Any]) -> list[Message]:
        field = self.prompt
        value: Any = self.prompt_columns.read(record) if self.prompt_columns else record.get(field)
        if value is None and field not in self.required:
            return []
        if isinstance(value, list):
            return parse_messages(self.check_text, value, field)
        prompt = self.check_text(value, field)
        if not prompt.strip():
            raise RowFault("empty_prompt", field, "is empty; expected text")
        return [{"role": "user", "content": prompt}]


class _PromptColumns:
    """The columns of a prompt: one column, a template of several, or Alpaca's instruction and input."""

    def __init__(self, check_text: TextValidator, preset: "DatasetPreset", form: str, names: list[str]) -> None:
        self.check_text = check_text
        self.column = preset.prompt or FORMATS[form][0]
        self.parts = _parse_template(preset.prompt_template) if preset.prompt_template else None
        self.input = ALPACA_INPUT if form == "alpaca" and not preset.prompt_template else None
        self.field = "prompt_template" if self.parts else self.column
        self.required: tuple[str, ...] = (self.column,)
        self.description: dict[str, Any] = {"prompt": self.column}
        if preset.prompt_template and self.parts:
            self.required = tuple(dict.fromkeys(column for _, column in self.parts if column))
            self.description = {"prompt_template": preset.prompt_template}
        elif self.input in names:
            self.description["input"] = self.input

    def read(self, record: dict[str, Any]) -> str:
        """Return the prompt's text; raises RowFault if a column is not text."""
        if self.parts:
            parts = (
                literal + (self.check_text(record[column], column) if column else "") for literal, column in self.parts
            )
            return "".join(parts).rstrip()  # an empty last column leaves blank lines at the end
        prompt_text = self.check_text(record[self.column], self.column)
        more = record.get(self.input) if self.input else None
        if self.input and more is not None and self.check_text(more, self.input).strip():
            return f"{prompt_text}\n\n{more}"
        return prompt_text


class _LabelReader:
    """Reads the label of a classification: its text, or its number as an index into the preset's list of names."""

    def __init__(self, check_text: TextValidator, names: list[str] | None) -> None:
        self.check_text, self.names = check_text, names

    def __call__(self, value: Any, field: str) -> str:
        """Return the label's text; raises RowFault."""
        number = _parse_integer(value)
        if self.names is None:
            if number is not None:
                remedy = "name the labels in the dataset's preset (`labels`), or give it prompt and completion"
                raise RowFault(
                    "unnamed_label", field, f"is {describe_value(value)}; expected the label's text; {remedy}"
                )
            return self.check_text(value, field).strip()
        if isinstance(value, str) and value.strip() in self.names:
            return value.strip()
        if number is None:
            known = format_names(self.names)
            raise RowFault(
                "unknown_label", field, f"is {describe_value(value)}; expected one of {known}, or its number from 0"
            )
        if not 0 <= number < len(self.names):
            raise RowFault(
                "label_out_of_range",
                field,
                f"is {describe_value(value)}; expected 0 to {len(self.names) - 1}, an index into the preset's `labels`",
            )
        return self.names[number]


_FORMAT_CLASSES: dict[str, type[_MessagesFormat] | type[_PromptAnswerFormat] | type[_PreferenceFormat]] = {
    "messages": _MessagesFormat,
    "sharegpt": _MessagesFormat,
    "alpaca": _PromptAnswerFormat,
    "prompt_completion": _PromptAnswerFormat,
    "question_answer": _PromptAnswerFormat,
    "preference": _PreferenceFormat,
    "classification": _PromptAnswerFormat,
}


def _check_pair(chosen: list[Message], chosen_field: str, rejected: list[Message], field: str) -> None:
    """Raise RowFault unless two conversations differ in the last message and nowhere else."""
    if chosen[:-1] != rejected[:-1]:
        problem = f"answers another conversation than {chosen_field}; expected the same up to the last message"
        raise RowFault("different_prompts", field, problem)
    if _get_compared_parts(chosen) == _get_compared_parts(rejected):
        raise RowFault("same_answers", field, f"is equal to {chosen_field}; expected another answer")


def _get_compared_parts(messages: list[Message]) -> tuple[str, Any]:
    """Return what is compared of the last message: its text without surrounding white space, and its tool calls."""
    return messages[-1]["content"].strip(), messages[-1].get("tool_calls")


def _parse_integer(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value.strip(), re.ASCII):
        return int(value)
    return None


def _add_system_message(
    check_text: TextValidator, column: str | None, record: dict[str, Any], messages: list[Message]
) -> list[Message]:
    content = record.get(column) if column else None
    if column is None or content is None or not check_text(content, column).strip():
        return messages
    if messages[0]["role"] == "system":
        raise RowFault(
            "two_system_messages",
            column,
            "is given, but the messages begin with a system message too; expected one of them",
        )
    return [{"role": "system", "content": content}, *messages]


def _choose_system_column(preset: "DatasetPreset") -> str | None:
    # If the preset names columns, no others are read.
    named = preset.prompt or preset.completion or preset.prompt_template
    return None if named else SYSTEM


def _select_present(names: list[str], **columns: str | None) -> dict[str, str]:
    """Return the optional columns that the first record has."""
    return {key: column for key, column in columns.items() if column in names and column}


def _contains_prompt(messages: list[Message], prompt: list[Message]) -> bool:
    """Return whether the conversation begins with the prompt, or has its text as one of the user's messages."""
    if len(prompt) == 1:
        return any(
            message["role"] == "user" and message["content"].strip() == prompt[0]["content"].strip()
            for message in messages
        )
    return messages[: len(prompt)] == prompt


def _parse_template(template: str) -> list[tuple[str, str | None]]:
    """Return the parts of a prompt template: (literal text, name of the column that follows it or None)."""
    remedy = "write {column} for a column and {{ or }} for a brace"
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"presets.yaml: prompt_template {template!r}: {error}; {remedy}", code="invalid-template"
        ) from None
    for _, column, format_spec, conversion in parsed:
        if column is not None and (not column or format_spec or conversion):
            raise InputError(
                f"presets.yaml: prompt_template {template!r}: a field must be only a name; {remedy}",
                code="invalid-template",
            )
    if not any(column for _, column, _, _ in parsed):
        raise InputError(
            f"presets.yaml: prompt_template {template!r}: names no column; {remedy}", code="invalid-template"
        )
    return [(literal, column) for literal, column, _, _ in parsed]
