"""Rows longer than the model is to read, made shorter."""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Literal

Messages = list[dict[str, Any]]

# The tokens of a conversation's longest sequence; None where the template refuses it.
Measure = Callable[[Messages], int | None]

Side = Literal["prompt", "answer"]


def truncated(messages: Messages, side: Side, max_length: int, measure: Measure, tokenizer: Any) -> Messages | None:
    """Return the conversation with what stands before its last answer, or with that answer, made to fit; else None.

    `prompt`: earlier turns go whole, the oldest first and a system message never; if the last turn alone is too long,
    the middle of what its user says goes. No answer is cut: those of the turns that stay are whole.
    `answer`: later turns go whole, the last first; if the answer that is then the last one is too long, its end goes.

    Texts are cut between tokens, messages and turns stay whole otherwise, so that the template's frame stays valid.
    """
    fit = _Fit(max_length, measure, tokenizer)
    return fit.prompt(messages) if side == "prompt" else fit.answer(messages)


class _Fit:
    def __init__(self, max_length: int, measure: Measure, tokenizer: Any) -> None:
        self.max_length = max_length
        self.measure = measure
        self.backend = tokenizer.backend_tokenizer

    def prompt(self, messages: Messages) -> Messages | None:
        system = messages[:1] if messages[0]["role"] == "system" else []
        turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if not turns:
            return None
        first = bisect_left(turns, True, key=lambda turn: self.fits([*system, *messages[turn:]]))
        if first < len(turns):
            return [*system, *messages[turns[first] :]]
        return self.cut([*system, *messages[turns[-1] :]], len(system), ends=True)

    def answer(self, messages: Messages) -> Messages | None:
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        # The last answer that has room for its beginning at least.
        without_room = bisect_left(answers, True, key=lambda index: not self.begins(messages[: index + 1]))
        if not without_room:
            return None
        last = answers[without_room - 1]
        if self.fits(messages[: last + 1]):
            return messages[: last + 1]
        return self.cut(messages[: last + 1], last, ends=False)

    def begins(self, messages: Messages) -> bool:
        text = messages[-1]["content"]
        spans = self.spans(text)
        return bool(spans) and self.fits(_with_text(messages, len(messages) - 1, text[: spans[0][1]]))

    def fits(self, messages: Messages) -> bool:
        tokens = self.measure(messages)
        return tokens is not None and tokens <= self.max_length

    def cut(self, messages: Messages, index: int, *, ends: bool) -> Messages | None:
        """Return the conversation with as much of one message's text as fits: both ends of it, or its beginning."""
        text = messages[index]["content"]
        spans = self.spans(text)
        keep = len(spans)
        tokens = self.measure(messages)
        # Tokens at the seam may merge in other ways: what is left is measured again.
        while tokens is not None and tokens > self.max_length:
            keep -= tokens - self.max_length
            if keep < 1:
                return None
            behind = keep // 2 if ends else 0
            end = spans[keep - behind - 1][1]
            begin = max(end, spans[len(spans) - behind][0]) if behind else len(text)
            shorter = text[:end] + text[begin:]
            if not shorter.strip():
                return None
            messages = _with_text(messages, index, shorter)
            tokens = self.measure(messages)
        return None if tokens is None else messages

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return where each token of the text begins and ends in it."""
        offsets: list[tuple[int, int]] = self.backend.encode(text, add_special_tokens=False).offsets
        return offsets


def _with_text(messages: Messages, index: int, text: str) -> Messages:
    return [*messages[:index], {**messages[index], "content": text}, *messages[index + 1 :]]
