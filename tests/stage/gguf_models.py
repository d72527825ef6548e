"""Small models with real vocabularies, and their GGUF files, made once per test run."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lathe import gguf, paths

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
METADATA = {"lathe.base_revision": "builtin-1", "lathe.dataset_digest": "0123abcd"}


class Made(NamedTuple):
    folder: Path
    gguf: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random Llama with a SentencePiece vocabulary of 400 pieces, rows of 256 weights, and its f16 GGUF."""
    return _llama(tmp_path_factory.getbasetemp() / "random", _leave_random)


@pytest.fixture(scope="session")
def countdown(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A Llama that answers token 300 with 299, 298, … down to the end token 4, `<|im_end|>`, and its f16 GGUF."""
    return _llama(tmp_path_factory.getbasetemp() / "countdown", _count_down)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random Qwen3 with the real Qwen2 vocabulary, rows of 64 weights, and its f16 GGUF."""
    return _qwen(tmp_path_factory.getbasetemp() / "qwen")


def convert(folder: Path, out: Path, **options: Any) -> Path:
    """Convert with this repository's converter."""
    arguments = {"outtype": "f16", "llama_cpp": paths.LLAMA_CPP, "metadata": METADATA, **options}
    gguf.convert(folder, out, **arguments)
    return out


@functools.cache
def _llama(folder: Path, finish: Callable[[Any], None]) -> Made:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    tokenizer = _sentencepiece_tokenizer(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        finish(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Made(folder, convert(folder, folder.with_suffix(".gguf")))


def _leave_random(model: Any) -> None:
    del model


def _count_down(model: Any) -> None:
    # The layers add nothing, so the head sees the last token alone, and finds it again one row earlier.
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    embeddings = model.model.embed_tokens.weight
    embeddings.normal_()
    model.lm_head.weight[:-1] = embeddings[1:]
    model.lm_head.weight[-1] = embeddings[0]


def _sentencepiece_tokenizer(folder: Path) -> Any:
    import sentencepiece
    from transformers import LlamaTokenizer

    rooms = ("attic", "kitchen", "bedroom", "cellar", "garden", "office")
    hours = range(9)
    lines = [f"please switch {how} the {room} lamp at {n}:30" for how in ("on", "off") for room in rooms for n in hours]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        control_symbols=["<|im_start|>", "<|im_end|>", "<pad>"],
        minloglevel=2,
    )
    return LlamaTokenizer.from_pretrained(
        folder,
        add_prefix_space=False,
        legacy=False,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


@functools.cache
def _qwen(folder: Path) -> Made:
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    folder.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(paths.LLAMA_CPP / "models", gguf_file="ggml-vocab-qwen2.gguf")
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE.removeprefix("{{ bos_token }}")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return Made(folder, convert(folder, folder.with_suffix(".gguf")))
