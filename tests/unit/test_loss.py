"""Loss in tiles: the loss and the gradients of logits that are held, for every kind of head, and less memory."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import PYTHONPATH, load_toy
from transformers import AutoConfig, AutoModelForCausalLM
from trl.kernels import chunked_logprob
from trl.trainer import add_fused_lm_head, utils

from lathe.models.adapter import add_adapter
from lathe.training import loss
from lathe.training.loss import IGNORE_INDEX, count_tile_bytes, uses_tiles
from lathe.training.training_step import autocast, compute_step_loss, has_plain_head

VOCABULARY = 150
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
# What each does with its logits beyond the product with the head.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},  # whose head has a bias
}
ROWS, LENGTH = 3, 20


@pytest.fixture(params=["all positions", "supervised positions"])
def tiles(request, monkeypatch) -> str:
    """Small tiles, so that there are several each way; as elsewhere, and as on a GPU but for the kernel."""
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 16)
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 64)
    if request.param == "supervised positions":
        monkeypatch.setattr(utils, "_use_triton", lambda device: True)
    return str(request.param)


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **MODELS[kind]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


def make_batch() -> dict[str, Any]:
    """A third of the tokens is supervised, others in each row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    supervised = torch.rand(ROWS, LENGTH - 1, generator=generator) < 0.3
    columns = supervised.any(dim=0).nonzero().flatten()
    targets = ids[:, 1:].masked_fill(~supervised, IGNORE_INDEX)[:, columns]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "columns": columns, "targets": targets}


def compute(model: Any, precision: str, *, in_tiles: bool, batch: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    with autocast("cpu", precision):
        value = compute_step_loss(model, batch, in_tiles=in_tiles)
    (value / 7).backward()  # as of a mean over all passes of a step
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return value.item(), {name: gradient.clone() for name, gradient in gradients.items()}


def assert_same(model: Any, precision: str, relative: float) -> None:
    batch = make_batch()
    expected, gradients = compute(model, precision, in_tiles=False, batch=batch)
    found, of_tiles = compute(model, precision, in_tiles=True, batch=batch)
    assert found == pytest.approx(expected, rel=relative)
    assert of_tiles.keys() == gradients.keys()
    for name, gradient in gradients.items():
        distance = (of_tiles[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert distance < relative, name


@pytest.mark.parametrize("kind", MODELS)
def test_tiles_have_the_loss_and_the_gradients_of_held_logits(kind, tiles):
    model = make_model(kind)
    add_fused_lm_head(model)
    assert_same(model, "fp32", 1e-5)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_so_do_the_kernels_of_a_gpu_by_tritons_interpreter():
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpret_tiles.py"))],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([PYTHONPATH, os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(MODELS)


@pytest.mark.parametrize("choice", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_tiles_train_an_adapter_alike(choice, tiles):
    lora = load_toy().params.lora.model_copy(update={"lora_dropout": 0.0, **choice})
    model = add_adapter(make_model("llama" if not choice else "qwen3"), lora)
    assert has_plain_head(model.get_base_model())
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    add_fused_lm_head(model.get_base_model())
    assert_same(model, "fp32", 1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_head_with_rows_of_added_tokens_is_known(kind):
    model = add_adapter(make_model(kind), load_toy().params.lora, token_ids=[3, 5])
    assert not has_plain_head(model.get_base_model())


def test_in_bf16_tiles_differ_by_rounding_alone(tiles):
    model = make_model("gemma2")
    add_fused_lm_head(model)
    assert_same(model, "bf16", 2e-2)


def test_a_batch_without_a_supervised_token_has_no_loss_and_no_gradient(tiles):
    model = make_model("qwen3")
    add_fused_lm_head(model)
    batch = make_batch()
    batch |= {"columns": torch.tensor([], dtype=torch.long), "targets": torch.zeros(ROWS, 0, dtype=torch.long)}
    value, gradients = compute(model, "fp32", in_tiles=True, batch=batch)
    assert value == 0
    assert all(not gradient.any() for gradient in gradients.values())


def test_the_head_is_given_twice_without_harm():
    model = make_model("granite")
    plain = copy.deepcopy(model)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as TRL's trainer does
    add_fused_lm_head(model)
    batch = make_batch()
    for in_tiles in (False, True):
        found = compute_step_loss(model, batch, in_tiles=in_tiles)
        torch.testing.assert_close(found, compute_step_loss(plain, batch), rtol=1e-5, atol=0)


def test_tiles_are_as_large_as_trls():
    assert loss.TILE == (chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE)


def test_a_gpu_holds_no_more_than_half_a_gigabyte_of_logits_and_a_cpu_all():
    assert not uses_tiles("cpu", 8192, 151_936, itemsize=2, sharded=True)
    assert uses_tiles("cuda", 8192, 151_936, itemsize=2)
    assert not uses_tiles("cuda", 800, 151_936, itemsize=2)
    assert uses_tiles("cuda", 800, 151_936, itemsize=4)
    assert uses_tiles("cuda", 1, 300, itemsize=2, sharded=True)
    assert count_tile_bytes(8192, 151_936, itemsize=2) == count_tile_bytes(1 << 20, 1 << 20, itemsize=2) == 1 << 28
    assert count_tile_bytes(100, 300, itemsize=2) == 60_000
