"""Chat template: how messages become the text that a model reads, and where in it the answer is.

One template everywhere: training, evaluation, generation and chat call `ChatTemplate.render`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Self

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from lathe.common.errors import InputError

Message = Mapping[str, Any]
Conversation = Sequence[Message]

# What `strftime_now` formats in templates that state the date (Llama 3, SmolLM3); the current date would make two runs
# differ. It is the fallback in Llama 3's own template.
FIXED_DATE = datetime(2024, 7, 26)

_TEXT_MESSAGE = {"role", "content"}


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
        bos = tokenizer.bos_token_id
        return cls(
            text=tokenizer.chat_template,
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token or "",
            adds_bos=bos is not None and tokenizer("text")["input_ids"][0] == bos,
        )

    def render(
        self,
        messages: Conversation,
        *,
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """Return the messages as the model reads them; with `add_generation_prompt`, up to where its answer begins.

        The text contains the special tokens that the template writes, BOS included, so it is tokenized without adding
        any. A template that asks for the date gets a fixed one. Raises TemplateError if the template refuses the
        messages.
        """
        try:
            template, variables = _compile(self.text)
            if tools is None and all(map(_is_text_message, messages)):
                # What render_jinja_template adds, copies of the messages above all, takes longer than the rendering.
                context = {
                    **variables,
                    "messages": messages,
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                    "bos_token": self.bos_token,
                    "eos_token": self.eos_token,
                }
                return "".join(template.root_render_func(template.new_context(context, shared=True)))
            texts, _ = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.text,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
            )
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template's line {error.lineno} is not valid Jinja: {_join_lines(error)}",
                code="template-syntax",
            ) from None
        except (jinja2.TemplateError, TypeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise TemplateError(
                f"the chat template refuses the roles [{roles}]: {_join_lines(error)}; give conversations in its form",
                code="template-refuses",
            ) from None
        return texts[0]

    def split_answer(self, messages: Conversation) -> SplitAnswer:
        """Split the rendered conversation at its last message, which is the answer.

        The prompt is the one of inference. The three texts make up `render(messages)`, except for a template that
        writes earlier messages differently once there is an answer. What follows the answer begins with the end token,
        possibly after white space. Raises TemplateError if the answer is not written right after the prompt, or not as
        it is.
        """
        prompt = self.render(messages[:-1], add_generation_prompt=True)
        text = self.render(messages)
        if not text.startswith(prompt):
            # Mistral Nemo's writes the system message only where a request comes last: then the answer is written as
            # after that request alone.
            start = max((at for at, message in enumerate(messages[:-1]) if message["role"] == "user"), default=0)
            if start > 0:
                return self.split_answer(messages[start:])._replace(prompt=prompt)
            raise TemplateError(
                f"the chat template's generation prompt ends with {prompt[-20:]!r}, but its answers do not begin so; "
                "use a template whose generation prompt is how it writes answers",
                code="generation-prompt",
            )
        written = text[len(prompt) :]
        # Many templates rewrite reasoning before the answer proper; the answer itself is only stripped.
        answer = str(messages[-1]["content"]).rpartition("</think>")[2].strip()
        if answer not in written:
            raise TemplateError(
                f"the chat template does not write the answer {_shorten(answer)} as it is; use one that does",
                code="answer-not-written",
            )
        for message in messages:
            if message["role"] == "tool" or message.get("tool_calls"):
                _check_tools_are_written(message, written if message is messages[-1] else prompt)
        if messages[-1].get("tool_calls"):
            # Only the template knows where calls end: they take the place of a text, so what ends that ends them.
            with_text = [*messages[:-1], {"role": "assistant", "content": "an answer"}]
            rest = self.split_answer(with_text).rest
            end = len(written.removesuffix(rest).rstrip())
            if not written.endswith(rest):
                raise TemplateError(
                    "the chat template ends a tool call in another way than a text; use one that does not",
                    code="tool-call-end",
                )
        else:
            end = written.index(answer) + len(answer)
        return SplitAnswer(prompt, written[:end], written[end:])

    @cached_property
    def answer_prefix(self) -> str:
        r"""What the template writes between its generation prompt and a plain answer; empty if only white space.

        Empty for most; `<think>\n\n</think>\n\n` for Qwen3. A model trained on this template begins its answers with
        it, so it is removed before an answer is compared with its reference.
        """
        question_and_answer = [
            {"role": "user", "content": "a question"},
            {"role": "assistant", "content": "an answer"},
        ]
        prefix = self.split_answer(question_and_answer).answer.removesuffix("an answer")
        return prefix if prefix.strip() else ""


@lru_cache
def _compile(text: str) -> tuple[jinja2.Template, dict[str, Any]]:
    """Return the template as transformers compiles it, and its variables besides the conversation."""
    template = _compile_jinja_template(text)
    template.environment.globals["strftime_now"] = FIXED_DATE.strftime
    return template, dict(template.globals)


def _is_text_message(message: Message) -> bool:
    return message.keys() == _TEXT_MESSAGE and isinstance(message["content"], str)


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
    return " ".join(str(error).split()).rstrip(".")
