"""Answer reading: what a model's answer to a prompt says and calls, for scores and rewards alike."""

from typing import Any, NamedTuple

from lathe.models.answer_split import find_answer_prefix, split_answer
from lathe.models.answer_syntax import Call, find_call_syntax, find_thought_syntax, list_calls
from lathe.models.chat_template import ChatTemplate, Conversation, Tools
from lathe.models.message_form import THOUGHT


class HeldOutPrompt(NamedTuple):
    """A held-out row as rendered: its prompt, the answer as the template writes it, and the bare reference.

    `tools` are those that an answer may call, and `calls` those of the reference; None where there are neither.
    """

    prompt: str
    answer: str
    reference: str
    tools: Tools | None = None
    calls: list[Call] | None = None

    @property
    def is_document(self) -> bool:
        """Whether it is a raw text, which no prompt stands before."""
        return not self.prompt


def render_prompt(template: ChatTemplate, conversation: Conversation, tools: Tools | None = None) -> HeldOutPrompt:
    """Render a conversation whose last message is the reference."""
    prompt, answer, _ = split_answer(template, conversation, tools)
    last = conversation[-1]
    is_plain = not (last.get("tool_calls") or last.get(THOUGHT))
    reference = str(last["content"]) if is_plain else answer.removeprefix(find_answer_prefix(template))
    calls = list_calls(last) if tools or last.get("tool_calls") else None
    return HeldOutPrompt(prompt, answer, reference, tools, calls)


def read_answer(template: ChatTemplate, row: HeldOutPrompt, text: str) -> dict[str, Any]:
    """Return what is read of an answer and its reference beside their texts, if there is more to them.

    Where one has a thought, `answer` and `reference_answer` are what is said after it. Of a row with tools, `calls` and
    `reference_calls` are the calls; None for `calls` if those of the chat template cannot be told.
    """
    read: dict[str, Any] = {}
    thought = find_thought_syntax(template)
    written = text.removeprefix(find_answer_prefix(template))
    reference = row.reference
    answers = thought.strip(written, prompt=row.prompt), thought.strip(reference)
    if answers != (written, reference):
        read |= {"answer": answers[0], "reference_answer": answers[1]}
    if row.calls is not None:
        syntax = find_call_syntax(template)
        read["calls"] = syntax.read(written, row.tools).calls if syntax else None
        read["reference_calls"] = row.calls
    return read
