"""Formats of preference pairs: a better and a worse answer to one prompt."""

from typing import TYPE_CHECKING, Any

from lathe.data.format_columns import (
    FORMATS,
    PARALLEL,
    TOOLS,
    Format,
    add_system_message,
    check_pair,
    choose_system_column,
    select_present,
)
from lathe.data.json_values import describe_value
from lathe.data.messages import (
    Message,
    check_order,
    find_messages,
    parse_messages,
    parse_transcript,
    parse_turns,
    require_learnt,
)
from lathe.data.prompt_columns import PromptColumns
from lathe.data.row_checks import RowFault, TextValidator, note_unused

if TYPE_CHECKING:
    from lathe.config.presets import SingleDataset


CONVERSATIONS = FORMATS["sharegpt"][0]  # the prompt of LLaMA-Factory's pairs


class PreferenceFormat(Format):
    r"""A preference pair: a better and a worse answer to one prompt; `chosen` is the one that is trained on.

    Both are texts, or both are lists of messages. A list that begins with an assistant message continues the prompt;
    any other list is the whole conversation. Texts without a prompt are transcripts that begin with "\n\nHuman:".
    """

    def __init__(self, check_text: TextValidator, preset: "SingleDataset", form: str, names: list[str]) -> None:
        self.check_text, self.system = check_text, choose_system_column(preset)
        self.prompt_columns = (
            PromptColumns(check_text, preset, form, FORMATS[form][0], names) if preset.prompt_template else None
        )
        known = CONVERSATIONS if CONVERSATIONS in names and "prompt" not in names else "prompt"
        self.prompt = self.prompt_columns.field if self.prompt_columns else preset.prompt or known
        self.chosen = preset.completion or FORMATS[form][0]
        self.rejected = preset.rejected or FORMATS[form][1]
        named = (preset.prompt,) if preset.prompt else ()
        self.required = (*(self.prompt_columns.required if self.prompt_columns else named), self.chosen, self.rejected)
        self.optional = (self.prompt, self.system)
        self.description: dict[str, Any] = {
            **(self.prompt_columns.description if self.prompt_columns else select_present(names, prompt=self.prompt)),
            "completion": self.chosen,
            "rejected": self.rejected,
            **select_present(names, system=self.system),
        }

    def convert(self, record: dict[str, Any]) -> list[Message]:
        """Return the prompt with the better answer; raises RowFault."""
        chosen, rejected = self._parse_side(record, self.chosen), self._parse_side(record, self.rejected)
        check_pair(chosen, self.chosen, rejected, self.rejected)
        return add_system_message(self.check_text, self.system, record, chosen)

    def get_extra_fields(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the worse answer as `rejected`."""
        return {"rejected": self._parse_side(record, self.rejected)[-1:]}

    def _parse_side(self, record: dict[str, Any], column: str) -> list[Message]:
        value, chosen = (_find_turns(record[name]) for name in (column, self.chosen))
        if isinstance(chosen, list) != isinstance(value, list):
            raise RowFault(
                "not_alike",
                column,
                f"is {describe_value(value)} but {self.chosen} is {describe_value(chosen)}; expected both alike",
            )
        prompt = self._parse_prompt(record)
        if isinstance(value, list):
            messages = parse_turns(self.check_text, value, column)
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
        require_learnt(messages, column)
        return messages

    def _parse_prompt(self, record: dict[str, Any]) -> list[Message]:
        field = self.prompt
        value: Any = self.prompt_columns.read(record) if self.prompt_columns else record.get(field)
        if value is None and field not in self.required:
            return []
        if turns := value if isinstance(value, list) else find_messages(value):
            return parse_turns(self.check_text, turns, field)
        prompt = self.check_text(value, field)
        if not prompt.strip():
            raise RowFault("empty_prompt", field, "is empty; expected text")
        return [{"role": "user", "content": prompt}]


class OpenAIPreferenceFormat(Format):
    """OpenAI's preference pairs: the request in `input`, a better and a worse answer to it as lists of messages."""

    def __init__(self, check_text: TextValidator, preset: "SingleDataset", form: str, names: list[str]) -> None:
        self.check_text = check_text
        self.required = FORMATS[form]
        self.request, self.chosen, self.rejected = FORMATS[form]
        self.description: dict[str, Any] = {
            "prompt": self.request,
            "completion": self.chosen,
            "rejected": self.rejected,
        }

    def get_request(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a record that holds messages and tools."""
        request: dict[str, Any] = record[self.request]
        return request

    def convert(self, record: dict[str, Any]) -> list[Message]:
        """Return the prompt with the better answer; raises RowFault."""
        request = record[self.request]
        if not isinstance(request, dict) or "messages" not in request:
            raise RowFault(
                "not_an_object", self.request, f"is {describe_value(request)}; expected an object with messages"
            )
        note_unused(self.check_text, request, ("messages", *TOOLS, PARALLEL), self.request)
        chosen, rejected = (self._parse_side(record, column) for column in (self.chosen, self.rejected))
        check_pair(chosen, self.chosen, rejected, self.rejected)
        return chosen

    def get_extra_fields(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the worse answer as `rejected`."""
        return {"rejected": self._parse_side(record, self.rejected)[-1:]}

    def _parse_side(self, record: dict[str, Any], column: str) -> list[Message]:
        prompt = parse_messages(self.check_text, record[self.request]["messages"], f"{self.request}.messages")
        messages = [*prompt, *parse_messages(self.check_text, record[column], column)]
        check_order(messages, column, start=-len(prompt))
        require_learnt(messages, column)
        return messages


def _find_turns(value: Any) -> Any:
    """Return a list of messages, one of them alone or as JSON text too; another value as it is."""
    if isinstance(value, dict) and value.keys() & {"role", "from"}:
        return [value]
    return find_messages(value) or value


def _contains_prompt(messages: list[Message], prompt: list[Message]) -> bool:
    """Return whether the conversation begins with the prompt, or has its text as one of the user's messages."""
    if len(prompt) == 1:
        return any(
            message["role"] == "user" and message["content"].strip() == prompt[0]["content"].strip()
            for message in messages
        )
    return messages[: len(prompt)] == prompt
