"""Message form: in which form a chat template reads thoughts and calls of tools, found by rendering examples.

Messages have one form everywhere in Lathe: a thought in `reasoning_content` or as a `<think>` block in the text, the
arguments of a call as an object, "" as the content beside calls. Templates differ, so `adapt` changes what they read.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lathe.common.errors import InputError

Message = Mapping[str, Any]
Conversation = Sequence[Message]
Render = Callable[[Conversation], str]

THOUGHT = "reasoning_content"
# The same names that transformers gives a thought by.
THOUGHT_KEYS = (THOUGHT, "thinking", "reasoning")
INLINE_THOUGHT = "<think>\n{thought}\n</think>\n\n{answer}"

QUESTION = {"role": "user", "content": "a question"}
ANSWER, A_THOUGHT = "an answer", "a thought"
CALL_ID = re.compile(r"[A-Za-z0-9]{9}")  # what Mistral's templates demand

ThoughtPlace = Literal["field", "parts", "inline"]


@dataclass(frozen=True)
class MessageForm:
    """Where a template reads a thought (None: nowhere), and the form of calls that it writes.

    Some read a thought before calls in another place than one before a text (Gemma 4).
    """

    thought: ThoughtPlace | None
    thought_before_calls: ThoughtPlace | None
    splits_text: bool  # a <think> block in the text is written as a thought in its place is
    arguments_as_text: bool
    empty_content: str | None  # beside calls
    short_ids: bool  # ids of calls must have nine letters and digits

    def adapt(self, messages: Conversation) -> list[dict[str, Any]]:
        """Return the messages in the form that the template reads."""
        adapted = [self._adapt_message(message) for message in messages]
        return _shorten_ids(adapted) if self.short_ids else adapted

    def _adapt_message(self, message: Message) -> dict[str, Any]:
        if message["role"] != "assistant":
            return dict(message)
        result = {key: value for key, value in message.items() if key not in THOUGHT_KEYS}
        thought, answer = split_thought(message)
        if thought and (any(message.get(key) for key in THOUGHT_KEYS) or not self.splits_text):
            place = self.thought_before_calls if message.get("tool_calls") else self.thought
            result |= _place_thought(place, thought, answer, message["content"] or "")
        if calls := message.get("tool_calls"):
            result["tool_calls"] = [self._adapt_call(call) for call in calls]
            result["content"] = result.get("content") or self.empty_content
        return result

    def _adapt_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        if not self.arguments_as_text:
            return dict(call)
        function = call["function"]
        text = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}


PLAIN_FORM = MessageForm("inline", "inline", True, False, "", False)


def _place_thought(place: ThoughtPlace | None, thought: str, answer: str, content: str) -> dict[str, Any]:
    match place:
        case "field":
            return {"content": answer, **dict.fromkeys(THOUGHT_KEYS, thought)}
        case "parts":
            text = [{"type": "text", "text": answer}] if answer else []
            return {"content": [{"type": "thinking", "thinking": thought}, *text]}
        case "inline" if content == answer:
            return {"content": INLINE_THOUGHT.format(thought=thought, answer=answer)}
        case "inline":
            return {"content": content}
        case None:
            return {"content": answer}


def split_thought(message: Message) -> tuple[str, str]:
    """Return the thought of an assistant message, "" if it has none, and the answer after it."""
    content = str(message.get("content") or "")
    field = next((str(message[key]) for key in THOUGHT_KEYS if message.get(key)), "")
    if field:
        return field.strip(), content
    before, end, answer = content.rpartition("</think>")
    if not end:
        return "", content
    return before.rpartition("<think>")[2].strip(), answer.strip()


def find_form(render: Render) -> MessageForm:
    """Return the form that a template reads; `render` is the template itself, and raises InputError if it refuses."""

    def try_form(form: MessageForm, *messages: Message) -> str:
        try:
            return render(form.adapt(messages))
        except InputError:
            return ""

    thoughtful = {"role": "assistant", "content": ANSWER, THOUGHT: A_THOUGHT}
    inline = {"role": "assistant", "content": INLINE_THOUGHT.format(thought=A_THOUGHT, answer=ANSWER)}
    places: tuple[ThoughtPlace, ...] = ("field", "parts", "inline")
    rendered = {
        place: text
        for place in places
        if A_THOUGHT in (text := try_form(MessageForm(place, place, True, False, "", False), QUESTION, thoughtful))
        and ANSWER in text
        and not re.search(r"""['"]type['"]: ['"]thinking['"]""", text)  # the parts as Python or JSON writes them
    }
    place = next(iter(rendered), None)
    as_text = try_form(PLAIN_FORM, QUESTION, inline)
    splits_text = place == "inline" or (place is not None and as_text == rendered[place])

    def writes_calls(form: MessageForm) -> bool:
        text = try_form(form, *EXAMPLE_CALL)
        # A dict that is written as Python writes it is no form of a call.
        return "first_function" in text and "first value" in text and "{'" not in text

    forms = [
        MessageForm(place, place, splits_text, as_text, content, short_ids)
        for short_ids in (False, True)
        for as_text in (False, True)
        for content in ("", None)
    ]
    form = next(filter(writes_calls, forms), forms[0])
    before_calls = (replace(form, thought_before_calls=other) for other in places)
    thoughtful_call = {**EXAMPLE_CALL[-1], THOUGHT: A_THOUGHT}
    return next(
        (
            other
            for other in (form, *before_calls)
            if A_THOUGHT in try_form(other, QUESTION, thoughtful_call).partition("first_function")[0]
        ),
        form,
    )


def make_call(name: str, arguments: Mapping[str, Any], number: int = 1) -> dict[str, Any]:
    """Return a call of a tool in Lathe's form."""
    return {"type": "function", "id": f"call_{number}", "function": {"name": name, "arguments": dict(arguments)}}


EXAMPLE_CALL: tuple[Message, ...] = (
    QUESTION,
    {"role": "assistant", "content": "", "tool_calls": [make_call("first_function", {"first_key": "first value"})]},
)


def _shorten_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give every call an id of nine characters, and each answer of a tool that of its call."""
    known: dict[str, str] = {}
    waiting: list[str] = []
    count = 0
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or []:
            count += 1
            given = call.get("id")
            new = given if given and CALL_ID.fullmatch(given) else f"call{count:05d}"
            if given:
                known[given] = new
            waiting.append(new)
            calls.append({**call, "id": new})
        if calls:
            message["tool_calls"] = calls
        if message["role"] == "tool":
            given = message.get("tool_call_id")
            first = waiting.pop(0) if waiting else f"call{count:05d}"
            message["tool_call_id"] = known.get(given, first) if given else first
    return messages
