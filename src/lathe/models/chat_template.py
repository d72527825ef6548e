"""Chat template: how messages become the text that a model reads, and where in it the answer is.

One template everywhere: training, evaluation, generation and chat call `ChatTemplate.render`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Self

import jinja2

from lathe.common import bounded_jinja
from lathe.common.errors import InputError
from lathe.models.document import is_document
from lathe.models.message_form import (
    ANSWER,
    QUESTION,
    THOUGHT,
    Conversation,
    Message,
    MessageForm,
    find_form,
    split_thought,
)

# Definitions of tools in OpenAI's form: {"type": "function", "function": {"name", "description", "parameters"}}.
Tools = Sequence[Mapping[str, Any]]

# What `strftime_now` formats in templates that state the date (Llama 3, SmolLM3); the current date would make two runs
# differ. It is the fallback in Llama 3's own template.
FIXED_DATE = datetime(2024, 7, 26)

_TEXT_MESSAGE = {"role", "content"}
_OPENED_THOUGHT = re.compile(r"<think>(\s*)\Z")
# A token at the very end, such as the <|call|> of gpt-oss.
_LAST_MARKER = re.compile(r"\s*(<[|\uff5c][^<>\s]+[|\uff5c]>|</s>)\s*\Z")

EXAMPLE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "first_function",
        "description": "What the function does.",
        "parameters": {
            "type": "object",
            "properties": {"first_key": {"type": "string", "description": "What the value is."}},
            "required": ["first_key"],
        },
    },
}


class TemplateError(InputError):
    """A conversation that the chat template cannot render as a prompt and an answer."""


class SplitAnswer(NamedTuple):
    """A rendered conversation in three parts: the prompt, the answer, and what the template writes after it."""

    prompt: str
    answer: str
    rest: str


@dataclass(frozen=True)
class ChatTemplate:
    """The Jinja `text` of a chat template with the special tokens that it writes.

    `bos_token` and `eos_token` are empty where the vocabulary has none; `adds_bos` says whether the tokenizer puts its
    BOS before plain text.
    """

    text: str
    bos_token: str
    eos_token: str
    adds_bos: bool

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> Self:
        """Return the template of a Hugging Face tokenizer. Raises TemplateError if it has none."""
        if not tokenizer.chat_template:
            raise TemplateError(
                "the tokenizer has no chat template; choose an instruction-tuned model", code="no-chat-template"
            )
        text = tokenizer.chat_template
        if isinstance(text, dict):  # several by name; llama.cpp's converter makes this one the file's
            if "default" not in text:
                raise TemplateError(
                    f"the tokenizer has chat templates named {', '.join(text)}, none of them default; call one of them "
                    "default in tokenizer_config.json",
                    code="no-default-template",
                )
            text = text["default"]
        bos = tokenizer.bos_token_id
        return cls(
            text=text,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token or "",
            adds_bos=bos is not None and tokenizer("text")["input_ids"][0] == bos,
        )

    def render(
        self,
        messages: Conversation,
        *,
        add_generation_prompt: bool = False,
        tools: Tools | None = None,
    ) -> str:
        """Return the messages as the model reads them; with `add_generation_prompt`, up to where its answer begins.

        The text contains the special tokens that the template writes, BOS included, so it is tokenized without adding
        any. A template that asks for the date gets a fixed one. `tools` are definitions in OpenAI's form. Raises
        TemplateError if the template refuses the messages.
        """
        if is_document(messages):
            return str(messages[0]["content"])
        if not all(map(_is_text_message, messages)):
            messages = self.form.adapt(messages)
        return self._render(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def _render(
        self, messages: Conversation, *, add_generation_prompt: bool = False, tools: Tools | None = None
    ) -> str:
        context = {
            "messages": messages,
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
        }
        try:
            template, variables = _compile(self.text)
            rendered = bounded_jinja.render(template, {**variables, **context})
            rendered.encode()  # half a surrogate pair has no form in UTF-8
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template's line {error.lineno} is not valid Jinja: {_join_lines(error)}",
                code="template-syntax",
            ) from None
        except bounded_jinja.TemplateLimitError as error:
            raise TemplateError(f"the chat template: {error}; use another", code="template-limit") from None
        except Exception as error:  # a template is a program: it may fail in any way
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise TemplateError(
                f"the chat template refuses the roles [{roles}]: {_join_lines(error)}; give conversations in its form",
                code="template-refuses",
            ) from None
        return rendered

    @cached_property
    def form(self) -> MessageForm:
        """The form in which the template reads thoughts and calls."""
        return find_form(self._render)

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template writes the definitions of tools."""
        try:
            return EXAMPLE_TOOL["function"]["name"] in self.render([QUESTION], tools=[EXAMPLE_TOOL])
        except TemplateError:
            return False

    def split_answer(self, messages: Conversation, tools: Tools | None = None) -> SplitAnswer:
        """Split the rendered conversation at its last message, which is the answer.

        The prompt is the one of inference. The three texts make up `render(messages)`, except for a template that
        writes earlier messages differently once there is an answer, or opens the thought in its generation prompt and
        writes none. What follows the answer begins with the end token, possibly after white space. Raises TemplateError
        if the answer is not written right after the prompt, or not as it is.
        """
        if is_document(messages):
            return SplitAnswer("", self.render(messages), self.eos_token)
        prompt = self.render(messages[:-1], add_generation_prompt=True, tools=tools)
        text = self.render(messages, tools=tools)
        last = messages[-1]
        thought, answer = split_thought(last)
        answer = answer.strip()
        written = text[len(prompt) :] if text.startswith(prompt) else None
        if (opened := _OPENED_THOUGHT.search(prompt)) and (written is None or thought not in written):
            written = _close_thought(thought, text, prompt, opened) or written
        if written is None:
            # Mistral Nemo's writes the system message only where a request comes last: then the answer is written as
            # after that request alone.
            start = max((at for at, message in enumerate(messages[:-1]) if message["role"] == "user"), default=0)
            if start > 0:
                return self.split_answer(messages[start:], tools)._replace(prompt=prompt)
            switched = (
                "; the answer has a thought, and the template may have been told to write none" if thought else ""
            )
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
        if answer not in written[start:]:
            raise TemplateError(
                f"the chat template does not write the answer {_shorten(answer)} as it is; use one that does",
                code="answer-not-written",
            )
        for tool in tools or []:
            if (name := tool["function"]["name"]) not in prompt or not self.writes_tools:
                raise TemplateError(
                    f"the chat template does not write the tool {name!r}; use one that does", code="tools-not-written"
                )
        history = self._render_history(messages[:-1], prompt, tools)
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
            end = self._find_end_of_calls(messages, written, tools)
        else:
            end = written.index(answer, start) + len(answer)
        return SplitAnswer(prompt, written[:end], written[end:])

    def _render_history(self, messages: Conversation, prompt: str, tools: Tools | None) -> str:
        """Return the prompt without the definitions of tools, in which the names of functions stand too."""
        if not tools or not any(message.get("tool_calls") for message in messages):
            return prompt
        try:
            return self.render(messages)
        except TemplateError:
            return prompt

    def _find_end_of_calls(self, messages: Conversation, written: str, tools: Tools | None) -> int:
        """Return where the calls end: they take the place of a text, so what ends that ends them, or another token."""
        with_text = [*messages[:-1], {"role": "assistant", "content": ANSWER}]
        rest = self.split_answer(with_text, tools).rest
        if written.endswith(rest):
            return len(written.removesuffix(rest).rstrip())
        if not (end := _LAST_MARKER.search(written)):
            raise TemplateError(
                "the chat template ends a tool call in another way than a text; use one that does not",
                code="tool-call-end",
            )
        return end.start()

    @cached_property
    def answer_prefix(self) -> str:
        r"""What the template writes between its generation prompt and a plain answer; empty if only white space.

        Empty for most; `<think>\n\n</think>\n\n` for Qwen3. A model trained on this template begins its answers with
        it, so it is removed before an answer is compared with its reference.
        """
        question_and_answer = [QUESTION, {"role": "assistant", "content": ANSWER}]
        try:
            answer = self.split_answer(question_and_answer).answer
        except TemplateError:
            if not self.writes_tools:
                raise
            answer = self.split_answer(question_and_answer, [EXAMPLE_TOOL]).answer  # one for requests with tools alone
        prefix = answer.removesuffix(ANSWER)
        return prefix if prefix.strip() else ""


@lru_cache
def _compile(text: str) -> tuple[jinja2.Template, dict[str, Any]]:
    """Return the template, and its variables besides the conversation."""
    template = bounded_jinja.compile_template(text)
    return template, {**template.globals, "strftime_now": FIXED_DATE.strftime}


def _is_text_message(message: Message) -> bool:
    content = message.get("content")
    return message.keys() == _TEXT_MESSAGE and isinstance(content, str) and "</think>" not in content


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


def _join_lines(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
