"""Answer syntax: how a chat template writes thoughts and calls of tools in an answer, and how they are read from one.

Nothing is known of any template: examples are rendered with it, and what stands around their parts are the markers. So
it works for JSON between markers (Qwen, Hermes), bare JSON (Llama), a list (Mistral), a name before its arguments
(DeepSeek, gpt-oss, Kimi K2), an element per argument (Qwen3-Coder, GLM), calls as in Python (LFM2) and objects whose
keys are bare (Gemma 4). A form that does not read the examples back is none.
"""

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, Self

from lathe.models.answer_split import find_answer_prefix, split_answer
from lathe.models.chat_template import EXAMPLE_TOOL, ChatTemplate, Tools
from lathe.models.message_form import A_THOUGHT, ANSWER, QUESTION, THOUGHT, make_call
from lathe.models.template_error import TemplateError

# A call as it is compared: {"name": …, "arguments": {…}}.
Call = dict[str, Any]

_FIRST, _SECOND = "first_function", "second_function"
_ARGUMENTS = {"first_key": "first value", "second_key": "other value"}
_EXAMPLES: list[Call] = [{"name": name, "arguments": _ARGUMENTS} for name in (_FIRST, _SECOND)]
# Values that are hard to read back.
_PROBES: list[Call] = [
    {"name": _FIRST, "arguments": {"first_key": 'a "b" {c}, [d]', "second_key": "7"}},
    {"name": _SECOND, "arguments": {"first_key": "first value", "count": 7, "is_set": True}},
]
_EXAMPLE_ID = re.compile(r"call_[12]|call0000[12]")
_COUNTER = re.compile(r"\d+")  # such as that of Kimi K2's functions.NAME:0
_ATTRIBUTE = re.compile(r'="\w+"')
_NAME = re.compile(r"[^\s<>{}()\[\]\"'=,:|]+")
_BARE_VALUE = re.compile(r"[\w.+-]+")
_NAMED_VALUES = {"True": True, "False": False, "None": None}  # as Python writes them
_DECODER = json.JSONDecoder()


class _Read(NamedTuple):
    name: str
    arguments: dict[str, Any]
    end: int


class _Unit(Protocol):
    """The part of a call that names function and arguments."""

    def read(self, text: str, start: int, tools: Tools) -> _Read | None:
        """Read one at `start`; None if there is none."""


class Answer(NamedTuple):
    """An answer in parts: its text, and the calls in it."""

    content: str
    calls: list[Call]


@dataclass(frozen=True)
class CallSyntax:
    """What stands before the first call of an answer, between two (None: one at most), and after the last."""

    unit: _Unit
    opening: str
    between: str | None
    closing: str

    def read(self, text: str, tools: Tools | None = None) -> Answer:
        """Return the text of an answer, and its calls; what is not written as calls are is text.

        `tools` say which arguments are text, where the template writes all values alike.
        """
        for found in _compile(self.opening, anchored=not self.opening.strip()).finditer(text):
            calls, rest = self._read_calls(text, found.end(), tools or [])
            if calls:
                return Answer("\n".join(filter(None, (text[: found.start()].strip(), rest))), calls)
        return Answer(text, [])

    def _read_calls(self, text: str, start: int, tools: Tools) -> tuple[list[Call], str]:
        """Return the calls, and the text after them."""
        calls: list[Call] = []
        while unit := self.unit.read(text, start, tools):
            calls.append({"name": unit.name, "arguments": unit.arguments})
            following = self.between is not None and _compile(self.between).match(text, unit.end)
            if following and following.end() < len(text) and self.unit.read(text, following.end(), tools):
                start = following.end()
                continue
            end = _compile(self.closing).match(text, unit.end)
            rest = text[end.end() if end else unit.end :].strip()
            if rest and (not end or not self.closing.strip()):
                return [], ""  # JSON with more behind it is a text
            return calls, rest
        return [], ""


@dataclass(frozen=True)
class ThoughtSyntax:
    """What stands before a thought, and between it and the answer."""

    opening: str
    closing: str

    def strip(self, text: str, *, prompt: str = "") -> str:
        """Return what an answer says after its thought: nothing, if the thought does not end."""
        closing, opening = self.closing.strip(), self.opening.strip()
        if closing in text:
            return text.rpartition(closing)[2].strip()
        is_open = text.lstrip().startswith(opening) if opening else prompt.rstrip().endswith("<think>")
        return "" if is_open else text


