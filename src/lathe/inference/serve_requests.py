"""Requests to llama-server: checked as rows of a dataset are, and written anew with known keys alone.

llama-server has many keys beside OpenAI's, which name files, slots, adapters and grammars. What is not listed here is
refused. Nothing of a body reaches it as it was written, so that both read the same.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from lathe.data.messages import parse_messages
from lathe.data.row_checks import RowFault, TextValidator
from lathe.data.tools import parse_tools
from lathe.inference.json_schema_limits import SchemaError, count_parts, resolve_schema
from lathe.inference.serve_limits import CHAT_PATH, RequestError
from lathe.models.chat_template import ChatTemplate
from lathe.models.message_form import THOUGHT
from lathe.models.template_error import TemplateError

SAMPLING = {
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "logit_bias", "stop"),
    *("repeat_penalty", "presence_penalty", "frequency_penalty"),
}
STREAMING = {"stream", "stream_options"}
CHAT = {
    *("messages", "tools", "tool_choice", "parallel_tool_calls", "functions", "response_format"),
    *("max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "chat_template_kwargs", "reasoning_effort"),
}
COMPLETION = {"prompt", "max_tokens", "logprobs"}
# Keys of OpenAI's that are about its own service, or whose only allowed value is the default. They change nothing.
WITHOUT_EFFECT = {
    *("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"),
    *("n", "best_of", "modalities"),
}
# The likeliest token alone is kept: of 50,000, the steps of sampling behind that would take a millisecond a token.
GREEDY = {"temperature": 0, "top_k": 1}
MAX_TOKENS_OF_A_COMPLETION = 16  # where the request leaves it open, as OpenAI has it
MOST_TOOLS = 128  # as OpenAI has it
MOST_PARTS_OF_TOOLS = 4000  # of the JSON Schemas of all
MOST_OPTIONS, LONGEST_OPTION = 16, 200  # of a template, and characters of one
OF_THE_TEMPLATE = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}

_ANY_TEXT = TextValidator(re.compile("(?!)"))  # as in a chat: what is sent is rendered

Preparer = Callable[[str, dict[str, Any]], dict[str, Any]]


def make_preparer(template: ChatTemplate, model_name: str) -> Preparer:
    """Return the function that makes of a request to a path the one to llama-server; it raises RequestError (400)."""

    def prepare(path: str, request: dict[str, Any]) -> dict[str, Any]:
        known = SAMPLING | STREAMING | (CHAT if path == CHAT_PATH else COMPLETION)
        given = {key: value for key, value in request.items() if value is not None and key not in WITHOUT_EFFECT}
        for key in given:
            if key not in known:
                raise RequestError(400, f"{key[:40]}: is not supported; leave it out")
        prepared = _prepare_chat(given, template) if path == CHAT_PATH else _prepare_completion(given)
        if not isinstance(prepared.get("logit_bias", {}), dict):
            raise RequestError(400, "logit_bias: must be an object, from tokens to numbers")
        is_greedy = prepared.get("temperature", 0) == 0
        return {"model": model_name, **prepared, **(GREEDY if is_greedy else {})}

    return prepare


def refuse_template_options(path: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return a request to llama-cpp-python's server, which would drop the options of a template in silence."""
    if request.get("chat_template_kwargs") is not None:
        raise RequestError(400, "chat_template_kwargs: are read by llama-server alone; `make llama-server` builds it")
    return request


def _prepare_completion(given: dict[str, Any]) -> dict[str, Any]:
    prompt = given["prompt"]
    if isinstance(prompt, list) and len(prompt) == 1:
        [prompt] = prompt
    if not isinstance(prompt, str):
        raise RequestError(400, "prompt: must be one text; send a request for each")
    return {"max_tokens": MAX_TOKENS_OF_A_COMPLETION, **given, "prompt": prompt}


