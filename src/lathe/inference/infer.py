"""Answers to a file of requests, many at a time, with the template of training."""

import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast

from lathe.common.errors import InputError
from lathe.common.jsonl import line
from lathe.data.json_values import describe_value
from lathe.data.messages import check_order, parse_messages
from lathe.data.row_checks import RowFault, TextValidator, is_empty
from lathe.data.tools import parse_tools
from lathe.inference.generate import Completion, Generator
from lathe.inference.row_file import RowFile
from lathe.models.answer_split import find_answer_prefix
from lathe.models.chat_template import Message
from lathe.models.template_error import TemplateError

STANDARD_INPUT = Path("-")

ANSWER = ("completion", "finish_reason")
_ANY_TEXT = TextValidator(re.compile("(?!)"))  # as in a chat: what is typed is rendered


def infer(generator: Generator, file: Path, out: BinaryIO, *, max_new_tokens: int) -> None:
    """Write every line of the JSON Lines `file` to `out` with its `completion` and `finish_reason`, in their order.

    The file `-` is standard input. A line is an object with `prompt`, a text, or `messages`, a list of {role, content}
    that ends with a request; `tools` are definitions of functions; other keys are kept. All lines are rendered first,
    into a temporary file; each is written as soon as it and all before it are answered. Raises InputError that names
    file and line, before anything is written, if one cannot be answered.
    """
    prefix = find_answer_prefix(generator.chat_template)
    with tempfile.TemporaryFile() as temporary:
        requests = RowFile.write(_render_requests(file, generator), cast(BinaryIO, temporary))
        completions = generator.iterate_completions(
            lambda: (prompt for prompt, _ in requests), max_new_tokens=max_new_tokens
        )
        count = 0
        for (_, row), completion in zip(requests, _sort_completions(completions), strict=True):
            count += 1
            answer = {"completion": completion.text.removeprefix(prefix), "finish_reason": completion.finish_reason}
            out.write(line({**row, **answer}))
            out.flush()
    if not count:
        raise InputError(
            f"{file}: holds no line; give a JSON object with prompt or messages a line", code="no-requests"
        )


def _sort_completions(completions: Iterable[tuple[int, Completion]]) -> Iterator[Completion]:
    """Yield the answers by their numbers; memory holds those that finished before a slower one."""
    waiting: dict[int, Completion] = {}
    following = 0
    for number, completion in completions:
        waiting[number] = completion
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _render_requests(file: Path, generator: Generator) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the prompt and the row of each line."""
    template, n_ctx = generator.chat_template, generator.n_ctx
    for at, row in _read_lines(file):
        try:
            tools = _read_tools(row)
            if tools and not template.writes_tools:
                raise _make_fault("tools", "are given, and the model's chat template writes none; leave them out")
            prompt = template.render(_read_messages(row), add_generation_prompt=True, tools=tools)
        except RowFault as fault:
            raise InputError(f"{at}: {fault.fault}", code="not-a-request") from None
        except TemplateError as error:
            raise InputError(f"{at}: {error}", code=error.code) from None
        if (length := len(generator.tokenize(prompt))) >= n_ctx:
            raise InputError(
                f"{at}: {length} tokens leave no room for an answer in a context of {n_ctx}; shorten the request "
                f"or raise generate.n_ctx",
                code="prompt-too-long",
            )
        yield prompt, row


def _read_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the object of each line that is not blank."""
    with nullcontext(sys.stdin.buffer) if file == STANDARD_INPUT else file.open("rb") as lines:
        for number, written in enumerate(lines, start=1):
            at = f"{file}:{number}"
            if not written.strip():
                continue
            try:
                row = json.loads(written.decode("utf-8-sig" if number == 1 else "utf-8"))
                line(row)  # as it will be written: half a surrogate pair, as an escape, has no form in UTF-8
            except UnicodeEncodeError:
                raise InputError(
                    f"{at}: holds half of a surrogate pair, which is no character; write the character itself",
                    code="half-a-character",
                ) from None
            except (ValueError, RecursionError):
                raise InputError(f"{at}: not JSON in UTF-8; write one JSON object a line", code="not-json") from None
            if not isinstance(row, dict):
                raise InputError(
                    f"{at}: is {describe_value(row)}; write an object with prompt or messages", code="not-an-object"
                )
            yield at, row


def _read_messages(row: dict[str, Any]) -> list[Message]:
    given = [key for key in ("prompt", "messages") if key in row]
    if len(given) != 1:
        has = "both prompt and messages" if given else "neither prompt nor messages"
        raise _make_fault(None, f"it has {has}; give one of them")
    if taken := [key for key in ANSWER if key in row]:
        raise _make_fault(taken[0], "is where the answer goes; rename the key")
    if given == ["prompt"]:
        prompt = _ANY_TEXT(row["prompt"], "prompt")
        if not prompt.strip():
            raise _make_fault("prompt", "is empty; expected text")
        return [{"role": "user", "content": prompt}]
    messages = parse_messages(_ANY_TEXT, row["messages"], "messages")
    if messages and messages[-1]["role"] not in ("user", "tool"):
        raise _make_fault("messages", f"ends with {messages[-1]['role']}; expected a user or tool message last")
    check_order([*messages, {"role": "assistant", "content": "an answer"}] if messages else [], "messages")
    return list(messages)


def _read_tools(row: dict[str, Any]) -> list[dict[str, Any]]:
    given = [key for key in ("tools", "functions") if not is_empty(row.get(key))]
    if len(given) > 1:
        raise _make_fault("functions", "is given beside tools; give one of them")
    return parse_tools(_ANY_TEXT, row[given[0]], given[0]) if given else []


def _make_fault(field: str | None, problem: str) -> RowFault:
    return RowFault("not_a_request", field, problem)
