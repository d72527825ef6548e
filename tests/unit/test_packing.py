"""Rows end to end: the same loss and gradients as one by one, and nothing of a row in another."""

import pytest
import torch
from toy import load_toy
from transformers import AutoConfig, AutoModelForCausalLM

from lathe.models.adapter import add_adapter
from lathe.models.loss_mask import Encoded
from lathe.training.loss import IGNORE_INDEX, sum_token_losses
from lathe.training.packing import (
    PaddedCollator,
    PaddingFreeCollator,
    build_dataset,
    build_packed_dataset,
    round_length_up,
)
from lathe.training.row_attention import ROW_ATTENTION, separate_rows
from lathe.training.training_step import compute_step_loss, select_model_inputs

VOCABULARY = 90
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
MODELS = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "gemma": {"num_key_value_heads": 1},
    "gemma3_text": {"sliding_window": 5, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention"] * 2},
}
LENGTHS = [13, 5, 12, 21, 7, 3]
FILLER = 1  # to the next length that batches have


def made(kind: str, **shape) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **shape}), dtype=torch.float32)
    model.requires_grad_(True)
    return model


def rows(lengths=LENGTHS) -> list[Encoded]:
    random = torch.Generator().manual_seed(1)
    return [
        Encoded(index, torch.randint(VOCABULARY, (n,), generator=random).tolist(), [i * 2 >= n for i in range(n)])
        for index, n in enumerate(lengths)
    ]


def loss_of(model, batch) -> torch.Tensor:
    return compute_step_loss(model, batch)


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_packed_rows_have_the_loss_and_the_gradients_of_rows_one_by_one(kind, checkpointing):
    model = made(kind, **MODELS[kind])
    expected = 0.0
    for row in build_dataset(rows()):
        # The stock forward with its own attention, labels and loss, which is a mean.
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
        supervised = sum(label != IGNORE_INDEX for label in row["labels"])
        loss = model(**batch, use_cache=False).loss * supervised
        loss.backward()
        expected += loss.item()
    alone = gradients(model)

    assert separate_rows(model, "auto", precision="fp32")
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    packs = build_packed_dataset(rows(), max_length=24)
    assert len(packs) < len(LENGTHS)
    loss = loss_of(model, PaddingFreeCollator()(list(packs)))
    loss.backward()
    torch.testing.assert_close(loss.item(), expected, rtol=1e-5, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_no_token_of_a_row_changes_what_is_said_of_another(kind):
    model = made(kind, **MODELS[kind]).eval()
    assert separate_rows(model, "auto", precision="fp32")
    batch = PaddingFreeCollator()(list(build_packed_dataset(rows(), max_length=60)))
    inputs = select_model_inputs(batch)
    before = model(**inputs).logits[0]
    first = 0
    for length in batch["row_lengths"]:
        own = slice(first, first + length)
        changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
        changed["input_ids"][0, own] = (changed["input_ids"][0, own] + 1) % VOCABULARY
        after = model(**changed).logits[0]
        others = torch.ones(len(before), dtype=torch.bool)
        others[own] = False
        assert torch.equal(after[others], before[others])
        assert not torch.equal(after[own], before[own])
        first += length


def test_padded_batches_have_the_same_loss_too():
    model = made("llama")
    examples = list(build_dataset(rows()))
    padded = loss_of(model, PaddedCollator(0)(examples))
    assert separate_rows(model, "auto", precision="fp32")
    torch.testing.assert_close(loss_of(model, PaddingFreeCollator()(examples)), padded, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("gemma2", {"attn_logit_softcapping": 30.0, "query_pre_attn_scalar": 8}),
        ("mamba", {"state_size": 4, "hidden_size": 32, "num_hidden_layers": 2}),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}),
        ("recurrent_gemma", {"lru_width": 32}),
    ],
)
def test_models_that_would_mix_rows_are_left_as_they_were(kind, shape):
    model = made(kind, **shape)
    before = model.config._attn_implementation
    assert not separate_rows(model, "auto", precision="fp32")
    assert model.config._attn_implementation == before != ROW_ATTENTION


def test_packs_hold_every_row_once_and_whole():
    sequences = rows([7, 3, 9, 30, 1, 4, 8, 8, 2] * 300)
    packs = build_packed_dataset(sequences, max_length=20)
    found, sizes = [], []
    for pack in packs:
        sizes.append(len(pack["input_ids"]))
        ends = torch.tensor(pack["seq_lengths"]).cumsum(0).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            assert pack["labels"][start] == IGNORE_INDEX
            found.append(pack["input_ids"][start:end])
    assert sorted(found) == sorted(row.input_ids for row in sequences)
    assert max(sizes) == 30  # the longest row, which no limit cuts
    total = sum(len(row.input_ids) for row in sequences)
    assert len(packs) <= 1.02 * total / 30 + 1


def test_only_tokens_that_predict_a_supervised_one_get_logits():
    batch = PaddingFreeCollator()(list(build_dataset(rows())))
    assert batch["columns"].tolist() == sorted(set(batch["columns"].tolist()))
    assert batch["targets"].shape == (1, sum(sum(row.supervised[1:]) for row in rows()))
    assert (batch["targets"] != IGNORE_INDEX).all()
    assert (batch["labels"][:, 1:] != IGNORE_INDEX).sum() == batch["targets"].numel()
    assert batch["input_ids"].shape == (1, sum(LENGTHS) + FILLER)
    assert batch["tokens"] == sum(LENGTHS)
    assert batch["supervised_tokens"] == batch["targets"].numel()
    assert batch["row_lengths"] == tuple(sorted([*LENGTHS, FILLER], reverse=True))


def test_batches_have_few_different_lengths():
    lengths = {round_length_up(tokens) for tokens in range(1024, 2048)}
    assert len(lengths) == 16 + 1
    for tokens in range(1, 5000):
        rounded = round_length_up(tokens)
        assert tokens <= rounded < tokens * 17 / 16 + 1
        assert rounded in (round_length_up(rounded), tokens)
    assert round_length_up(100_000) % 4096 == 0


def test_the_filler_changes_neither_loss_nor_gradients(monkeypatch):
    model = made("llama")
    assert separate_rows(model, "auto", precision="fp32")
    results = []
    for add in (0, 40):  # longer than any row
        monkeypatch.setattr("lathe.training.packing.round_length_up", lambda tokens, add=add: tokens + add)
        loss = loss_of(model, PaddingFreeCollator()(list(build_dataset(rows()))))
        loss.backward()
        results.append((loss.item(), gradients(model)))
    (plain, plain_gradients), (filled, filled_gradients) = results
    assert filled == pytest.approx(plain, rel=1e-6)
    for name, gradient in filled_gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_torch_and_so_is_its_gradient(dtype, monkeypatch):
    monkeypatch.setattr("lathe.training.loss.CHUNK_BYTES", {"cpu": 4 * 11 * 3})
    logits = (8 * torch.randn(20, 11, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    targets = torch.tensor([3, IGNORE_INDEX, 0, 10] * 5)
    expected = torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected / 7, logits)
    loss = sum_token_losses(logits, targets)
    (gradient,) = torch.autograd.grad(loss / 7, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


def test_an_adapter_on_the_head_gets_gradients_through_the_loss():
    model = made("llama")
    assert separate_rows(model, "auto", precision="fp32")
    model = add_adapter(model, load_toy().params.lora.model_copy(update={"modules_to_save": ["lm_head"]}))
    loss_of(model, PaddingFreeCollator()(list(build_dataset(rows())))).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    assert any("lm_head" in name for name, parameter in model.named_parameters() if parameter.grad is not None)
