"""A file of requests, answered many at a time with the training template."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lathe.common.errors import InputError
from lathe.common.jsonl import line
from lathe.data.messages import RowFault, TextValidator, check_order, parse_messages
from lathe.data.read_files import describe_value
from lathe.inference.generate import Completion, Generator
from lathe.models.chat_template import Message, TemplateError, answer_lead, render

ANSWER = ("completion", "finish_reason")
_ANY_TEXT = TextValidator(re.compile("(?!)"))  # as in a chat: what is typed is rendered


def infer(generator: Generator, file: Path, out: BinaryIO, *, max_new_tokens: int) -> None:
    """Write every line of the JSON Lines `file` to `out` with its `completion` and `finish_reason`, in their order.

    A line is an object with `prompt`, a text, or `messages`, a list of {role, content} that ends with a request; its
    other keys are kept. Lines are read as they are needed and written as soon as they and all before them are answered.
    Raises InputError that names file and line, before anything is written, where one cannot be answered.
    """
    ask = _Asker(file, generator)
    lead = answer_lead(generator.template, bos_token=generator.bos_token, eos_token=generator.eos_token)
    finished = generator.completions(ask.prompts, max_new_tokens=max_new_tokens)  # which first looks at every line
    count = 0
    for (_, row), completion in zip(ask.rows(), _in_order(finished), strict=True):
        count += 1
        answer = {"completion": completion.text.removeprefix(lead), "finish_reason": completion.finish_reason}
        out.write(line({**row, **answer}))
        out.flush()
    if not count:
        raise InputError(f"{file}: holds no line; give a JSON object with prompt or messages a line")


def _in_order(finished: Iterable[tuple[int, Completion]]) -> Iterator[Completion]:
    """Yield the answers by their numbers; held are those that finished before a slower one."""
    held: dict[int, Completion] = {}
    due = 0
    for number, completion in finished:
        held[number] = completion
        while due in held:
            yield held.pop(due)
            due += 1


@dataclass(frozen=True)
class _Asker:
    file: Path
    generator: Generator

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The lines that are not blank, and where each stands."""
        with self.file.open("rb") as lines:
            for number, written in enumerate(lines, start=1):
                at = f"{self.file}:{number}"
                if not written.strip():
                    continue
                try:
                    row = json.loads(written.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError):
                    raise InputError(f"{at}: not JSON in UTF-8; write one JSON object a line") from None
                if not isinstance(row, dict):
                    raise InputError(f"{at}: is {describe_value(row)}; write an object with prompt or messages")
                yield at, row

    def prompts(self) -> Iterator[str]:
        """What the model reads of each line."""
        template, n_ctx = self.generator.template, self.generator.n_ctx
        bos, end = self.generator.bos_token, self.generator.eos_token
        for at, row in self.rows():
            try:
                prompt = render(template, _messages(row), bos_token=bos, eos_token=end, add_generation_prompt=True)
            except RowFault as fault:
                raise InputError(f"{at}: {fault.fault}") from None
            except TemplateError as error:
                raise InputError(f"{at}: {error}") from None
            if (length := len(self.generator.tokenize(prompt))) >= n_ctx:
                raise InputError(
                    f"{at}: {length} tokens leave no room for an answer in a context of {n_ctx}; shorten the request "
                    f"or raise generate.n_ctx"
                )
            yield prompt


def _messages(row: dict[str, Any]) -> list[Message]:
    given = [key for key in ("prompt", "messages") if key in row]
    if len(given) != 1:
        has = "both prompt and messages" if given else "neither prompt nor messages"
        raise _fault(None, f"it has {has}; give one of them")
    if taken := [key for key in ANSWER if key in row]:
        raise _fault(taken[0], "is where the answer goes; rename the key")
    if given == ["prompt"]:
        prompt = _ANY_TEXT(row["prompt"], "prompt")
        if not prompt.strip():
            raise _fault("prompt", "is empty; expected text")
        return [{"role": "user", "content": prompt}]
    messages = parse_messages(_ANY_TEXT, row["messages"], "messages")
    if messages and messages[-1]["role"] not in ("user", "tool"):
        raise _fault("messages", f"ends with {messages[-1]['role']}; expected a user or tool message last")
    check_order([*messages, {"role": "assistant", "content": "an answer"}] if messages else [], "messages")
    return list(messages)


def _fault(field: str | None, problem: str) -> RowFault:
    return RowFault("not_a_request", field, problem)
