"""Token lengths of rows from their characters: by the model's tokenizer and chat template, or estimated without."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.config.presets import GGUF_SUFFIX

Messages = list[dict[str, Any]]

# Without a tokenizer, cautiously: English prose has about 4 characters a token, JSON and code 3, other scripts 2.
ASSUMED_CHARACTERS = {"latin": 3.0, "other": 2.0}
ASSUMED_TEMPLATE_TOKENS = 64  # of a chat template around a conversation, with a system message of its own


@dataclass(frozen=True)
class LengthsInTokens:
    """How many characters a token has, how many tokens a chat template adds, and how that is known."""

    characters_per_token: float
    template_tokens: int
    source: str

    def count_text(self, characters: int) -> int:
        """Return the tokens of a text of so many characters."""
        return math.ceil(characters / self.characters_per_token)

    def count_row(self, characters: int) -> int:
        """Return the tokens of a conversation of so many characters, as the model reads it."""
        return self.count_text(characters) + self.template_tokens


def measure_token_lengths(tokenizer: Path | None, sample: Sequence[Messages]) -> LengthsInTokens:
    """Return the lengths for conversations such as those of the sample.

    `tokenizer` is a model's folder or GGUF file. Without one, or where it has no chat template, they are assumed.
    """
    try:
        if tokenizer and sample and tokenizer.suffix == GGUF_SUFFIX:
            return _measure_by_gguf(tokenizer, sample)
        if tokenizer and sample and (tokenizer / "tokenizer_config.json").is_file():
            return _measure_by_folder(tokenizer, sample)
    except InputError:  # no chat template, which a preset may give, or one that refuses these messages
        pass
    texts = [_join(messages) for messages in sample]
    characters = sum(map(len, texts))
    other = sum(not character.isascii() for text in texts for character in text)
    ratio = ASSUMED_CHARACTERS["latin" if 4 * other <= characters else "other"]
    return LengthsInTokens(ratio, ASSUMED_TEMPLATE_TOKENS, f"assumed: {ratio:g} characters a token")


def _measure_by_folder(folder: Path, sample: Sequence[Messages]) -> LengthsInTokens:
    from transformers import AutoTokenizer

    from lathe.common.outside_files import translate_errors
    from lathe.models.tokenizer_template import read_chat_template

    with translate_errors(folder.name, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    template = read_chat_template(tokenizer)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return _measure(count, template.render, sample)


def _measure_by_gguf(file: Path, sample: Sequence[Messages]) -> LengthsInTokens:
    from lathe.gguf.llama_model import LlamaModel

    with LlamaModel(file, vocab_only=True) as model:
        return _measure(lambda text: len(model.tokenize(text)), model.chat_template.render, sample)


def _measure(
    count: Callable[[str], int], render: Callable[[Messages], str], sample: Sequence[Messages]
) -> LengthsInTokens:
    texts = [_join(messages) for messages in sample]
    tokens = [count(text) for text in texts]
    added = [count(render(messages)) - own for messages, own in zip(sample, tokens, strict=True)]
    ratio = sum(map(len, texts)) / max(1, sum(tokens))
    return LengthsInTokens(max(ratio, 0.1), max(0, math.ceil(statistics.median(added))), "by the model's tokenizer")


def _join(messages: Messages) -> str:
    return "\n".join(str(message.get("content") or "") for message in messages)
