"""Chat with a GGUF in the terminal, answers streamed token by token."""

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

from lathe.common.errors import InputError
from lathe.common.text import make_one_line, make_printable
from lathe.data.row_checks import RowFault, TextValidator
from lathe.data.tools import Tool, parse_tools
from lathe.inference.generate import Generator
from lathe.models.chat_template import Conversation, Tools

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"

History = list[dict[str, str]]
AnswerTo = Callable[[Conversation], Iterator[str]]


def chat(
    gguf: Path,
    *,
    prompt: str | None,
    max_new_tokens: int,
    n_ctx: int,
    threads: int,
    system: str | None = None,
    tools: Tools | None = None,
    source: TextIO | None = None,
    out: TextIO | None = None,
) -> None:
    """Chat with the model in `gguf`: answer `prompt` once, or read requests until the input ends.

    Requests come from `source` (standard input by default), answers go to `out` (standard output by default).
    `system` is a system message put before the conversation; without one the template's own default is used. `tools`
    are definitions of functions, which the template writes; calls of them are printed as the model writes them.
    Decoding is greedy, by the code that is used for scoring, so that an answer here is the answer that was scored.
    Raises InputError if the file is no usable model or a single prompt does not fit into `n_ctx` tokens.
    """
    out = out or sys.stdout
    beginning: History = [{"role": "system", "content": system}] if system else []
    with Generator(gguf, n_parallel=1, n_ctx=n_ctx, threads=threads) as generator:
        if tools and not generator.chat_template.writes_tools:
            raise InputError(
                f"{gguf}: its chat template writes no tools; leave --tools out", code="template-ignores-tools"
            )
        answer = partial(_stream_answer, generator, max_new_tokens=max_new_tokens, tools=tools)
        if prompt is not None:
            _print_answer(answer([*beginning, _user_message(prompt)]), out)
        else:
            _converse(generator.model.path.name, answer, beginning, source or sys.stdin, out)


def read_tools(file: Path) -> list[Tool]:
    """Read the definitions of functions in a JSON file. Raises InputError where there are none."""
    try:
        tools = parse_tools(TextValidator(re.compile("(?!)")), file.read_text(encoding="utf-8"), "tools")
    except FileNotFoundError:
        raise InputError(
            f"--tools {file}: no such file; give a JSON file with a list of functions", code="missing-file"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"--tools {file}: byte {error.start} is not UTF-8; save the file as UTF-8", code="not-utf-8"
        ) from None
    except RowFault as error:
        raise InputError(f"--tools {file}: {error.fault}", code="invalid-tools") from None
    if not tools:
        raise InputError(
            f"--tools {file}: holds no function; give a list of {{name, parameters}}", code="invalid-tools"
        )
    return tools


def _converse(name: str, answer_to: AnswerTo, beginning: History, source: TextIO, out: TextIO) -> None:
    interactive = source.isatty()
    if interactive:
        out.write(f"{make_one_line(name)}: {HELP}\n")
    history = list(beginning)
    while (request := _read_request(source, out, interactive=interactive)) not in (None, "/exit"):
        if request == "/reset":
            history = list(beginning)
        elif request:
            history.append(_user_message(request))
            try:
                answer = _print_answer(answer_to(history), out)
            except InputError as error:
                history.pop()
                out.write(make_printable(f"{error}; or /reset\n"))
            else:
                history.append({"role": "assistant", "content": answer})


def _read_request(source: TextIO, out: TextIO, *, interactive: bool) -> str | None:
    """Read the next request; return an empty one after Ctrl-C, None at the end of the input."""
    if not interactive:
        line = source.readline()
        return line.strip() if line else None
    import readline  # noqa: F401 - line editing and history in input()

    try:
        return input("> ").strip()
    except KeyboardInterrupt:
        out.write("\n")
        return ""
    except EOFError:
        out.write("\n")
        return None


def _stream_answer(
    generator: Generator, messages: Conversation, *, max_new_tokens: int, tools: Tools | None
) -> Iterator[str]:
    prompt = generator.chat_template.render(messages, add_generation_prompt=True, tools=tools)
    return generator.stream(prompt, max_new_tokens=max_new_tokens)


def _print_answer(pieces: Iterator[str], out: TextIO) -> str:
    """Write the pieces as they come, until the end or Ctrl-C; return the text that was written."""
    written: list[str] = []
    try:
        for piece in pieces:
            written.append(piece)
            out.write(make_printable(piece))
            out.flush()
    except KeyboardInterrupt:
        out.write(" …")
    out.write("\n")
    out.flush()
    return "".join(written)


def _user_message(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}
