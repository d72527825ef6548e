"""Full tuning: every weight moves, and the pipeline makes of it what it makes of an adapter."""

import json
from pathlib import Path

import pytest
import torch
from conftest import Checkout, changed, copy_of, write_splits
from safetensors.torch import load_file
from toy import load_toy
from transformers import AutoModelForCausalLM

from lathe.models.merge.merge import merge
from lathe.sources.builtin import household_commands
from lathe.training import train as training

SPLITS = {
    "train": household_commands.make_rows(1)["train"][:24],
    "validation": household_commands.make_rows(1)["validation"][:6],
}
FULL = {
    "tuning": "full",
    "quantization.load_in_4bit": False,
    "learning_rate": 1e-3,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "eval_steps": 100,
    "max_length": 256,
    "seed": 1,
}


@pytest.fixture
def trained(small_model, tmp_path, monkeypatch):
    """Return a function that trains with some parameters changed and gives the folder, and the model as it was then."""
    models = []
    save = training.save_full_model

    def saved(model, *others):
        models.append(model)
        save(model, *others)

    def train(**changes) -> tuple[Path, torch.nn.Module, training.TrainingResult]:
        folder = tmp_path / f"adapter{len(models)}"
        folder.mkdir()
        chosen = changed(load_toy().params, {**FULL, **changes})
        files = write_splits(tmp_path / "data", SPLITS)
        result = training.train(small_model, files, folder, tmp_path / f"metrics{len(models)}", params=chosen)
        return folder, models[-1], result

    monkeypatch.setattr(training, "save_full_model", saved)
    return train


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True, "sft.packing": True}], ids=str)
def test_every_weight_moves_and_embeddings_stay_tied(trained, small_model, changes):
    folder, model, result = trained(**changes)
    before, after = load_file(small_model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert not torch.equal(after[name], tensor), name
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert result.frozen == {}
    assert result.trained_tensors == len(before)


def test_the_merged_model_is_the_trained_one(trained, small_model, tmp_path):
    folder, model, _ = trained()
    (tmp_path / "merged").mkdir()
    report = merge(small_model, folder, tmp_path / "merged", dtype="auto", max_shard_size_bytes=10**9)
    assert report.tensors_changed == report.tensors_total == len(load_file(small_model / "model.safetensors"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(merged[name], tensor.to(merged[name].dtype)), name


def test_the_same_seed_gives_the_same_bytes(trained):
    first, second = (trained()[0] for _ in range(2))
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_updates_smaller_than_16_bits_can_hold_are_not_lost(trained, small_model):
    """In bf16 a weight near 1 moves by 1/256 or not at all."""
    model = trained(learning_rate=1e-6, precision="bf16")[1]
    before = load_file(small_model / "model.safetensors")["model.norm.weight"].float()
    moved = (model.get_submodule("model.norm").weight - before).abs()
    assert 0 < moved.max() < 1e-4


def test_the_pipeline_goes_on_to_the_gguf(reproduced: Checkout, tmp_path):
    checkout = copy_of(reproduced, tmp_path / "lathe")
    checkout.set({"training.tuning": "full", "quantization.load_in_4bit": False, "training.learning_rate": 0.001})
    ran = checkout.run("dvc", "repro", "estimate", "check_converted_merged").stdout
    for stage in ("estimate", "train", "merge", "convert_merged"):
        assert f"Running stage '{stage}'" in ran
    proof = checkout.json("metrics/train/freeze_proof.json")
    tensors = load_file(checkout.root / "models/base/model.safetensors")
    assert proof == {"frozen_tensors": 0, "trained_tensors": len(tensors), "moved": [], "sha256": []}
    assert checkout.json("metrics/merge/report.json")["tensors_changed"] == len(tensors)
    memory = {each["part"]: each["bytes"] for each in checkout.json("metrics/estimate/training.json")["memory"]}
    assert memory["adapter"] == 4 * sum(tensor.numel() for tensor in tensors.values())
    assert checkout.json("metrics/check_converted/merged.json")["tokens_compared"] > 0
    assert json.loads((checkout.root / "models/adapter/tuning.json").read_text())["tuning"] == "full"
