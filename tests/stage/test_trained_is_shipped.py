"""The likelihood of held-out answers shows whether a GGUF is the model that was trained."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from base_models import make
from gguf_models import convert
from refusals import refused
from safetensors.torch import load_file, save_file
from shared import made_once

from lathe.inference.score_answers import score_answers
from lathe.models.loss_mask import Encoded
from lathe.models.measured_answers import MOST_ROWS, MOST_TOKENS, choose_answers
from lathe.models.same_model import check_same_model
from lathe.models.tokenizer import load_tokenizer
from lathe.models.weight_range import find_beyond_f16
from lathe.sources.builtin import household_commands
from lathe.training.measure_answers import measure_answers

ROWS = household_commands.make_rows(1)["validation"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "dense", lambda folder: make("LlamaForCausalLM", folder))


@pytest.fixture(scope="module")
def answers(model: Path) -> list[Encoded]:
    """Answers that the model is sure of, as it is of those that it has learnt: its own."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    answers = []
    for row in choose_answers(load_tokenizer(model), ROWS)[:4]:
        prompt = [token for token, is_answer in zip(row.input_ids, row.supervised, strict=True) if not is_answer]
        ids = loaded.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False)[0].tolist()
        answers.append(Encoded(row.row, ids, [at >= len(prompt) for at in range(len(ids))]))
    return answers


def of_transformers(folder: Path, answers: list[Encoded]) -> float:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    measured = measure_answers(loaded, answers, precision="fp32")
    assert measured.tokens == sum(sum(answer.supervised) for answer in answers)
    assert loaded.training is False
    return measured.describe()["nats_per_token"]


def change(model: Path, folder: Path, name: str, values: Any) -> Path:
    shutil.copytree(model, folder)
    tensors = {key: tensor.clone() for key, tensor in load_file(model / "model.safetensors").items()}
    values(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_gguf_of_a_model_has_its_likelihood(model, answers, tmp_path):
    trained = of_transformers(model, answers)
    shipped = score_answers(convert(model, tmp_path / "m.gguf"), answers, threads=1)
    assert shipped.describe()["nats_per_token"] == pytest.approx(trained, abs=1e-3)
    assert shipped.rows == 4
    check_same_model(
        "m.gguf", trained=trained, shipped=shipped.nll / shipped.tokens, tokens=shipped.tokens, load_in_4bit=False
    )


@pytest.mark.parametrize("tensor", ["lm_head.weight", "model.norm.weight", "model.layers.0.mlp.down_proj.weight"])
def test_a_gguf_with_one_tensor_drawn_at_random_is_refused(model, answers, tmp_path, tensor):
    trained = of_transformers(model, answers)
    other = change(model, tmp_path / "other", tensor, lambda weight: weight.normal_(std=weight.float().std().item()))
    shipped = score_answers(convert(other, tmp_path / "other.gguf"), answers, threads=1)
    with refused("other-than-trained", "other.gguf", "the model that was trained had", "convert.llama_cpp_dir"):
        check_same_model(
            "other.gguf", trained=trained, shipped=shipped.nll / shipped.tokens, tokens=8, load_in_4bit=False
        )


@pytest.mark.parametrize(
    ("trained", "shipped", "load_in_4bit", "is_same"),
    [
        (2.0, 2.05, False, True),
        (2.0, 2.2, False, False),
        (2.0, 1.8, False, False),
        (2.0, 2.2, True, True),
        (2.0, 4.0, True, False),
        (2.0, float("nan"), True, False),
        (2.0, float("inf"), False, False),
    ],
)
def test_what_rounding_explains_is_the_same_model(trained, shipped, load_in_4bit, is_same):
    def check() -> None:
        check_same_model("m.gguf", trained=trained, shipped=shipped, tokens=8, load_in_4bit=load_in_4bit)

    if is_same:
        check()
        return
    with refused("other-than-trained", kept=False):
        check()


def test_a_weight_that_f16_cannot_hold_is_found_and_kept_in_bf16(model, answers, tmp_path):
    def grow(weight: torch.Tensor) -> None:
        weight[0] = 1e5

    assert find_beyond_f16(model) is None
    large = change(model, tmp_path / "large", "model.norm.weight", grow)
    assert find_beyond_f16(large) == ("model.norm.weight", pytest.approx(1e5, rel=0.01))
    trained = of_transformers(large, answers)
    shipped = score_answers(convert(large, tmp_path / "large.gguf", outtype="bf16"), answers, threads=1)
    assert shipped.nll / shipped.tokens == pytest.approx(trained, rel=0.02)


def test_the_answers_that_are_measured_are_the_last_of_the_first_rows(model):
    tokenizer = load_tokenizer(model)

    def read() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(ROWS * 50):
            assert number < MOST_ROWS, "more rows were read than are measured"
            yield row

    chosen = choose_answers(tokenizer, read())
    assert len(chosen) == MOST_ROWS
    long = {"messages": [{"role": "user", "content": "so " * MOST_TOKENS}, {"role": "assistant", "content": "yes"}]}
    assert [answer.row for answer in choose_answers(tokenizer, [long, *ROWS])] == [0]
