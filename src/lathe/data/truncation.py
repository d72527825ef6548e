"""Truncation: conversations that are longer than training.max_length, shortened on one side."""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Literal

Messages = list[dict[str, Any]]

# Counts the tokens of a conversation's longest sequence; None if the chat template refuses the conversation.
CountTokens = Callable[[Messages], int | None]

TruncatedSide = Literal["prompt", "answer"]


def truncate_conversation(
    messages: Messages, side: TruncatedSide, max_length: int, count_tokens: CountTokens, tokenizer: Any
) -> Messages | None:
    """Return the conversation shortened to `max_length` tokens, or None if it cannot be.

    `prompt`: drops earlier turns, the oldest first, and never the system message. If the last turn alone is too long,
    it cuts the middle out of its user message. Answers are not cut: those of the remaining turns stay whole.
    `answer`: drops later turns, the last first. If the last remaining answer is too long, it cuts its end.

    Texts are cut between tokens. Turns are dropped whole, so that the rest is still a conversation for the template.
    """
    truncator = _Truncator(max_length, count_tokens, tokenizer)
    return truncator.truncate_prompt(messages) if side == "prompt" else truncator.truncate_answer(messages)


class _Truncator:
    def __init__(self, max_length: int, count_tokens: CountTokens, tokenizer: Any) -> None:
        self.max_length = max_length
        self.count_tokens = count_tokens
        self.backend = tokenizer.backend_tokenizer

    def truncate_prompt(self, messages: Messages) -> Messages | None:
        system = messages[:1] if messages[0]["role"] == "system" else []
        turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if not turns:
            return None
        first = bisect_left(turns, True, key=lambda turn: self.fits([*system, *messages[turn:]]))
        if first < len(turns):
            return [*system, *messages[turns[first] :]]
        return self.cut_message([*system, *messages[turns[-1] :]], len(system), keep_end=True)

    def truncate_answer(self, messages: Messages) -> Messages | None:
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        # The last answer of which at least the first token fits.
        without_room = bisect_left(answers, True, key=lambda index: not self.fits_with_one_token(messages[: index + 1]))
        if not without_room:
            return None
        last = answers[without_room - 1]
        if self.fits(messages[: last + 1]):
            return messages[: last + 1]
        return self.cut_message(messages[: last + 1], last, keep_end=False)

    def fits_with_one_token(self, messages: Messages) -> bool:
        """Return whether the conversation fits if its last message is cut to its first token."""
        text = messages[-1]["content"]
        spans = self.get_token_spans(text)
        return bool(spans) and self.fits(_replace_content(messages, len(messages) - 1, text[: spans[0][1]]))

    def fits(self, messages: Messages) -> bool:
        tokens = self.count_tokens(messages)
        return tokens is not None and tokens <= self.max_length

    def cut_message(self, messages: Messages, index: int, *, keep_end: bool) -> Messages | None:
        """Return the conversation with one message cut until it fits: its middle (`keep_end`) or its end is removed."""
        text = messages[index]["content"]
        spans = self.get_token_spans(text)
        keep = len(spans)
        tokens = self.count_tokens(messages)
        # Tokens on both sides of the cut may merge, so that the result is counted again.
        while tokens is not None and tokens > self.max_length:
            keep -= tokens - self.max_length
            if keep < 1:
                return None
            kept_at_end = keep // 2 if keep_end else 0
            end = spans[keep - kept_at_end - 1][1]
            begin = max(end, spans[len(spans) - kept_at_end][0]) if kept_at_end else len(text)
            shorter = text[:end] + text[begin:]
            if not shorter.strip():
                return None
            messages = _replace_content(messages, index, shorter)
            tokens = self.count_tokens(messages)
        return None if tokens is None else messages

    def get_token_spans(self, text: str) -> list[tuple[int, int]]:
        """Return the first and the last character offset (exclusive) of each token of the text."""
        offsets: list[tuple[int, int]] = self.backend.encode(text, add_special_tokens=False).offsets
        return offsets


def _replace_content(messages: Messages, index: int, text: str) -> Messages:
    return [*messages[:index], {**messages[index], "content": text}, *messages[index + 1 :]]
