import json
import logging
from dataclasses import replace

import pytest
import torch

from lathe.sources.builtin import tiny_model

SMALL = replace(
    tiny_model.RECIPE,
    vocab_size=560,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    documents=400,
    steps=4,
    batch_size=8,
    threads=1,
)
SEED = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tiny")
    tiny_model.build(made, SEED, SMALL)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


def test_the_folder_is_a_complete_model_and_nothing_else(folder):
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


def test_two_builds_of_one_seed_have_the_same_bytes(folder, tmp_path):
    tiny_model.build(tmp_path, SEED, SMALL)
    for file in sorted(folder.iterdir()):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_another_seed_gives_other_weights(folder, tmp_path):
    tiny_model.build(tmp_path, SEED + 1, SMALL)
    assert (tmp_path / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()


def test_a_build_leaves_the_callers_random_numbers_and_threads_alone(tmp_path):
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    tiny_model.build(tmp_path, SEED, replace(SMALL, steps=1, threads=threads + 1))
    assert torch.equal(torch.rand(4), expected)
    assert torch.get_num_threads() == threads


def test_the_weights_are_bf16_and_tied(model):
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.config.max_position_embeddings >= 1024


def test_training_lowers_the_loss(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lathe.sources.builtin.tiny_model"):
        tiny_model.build(tmp_path, SEED, replace(SMALL, steps=1))
        tiny_model.build(tmp_path, SEED, replace(SMALL, steps=60))
    first, last = (record.args[-1] for record in caplog.records if "trained for" in record.msg)
    assert last < first - 1


def test_markers_are_single_tokens_that_differ_and_text_cannot_be_unknown(tokenizer):
    markers = [tiny_model.BEGIN, tiny_model.START_OF_TURN, tiny_model.END_OF_TURN, tiny_model.PAD]
    ids = [tokenizer(marker, add_special_tokens=False)["input_ids"] for marker in markers]
    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == len(markers)
    for text in ("Größe 12 °C – 你好, здравствуй 🙂", "  two  spaces\n\tand a tab", "def f(x): return x ** 2"):
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in encoded
        assert tokenizer.decode(encoded) == text


def test_the_end_of_a_turn_ends_generation_and_is_not_the_padding(tokenizer, model):
    end = tokenizer.convert_tokens_to_ids(tiny_model.END_OF_TURN)
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == end
    assert tokenizer.pad_token_id == model.config.pad_token_id != end
    assert tokenizer.bos_token_id == model.config.bos_token_id == 1


def test_the_chat_template_renders_every_role_with_one_beginning(tokenizer):
    messages = [
        {"role": "system", "content": "Answer in JSON."},
        {"role": "user", "content": "lamp on"},
        {"role": "assistant", "content": "{}"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == (
        "<s><|im_start|>system\nAnswer in JSON.<|im_end|>\n"
        "<|im_start|>user\nlamp on<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == whole.removesuffix("{}<|im_end|>\n")
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_the_vocabulary_knows_the_words_of_the_dataset(folder):
    vocabulary = (folder / "tokenizer.model").read_bytes()
    for word in (b"attic", b"lamp", b"error", b"assistant"):
        assert word in vocabulary


def test_the_readme_says_which_seed_and_arithmetic_made_it(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert f"seed {SEED}" in text
    assert "bf16 autocast" in text or "fp32" in text
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is True
