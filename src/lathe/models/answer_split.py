"""Split of a rendered conversation: the prompt, the answer, and what the chat template writes after it."""

import json
import re
from functools import lru_cache
from typing import NamedTuple

from lathe.models.chat_template import EXAMPLE_TOOL, ChatTemplate, TemplateError, Tools
from lathe.models.document import is_document
from lathe.models.message_form import ANSWER, QUESTION, THOUGHT, Conversation, Message, split_thought

_OPENED_THOUGHT = re.compile(r"<think>(\s*)\Z")
# An empty thought at the end of a generation prompt, such as Gemma 4's <|channel>thought\n<channel|>.
_THOUGHT_MARKER = r"<[^<>\s]*(?:think|channel)[^<>\s]*>"
_EMPTY_THOUGHT = re.compile(rf"{_THOUGHT_MARKER}\w*\s*{_THOUGHT_MARKER}\s*\Z", re.IGNORECASE)
# A token at the very end, such as the <|call|> of gpt-oss and the <|tool_response> of Gemma 4.
_LAST_MARKER = re.compile(r"\s*(<[|\uff5c][^<>\s]+>|</s>)\s*\Z")


class SplitAnswer(NamedTuple):
    """A rendered conversation in three parts: the prompt, the answer, and what the template writes after it."""

    prompt: str
    answer: str
    rest: str


def split_answer(template: ChatTemplate, messages: Conversation, tools: Tools | None = None) -> SplitAnswer:
    """Split the rendered conversation at its last message, which is the answer.

    The prompt is the one of inference. The three texts make up `render(messages)`, except for a template that
    writes earlier messages differently once there is an answer, or has a thought in its generation prompt, opened or
    empty, that it does not write before an answer. What follows the answer begins with the end token, possibly after
    white space. Raises TemplateError if the answer is not written right after the prompt, or not as it is.
    """
    if is_document(messages):
        return SplitAnswer("", template.render(messages), template.eos_token)
    prompt = template.render(messages[:-1], add_generation_prompt=True, tools=tools)
    text = template.render(messages, tools=tools)
    last = messages[-1]
    thought, answer = split_thought(last)
    answer = answer.strip()
    written = text[len(prompt) :] if text.startswith(prompt) else None
    if (opened := _OPENED_THOUGHT.search(prompt)) and (written is None or thought not in written):
        written = _close_thought(thought, text, prompt, opened) or written
    if written is None and not thought and (empty := _EMPTY_THOUGHT.search(prompt)):
        # Inference begins after the empty thought, so that is where the answer is learnt.
        before = prompt[: empty.start()]
        written = text[len(before) :] if text.startswith(before) else None
    if written is None:
        # Mistral Nemo's writes the system message only where a request comes last: then the answer is written as
        # after that request alone.
        start = max((at for at, message in enumerate(messages[:-1]) if message["role"] == "user"), default=0)
        if start > 0:
            return split_answer(template, messages[start:], tools)._replace(prompt=prompt)
        switched = "; the answer has a thought, and the template may have been told to write none" if thought else ""
        raise TemplateError(
            f"the chat template's generation prompt ends with {prompt[-20:]!r}, but its answers do not begin so; "
            f"use a template whose generation prompt is how it writes answers{switched}",
            code="generation-prompt",
        )
    start = 0
    if thought:
        if thought not in written:
            raise TemplateError(
                f"the chat template does not write the thought {_shorten(thought)} ({THOUGHT}); use one that does, "
                "or leave the thoughts out of the rows",
                code="thought-not-written",
            )
        start = written.index(thought) + len(thought)
        if any(call["function"]["name"] not in written[start:] for call in last.get("tool_calls") or []):
            raise TemplateError(
                f"the chat template writes the thought {_shorten(thought)} ({THOUGHT}) after the calls; use one that "
                "writes it before them, or leave the thoughts out of the rows",
                code="thought-after-calls",
            )
    if answer not in written[start:]:
        raise TemplateError(
            f"the chat template does not write the answer {_shorten(answer)} as it is; use one that does",
            code="answer-not-written",
        )
    for tool in tools or []:
        if (name := tool["function"]["name"]) not in prompt or not template.writes_tools:
            raise TemplateError(
                f"the chat template does not write the tool {name!r}; use one that does", code="tools-not-written"
            )
    history = _render_history(template, messages[:-1], prompt, tools)
    for message in messages:
        if message["role"] == "tool" or message.get("tool_calls"):
            _check_tools_are_written(message, written if message is last else history)
        elif (name := message.get("name")) and name not in prompt:
            raise TemplateError(
                f"the chat template does not write the name {_shorten(name)} of the {message['role']} message; use "
                "one that does, or leave the name out",
                code="name-not-written",
            )
    if last.get("tool_calls"):
        end = _find_end_of_calls(template, messages, written, tools)
    else:
        end = written.index(answer, start) + len(answer)
    return SplitAnswer(prompt, written[:end], written[end:])


