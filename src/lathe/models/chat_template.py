"""Chat template: how messages become the text that a model reads.

One template everywhere: training, evaluation, generation and chat call `ChatTemplate.render`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

import jinja2
import jinja2.sandbox

from lathe.common import bounded_jinja
from lathe.models.document import is_document
from lathe.models.message_form import QUESTION, Conversation, Message, MessageForm, find_form
from lathe.models.template_error import TemplateError

# Definitions of tools in OpenAI's form: {"type": "function", "function": {"name", "description", "parameters"}}.
Tools = Sequence[Mapping[str, Any]]

# What `strftime_now` formats in templates that state the date (Llama 3, SmolLM3); the current date would make two runs
# differ. It is the fallback in Llama 3's own template.
FIXED_DATE = datetime(2024, 7, 26)

_TEXT_MESSAGE = {"role", "content"}

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
        context = self.list_variables(messages, add_generation_prompt=add_generation_prompt, tools=tools)
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
        except jinja2.sandbox.SecurityError as error:
            raise TemplateError(
                f"the chat template does what transformers forbids: {_join_lines(error)}; use another",
                code="template-forbidden",
            ) from None
        except Exception as error:  # a template is a program: it may fail in any way
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise TemplateError(
                f"the chat template refuses the roles [{roles}]: {_join_lines(error)}; give conversations in its form",
                code="template-refuses",
            ) from None
        return rendered

    def list_variables(
        self, messages: Conversation, *, add_generation_prompt: bool, tools: Tools | None
    ) -> dict[str, Any]:
        """Return what the template gets, by name, with messages that have its `form`."""
        return {
            "messages": messages,
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
        }

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


@lru_cache
def _compile(text: str) -> tuple[jinja2.Template, dict[str, Any]]:
    """Return the template, and its variables besides the conversation."""
    template = bounded_jinja.compile_template(text)
    return template, {**template.globals, "strftime_now": FIXED_DATE.strftime}


def _is_text_message(message: Message) -> bool:
    content = message.get("content")
    return message.keys() == _TEXT_MESSAGE and isinstance(content, str) and "</think>" not in content


def _join_lines(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
