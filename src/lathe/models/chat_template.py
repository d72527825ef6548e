"""From chat messages to text and token ids, through the model's own chat template.

One template everywhere: training, evaluation and generation call `render`, and `encode` tokenises what it returns.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from lathe.common.errors import InputError

Message = Mapping[str, Any]
Conversation = Sequence[Message]

# What `strftime_now` formats in templates that state the date (Llama 3, SmolLM3); the current date would make two runs
# differ. It is the fallback that Llama 3's own template holds.
TODAY = datetime(2024, 7, 26)

_TEXT_MESSAGE = {"role", "content"}


class TemplateError(InputError):
    """A conversation that the chat template cannot render as a prompt and an answer."""


def render(
    chat_template: str,
    messages: Conversation,
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """Return the messages as the model reads them; with `add_generation_prompt`, up to where its answer begins.

    The text holds whatever special tokens the template writes, BOS among them, so it is tokenised without adding any.
    A template that asks for the date gets a fixed one. Raises TemplateError where the template refuses the messages.
    """
    try:
        template, known = _compiled(chat_template)
        if tools is None and all(map(_is_text_message, messages)):
            # What render_jinja_template adds, copies of the messages above all, takes longer than the rendering.
            context = {
                **known,
                "messages": messages,
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                "bos_token": bos_token,
                "eos_token": eos_token,
            }
            return "".join(template.root_render_func(template.new_context(context, shared=True)))
        texts, _ = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
        )
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the chat template's line {error.lineno} is not valid Jinja: {_line(error)}") from None
    except (jinja2.TemplateError, TypeError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise TemplateError(
            f"the chat template refuses the roles [{roles}]: {_line(error)}; give conversations in its form"
        ) from None
    return texts[0]


def render_for(tokenizer: Any, messages: Conversation, *, add_generation_prompt: bool = False) -> str:
    """Return `render` with a Hugging Face tokenizer's template and special tokens."""
    return render(
        tokenizer.chat_template,
        messages,
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
        add_generation_prompt=add_generation_prompt,
    )


def prompt_and_answer(
    chat_template: str, messages: Conversation, *, bos_token: str, eos_token: str
) -> tuple[str, str, str]:
    """Return the prompt of the last message, the answer as the template writes it behind, and what it adds at the end.

    The prompt is the one of inference. The three texts make up `render(messages)`, but for a template that writes
    earlier messages otherwise once there is an answer; the last begins with the end token, after white space perhaps.
    Raises TemplateError where an answer is not written behind the prompt, or not as it is.
    """
    prompt = render(chat_template, messages[:-1], bos_token=bos_token, eos_token=eos_token, add_generation_prompt=True)
    whole = render(chat_template, messages, bos_token=bos_token, eos_token=eos_token)
    if not whole.startswith(prompt):
        # Mistral Nemo's writes the system message only where a request comes last: then the answer is written as
        # behind that request alone.
        start = max((at for at, message in enumerate(messages[:-1]) if message["role"] == "user"), default=0)
        if start > 0:
            return prompt, *prompt_and_answer(
                chat_template, messages[start:], bos_token=bos_token, eos_token=eos_token
            )[1:]
        raise TemplateError(
            f"the chat template's generation prompt ends with {prompt[-20:]!r}, but its answers do not begin so; "
            "use a template whose generation prompt is how it writes answers"
        )
    written = whole[len(prompt) :]
    # Reasoning before the answer proper is rewritten by many templates; the answer itself is only stripped.
    answer = str(messages[-1]["content"]).rpartition("</think>")[2].strip()
    if answer not in written:
        raise TemplateError(f"the chat template does not write the answer {_shown(answer)} as it is; use one that does")
    for message in messages:
        if message["role"] == "tool" or message.get("tool_calls"):
            _check_tools_are_written(message, written if message is messages[-1] else prompt)
    if messages[-1].get("tool_calls"):
        # Where calls end only the template knows: they take the place of a text, so what ends that ends them.
        text = [*messages[:-1], {"role": "assistant", "content": "an answer"}]
        _, _, rest = prompt_and_answer(chat_template, text, bos_token=bos_token, eos_token=eos_token)
        end = len(written.removesuffix(rest).rstrip())
        if not written.endswith(rest):
            raise TemplateError("the chat template ends a tool call in another way than a text; use one that does not")
    else:
        end = written.index(answer) + len(answer)
    return prompt, written[:end], written[end:]


def answer_lead(chat_template: str, *, bos_token: str, eos_token: str) -> str:
    r"""Return what the template writes between its generation prompt and a plain answer, white space aside.

    Empty for most; `<think>\n\n</think>\n\n` for Qwen3. A model trained by `encode` begins its completions with it, so
    it is to be removed before a completion is compared with the bare answer.
    """
    probe = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    _, written, _ = prompt_and_answer(chat_template, probe, bos_token=bos_token, eos_token=eos_token)
    lead = written.removesuffix("an answer")
    return lead if lead.strip() else ""


@lru_cache
def _compiled(chat_template: str) -> tuple[jinja2.Template, dict[str, Any]]:
    """Return the template as transformers compiles it, and what it knows besides the conversation."""
    template = _compile_jinja_template(chat_template)
    template.environment.globals["strftime_now"] = TODAY.strftime
    return template, dict(template.globals)


def _is_text_message(message: Message) -> bool:
    return message.keys() == _TEXT_MESSAGE and isinstance(message["content"], str)


def _check_tools_are_written(message: Message, rendered: str) -> None:
    """Raise TemplateError where a tool's answer, or a call of one, is not in the rendering."""
    expected = [str(message["content"]).strip()] if message["role"] == "tool" else []
    for call in message.get("tool_calls") or []:
        expected += [call["function"]["name"], *call["function"]["arguments"]]
    for text in expected:
        if text not in rendered and json.dumps(text, ensure_ascii=False)[1:-1] not in rendered:
            what = "tool message" if message["role"] == "tool" else "tool call"
            raise TemplateError(f"the chat template does not write the {what} {_shown(text)}; use one that does")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