@lru_cache
def find_call_syntax(template: ChatTemplate) -> CallSyntax | None:
    """Return how the template writes calls; None if it writes none that can be told."""
    one, two = (_render_calls(template, _EXAMPLES[:count]) for count in (1, 2))
    for kind in (_JsonUnit, _NamedUnit, _PythonUnit, _ElementUnit, _BareKeyUnit):
        found = one and kind.find(one, 0, _FIRST)
        if not found or not one:
            continue
        unit, start, end = found
        between = None
        if two and (first := kind.find(two, 0, _FIRST)) and (second := kind.find(two, first[2], _SECOND)):
            between = two[first[2] : second[1]]
        syntax = CallSyntax(unit, one[:start], between, one[end:])
        if all(_is_read_back(syntax, template, calls) for calls in (_EXAMPLES[:1], _EXAMPLES, _PROBES[:1], _PROBES)):
            return syntax
    return None


def _is_read_back(syntax: CallSyntax, template: ChatTemplate, calls: list[Call]) -> bool:
    """Return whether calls are read as they are written; also where the template does not write as many."""
    written = _render_calls(template, calls)
    return written is None or syntax.read(written, _TOOLS).calls == calls


@lru_cache
def find_thought_syntax(template: ChatTemplate) -> ThoughtSyntax:
    """Return how the template writes thoughts; that of most, if it writes none."""
    message = {"role": "assistant", "content": ANSWER, THOUGHT: A_THOUGHT}
    try:
        answer = split_answer(template, [QUESTION, message]).answer
    except TemplateError:
        return ThoughtSyntax("<think>", "</think>")
    opening, _, rest = answer.partition(A_THOUGHT)
    return ThoughtSyntax(opening, rest.partition(ANSWER)[0])


def render_markers(template: ChatTemplate) -> str:
    """Return a text with every marker that the template may write in an answer."""
    thought = find_thought_syntax(template)
    calls = [_render_calls(template, _EXAMPLES[:count]) or "" for count in (1, 2)]
    return "\n".join([thought.opening, thought.closing, *calls, find_answer_prefix(template)])


