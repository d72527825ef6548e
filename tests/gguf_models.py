"""Small models with real vocabularies, and their GGUF files, made once per test run."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import preloaded
import pytest
from filelock import FileLock
from shared import made_once

from lathe.common import paths
from lathe.gguf import convert as converter

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
    return made_with_gguf(tmp_path_factory, "random", lambda folder: make_llama(folder, _leave_random))


@pytest.fixture(scope="session")
def countdown(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A Llama that answers token 300 with 299, 298, … down to the end token 4, `<|im_end|>`, and its f16 GGUF."""
    return made_with_gguf(tmp_path_factory, "countdown", lambda folder: make_llama(folder, _count_down))


@pytest.fixture(scope="session")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A Llama of one layer that has read household documents for some seconds, and its f16 GGUF."""
    return made_with_gguf(tmp_path_factory, "learnt", _make_learnt)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random Qwen3 with the real Qwen2 vocabulary, rows of 64 weights, and its f16 GGUF."""
    return made_with_gguf(tmp_path_factory, "qwen", make_qwen3)


@pytest.fixture(scope="session")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random Llama with the real Llama 3 vocabulary, rows of 64 weights, and its f16 GGUF."""
    return made_with_gguf(tmp_path_factory, "llama3", make_llama3)


@pytest.fixture
def quantize_program(tmp_path: Path) -> Path:
    """A program with the command line of llama.cpp's `llama-quantize`, over the library that it is made of.

    The program itself takes minutes to build.
    """
    file, script = tmp_path / "llama-quantize", tmp_path / "llama_quantize.py"
    lines = (
        "import sys",
        "from pathlib import Path",
        "from lathe.gguf.quantize import quantize",
        "*given, source, out, name, threads = sys.argv[1:]",
        "options = {'tensor_types': []}",
        "for option, value in zip(given[::2], given[1::2], strict=True):",
        "    if option == '--tensor-type':",
        "        options['tensor_types'].append(value)",
        "    else:",
        "        key = {'--imatrix': 'importance'}.get(option, option.strip('-').replace('-', '_'))",
        "        options[key] = Path(value) if key == 'importance' else value",
        "print('quantizing with a program of its own')",
        f"Path({str(file)!r} + '.used').touch()",
        "quantize(Path(source), Path(out), type=name, threads=int(threads), **options)",
    )
    script.write_text("\n".join(lines) + "\n")
    # Not in one file: the path of an interpreter behind #! may hold no space.
    file.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{script}' \"$@\"\n")
    file.chmod(0o755)
    return file


def made_with_gguf(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Made:
    """Return the model folder that `make` fills, made once per run, and its f16 GGUF beside it."""

    def make_both(folder: Path) -> None:
        make(folder)
        convert(folder, folder.with_suffix(".gguf"))

    folder = made_once(factory, name, make_both)
    return Made(folder, folder.with_suffix(".gguf"))


def convert(folder: Path, out: Path, **options: Any) -> Path:
    """Convert with this repository's converter."""
    arguments = {"outtype": "f16", "llama_cpp": paths.LLAMA_CPP, "metadata": METADATA, **options}
    with preloaded.forking():
        converter.convert(folder, out, **arguments)
    return out


def make_llama(folder: Path, finish: Callable[[Any], None], **shape: int) -> None:
    """Fill a new folder with a small Llama of rows of 256 weights, unless `shape` differs, changed by `finish`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    tokenizer = sentencepiece_tokenizer(folder, CHAT_TEMPLATE)
    torch.manual_seed(1)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, **shape}
    config = LlamaConfig(
        **sizes,
        vocab_size=len(tokenizer),
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


def sentencepiece_tokenizer(folder: Path, template: str) -> Any:
    """Train a vocabulary of 400 pieces on household commands, and return it as a tokenizer of Llama's."""
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
        chat_template=template,
    )


def _make_learnt(folder: Path) -> None:
    from dataclasses import replace

    from lathe.sources.builtin import tiny_model

    folder.mkdir()
    recipe = replace(
        tiny_model.RECIPE, intermediate_size=256, num_hidden_layers=1, documents=1600, steps=100, batch_size=16
    )
    tiny_model.build(folder, 1, recipe)


