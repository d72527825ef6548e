"""Text of a sampled answer: its tokens decoded as llama.cpp decodes them where a GGUF is evaluated."""

from collections.abc import Iterable, Sequence
from typing import Any

from lathe.models.answer_syntax import render_markers
from lathe.models.chat_template import ChatTemplate


class AnswerDecoder:
    """Decodes answers; of the control tokens it shows those that mark thoughts and calls, such as `[TOOL_CALLS]`.

    `ends` are the tokens that end an answer, which are never shown.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate, ends: Iterable[int]) -> None:
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        markers = set(tokenizer(render_markers(template), add_special_tokens=False)["input_ids"]) - set(ends)
        self.tokenizer = tokenizer
        self.hidden = (special | set(tokenizer.all_special_ids) | set(ends)) - markers

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer."""
        shown = [token for token in ids if token not in self.hidden]
        text: str = self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
