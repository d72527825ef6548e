# ruff: noqa: F811 - fixtures are imported, then named as arguments
"""A GGUF file as base model: weights, tokenizer and template as llama.cpp reads them, or a refusal."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import CHAT_TEMPLATE, Made, convert, llama3, qwen, rewrite, tiny  # noqa: F401
from refusals import refused
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lathe.common import paths
from lathe.gguf import tokenizer_parity
from lathe.gguf.description import describe_gguf
from lathe.gguf.llama_model import LlamaModel
from lathe.gguf.quantize import quantize
from lathe.gguf.tensor_list import list_tensors
from lathe.models import model_folder
from lathe.sources import gguf_model
from lathe.sources.gguf_reading import parse_once
from lathe.sources.gguf_tokenizer import save_tokenizer

VOCABULARIES = (
    *("aquila", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm", "phi-3"),
    *("qwen2", "qwen35", "starcoder"),
)
LARGE = ("aquila", "llama-bpe", "qwen35")  # byte pairs as qwen2's, which is tried in the quick run
# Those of which transformers alone gives other ids.
NOT_BY_TRANSFORMERS = {"aquila", "deepseek-coder", "deepseek-llm", "falcon", "llama-spm", "starcoder"}
TEXTS = [*tokenizer_parity.SAMPLE_TEXTS, *gguf_model.make_texts(2000)]


def count_differences(tokenizer: Any, ids: list[list[int]], texts: list[str]) -> int:
    given = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return sum(mine != theirs for mine, theirs in zip(given, ids, strict=True))


def write_model(file: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    return gguf_model.write_model(file, folder)


def describe_vocabulary(file: Path) -> dict[str, Any]:
    """What decides how llama.cpp frames, ends and splits a text."""
    with LlamaModel(file, vocab_only=True) as vocabulary:
        return {
            "bos": vocabulary.bos,
            "eos": vocabulary.eos,
            "adds_bos": vocabulary.adds_bos,
            "ends": [token for token in range(vocabulary.n_vocab) if vocabulary.is_end(token)],
            "texts": [vocabulary.get_token_text(token) for token in range(vocabulary.n_vocab)],
            "ids": [vocabulary.tokenize(text, add_special=True) for text in TEXTS],
            "pre": vocabulary.metadata.get("tokenizer.ggml.pre"),
            "chat_template": vocabulary.metadata.get("tokenizer.chat_template"),
        }


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in VOCABULARIES]
)
def test_the_ids_of_a_real_vocabulary_are_those_of_llama_cpp(tmp_path: Path, name: str) -> None:
    file = paths.LLAMA_CPP / f"models/ggml-vocab-{name}.gguf"
    with parse_once():
        save_tokenizer(file, tmp_path, describe_gguf(file)["metadata"])
        by_transformers = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    with LlamaModel(file, vocab_only=True) as vocabulary:
        special = gguf_model.mention_special_tokens(saved)
        ids = [vocabulary.tokenize(text) for text in [*TEXTS, *special]]
        assert count_differences(saved, ids, [*TEXTS, *special]) == 0
        assert (count_differences(by_transformers, ids[: len(TEXTS)], TEXTS) > 0) == (name in NOT_BY_TRANSFORMERS)
        assert saved("text")["input_ids"] == vocabulary.tokenize("text", add_special=True)
        assert saved.bos_token_id == vocabulary.bos or not vocabulary.adds_bos
        assert vocabulary.is_end(saved.eos_token_id)
        assert len(saved) <= vocabulary.n_vocab
        assert saved.decode(saved("Straße, 12 <x>", add_special_tokens=False)["input_ids"]).strip() == "Straße, 12 <x>"


@pytest.mark.parametrize("name", ["tiny", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen", "llama3"))])
def test_a_model_comes_back_from_its_gguf(tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    made: Made = request.getfixturevalue(name)
    origin = write_model(made.gguf, tmp_path / "base")
    assert origin["gguf"] == made.gguf.name
    assert origin["sha256"] == hashlib.sha256(made.gguf.read_bytes()).hexdigest()
    assert origin["quantization"] == "F16"
    assert 16 < origin["bits_per_weight"] < 16.1
    assert origin["texts_compared"] > 2000
    assert 0 <= origin["kl_divergence"] < 0.001

    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (made.folder, tmp_path / "base"))
    weights, again = before.state_dict(), after.state_dict()
    assert weights.keys() == again.keys()
    for key, tensor in weights.items():
        # bf16 to f16 and back: exact but for the smallest, which f16 holds as 24 bits after the point.
        torch.testing.assert_close(again[key].float(), tensor.float(), rtol=0, atol=2.0**-24, msg=key)
    changing = {"_name_or_path", "transformers_version", "dtype", "initializer_range", "rms_norm_eps", "layer_types"}
    config, wanted = after.config.to_dict(), before.config.to_dict()
    for key in ("hidden_size", "head_dim", "num_key_value_heads", "rope_parameters", "tie_word_embeddings"):
        assert key not in changing
        assert config[key] == wanted[key], key
    assert config["vocab_size"] == wanted["vocab_size"]
    assert config["eos_token_id"] == wanted["eos_token_id"]
    model_folder.open_model(tmp_path / "base")

    convert(tmp_path / "base", tmp_path / "again.gguf")
    was, became = describe_vocabulary(made.gguf), describe_vocabulary(tmp_path / "again.gguf")
    for key, value in was.items():
        assert became[key] == value, key


@pytest.mark.parametrize(("kind", "bits", "main"), [("Q8_0", 8.6, "Q8_0"), ("Q4_K_M", 6, "Q4_K"), ("Q2_K", 5, "Q2_K")])
def test_a_quantized_file_is_dequantized(tmp_path: Path, tiny: Made, kind: str, bits: float, main: str) -> None:
    quantize(tiny.gguf, tmp_path / "small.gguf", type=kind, threads=2)
    origin = write_model(tmp_path / "small.gguf", tmp_path / "base")
    assert origin["quantization"] == main
    assert origin["bits_per_weight"] < bits
    weights, again = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tiny.folder, tmp_path / "base")
    )
    for key, tensor in weights.items():
        error = (again[key].float() - tensor.float()).norm() / tensor.float().norm()
        assert error < {"Q8_0": 0.01, "Q4_K_M": 0.15, "Q2_K": 0.45}[kind], key
    assert {tensor.dtype for tensor in again.values()} == {torch.bfloat16}


def test_values_that_only_f16_holds_are_rounded_and_too_little_to_notice(tmp_path: Path, tiny: Made) -> None:
    import gguf

    def nudge(values: Any) -> Any:
        return values + np.float16(2**-13) if values.dtype == np.float16 else values

    fine = tmp_path / "fine.gguf"
    rewrite(tiny.gguf, fine)
    for tensor in gguf.GGUFReader(fine, "r+").tensors:
        tensor.data[:] = nudge(tensor.data)
    assert write_model(fine, tmp_path / "base")["kl_divergence"] < 0.01


def test_an_answer_ends_where_the_template_ends_a_turn(tmp_path: Path, tiny: Made) -> None:
    """Of many files `eos` ends a text and another token a turn; llama.cpp stops at both."""
    template = CHAT_TEMPLATE.replace("{{ bos_token }}", "<s>")
    changes = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 4, "tokenizer.chat_template": template}
    file = rewrite(tiny.gguf, tmp_path / "two-ends.gguf", changes)
    write_model(file, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").generation_config.eos_token_id == 4
    convert(tmp_path / "base", tmp_path / "again.gguf")
    with LlamaModel(tmp_path / "again.gguf", vocab_only=True) as vocabulary:
        assert vocabulary.is_end(4)


@pytest.mark.parametrize("adds", [True, False, None])
def test_a_text_begins_as_the_file_says_or_as_llama_cpp_takes_it(tmp_path: Path, tiny: Made, adds: bool | None) -> None:
    file = rewrite(tiny.gguf, tmp_path / "bos.gguf", {"tokenizer.ggml.add_bos_token": adds})
    write_model(file, tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "again.gguf")
    for made in (file, tmp_path / "again.gguf"):
        with LlamaModel(made, vocab_only=True) as vocabulary:
            assert vocabulary.adds_bos == (adds is not False)
    ids = AutoTokenizer.from_pretrained(tmp_path / "base")("text")["input_ids"]
    assert (ids[0] == 1) == (adds is not False)


SCALED = {
    "linear": {"rope_type": "linear", "factor": 8.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}


def scale_positions(made: Made, folder: Path, changes: dict[str, Any]) -> Path:
    """Convert a model with another scaling of its positions."""
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    model.config.rope_parameters = {"rope_theta": 10000.0, **changes}
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(made.folder).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((made.folder / "tokenizer.model").read_bytes())
    return convert(folder, folder.with_suffix(".gguf"))


@pytest.mark.parametrize("kind", SCALED)
def test_the_scaling_of_positions_comes_back(tmp_path: Path, tiny: Made, kind: str) -> None:
    file = scale_positions(tiny, tmp_path / "scaled", SCALED[kind])
    origin = write_model(file, tmp_path / "base")
    assert origin["kl_divergence"] < 0.01
    config = LlamaConfig.from_pretrained(tmp_path / "base")
    found = {key: config.rope_parameters.get(key) for key in SCALED[kind]}
    assert found == pytest.approx(SCALED[kind])
    convert(tmp_path / "base", tmp_path / "again.gguf")
    was, became = ({t.name for t in list_tensors(path)} for path in (file, tmp_path / "again.gguf"))
    assert was == became


@pytest.mark.parametrize(
    ("changes", "code", "parts"),
    [
        ({"general.architecture": "qwen99"}, "gguf-not-read", ["architecture 'qwen99'"]),
        ({"tokenizer.ggml.model": "none"}, "no-tokenizer", ["holds no tokenizer"]),
        ({"tokenizer.ggml.model": None}, "no-tokenizer", ["holds no tokenizer"]),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer-not-read", ["(rwkv)"]),
        ({"general.type": "adapter"}, "not-a-model", ["'adapter'"]),
        ({"split.count": 3}, "split-gguf", ["one of 3 parts", "llama-gguf-split --merge"]),
        ({"llama.rope.scaling.type": "longrope"}, "rope-not-read", ["'longrope'"]),
        ({"llama.attention.layer_norm_rms_epsilon": 3.0}, None, []),
    ],
)
def test_what_is_no_base_model_is_refused(
    tmp_path: Path, tiny: Made, changes: dict[str, Any], code: str | None, parts: list[str]
) -> None:
    file = rewrite(tiny.gguf, tmp_path / "changed.gguf", changes)
    if code is None:  # that the copy itself is not what is refused
        write_model(file, tmp_path / "base")
        return
    with refused(code, "changed.gguf: ", *parts) as caught:
        write_model(file, tmp_path / "base")
    assert "\n" not in str(caught.value)


def test_a_model_that_transformers_reads_otherwise_is_refused(tmp_path: Path, tiny: Made) -> None:
    file = rewrite(tiny.gguf, tmp_path / "other.gguf", {"llama.attention.causal": False})
    with refused("other-model", "other.gguf: ", "KL divergence", kept=False):
        write_model(file, tmp_path / "base")


def test_a_damaged_file_is_refused(tmp_path: Path, tiny: Made) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(tiny.gguf.read_bytes()[:100_000])
    with refused("truncated-gguf", "cut.gguf: ", kept=False):
        write_model(file, tmp_path / "base")
    file.write_bytes(b"PK" + tiny.gguf.read_bytes()[2:])
    with refused("not-gguf", "cut.gguf: not a GGUF file"):
        gguf_model.write_model(file, tmp_path / "base")


def test_a_vocabulary_alone_is_refused(tmp_path: Path) -> None:
    with refused("no-weights", "ggml-vocab-gpt-2.gguf: holds no weights"):
        write_model(paths.LLAMA_CPP / "models/ggml-vocab-gpt-2.gguf", tmp_path / "base")


def test_a_type_that_cannot_be_dequantized_is_refused(tmp_path: Path, tiny: Made) -> None:
    quantize(tiny.gguf, tmp_path / "ones.gguf", type="Q1_0", threads=2)
    with refused("gguf-not-read", "ones.gguf: transformers cannot read this model", kept=False) as caught:
        write_model(tmp_path / "ones.gguf", tmp_path / "base")
    assert "\n" not in str(caught.value)
    assert "Q1_0" in str(caught.value) or "41" in str(caught.value), caught.value
