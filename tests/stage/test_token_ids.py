"""What llama.cpp reads is what transformers read in training, token by token, with a toy's vocabulary and real ones."""

import random
import re
import unicodedata

import pytest
from gguf_models import llama3, qwen, tiny  # noqa: F401 - fixtures

from lathe.common import paths
from lathe.gguf import tokenizer_parity
from lathe.inference.general_text import read_paragraphs
from lathe.models.tokenizer_template import read_chat_template
from lathe.sources.builtin import household_commands

PIECES = [piece for text in tokenizer_parity.SAMPLE_TEXTS for piece in re.split(r"(?<=\s)", text) if piece]
JOINTS = ["", "", "", " ", "  ", "\n", "\n\n", "\t", "\u00a0", "\u3000", " \n ", "\r\n", "0", "'s", "🙂", "—"]


def mixtures(count: int) -> list[str]:
    """Pieces of many scripts, code and numbers, joined in ways that nobody would think of."""
    draw = random.Random(1)
    texts = []
    for _ in range(count):
        parts = [draw.choice(PIECES) + draw.choice(JOINTS) for _ in range(draw.randint(1, 12))]
        texts.append(unicodedata.normalize("NFC", "".join(parts)))
    return texts


@pytest.mark.parametrize("vocabulary", ["tiny", "qwen", pytest.param("llama3", marks=pytest.mark.slow)])
def test_every_text_and_every_chat_has_the_same_ids_in_llama_cpp(vocabulary, request):
    from transformers import AutoTokenizer

    made = request.getfixturevalue(vocabulary)
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    texts = [*tokenizer_parity.SAMPLE_TEXTS, *read_paragraphs(paths.ROOT / "data/general.txt"), *mixtures(200)]
    answers = [text for text in texts if text.strip()]
    chats = [row["messages"] for row in household_commands.make_rows(1)["test"][:100]]
    chats += [
        [
            {"role": "system", "content": f"Answer in the language of {request}."},
            {"role": "user", "content": request},
            {"role": "assistant", "content": answer.strip()},
        ]
        for request, answer in zip(answers[::2], answers[1::2], strict=False)
    ]
    template = read_chat_template(tokenizer)
    rows = [template.render(chat) for chat in chats]
    rows += [template.render(chat[:-1], add_generation_prompt=True) for chat in chats]
    assert tokenizer_parity.check_tokens(made.folder, made.gguf, [*texts, *rows]) > 20_000
