"""Chat template checked as the model is fetched: llama.cpp's own Jinja engine must write what Python's does."""

import logging
from collections.abc import Iterator
from datetime import UTC
from pathlib import Path
from typing import Any

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.gguf.jinja_engine import find_engine, render_with_engine
from lathe.models.chat_template import EXAMPLE_TOOL, FIXED_DATE, ChatTemplate
from lathe.models.message_form import EXAMPLE_CALL
from lathe.models.template_error import TemplateError

logger = logging.getLogger(__name__)

_USER = {"role": "user", "content": "A question: 'é' \"🍎\"?"}
_ANSWER = {"role": "assistant", "content": "An answer."}
_RESULT = {"role": "tool", "content": "A result", "tool_call_id": "call_1", "name": "first_function"}
_CALLING = [{**EXAMPLE_CALL[0]}, {**EXAMPLE_CALL[1]}]

SHOWN_CHARACTERS = 40


def check_template(template: ChatTemplate, *, llama_cpp: Path, shown: str) -> bool:
    """Ask llama.cpp's Jinja engine for what the chat template of a model writes; `shown` names the model.

    Raises InputError where it cannot run the template at all, as then no program of llama.cpp could. What it writes
    otherwise is a warning. Returns False where the engine has not been built, and nothing is asked.
    """
    engine = find_engine(llama_cpp) or find_engine(paths.LLAMA_CPP)
    if engine is None:
        return False
    cases = list(_render_cases(template))
    seconds = int(FIXED_DATE.replace(tzinfo=UTC).timestamp())
    found = render_with_engine(engine, template.text, [variables for _, variables, _ in cases], unix_time=seconds)
    for (case, variables, expected), rendered in zip(cases, found, strict=True):
        if rendered.text is None and not variables["tools"]:
            raise InputError(
                f"{shown}: llama.cpp's Jinja engine cannot run its chat template ({case}): {rendered.error}; correct "
                "the template, or name another one as template in the model's preset",
                code="template-not-run",
            )
        if rendered.text != expected:
            logger.warning("%s: %s", shown, _describe_difference(case, expected, rendered.text, rendered.error))
    return True


def _render_cases(template: ChatTemplate) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield conversations by name, the variables that the template gets, and what Python's engine writes."""
    tools = [EXAMPLE_TOOL] if template.writes_tools else None
    cases: list[tuple[str, list[dict[str, Any]], bool, Any]] = [
        ("a request", [_USER], True, None),
        ("a system message", [{"role": "system", "content": "Be kind."}, _USER], True, None),
        ("an answer", [_USER, _ANSWER], False, None),
        ("several turns", [_USER, _ANSWER, _USER], True, None),
    ]
    if tools:
        cases += [
            ("a request with tools", [_USER], True, tools),
            ("a call of a tool", _CALLING, False, tools),
            ("the result of a tool", [*_CALLING, _RESULT], True, tools),
        ]
    for name, messages, is_prompt, of_case in cases:
        adapted = template.form.adapt(messages)
        variables = template.list_variables(adapted, add_generation_prompt=is_prompt, tools=of_case)
        try:
            expected = template.render(messages, add_generation_prompt=is_prompt, tools=of_case)
        except TemplateError:
            continue
        yield name, variables, expected


def _describe_difference(case: str, expected: str, text: str | None, error: str | None) -> str:
    if text is None:
        return f"llama.cpp's Jinja engine cannot run its chat template for {case}: {error}"
    pairs = zip(expected, text, strict=False)
    start = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(expected), len(text)))
    ours, theirs = (whole[start : start + SHOWN_CHARACTERS] for whole in (expected, text))
    return (
        f"llama.cpp's Jinja engine writes {case} otherwise than in training: {theirs!r} instead of {ours!r}; serve the "
        "model with `lathe serve`, or take another template"
    )
