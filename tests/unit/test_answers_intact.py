"""Rendered, tokenised and masked with real vocabularies and templates, every answer comes back whole."""

import functools
import itertools
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from gguf_models import read_vocabulary
from samples import conversations, tool_conversations

from lathe.common import paths
from lathe.models.loss_mask import encode
from lathe.models.templates import builtin_templates

pytestmark = pytest.mark.heavy

ROWS = 200

REAL = paths.LLAMA_CPP / "models/templates"

# As Llama-2-7b-chat's tokenizer_config.json has it.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

# As Mistral-7B-Instruct-v0.1's has it.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

# name: vocabulary, template, how it writes an answer, the token that ends it, whether it takes a system message
STYLES: dict[str, tuple[str, str | Path, Any, str, bool]] = {
    "Qwen2.5": ("qwen2", REAL / "Qwen-Qwen2.5-7B-Instruct.jinja", str, "<|im_end|>", True),
    "Qwen3": (
        "qwen2",
        REAL / "Qwen-Qwen3-0.6B.jinja",
        lambda answer: "<think>\n\n</think>\n\n" + answer.lstrip("\n"),
        "<|im_end|>",
        True,
    ),
    "Llama 2": ("llama-spm", LLAMA2, lambda answer: f" {answer.strip()} ", "</s>", True),
    "Llama 3.1": ("llama-bpe", REAL / "meta-llama-Llama-3.1-8B-Instruct.jinja", str.strip, "<|eot_id|>", True),
    "Mistral 7B": ("llama-spm", MISTRAL, str, "</s>", False),
    "Mistral Nemo": ("llama-spm", REAL / "mistralai-Mistral-Nemo-Instruct-2407.jinja", str, "</s>", True),
    "chatml": ("qwen2", builtin_templates.read_template("chatml"), str, "<|im_end|>", True),
    "llama-3": ("llama-bpe", builtin_templates.read_template("llama-3"), str.strip, "<|eot_id|>", True),
    "mistral": ("llama-spm", builtin_templates.read_template("mistral"), lambda answer: f" {answer}", "</s>", True),
    "plain on Llama 2": ("llama-spm", builtin_templates.read_template("plain"), str, "</s>", True),
    "plain on Qwen": ("qwen2", builtin_templates.read_template("plain"), str, "<|endoftext|>", True),
}

CALLING = ("Qwen2.5", "Qwen3", "Llama 3.1", "Mistral Nemo", "chatml", "llama-3")


@pytest.fixture(scope="module")
def vocabularies():
    """Return a function that loads a real vocabulary by the name of its GGUF, once."""

    @functools.cache
    def load(name):
        return read_vocabulary(f"ggml-vocab-{name}.gguf")

    return load


@pytest.fixture(params=STYLES)
def style(request):
    return request.param


def prepared(vocabularies, style):
    vocabulary, template, written, end, system = STYLES[style]
    tokenizer = vocabularies(vocabulary)
    tokenizer.chat_template = template.read_text() if isinstance(template, Path) else template
    return tokenizer, written, end, system


def test_every_answer_of_every_turn_comes_back_whole_with_its_end_token(vocabularies, style):
    tokenizer, written, end, system = prepared(vocabularies, style)
    chats = conversations(ROWS, seed=1, system=system)
    learnt = by_row(tokenizer, encode(tokenizer, chats, supervise="all"))
    for row, chat in enumerate(chats):
        answers = [message["content"] for message in chat if message["role"] == "assistant"]
        assert learnt[row] == [normal(tokenizer, written(answer)) + end for answer in answers], (style, row)


def test_the_last_answer_alone_comes_back_whole(vocabularies, style):
    tokenizer, written, end, system = prepared(vocabularies, style)
    chats = conversations(40, seed=2, system=system)
    learnt = by_row(tokenizer, encode(tokenizer, chats, supervise="last"))
    for row, chat in enumerate(chats):
        assert learnt[row] == [normal(tokenizer, written(chat[-1]["content"])) + end], (style, row)


@pytest.mark.parametrize("style", CALLING, indirect=True)
def test_tool_calls_are_learnt_whole_and_what_the_tool_says_is_not(vocabularies, style):
    tokenizer, written, end, _ = prepared(vocabularies, style)
    chats = tool_conversations(ROWS, seed=3)
    sequences = encode(tokenizer, chats, supervise="all")
    learnt = by_row(tokenizer, sequences)
    for row, chat in enumerate(chats):
        call, *answers = [message for message in chat if message["role"] == "assistant"]
        found = learnt[row]
        assert found[0].endswith(end)
        assert found[0].count(end) == 1
        assert "weather" in found[0]
        for key in call["tool_calls"][0]["function"]["arguments"]:
            assert f'"{key}"' in found[0]
        assert found[1:] == [normal(tokenizer, written(answer["content"])) + end for answer in answers], (style, row)


def by_row(tokenizer, sequences) -> dict[int, list[str]]:
    """Return the texts of the supervised runs by row."""
    found: dict[int, list[str]] = {}
    for sequence in sequences:
        stop, before = 0, ""
        for learnt, run in itertools.groupby(sequence.supervised):
            stop += len(list(run))
            whole = tokenizer.decode(sequence.input_ids[:stop], clean_up_tokenization_spaces=False)
            if learnt:
                found.setdefault(sequence.row, []).append(whole[len(before) :])
            before = whole
    return found


def normal(tokenizer, text: str) -> str:
    """Return the text as the vocabulary's own normaliser leaves it: Qwen's composes."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return unicodedata.normalize("NFC", text) if "NFC" in repr(normalizer) else text
