"""Requests to the server with tools: read as rows of a dataset are, and answered with the calls of an answer."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lathe.data.messages import parse_messages
from lathe.data.row_checks import RowFault, TextValidator
from lathe.data.tools import parse_tools
from lathe.models.answer_split import find_answer_prefix
from lathe.models.answer_syntax import Call, find_call_syntax
from lathe.models.chat_template import ChatTemplate
from lathe.models.template_error import TemplateError

_ANY_TEXT = TextValidator(re.compile("(?!)"))  # as in a chat: what is sent is rendered

Handler = Callable[..., Any]


def format_prompt(template: ChatTemplate, messages: list[dict[str, Any]], tools: Any) -> str:
    """Return the prompt of a request; raises HTTPException (400) for messages or tools that are none."""
    from fastapi import HTTPException

    try:
        definitions = parse_tools(_ANY_TEXT, tools, "tools")
        if definitions and not template.writes_tools:
            raise RowFault("tools", "tools", "are given, and the model's chat template writes none; leave them out")
        parsed = parse_messages(_ANY_TEXT, messages, "messages")
        return template.render(parsed, add_generation_prompt=True, tools=definitions)
    except RowFault as fault:
        raise HTTPException(400, str(fault.fault)) from None
    except TemplateError as error:
        raise HTTPException(400, str(error)) from None


def answer_with_calls(handler: Handler, template: ChatTemplate, markers: Mapping[int, bytes]) -> Handler:
    """Return a chat handler of llama-cpp-python that answers as `handler`, with `tool_calls` where the text has some.

    `markers` are control tokens that the template writes in an answer; llama-cpp-python would leave them out. An answer
    to a request with tools is sent whole, even where it is to be streamed, as calls end before they can be told.
    """

    def answer(
        *, llama: Any, messages: Any, tools: Any = None, tool_choice: Any = None, stream: bool = False, **options: Any
    ) -> Any:
        _show_markers(llama, markers)
        if functions := options.pop("functions", None):
            tools = tools or [{"type": "function", "function": function} for function in functions]
        if tool_choice == "none":
            tools = None
        if not tools or isinstance(tool_choice, dict):
            return handler(
                llama=llama, messages=messages, tools=tools, tool_choice=tool_choice, stream=stream, **options
            )
        whole = handler(llama=llama, messages=messages, tools=tools, stream=False, **options)
        _read_calls(whole, template, parse_tools(_ANY_TEXT, tools, "tools"))
        return _stream(whole) if stream else whole

    return answer


def _read_calls(whole: dict[str, Any], template: ChatTemplate, tools: list[dict[str, Any]]) -> None:
    """Put the calls of an answer in the place of their text."""
    syntax = find_call_syntax(template)
    for choice in whole["choices"]:
        text = (choice["message"].get("content") or "").removeprefix(find_answer_prefix(template))
        read = syntax.read(text, tools) if syntax else None
        if read and read.calls:
            calls = [_write_call(call, whole["id"], number) for number, call in enumerate(read.calls)]
            choice["message"] |= {"content": read.content or None, "tool_calls": calls}
            choice["finish_reason"] = "tool_calls"


def _write_call(call: Call, answer: str, number: int) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return {"id": f"call_{answer.removeprefix('chatcmpl-')}_{number}", "type": "function", "function": function}


def _stream(whole: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield an answer in the chunks of a stream."""
    common = {key: whole[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    for choice in whole["choices"]:
        message = choice["message"]
        delta: dict[str, Any] = {"role": "assistant", "content": message["content"]}
        if calls := message.get("tool_calls"):
            delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
        for part, reason in ((delta, None), ({}, choice["finish_reason"])):
            chunk = {"index": choice["index"], "delta": part, "logprobs": None, "finish_reason": reason}
            yield {**common, "choices": [chunk]}


def _show_markers(llama: Any, markers: Mapping[int, bytes]) -> None:
    """Let the model's text have the control tokens that mark thoughts and calls."""
    if not markers or getattr(llama, "shows_markers", False):
        return
    write = llama.detokenize

    def write_with_markers(tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        if special or not any(token in markers for token in tokens):
            text: bytes = write(tokens, prev_tokens=prev_tokens, special=special)
            return text
        parts, plain = [], list[int]()
        for token in tokens:
            if token in markers:
                parts += [write(plain, prev_tokens=prev_tokens), markers[token]]
                plain = []
            else:
                plain.append(token)
        return b"".join([*parts, write(plain, prev_tokens=prev_tokens)])

    llama.detokenize, llama.shows_markers = write_with_markers, True
