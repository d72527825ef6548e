"""Dataset formats: how the columns of a record become chat messages."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lathe.common.errors import InputError
from lathe.data.detect_format import detect_format
from lathe.data.format_columns import (
    FORMATS,
    HISTORY,
    PARALLEL,
    REJECTED,
    TOOLS,
    UNWANTED_FLAGS,
    UNWANTED_WORDS,
    WANTED,
    WANTED_WORDS,
    Format,
    add_system_message,
    check_pair,
    choose_system_column,
    names_columns,
    select_present,
)
from lathe.data.json_values import describe_value
from lathe.data.messages import (
    Message,
    check_order,
    find_messages,
    make_pair,
    parse_conversation,
    parse_messages,
    parse_turns,
    require_learnt,
)
from lathe.data.null_arguments import remove_null_arguments
from lathe.data.preference_formats import OpenAIPreferenceFormat, PreferenceFormat
from lathe.data.prompt_columns import PromptColumns
from lathe.data.row_checks import (
    IGNORED,
    RowFault,
    TextValidator,
    check_preset_text,
    format_names,
    is_empty,
    note_unused,
)
from lathe.data.thoughts import ALL_THOUGHT_KEYS, find_thoughts
from lathe.data.tools import Tool, check_calls, get_parallel, parse_tools
from lathe.models.document import DOCUMENT
from lathe.models.message_form import THOUGHT
from lathe.models.unicode_form import UnicodeRule

if TYPE_CHECKING:
    from lathe.config.presets import SingleDataset


class RecordConverter:
    """Converts records to examples, by the format that the preset names or that the column names fit.

    `required` are the columns that every record must have, `description` is what the report says about the format,
    `detected` whether it was chosen by the column names.
    """

    def __init__(
        self,
        preset: "SingleDataset",
        names: Iterable[str],
        file: str,
        control_tokens: re.Pattern[str],
        unicode_rule: UnicodeRule | None = None,
        *,
        first: Mapping[str, Any] | None = None,
        is_padded: bool = False,
    ) -> None:
        """Choose the format by the preset, else by the column `names` of the first records in `file`.

        Texts that hold one of the `control_tokens`, or do not follow the `unicode_rule`, will be refused. Where the
        records are padded, arguments of calls that are null are left out and counted. Raises InputError if no format
        fits, or several do.
        """
        self.is_padded = is_padded
        names = list(names)
        check_text = TextValidator(control_tokens, unicode_rule)
        named = _get_preset_format(preset)
        self.detected = not named
        form = named or detect_format(names, first or {}, file)
        self.format = _FORMAT_CLASSES[form](check_text, preset, form, names)
        self.required = self.format.required
        self.description = {"format": form, **self.format.description}
        if WANTED not in self.required:
            self.description |= select_present(names, wanted=WANTED)
        self.check_text, self.is_named = check_text, names_columns(preset)
        self.tool_columns = (preset.tools,) if preset.tools else () if self.is_named else TOOLS
        self.description |= select_present(names, tools=next((key for key in self.tool_columns if key in names), None))
        flags = () if self.is_named or form == "classification" else UNWANTED_FLAGS
        self.wanted_columns = tuple(column for column in (WANTED, *flags) if column not in self.required)
        self.read = frozenset(
            {
                *self.required,
                *self.format.optional,
                *self.tool_columns,
                WANTED,
                *flags,
                *(() if self.is_named else (PARALLEL,)),
            }
        )
        self.unused: Counter[str] = Counter()
        self._tools: list[Tool] = []

    def convert(self, record: dict[str, Any]) -> list[Message]:
        """Return the record's messages; raises RowFault."""
        for column in self.required:
            if column not in record:
                raise RowFault("missing_column", column, f"is missing; the row has {format_names(record)}")
        self.check_text.unused = set()
        for column in self.wanted_columns:
            if (value := record.get(column)) is not None and value is not True:
                self._check_wanted(column, value)
        if record.keys() - self.read:
            self._note_unused_columns(record)
        messages = self.format.convert(record)
        self._tools = self._read_tools(record)
        if self._tools or any("tool_calls" in message or "tool_call_id" in message for message in messages):
            self._check_calls(record, messages)
            if remove_null_arguments(messages, self._tools, all_=self.is_padded):
                self.check_text.unused.add("null arguments of calls")
        self.unused.update(self.check_text.unused)
        return messages

    def get_extra_fields(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return what the example has beside its messages; the record is the one that `convert` accepted last.

        A preference pair has `rejected`: a list of one message, the worse alternative to the last of `messages`. A row
        with definitions of tools has `tools`.
        """
        extra = self.format.get_extra_fields(record)
        remove_null_arguments(extra.get("rejected", ()), self._tools, all_=self.is_padded)
        return {**extra, "tools": self._tools} if self._tools else extra

    def _check_wanted(self, column: str, value: Any) -> None:
        """Count a value that says nothing about the answer; raise RowFault for one that says no, or may."""
        is_flag = value in (0, 1) or str(value).lower() in ("true", "false", "0", "1")
        if value is False or (column in UNWANTED_FLAGS and is_flag and str(value).lower() in ("false", "0", "0.0")):
            raise RowFault(
                "unwanted_answer", column, "is false: the answer is not wanted; expected true, or no such row"
            )
        if isinstance(value, str) and not self.is_named:
            word = value.strip().lower().replace(" ", "_")
            if word in UNWANTED_WORDS:
                raise RowFault(
                    "unwanted_answer",
                    column,
                    f"is {describe_value(value)}: the answer is not wanted; expected a wanted one, or no such row",
                )
            if word in WANTED_WORDS:
                return
        if is_flag and column == WANTED and not self.is_named:
            raise RowFault(
                "unwanted_answer",
                WANTED,
                f"is {describe_value(value)}; expected true or false if it says whether the answer is wanted (in a "
                "table by the name kto_tag, where they may be text), and another name of the column if not",
            )
        if not is_flag or column == WANTED:
            self.check_text.unused.add(f"column {column}")

    def _note_unused_columns(self, record: dict[str, Any]) -> None:
        if self.is_named:  # what the preset does not name may be anything
            unused = {column for column in record.keys() - self.read - IGNORED if not is_empty(record[column])}
            self.check_text.unused |= {f"column {column}" for column in unused}
        else:
            note_unused(self.check_text, record, self.read, None)

    def _read_tools(self, record: dict[str, Any]) -> list[Tool]:
        record = self.format.get_request(record)
        given = [column for column in self.tool_columns if not is_empty(record.get(column))]
        if len(given) > 1:
            raise RowFault("tools", given[1], f"is given beside {given[0]}; expected one of them")
        return parse_tools(self.check_text, record[given[0]], given[0]) if given else []

    def _check_calls(self, record: dict[str, Any], messages: list[Message]) -> None:
        record = self.format.get_request(record)
        parallel = get_parallel(None if self.is_named else record.get(PARALLEL), PARALLEL)
        column = self.description.get("messages", "messages")
        check_calls(messages, str(column), self._tools, parallel=parallel)

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


def _get_preset_format(preset: "SingleDataset") -> str | None:
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


class _MessagesFormat(Format):
    """One column with the whole conversation."""

    def __init__(self, check_text: TextValidator, preset: "SingleDataset", form: str, names: list[str]) -> None:
        self.check_text, self.system, self.sharegpt = check_text, choose_system_column(preset), form == "sharegpt"
        self.column = preset.messages or FORMATS[form][0]
        self.required = (self.column,)
        self.optional = (REJECTED, self.system)
        self.description: dict[str, Any] = {
            "messages": self.column,
            **select_present(names, rejected=REJECTED, system=self.system),
        }

    def convert(self, record: dict[str, Any]) -> list[Message]:
        rejected = self._parse_rejected(record)
        messages = parse_conversation(
            self.check_text, record[self.column], self.column, sharegpt=self.sharegpt, is_pair=bool(rejected)
        )
        if rejected:
            if rejected[0]["role"] == "assistant":
                rejected = [*messages[:-1], *rejected]
            check_order(rejected, REJECTED)
            check_pair(messages, self.column, rejected, REJECTED)
        return add_system_message(self.check_text, self.system, record, messages)

    def get_extra_fields(self, record: dict[str, Any]) -> dict[str, Any]:
        return {"rejected": rejected[-1:]} if (rejected := self._parse_rejected(record)) else {}

    def _parse_rejected(self, record: dict[str, Any]) -> list[Message]:
        value = record.get(REJECTED)
        if value is None or self.column == REJECTED:
            return []
        if isinstance(value, str):
            value = find_messages(value) or [{"role": "assistant", "content": value}]
        return parse_messages(self.check_text, value, REJECTED, sharegpt=self.sharegpt)


class _TextFormat(Format):
    """One column with a raw text."""

    def __init__(self, check_text: TextValidator, preset: "SingleDataset", form: str, names: list[str]) -> None:
        self.check_text, self.column = check_text, preset.completion or form
        self.required = (self.column,)
        self.description: dict[str, Any] = {"document": self.column}

    def convert(self, record: dict[str, Any]) -> list[Message]:
        text = self.check_text(record[self.column], self.column)
        if not text.strip():
            raise RowFault("empty_document", self.column, "is empty; expected text")
        return [{"role": DOCUMENT, "content": text}]

    def get_extra_fields(self, record: dict[str, Any]) -> dict[str, Any]:
        return {}


class _PromptAnswerFormat(Format):
    """A prompt and an answer, from columns of their own."""

    def __init__(self, check_text: TextValidator, preset: "SingleDataset", form: str, names: list[str]) -> None:
        self.check_text, self.system = check_text, choose_system_column(preset)
        self.prompt_columns = PromptColumns(check_text, preset, form, FORMATS[form][0], names)
        self.answer_column = preset.completion or FORMATS[form][1]
        self.check_answer: Callable[[Any, str], str] = check_text
        self.optional = (self.system, self.prompt_columns.input, preset.thought)
        self.thought = preset.thought
        self.is_named = self.system is None
        if not self.is_named:
            self.optional += (HISTORY, *(() if self.thought else ALL_THOUGHT_KEYS))
        self.required: tuple[str, ...] = (*self.prompt_columns.required, self.answer_column)
        self.description: dict[str, Any] = {
            **self.prompt_columns.description,
            "completion": self.answer_column,
            **select_present(names, system=self.system, thought=self.thought),
        }
        self.is_classification = form == "classification"
        if self.is_classification:
            self.check_answer = _LabelReader(check_text, preset.labels)
            if preset.labels:
                self.description["labels"] = preset.labels

    def convert(self, record: dict[str, Any]) -> list[Message]:
        messages = self._find_turns(record)
        if not messages:
            answer = self.check_answer(record[self.answer_column], self.answer_column)
            messages = make_pair(
                self.prompt_columns.read(record), self.prompt_columns.field, answer, self.answer_column
            )
        if not self.is_named:
            messages = [*self._read_history(record), *messages]
        if self.thought or not self.is_named:
            self._add_thought(record, messages[-1])
        return add_system_message(self.check_text, self.system, record, messages)

    def get_extra_fields(self, record: dict[str, Any]) -> dict[str, Any]:
        return {}

    def _find_turns(self, record: dict[str, Any]) -> list[Message]:
        """Return prompt and answer where one of them is a list of messages, as TRL has them; [] where none is.

        Only those of the answer are learnt.
        """
        if self.is_classification:
            return []
        column = self.prompt_columns.field
        before = None if self.prompt_columns.parts else find_messages(record[column])
        after = find_messages(record[self.answer_column])
        if not before and not after:
            return []
        if not before:
            before = [{"role": "user", "content": self.prompt_columns.read(record)}]
        if not after:
            answer = self.check_text(record[self.answer_column], self.answer_column)
            after = [{"role": "assistant", "content": answer}]
        prompt = [
            {**message, "train": False} if message["role"] == "assistant" else message
            for message in parse_turns(self.check_text, before, column)
        ]
        messages = [*prompt, *parse_turns(self.check_text, after, self.answer_column)]
        check_order(messages, self.answer_column, start=-len(prompt))
        require_learnt(messages, self.answer_column)
        return messages

    def _read_history(self, record: dict[str, Any]) -> list[Message]:
        """Return the earlier turns: a list of [prompt, answer]."""
        turns = record.get(HISTORY)
        if is_empty(turns):
            return []
        if not isinstance(turns, list):
            raise RowFault("not_a_list", HISTORY, f"is {describe_value(turns)}; expected a list of [prompt, answer]")
        messages = []
        for index, turn in enumerate(turns):
            field = f"{HISTORY}[{index}]"
            if not isinstance(turn, list | tuple) or len(turn) != 2:
                raise RowFault("not_a_list", field, f"is {describe_value(turn)}; expected [prompt, answer]")
            prompt, answer = (self.check_text(text, f"{field}[{at}]") for at, text in enumerate(turn))
            messages += make_pair(prompt, f"{field}[0]", answer, f"{field}[1]")
        return messages

    def _add_thought(self, record: dict[str, Any], answer: Message) -> None:
        if self.thought:
            given = record.get(self.thought)
            thoughts = {} if is_empty(given) else {self.thought: self.check_text(given, self.thought)}
        else:
            thoughts = find_thoughts(self.check_text, record)
        key, thought = next(iter(thoughts.items()), ("", ""))
        for other, second in thoughts.items():
            if second != thought:
                raise RowFault("thought", other, f"is given beside {key}; expected one of them")
        if thought and answer.get(THOUGHT):
            raise RowFault("thought", key, f"is given, and {self.answer_column} has a thought too; expected one")
        if thought:
            answer[THOUGHT] = thought


class _LabelReader:
    """Reads the label of a classification: its text, or its number as an index into the preset's list of names."""

    def __init__(self, check_text: TextValidator, names: list[str] | None) -> None:
        self.check_text = check_text
        self.names = [check_preset_text(check_text, name, "labels") for name in names] if names else None

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


_FORMAT_CLASSES: dict[
    str,
    type[_MessagesFormat]
    | type[_PromptAnswerFormat]
    | type[PreferenceFormat]
    | type[OpenAIPreferenceFormat]
    | type[_TextFormat],
] = {
    "messages": _MessagesFormat,
    "sharegpt": _MessagesFormat,
    "alpaca": _PromptAnswerFormat,
    "prompt_completion": _PromptAnswerFormat,
    "question_answer": _PromptAnswerFormat,
    "preference": PreferenceFormat,
    "openai_preference": OpenAIPreferenceFormat,
    "classification": _PromptAnswerFormat,
    "text": _TextFormat,
}


def _parse_integer(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value.strip(), re.ASCII):
        return int(value)
    return None
