"""A conversation with models, turn by turn: held by the page, answered by each GGUF, kept as a row of a test split.

The page sends all turns with each prompt, so that nothing of it is kept here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.config.load import load
from lathe.data.messages import parse_conversation
from lathe.data.row_checks import RowFault, TextValidator
from lathe.data.tools import Tool, load_calls, parse_tools
from lathe.models.message_form import THOUGHT, make_call

LONGEST_PROMPT = 20_000  # characters
MOST_TURNS = 100
TEST_ROWS = paths.DATA_LOCAL / "test-rows.jsonl"

_ANY_TEXT = TextValidator(re.compile("(?!)"))  # as in a chat: what is sent is rendered

ChatRole = Literal["user", "tool"]


class ChatAnswer(BaseModel):
    """What a model answered: `text` as it wrote it, and its parts; `calls` are {name, arguments}."""

    model_config = ConfigDict(extra="forbid")

    text: str
    thought: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = []
    tokens: int = 0
    tokens_per_second: float | None = None
    seconds_to_first_token: float = 0.0


class ChatTurn(BaseModel):
    """What was said to the models, by the user or by a tool, and the answer of each by its file."""

    model_config = ConfigDict(extra="forbid")

    role: ChatRole
    text: Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT)]
    answers: dict[str, ChatAnswer] = {}


_TURNS = TypeAdapter(Annotated[list[ChatTurn], Field(max_length=MOST_TURNS)])


def read_turns(text: str) -> list[ChatTurn]:
    """Return the turns that a page sent as JSON. Raises InputError where they are none."""
    try:
        return _TURNS.validate_json(text or "[]")
    except ValidationError:
        raise InputError(
            f"the conversation cannot be read, or has more than {MOST_TURNS} turns; begin a new one",
            code="invalid-conversation",
        ) from None


def write_turns(turns: Sequence[ChatTurn]) -> str:
    """Return the turns as the page holds them."""
    return _TURNS.dump_json(list(turns)).decode()


def read_functions(text: str) -> list[Tool]:
    """Return the definitions of functions in a JSON text; none for an empty one. Raises InputError."""
    try:
        return parse_tools(_ANY_TEXT, text.strip(), "tools")
    except RowFault as error:
        raise InputError(str(error.fault), code="invalid-tools") from None


def begin_turn(text: str, role: str) -> ChatTurn:
    """Return a turn without answers. Raises InputError for a text that is empty or too long."""
    text = text.replace("\r\n", "\n")
    if not text.strip() or len(text) > LONGEST_PROMPT:
        raise InputError(f"the prompt has {len(text)} characters; write from 1 to {LONGEST_PROMPT:,}", code="no-prompt")
    if role not in ("user", "tool"):
        raise InputError(f"{role[:20]!r}: speaks nowhere; must be user or tool", code="no-such-role")
    return ChatTurn(role=role, text=text)


def build_messages(turns: Sequence[ChatTurn], gguf: str, system: str) -> list[dict[str, Any]]:
    """Return the messages of a conversation with one model, up to the last turn, which it has yet to answer.

    A turn that the model did not answer is none of its conversation. What a tool says answers the calls of the answer
    before it, a line for each where there are several. Raises InputError where there are none.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    number, calls = 0, list[dict[str, Any]]()
    for turn in [*(turn for turn in turns[:-1] if gguf in turn.answers), *turns[-1:]]:
        messages += _write_prompt(turn, calls)
        if (answer := turn.answers.get(gguf)) is None:
            break
        calls = [
            make_call(call["name"], call["arguments"], number + place) for place, call in enumerate(answer.calls, 1)
        ]
        number += len(calls)
        messages.append(_write_answer(answer, calls))
    return messages


def called_tools(turns: Sequence[ChatTurn], gguf: str) -> bool:
    """Tell whether the last answer of a model calls tools."""
    answered = [turn.answers[gguf] for turn in turns if gguf in turn.answers]
    return bool(answered and answered[-1].calls)


def _write_prompt(turn: ChatTurn, calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if turn.role == "user":
        return [{"role": "user", "content": turn.text}]
    texts = [turn.text] if len(calls) == 1 else [line for line in turn.text.split("\n") if line.strip()]
    if not calls or len(texts) != len(calls):
        raise InputError(
            f"a tool answers with {len(texts)} lines, and the answer before it has {len(calls)} calls; "
            "write a line for each",
            code="other-calls",
        )
    return [
        {"role": "tool", "name": call["function"]["name"], "tool_call_id": call["id"], "content": text}
        for call, text in zip(calls, texts, strict=True)
    ]


def _write_answer(answer: ChatAnswer, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not calls:  # as `lathe chat` keeps it
        return {"role": "assistant", "content": answer.text}
    thought = {THOUGHT: answer.thought} if answer.thought else {}
    return {"role": "assistant", "content": answer.content, **thought, "tool_calls": list(calls)}


def build_test_row(
    turns: Sequence[ChatTurn], gguf: str, system: str, tools: Sequence[Tool], reference: str, *, is_calls: bool
) -> dict[str, Any]:
    """Return the last prompt with its reference as a record of the format `messages`; earlier answers are context.

    With `is_calls` the reference is JSON: calls, each {name, arguments}. Raises InputError where the pipeline would
    drop the record.
    """
    if not turns:
        raise InputError("there is no prompt to save; ask one first", code="no-prompt")
    last = turns[-1].model_copy(update={"answers": {}})
    messages = build_messages([*turns[:-1], last], gguf, system)
    messages = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in messages]
    try:
        answer: dict[str, Any] = {"role": "assistant", "content": reference.replace("\r\n", "\n")}
        if is_calls:
            answer = {"role": "assistant", "content": "", "tool_calls": load_calls(reference, "reference")}
        row = {"messages": [*messages, answer], **({"tools": list(tools)} if tools else {})}
        parse_conversation(_ANY_TEXT, row["messages"], "messages")
    except RowFault as error:
        raise InputError(f"the row: {error.fault}", code="invalid-row") from None
    return row


def show_test_rows() -> str:
    """Return the file that rows are kept in, by its path from the top."""
    return TEST_ROWS.relative_to(paths.ROOT).as_posix()


def save_test_row(row: Mapping[str, Any]) -> int:
    """Append a record to data/local/test-rows.jsonl; return its line. Raises InputError if it is there already."""
    line = json.dumps(row, ensure_ascii=False)
    lines = TEST_ROWS.read_text(encoding="utf-8").splitlines() if TEST_ROWS.is_file() else []
    if line in lines:
        raise InputError(
            f"{show_test_rows()}:{lines.index(line) + 1}: is this very row; change the reference",
            code="row-exists",
        )
    # A new file: the old one may be a link into DVC's cache.
    with paths.replace_file(TEST_ROWS) as partial:
        partial.write_text("".join(f"{each}\n" for each in [*lines, line]), encoding="utf-8")
    return len(lines) + 1


def write_mixture() -> str:
    """Return the lines of presets.yaml that score these rows beside the test rows of the dataset in params.yaml."""
    config = load()
    name = config.params.dataset
    entry = config.dataset.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    added = {"split": "test", "source": "local", "path": show_test_rows(), "format": "messages"}
    parts = entry["datasets"] if entry.get("source") == "mixture" else {name: entry}
    mixture = {f"{name}-and-rows": {"source": "mixture", "datasets": {**parts, TEST_ROWS.stem: added}}}
    return yaml.safe_dump({"datasets": mixture}, sort_keys=False, allow_unicode=True, width=1_000_000)