def list_calls(message: Mapping[str, Any]) -> list[Call]:
    """Return the calls of a message as they are compared."""
    return [
        {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
        for call in message.get("tool_calls", [])
    ]


def _render_calls(template: ChatTemplate, calls: list[Call]) -> str | None:
    written = [make_call(call["name"], call["arguments"], number) for number, call in enumerate(calls, start=1)]
    tools = _TOOLS if template.writes_tools else None
    message = {"role": "assistant", "content": "", "tool_calls": written}
    try:
        return split_answer(template, [QUESTION, message], tools).answer.removeprefix(find_answer_prefix(template))
    except TemplateError:
        return None


def _make_tool(name: str, **types: str) -> dict[str, Any]:
    properties = {key: {"type": kind, "description": "What it is."} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {**EXAMPLE_TOOL["function"], "name": name, "parameters": parameters}}


_TOOLS = [
    _make_tool(_FIRST, first_key="string", second_key="string"),
    _make_tool(_SECOND, first_key="string", second_key="string", count="integer", is_set="boolean"),
]


@lru_cache
def _compile(marker: str, *, anchored: bool = False) -> re.Pattern[str]:
    r"""Return a pattern of a marker, whatever its white space; `anchored` at the beginning of the text."""
    parts = (_EXAMPLE_ID.split(part) for part in marker.split())
    escaped = (r"[\w:.-]+".join(_COUNTER.sub(r"\\d+", re.escape(text)) for text in part) for part in parts)
    pattern = r"\s*".join(_ATTRIBUTE.sub('="[^"<>]*"', part) for part in escaped)
    return re.compile((r"\A" if anchored else "") + rf"\s*{pattern}\s*")


def _decode(text: str, start: int) -> tuple[Any, int] | None:
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class _JsonUnit:
    """An object with the keys of name and arguments, perhaps within another one."""

    name_key: str
    arguments_key: str
    outer: str | None

    @classmethod
    def find(cls, text: str, start: int, name: str) -> tuple[Self, int, int] | None:
        for brace in re.finditer(r"\{", text[start:]):
            place = start + brace.start()
            if not (decoded := _decode(text, place)) or not isinstance(decoded[0], dict):
                continue
            value, end = decoded
            for outer in (None, *(key for key, inner in value.items() if isinstance(inner, dict))):
                inner = value if outer is None else value[outer]
                keys = {json.dumps(of_key): key for key, of_key in inner.items()}
                arguments = keys.get(json.dumps(_ARGUMENTS)) or keys.get(json.dumps(json.dumps(_ARGUMENTS)))
                if (of_name := keys.get(json.dumps(name))) and arguments:
                    return cls(of_name, arguments, outer), place, end
        return None

    def read(self, text: str, start: int, tools: Tools) -> _Read | None:
        decoded = _decode(text, start)
        value = decoded[0] if decoded else None
        if self.outer is not None and isinstance(value, dict):
            value = value.get(self.outer)
        if not decoded or not isinstance(value, dict):
            return None
        name, arguments = value.get(self.name_key), value.get(self.arguments_key)
        if isinstance(arguments, str) and (inner := _decode(arguments.strip(), 0)):
            arguments = inner[0]
        return _Read(name, arguments, decoded[1]) if isinstance(name, str) and isinstance(arguments, dict) else None


@dataclass(frozen=True)
class _NamedUnit:
    """A name, a marker, and the arguments as JSON."""

    marker: str

    @classmethod
    def find(cls, text: str, start: int, name: str) -> tuple[Self, int, int] | None:
        begin = text.find(name, start)
        for brace in re.finditer(r"\{", text[begin:]) if begin >= 0 else ():
            decoded = _decode(text, begin + brace.start())
            if decoded and decoded[0] == _ARGUMENTS:
                return cls(text[begin + len(name) : begin + brace.start()]), begin, decoded[1]
        return None

    def read(self, text: str, start: int, tools: Tools) -> _Read | None:
        name = _NAME.match(text, start)
        marker = name and _compile(self.marker).match(text, name.end())
        decoded = _decode(text, marker.end()) if marker else None
        if not name or not decoded or not isinstance(decoded[0], dict):
            return None
        return _Read(name[0], decoded[0], decoded[1])


@dataclass(frozen=True)
class _PythonUnit:
    """A call with keyword arguments, as in Python."""

    @classmethod
    def find(cls, text: str, start: int, name: str) -> tuple[Self, int, int] | None:
        begin = text.find(f"{name}(", start)
        read = cls().read(text, begin, []) if begin >= 0 else None
        return (cls(), begin, read.end) if read and read.arguments == _ARGUMENTS else None

    def read(self, text: str, start: int, tools: Tools) -> _Read | None:
        if not re.compile(r"[\w.]+\(").match(text, start):
            return None
        for bracket in re.finditer(r"\)", text[start : start + 10_000]):
            end = start + bracket.end()
            try:
                call = ast.parse(text[start:end], mode="eval").body
                if not isinstance(call, ast.Call) or call.args:
                    return None
                arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            return _Read(ast.unparse(call.func), arguments, end)
        return None


@dataclass(frozen=True)
class _ElementUnit:
    """A name, and each argument between markers of its own; all values are written as text."""

    after_name: str
    before_key: str
    after_key: str
    after_value: str

    @classmethod
    def find(cls, text: str, start: int, name: str) -> tuple[Self, int, int] | None:
        begin = text.find(name, start)
        place = begin + len(name)
        gaps: list[str] = []
        for part in [part for item in _ARGUMENTS.items() for part in item] if begin >= 0 else ():
            at = text.find(part, place)
            if at < 0:
                return None
            gaps.append(text[place:at])
            place = at + len(part)
        if len(gaps) != 4 or not all(gap.strip() for gap in gaps):
            return None
        before_first, after_key, between, _ = gaps
        # What follows a value, whether another argument follows or not.
        after_value = re.sub(r"\s*[<\[|]*\Z", "", _find_common_start(between, text[place:]))
        before_key = between[len(after_value) :]
        if not after_value.strip() or not before_first.endswith(before_key.lstrip()):
            return None
        after_name = before_first.removesuffix(before_key.lstrip())
        return cls(after_name, before_key, after_key, after_value), begin, place + len(after_value)

    def read(self, text: str, start: int, tools: Tools) -> _Read | None:
        if not (name := _NAME.match(text, start)) or not (place := _compile(self.after_name).match(text, name.end())):
            return None
        end, arguments = place.end(), dict[str, Any]()
        while key_start := _compile(self.before_key).match(text, end):
            key_end = _compile(self.after_key).search(text, key_start.end())
            value_end = key_end and text.find(self.after_value.strip(), key_end.end())
            if not key_end or value_end is None or value_end < 0:
                return None
            key = text[key_start.end() : key_end.start()]
            after_key = key_end.start() + len(key_end[0].rstrip()) if key_end else 0
            value = text[after_key:value_end]
            if "\n" in self.after_key or "\n" in self.after_value:
                value = value.strip("\n")
            arguments[key] = _read_value(value, _find_type(tools, name[0], key))
            end = value_end + len(self.after_value.strip())
        return _Read(name[0], arguments, end)


@dataclass(frozen=True)
class _BareKeyUnit:
    """A name and an object whose keys are bare, and whose texts stand between quotes of its own."""

    quote: str

    @classmethod
    def find(cls, text: str, start: int, name: str) -> tuple[Self, int, int] | None:
        pairs = [rf"{key}:([^\s,:]+){value}\{number}" for number, (key, value) in enumerate(_ARGUMENTS.items(), 1)]
        found = re.compile(rf"{name}\{{{','.join(pairs)}\}}").search(text, start)
        return (cls(found[1]), found.start(), found.end()) if found else None

    def read(self, text: str, start: int, tools: Tools) -> _Read | None:
        if not (name := _NAME.match(text, start)):
            return None
        try:
            arguments, end = self._read_value(text, _skip_space(text, name.end()))
        except (ValueError, IndexError, RecursionError):
            return None
        return _Read(name[0], arguments, end) if isinstance(arguments, dict) else None

    def _read_value(self, text: str, at: int) -> tuple[Any, int]:
        """Return the value at a place and its end; raises ValueError or IndexError where there is none."""
        if text[at] in "{[":
            return self._read_parts(text, at)
        if text.startswith(self.quote, at):
            start = at + len(self.quote)
            end = text.index(self.quote, start)
            return text[start:end], end + len(self.quote)
        value = _BARE_VALUE.match(text, at)
        if value is None:
            raise ValueError
        return _NAMED_VALUES[value[0]] if value[0] in _NAMED_VALUES else json.loads(value[0]), value.end()

    def _read_parts(self, text: str, at: int) -> tuple[Any, int]:
        """Return an object or a list."""
        closing = "}" if text[at] == "{" else "]"
        keys, values = list[Any](), list[Any]()
        at = _skip_space(text, at + 1)
        while text[at] != closing:
            if values:
                if text[at] != ",":
                    raise ValueError
                at = _skip_space(text, at + 1)
            if closing == "}":
                key, at = self._read_key(text, at)
                keys.append(key)
            value, at = self._read_value(text, _skip_space(text, at))
            values.append(value)
            at = _skip_space(text, at)
        return (dict(zip(keys, values, strict=True)) if closing == "}" else values), at + 1

    def _read_key(self, text: str, at: int) -> tuple[str, int]:
        """Return a key and the place after its colon."""
        colon = text.index(":", at + len(self.quote) if text.startswith(self.quote, at) else at)
        key = text[at:colon].strip().removeprefix(self.quote).removesuffix(self.quote)
        if not key or any(character in key for character in "{}[],"):
            raise ValueError
        return key, colon + 1


def _skip_space(text: str, at: int) -> int:
    while text[at].isspace():
        at += 1
    return at


def _find_common_start(first: str, second: str) -> str:
    count = next(
        (at for at, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )
    return first[:count]


def _find_type(tools: Tools, name: str, key: str) -> Any:
    for tool in tools:
        if tool["function"]["name"] == name:
            schema = tool["function"].get("parameters", {}).get("properties", {}).get(key)
            return schema.get("type") if isinstance(schema, dict) else None
    return None


def _read_value(text: str, kind: Any) -> Any:
    """Return a value that is written as text: JSON, or as Python writes it, unless it is said to be text."""
    if kind == "string":
        return text
    if text in _NAMED_VALUES:
        return _NAMED_VALUES[text]
    decoded = _decode(text.strip(), 0)
    return decoded[0] if decoded and decoded[1] == len(text.strip()) else text
