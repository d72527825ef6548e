"""Heavy work of a page in a process of its own: an answer of a GGUF, or a trial call of the judge.

`python -m lathe.studio.helper answer` reads a request as JSON from standard input and writes the result as JSON. The
model is loaded by the code that scores and chats, and its memory is free again afterwards.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lathe.common import entry_point, paths
from lathe.common.errors import InputError


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the greedy answer of a GGUF to messages, as `lathe chat` gives it, in parts and with its speed.

    Raises InputError for a file that is no model, tools that its template does not write, or a prompt that is too long.
    """
    from lathe.commands.general import choose_generation_sizes
    from lathe.inference.generate import Generator

    sizes, threads = choose_generation_sizes(), os.cpu_count() or 1
    with Generator(Path(request["gguf"]), n_parallel=1, n_ctx=sizes.n_ctx, threads=threads) as generator:
        template = generator.chat_template
        tools = request.get("tools")
        if tools and not template.writes_tools:
            raise InputError(
                f"{request['gguf']}: its chat template writes no tools; leave them out", code="template-ignores-tools"
            )
        prompt = template.render(request["messages"], add_generation_prompt=True, tools=tools)
        begun = time.monotonic()
        first = None
        pieces = []
        for piece in generator.stream(prompt, max_new_tokens=sizes.max_new_tokens):
            first = first or time.monotonic()
            pieces.append(piece)
        seconds = time.monotonic() - (first or begun)
        text = "".join(pieces)
        tokens = len(generator.model.tokenize(text)) if hasattr(generator.model, "tokenize") else len(pieces)
        return {
            **split_parts(template, prompt, text, tools or []),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds if seconds > 0 and len(pieces) > 1 else None,
            "seconds_to_first_token": (first or time.monotonic()) - begun,
            "prompt": prompt,
            "prompt_tokens": len(generator.tokenize(prompt)),
            "max_new_tokens": sizes.max_new_tokens,
            "n_ctx": sizes.n_ctx,
            "threads": threads,
        }


def split_parts(template: Any, prompt: str, text: str, tools: Sequence[Any]) -> dict[str, Any]:
    """Return an answer as it is written, its thought, what it says after that, and its calls of `tools`.

    A thought that does not end is all of the answer.
    """
    from lathe.models.answer_syntax import find_call_syntax, find_thought_syntax

    thoughts = find_thought_syntax(template)
    opening, closing = thoughts.opening.strip(), thoughts.closing.strip()
    content = thoughts.strip(text, prompt=prompt) if closing else text
    thought = ""
    if content != text:
        thought = (text.rpartition(closing)[0] if closing in text else text).strip().removeprefix(opening).strip()
    syntax = find_call_syntax(template) if tools else None
    read = syntax.read(content, list(tools)) if syntax else None
    return {
        "text": text,
        "thought": thought,
        "content": read.content if read else content,
        "calls": read.calls if read else [],
    }


def ask_judge(request: dict[str, Any]) -> dict[str, Any]:
    """Return the verdict of the judge on one made-up answer, with tokens and cost; one request is sent.

    Raises InputError where the judge cannot be asked, or does not answer with a verdict.
    """
    from lathe.common.http_session import HttpStatusError, MalformedError, UnavailableError
    from lathe.config.overrides import apply_overrides
    from lathe.evaluation.judge.failures import RetryAtOnceError, RowRefusedError, UnknownModelError
    from lathe.evaluation.judge.judged_rows import read_rubric
    from lathe.evaluation.judge.prompt import compose_prompt
    from lathe.evaluation.judge.providers.provider import connect_provider
    from lathe.evaluation.judge.verdict import parse_verdict

    settings = apply_overrides(request["overrides"]).params.judge
    rubric = read_rubric(paths.ROOT / settings.rubric)
    prompt = compose_prompt(rubric, prompt=request["prompt"], reference=request["reference"], answer=request["answer"])

    async def ask() -> Any:
        provider = connect_provider(settings, [prompt], os.environ, paths.ROOT)
        try:
            return await provider.request_answer(prompt)
        finally:
            await provider.close()

    begun = time.monotonic()
    problems = (
        HttpStatusError,
        UnavailableError,
        MalformedError,
        RowRefusedError,
        UnknownModelError,
        RetryAtOnceError,
    )
    try:
        given = asyncio.run(ask())
        verdict = parse_verdict(given)
    except problems as error:
        raise InputError(
            f"judge {settings.provider}, {settings.model}: {error}; see `lathe doctor`", code="judge-failed"
        ) from None
    counts = (given.input_tokens or 0, given.output_tokens or 0)
    cost = (counts[0] * settings.input_price + counts[1] * settings.output_price) / 1e6
    return {
        "score": verdict.score,
        "reason": verdict.reason,
        "model": given.model,
        "input_tokens": given.input_tokens,
        "output_tokens": given.output_tokens,
        "cost": cost,
        "seconds": time.monotonic() - begun,
    }


KINDS = {"answer": answer, "judge": ask_judge}


def _main() -> None:
    result = KINDS[sys.argv[1]](json.load(sys.stdin))
    sys.__stdout__.write(json.dumps(result)) if sys.__stdout__ else None


if __name__ == "__main__":
    entry_point.guard(_main)
