"""What the dataset formats have in common: their columns, the system message, pairs compared."""

from typing import TYPE_CHECKING, Any

from lathe.data.messages import Message
from lathe.data.row_checks import RowFault, TextValidator
from lathe.data.thoughts import read_content
from lathe.models.message_form import THOUGHT

if TYPE_CHECKING:
    from lathe.config.presets import SingleDataset

# The columns that a format is detected by, and reads unless the preset names others.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "preference": ("chosen", "rejected"),
    "openai_preference": ("input", "preferred_output", "non_preferred_output"),
    "classification": ("text", "label"),
}
TEXT = "text"  # format and column of raw texts, which nothing but a single column of this name tells

SYSTEM = "system"  # optional, in every format; a list of messages may begin with its own system message
REJECTED = "rejected"  # optional beside a list of messages: a worse alternative to the last of them
TOOLS = ("tools", "functions")  # optional, in every format: definitions of tools
PARALLEL = "parallel_tool_calls"  # optional: false where a turn has one call at most
HISTORY = "history"  # optional beside a prompt and an answer: earlier turns, as LLaMA-Factory has them
WANTED = "label"  # optional beside an answer, true or false, as TRL's unpaired preferences have it
# The same by other names: LLaMA-Factory's, and those of people's own judgements.
UNWANTED_FLAGS = ("kto_tag", "desirable", "is_desirable", "accepted", "is_accepted", "is_correct", "thumbs_up")
# How they say it in words.
WANTED_WORDS = ("desirable", "wanted", "accepted", "chosen", "preferred", "thumbs_up")
UNWANTED_WORDS = ("undesirable", "unwanted", "rejected", "dispreferred", "thumbs_down")


class Format:
    """What all formats have: `optional` are the columns that are read beside the required ones."""

    optional: tuple[str | None, ...] = ()

    def get_request(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a record that holds the definitions of tools."""
        return record


def check_pair(chosen: list[Message], chosen_field: str, rejected: list[Message], field: str) -> None:
    """Raise RowFault unless two conversations differ in the last message and nowhere else."""
    if chosen[:-1] != rejected[:-1]:
        problem = f"answers another conversation than {chosen_field}; expected the same up to the last message"
        raise RowFault("different_prompts", field, problem)
    if _get_compared_parts(chosen) == _get_compared_parts(rejected):
        raise RowFault("same_answers", field, f"is equal to {chosen_field}; expected another answer")


def _get_compared_parts(messages: list[Message]) -> tuple[str, Any, Any]:
    """Return what is compared of the last message: its text without surrounding white space, calls and thought."""
    return messages[-1]["content"].strip(), messages[-1].get("tool_calls"), messages[-1].get(THOUGHT)


def add_system_message(
    check_text: TextValidator, column: str | None, record: dict[str, Any], messages: list[Message]
) -> list[Message]:
    """Return the messages with the system column's text before them; raises RowFault if there are two of them."""
    given = record.get(column) if column else None
    if column is None or given is None:
        return messages
    content, _ = read_content(check_text, given, column)
    if not content.strip():
        return messages
    if messages[0]["role"] == "system":
        raise RowFault(
            "two_system_messages",
            column,
            "is given, but the messages begin with a system message too; expected one of them",
        )
    return [{"role": "system", "content": content}, *messages]


def choose_system_column(preset: "SingleDataset") -> str | None:
    """Return the column of system messages; None if the preset names columns, as no others are read then."""
    return None if names_columns(preset) else SYSTEM


def names_columns(preset: "SingleDataset") -> bool:
    """Return whether the preset names the columns of prompt or answer."""
    return bool(preset.prompt or preset.completion or preset.prompt_template)


def select_present(names: list[str], **columns: str | None) -> dict[str, str]:
    """Return the optional columns that the first record has."""
    return {key: column for key, column in columns.items() if column in names and column}