def make_qwen3(folder: Path) -> None:
    """Fill a new folder with a random Qwen3 that has the real Qwen2 vocabulary and Qwen3's own chat template."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = _real_tokenizer("ggml-vocab-qwen2.gguf", "Qwen-Qwen3-0.6B.jinja", eos_token="<|im_end|>")
    config = Qwen3Config(
        vocab_size=151936, head_dim=16, tie_word_embeddings=True, bos_token_id=None, eos_token_id=151645, **_SMALL
    )
    _save(Qwen3ForCausalLM, config, tokenizer, folder)


def make_qwen3_moe(folder: Path) -> None:
    """Fill a new folder with a random Qwen3 of four experts, two to a token and the real Qwen2 vocabulary."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = _real_tokenizer("ggml-vocab-qwen2.gguf", "Qwen-Qwen3-0.6B.jinja", eos_token="<|im_end|>")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}
    config = Qwen3MoeConfig(
        vocab_size=151936,
        head_dim=16,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=151645,
        **experts,
        **_SMALL,
    )
    _save(Qwen3MoeForCausalLM, config, tokenizer, folder)


def make_llama3(folder: Path) -> None:
    """Fill a new folder with a random Llama that has the real Llama 3 vocabulary and its own chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    template = "meta-llama-Llama-3.1-8B-Instruct.jinja"
    tokenizer = _real_tokenizer("ggml-vocab-llama-bpe.gguf", template, eos_token="<|eot_id|>")
    # One more than Llama 3 has: reading the vocabulary from GGUF, transformers adds an <|endoftext|>.
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=128000, eos_token_id=128009, **_SMALL)
    _save(LlamaForCausalLM, config, tokenizer, folder)


_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def _real_tokenizer(vocabulary: str, template: str, eos_token: str) -> Any:
    tokenizer = read_vocabulary(vocabulary)
    tokenizer.eos_token = eos_token
    tokenizer.chat_template = (paths.LLAMA_CPP / "models/templates" / template).read_text()
    return tokenizer


def read_vocabulary(file: str) -> Any:
    """Return the tokenizer of a vocabulary that llama.cpp's source comes with.

    transformers takes many seconds to read it from GGUF, so it is kept as tokenizer.json for the processes and the runs
    that follow, unless what is kept would read text in another way.
    """
    import transformers

    models = paths.LLAMA_CPP / "models"
    kept = paths.ROOT / ".pytest_cache/vocabularies" / f"{file}-{transformers.__version__}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_name(f"{kept.name}.lock")):
        if kept.is_dir():
            return _load_kept_tokenizer(kept)
        tokenizer = transformers.AutoTokenizer.from_pretrained(models, gguf_file=file)
        with tempfile.TemporaryDirectory(dir=kept.parent) as name:
            partial = Path(name) / "tokenizer"
            tokenizer.save_pretrained(partial)
            again = _load_kept_tokenizer(partial)
            if (type(again), again.backend_tokenizer.to_str(), again.special_tokens_map) == (
                type(tokenizer),
                tokenizer.backend_tokenizer.to_str(),
                tokenizer.special_tokens_map,
            ):
                partial.rename(kept)
        return tokenizer


def _load_kept_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    # The class of some kinds sets a normalizer, which it does not where it reads GGUF.
    tokenizer._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer


def _save(kind: Any, config: Any, tokenizer: Any, folder: Path) -> None:
    import torch

    torch.manual_seed(1)
    kind(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rewrite(source: Path, out: Path, changes: dict[str, Any] | None = None, *, tensors: bool = True) -> Path:
    """Copy a GGUF file with some metadata changed, or left out where the new value is None."""
    import gguf

    changes = changes or {}
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, str(changes.get("general.architecture", "llama")))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in {"general.architecture", *changes}:
            continue
        kind, *inner = field.types
        writer.add_key_value(field.name, field.contents(), kind, inner[0] if inner else None)
    kinds = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    kinds[bool] = gguf.GGUFValueType.BOOL
    for key, value in changes.items():
        if value is not None and key != "general.architecture":
            writer.add_key_value(key, value, kinds[type(value)])
    for tensor in reader.tensors if tensors else []:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