def _prepare_chat(given: dict[str, Any], template: ChatTemplate) -> dict[str, Any]:
    tools = given.pop("tools", None)
    if functions := given.pop("functions", None):
        if not isinstance(functions, list):
            raise RequestError(400, "functions: must be a list")
        tools = tools or [{"type": "function", "function": function} for function in functions]
    choice = given.pop("tool_choice", None)
    try:
        definitions = [] if choice == "none" else parse_tools(_ANY_TEXT, tools, "tools")
        if definitions and not template.writes_tools:
            raise RowFault("tools", "tools", "are given, and the model's chat template writes none; leave them out")
        parsed = parse_messages(_ANY_TEXT, given["messages"], "messages")
    except RowFault as fault:
        raise RequestError(400, str(fault.fault)) from None
    if not parsed:
        raise RequestError(400, "messages: are all empty")
    try:  # here within limits of steps and sizes, which llama-server's own engine does not have
        template.render(parsed, add_generation_prompt=True, tools=definitions)
    except TemplateError as error:
        raise RequestError(400, str(error)) from None
    prepared = {**given, "messages": list(map(_write_message, parsed, template.form.adapt(parsed)))}
    if definitions:
        prepared |= _choose_tools(_bound_tools(definitions), choice)
    if (options := given.get("chat_template_kwargs")) is not None:
        _check_options(options)
    return prepared


def _write_message(message: dict[str, Any], adapted: dict[str, Any]) -> dict[str, Any]:
    """Return a message in OpenAI's form: its thought where the template reads it, the arguments of calls as text."""
    if not isinstance(adapted["content"], list):  # parts of a text, which llama-server makes of a thought itself
        message = {**message, **adapted} if THOUGHT in adapted else adapted
    written = {key: message[key] for key in ("role", "content", THOUGHT, "name", "tool_call_id") if key in message}
    if calls := message.get("tool_calls"):
        written["tool_calls"] = [{**call, "function": _write_function(call["function"])} for call in calls]
    return written


def _write_function(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**function, "arguments": text}


def _bound_tools(definitions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the tools with the references in their schemas resolved: llama-server makes a grammar of all together."""
    if len(definitions) > MOST_TOOLS:
        raise RequestError(400, f"tools: are {len(definitions)}; must be at most {MOST_TOOLS}")
    parts = 0
    for tool in definitions:
        function = tool["function"]
        if isinstance(function.get("parameters"), dict):
            try:
                function["parameters"] = resolve_schema(function["parameters"])
            except SchemaError as error:
                raise RequestError(400, f"tools: {function['name'][:40]}: {error}") from None
            parts += count_parts(function["parameters"])
    if parts > MOST_PARTS_OF_TOOLS:
        raise RequestError(400, f"tools: their JSON Schemas have more than {MOST_PARTS_OF_TOOLS} parts; send fewer")
    return definitions


def _choose_tools(definitions: list[dict[str, Any]], choice: Any) -> dict[str, Any]:
    if choice is None or choice in ("auto", "required"):
        return {"tools": definitions, "tool_choice": choice or "auto"}
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    # llama-server knows no choice of one function: it is offered that one, and has to call it.
    chosen = [tool for tool in definitions if tool["function"]["name"] == name]
    if not chosen:
        raise RequestError(400, "tool_choice: must be none, auto, required or one of the tools' functions")
    return {"tools": chosen, "tool_choice": "required"}


def _check_options(options: Any) -> None:
    if not isinstance(options, dict) or len(options) > MOST_OPTIONS:
        raise RequestError(400, f"chat_template_kwargs: must be an object of at most {MOST_OPTIONS} options")
    for name, value in options.items():
        if name in OF_THE_TEMPLATE:
            raise RequestError(400, f"chat_template_kwargs: {name} is not to be set; leave it out")
        is_short = not isinstance(value, str) or len(value) <= LONGEST_OPTION
        if not isinstance(value, str | bool | int | float) or not is_short:
            raise RequestError(400, f"chat_template_kwargs: {name[:40]} must be a number, true, false or a short text")
