"""From a raw row's columns to a validated conversation, by the format of the dataset."""

import re
import string
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from lathe.common.errors import InputError
from lathe.data.messages import Message, RowFault, TextRule, check_order, conversation, listed, pair, turns
from lathe.data.read_files import kind

if TYPE_CHECKING:
    from lathe.config.presets import DatasetPreset

# The columns by which each format is known, and is read unless the preset names others.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "preference": ("chosen", "rejected"),
    "classification": ("text", "label"),
}

ALPACA_INPUT = "input"  # a row may lack it, or leave it empty
SYSTEM = "system"  # likewise, in every format that has no list of messages for it
REJECTED = "rejected"  # likewise, beside a list of messages: what stands for the last of them
TOOLS = "tools"

SPEAKER = re.compile(r"\n\n(Human|Assistant):")


class Columns:
    """How the columns of a dataset become messages: as its preset says, or as its column names tell.

    `used` are the columns that every row must have, `description` is what the report says of them, `detected` whether
    the column names alone decided.
    """

    def __init__(
        self, preset: "DatasetPreset", names: Iterable[str], file: str, control_tokens: re.Pattern[str]
    ) -> None:
        """Choose by the preset, else by the first row's column `names`; raises InputError where neither tells.

        No text may hold one of the `control_tokens`: it would end its own turn.
        """
        names = list(names)
        text = TextRule(control_tokens)
        named = _named_format(preset)
        self.detected = not named
        form = named or _detected_format(names, file)
        self.format = _READERS[form](text, preset, form, names)
        self.used = self.format.used
        self.description = {"format": form, **self.format.description}

    def conversation(self, row: dict[str, Any]) -> list[Message]:
        """Return the row's messages; raises RowFault."""
        for column in self.used:
            if column not in row:
                raise RowFault("missing_column", column, f"is missing; the row has {listed(row)}")
        return self.format.conversation(row)

    def extras(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return what a processed row keeps beside its messages, of a row that `conversation` has accepted.

        A pair keeps `rejected`: a list of one message, which stands for the last of `messages`.
        """
        return self.format.extras(row)

    def require(self, names: Iterable[str], file: str) -> None:
        """Raise InputError where a column is in no row of the file."""
        names = list(names)
        for column in self.used:
            if column not in names:
                why = (
                    f"which the format {self.description['format']} needs"
                    if self.detected
                    else "which the dataset's preset names"
                )
                raise InputError(f"{file}: no row has the column {column!r}, {why}; its columns: {listed(names)}")


def _named_format(preset: "DatasetPreset") -> str | None:
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
            "presets.yaml: the dataset names only half of its columns; completion goes with one of prompt, "
            "prompt_template"
        )
    return None


def _detected_format(names: list[str], file: str) -> str:
    fitting = [form for form, columns in FORMATS.items() if set(columns) <= set(names)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InputError(
            f"{file}: its columns {listed(names)} fit the formats {' and '.join(fitting)}; say in the dataset's preset "
            f"which one is meant (format: {fitting[0]})"
        )
    known = "; ".join(" + ".join(columns) for columns in FORMATS.values())
    raise InputError(
        f"{file}: has the columns {listed(names)}; expected those of a format ({known}); name yours in the dataset's "
        "preset (messages, prompt + completion, prompt_template + completion)"
    )


class _Messages:
    """A column that holds the whole conversation."""

    def __init__(self, text: TextRule, preset: "DatasetPreset", form: str, names: list[str]) -> None:
        self.text, self.system, self.sharegpt = text, _system_column(preset), form == "sharegpt"
        self.column = preset.messages or FORMATS[form][0]
        self.used = (self.column,)
        self.description: dict[str, Any] = {
            "messages": self.column,
            **_shown(names, rejected=REJECTED, system=self.system),
        }

    def conversation(self, row: dict[str, Any]) -> list[Message]:
        if row.get(TOOLS) not in (None, "", "[]", [], {}):
            raise RowFault("tools", TOOLS, "is not supported; put the definitions of the tools into a system message")
        messages = conversation(self.text, row[self.column], self.column, sharegpt=self.sharegpt)
        if rejected := self._rejected(row):
            if rejected[0]["role"] == "assistant":
                rejected = [*messages[:-1], *rejected]
            check_order(rejected, REJECTED)
            _check_pair(messages, self.column, rejected, REJECTED)
        return _with_system(self.text, self.system, row, messages)

    def extras(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"rejected": rejected[-1:]} if (rejected := self._rejected(row)) else {}

    def _rejected(self, row: dict[str, Any]) -> list[Message]:
        value = row.get(REJECTED)
        if value is None or self.column == REJECTED:
            return []
        if isinstance(value, str):
            value = [{"role": "assistant", "content": value}]
        return turns(self.text, value, REJECTED, sharegpt=self.sharegpt)


class _Pairs:
    """A request and its answer, each made of columns."""

    def __init__(self, text: TextRule, preset: "DatasetPreset", form: str, names: list[str]) -> None:
        self.text, self.system = text, _system_column(preset)
        self.request = _Request(text, preset, form, names)
        self.answer_column = preset.completion or FORMATS[form][1]
        self.answer: Callable[[Any, str], str] = text
        self.used: tuple[str, ...] = (*self.request.used, self.answer_column)
        self.description: dict[str, Any] = {
            **self.request.description,
            "completion": self.answer_column,
            **_shown(names, system=self.system),
        }
        if form == "classification":
            self.answer = _LabelRule(text, preset.labels)
            if preset.labels:
                self.description["labels"] = preset.labels

    def conversation(self, row: dict[str, Any]) -> list[Message]:
        answer = self.answer(row[self.answer_column], self.answer_column)
        messages = pair(self.request(row), self.request.field, answer, self.answer_column)
        return _with_system(self.text, self.system, row, messages)

    def extras(self, row: dict[str, Any]) -> dict[str, Any]:
        return {}


class _Preference:
    r"""Two answers to one request, of which `chosen` is learnt.

    Both are texts, or both lists of messages. A list that begins with the assistant's message goes on where the prompt
    ends; any other holds the whole conversation. Texts without a prompt are transcripts that begin with "\n\nHuman:".
    """

    def __init__(self, text: TextRule, preset: "DatasetPreset", form: str, names: list[str]) -> None:
        self.text, self.system = text, _system_column(preset)
        self.request = _Request(text, preset, form, names) if preset.prompt_template else None
        self.prompt = self.request.field if self.request else preset.prompt or "prompt"
        self.chosen = preset.completion or FORMATS[form][0]
        self.rejected = preset.rejected or FORMATS[form][1]
        named = (preset.prompt,) if preset.prompt else ()
        self.used = (*(self.request.used if self.request else named), self.chosen, self.rejected)
        self.description: dict[str, Any] = {
            **(self.request.description if self.request else _shown(names, prompt=self.prompt)),
            "completion": self.chosen,
            "rejected": self.rejected,
            **_shown(names, system=self.system),
        }

    def conversation(self, row: dict[str, Any]) -> list[Message]:
        chosen, rejected = self._whole(row, self.chosen), self._whole(row, self.rejected)
        _check_pair(chosen, self.chosen, rejected, self.rejected)
        return _with_system(self.text, self.system, row, chosen)

    def extras(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"rejected": self._whole(row, self.rejected)[-1:]}

    def _whole(self, row: dict[str, Any], column: str) -> list[Message]:
        value = row[column]
        if isinstance(row[self.chosen], list) != isinstance(value, list):
            raise RowFault(
                "not_alike",
                column,
                f"is {kind(value)} but {self.chosen} is {kind(row[self.chosen])}; expected both alike",
            )
        prompt = self._prompt(row)
        if isinstance(value, list):
            messages = turns(self.text, value, column)
            if messages and messages[0]["role"] == "assistant" and prompt:
                messages = [*prompt, *messages]
            elif prompt and not _holds(messages, prompt):
                raise RowFault(
                    "different_prompts", column, f"does not hold the {self.prompt}; expected the conversation it begins"
                )
        elif prompt:
            answer = self.text(value, column)
            if not answer.strip():
                raise RowFault("empty_answer", column, "is empty; expected text")
            messages = [*prompt, {"role": "assistant", "content": answer}]
        else:
            messages = _transcript(self.text(value, column), column)
        check_order(messages, column)
        return messages

    def _prompt(self, row: dict[str, Any]) -> list[Message]:
        field = self.prompt
        value: Any = self.request(row) if self.request else row.get(field)
        if value is None and field not in self.used:
            return []
        if isinstance(value, list):
            return turns(self.text, value, field)
        prompt = self.text(value, field)
        if not prompt.strip():
            raise RowFault("empty_prompt", field, "is empty; expected text")
        return [{"role": "user", "content": prompt}]


class _Request:
    """What is asked: one column, a template of several, or Alpaca's instruction and input."""

    def __init__(self, text: TextRule, preset: "DatasetPreset", form: str, names: list[str]) -> None:
        self.text = text
        self.column = preset.prompt or FORMATS[form][0]
        self.parts = _template_parts(preset.prompt_template) if preset.prompt_template else None
        self.input = ALPACA_INPUT if form == "alpaca" and not preset.prompt_template else None
        self.field = "prompt_template" if self.parts else self.column
        self.used: tuple[str, ...] = (self.column,)
        self.description: dict[str, Any] = {"prompt": self.column}
        if preset.prompt_template and self.parts:
            self.used = tuple(dict.fromkeys(column for _, column in self.parts if column))
            self.description = {"prompt_template": preset.prompt_template}
        elif self.input in names:
            self.description["input"] = self.input

    def __call__(self, row: dict[str, Any]) -> str:
        """Return the request; raises RowFault where a column is no text."""
        if self.parts:
            parts = (literal + (self.text(row[column], column) if column else "") for literal, column in self.parts)
            return "".join(parts).rstrip()  # where the last column is empty, nothing but blank lines stands behind
        request = self.text(row[self.column], self.column)
        more = row.get(self.input) if self.input else None
        if self.input and more is not None and self.text(more, self.input).strip():
            return f"{request}\n\n{more}"
        return request


class _LabelRule:
    """Lets the text of a label pass; a number is a place in the list of names."""

    def __init__(self, text: TextRule, names: list[str] | None) -> None:
        self.text, self.names = text, names

    def __call__(self, value: Any, field: str) -> str:
        """Return the label's text; raises RowFault."""
        number = _whole_number(value)
        if self.names is None:
            if number is not None:
                remedy = "name the labels in the dataset's preset (`labels`), or give it prompt and completion"
                raise RowFault("unnamed_label", field, f"is {kind(value)}; expected the label's text; {remedy}")
            return self.text(value, field).strip()
        if isinstance(value, str) and value.strip() in self.names:
            return value.strip()
        if number is None:
            known = listed(self.names)
            raise RowFault("unknown_label", field, f"is {kind(value)}; expected one of {known}, or its number from 0")
        if not 0 <= number < len(self.names):
            raise RowFault(
                "label_out_of_range",
                field,
                f"is {kind(value)}; expected 0 to {len(self.names) - 1}, a place in the preset's `labels`",
            )
        return self.names[number]


_READERS: dict[str, type[_Messages] | type[_Pairs] | type[_Preference]] = {
    "messages": _Messages,
    "sharegpt": _Messages,
    "alpaca": _Pairs,
    "prompt_completion": _Pairs,
    "question_answer": _Pairs,
    "preference": _Preference,
    "classification": _Pairs,
}


def _check_pair(chosen: list[Message], chosen_field: str, rejected: list[Message], field: str) -> None:
    """Raise RowFault where two conversations do not differ in the last message, and in it alone."""
    if chosen[:-1] != rejected[:-1]:
        problem = f"answers another conversation than {chosen_field}; expected the same up to the last message"
        raise RowFault("different_prompts", field, problem)
    if _answer(chosen) == _answer(rejected):
        raise RowFault("same_answers", field, f"is equal to {chosen_field}; expected another answer")


def _answer(messages: list[Message]) -> tuple[str, Any]:
    """Return what templates write of the last message: its text without the white space around, and its calls."""
    return messages[-1]["content"].strip(), messages[-1].get("tool_calls")


def _whole_number(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value.strip(), re.ASCII):
        return int(value)
    return None


def _with_system(text: TextRule, column: str | None, row: dict[str, Any], messages: list[Message]) -> list[Message]:
    content = row.get(column) if column else None
    if column is None or content is None or not text(content, column).strip():
        return messages
    if messages[0]["role"] == "system":
        raise RowFault(
            "two_system_messages", column, "is given though the messages begin with one; expected one of them"
        )
    return [{"role": "system", "content": content}, *messages]


def _system_column(preset: "DatasetPreset") -> str | None:
    # Where the preset names columns, these are all that is read.
    named = preset.prompt or preset.completion or preset.prompt_template
    return None if named else SYSTEM


def _shown(names: list[str], **columns: str | None) -> dict[str, str]:
    """Return those of the columns that a row need not have and the first one has."""
    return {key: column for key, column in columns.items() if column in names and column}


def _holds(messages: list[Message], prompt: list[Message]) -> bool:
    """Tell whether the conversation holds the prompt: as it stands, or as the text of one of the user's messages."""
    if len(prompt) == 1:
        return any(
            message["role"] == "user" and message["content"].strip() == prompt[0]["content"].strip()
            for message in messages
        )
    return messages[: len(prompt)] == prompt


def _transcript(value: str, field: str) -> list[Message]:
    before, *spoken = SPEAKER.split(value)
    if before.strip() or not spoken:
        raise RowFault(
            "no_prompt",
            field,
            "is a text beside no prompt column; expected one, or a transcript that begins with '\\n\\nHuman:'",
        )
    messages = []
    for speaker, said in zip(spoken[::2], spoken[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if not said.strip():
            raise RowFault(
                "empty_answer" if role == "assistant" else "empty_prompt",
                field,
                f"has an empty turn of {speaker}; expected text",
            )
        messages.append({"role": role, "content": said.strip()})
    return messages


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