def _render_history(template: ChatTemplate, messages: Conversation, prompt: str, tools: Tools | None) -> str:
    """Return the prompt without the definitions of tools, in which the names of functions stand too."""
    if not tools or not any(message.get("tool_calls") for message in messages):
        return prompt
    try:
        return template.render(messages)
    except TemplateError:
        return prompt


def _find_end_of_calls(template: ChatTemplate, messages: Conversation, written: str, tools: Tools | None) -> int:
    """Return where the calls end: they take the place of a text, so what ends that ends them, or another token."""
    with_text = [*messages[:-1], {"role": "assistant", "content": ANSWER}]
    rest = split_answer(template, with_text, tools).rest
    if written.endswith(rest):
        return len(written.removesuffix(rest).rstrip())
    if template.eos_token and template.eos_token in written:
        return len(written.partition(template.eos_token)[0].rstrip())
    if not (end := _LAST_MARKER.search(written)):
        raise TemplateError(
            "the chat template ends a tool call in another way than a text; use one that does not",
            code="tool-call-end",
        )
    return end.start()


@lru_cache
def find_answer_prefix(template: ChatTemplate) -> str:
    r"""Return what a template writes between its generation prompt and a plain answer; empty if only white space.

    Empty for most; `<think>\n\n</think>\n\n` for Qwen3. A model trained on this template begins its answers with
    it, so it is removed before an answer is compared with its reference.
    """
    question_and_answer = [QUESTION, {"role": "assistant", "content": ANSWER}]
    try:
        answer = split_answer(template, question_and_answer).answer
    except TemplateError:
        if not template.writes_tools:
            raise
        answer = split_answer(template, question_and_answer, [EXAMPLE_TOOL]).answer  # one for requests with tools alone
    prefix = answer.removesuffix(ANSWER)
    return prefix if prefix.strip() else ""


def _close_thought(thought: str, text: str, prompt: str, opened: re.Match[str]) -> str | None:
    """Return thought and answer after a generation prompt that opens the thought, where the template writes no thought.

    It is empty for an answer without one. None if the answer is not written after what comes before the thought.
    """
    before = prompt[: opened.start()]
    if not text.startswith(before):
        return None
    answer = re.sub(r"\A<think>\s*</think>\s*", "", text[len(before) :])
    space = opened[1]
    return f"{thought}{space}</think>{space * 2}{answer}"


def _check_tools_are_written(message: Message, rendered: str) -> None:
    """Raise TemplateError if a tool message, or a call of a tool, is not in the rendered text."""
    expected = [str(message["content"]).strip()] if message["role"] == "tool" else []
    for call in message.get("tool_calls") or []:
        expected += [call["function"]["name"], *call["function"]["arguments"]]
    for text in expected:
        if text not in rendered and json.dumps(text, ensure_ascii=False)[1:-1] not in rendered:
            what = "tool message" if message["role"] == "tool" else "tool call"
            raise TemplateError(
                f"the chat template does not write the {what} {_shorten(text)}; use one that does",
                code="tool-not-written",
            )


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
