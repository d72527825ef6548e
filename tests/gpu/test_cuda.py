"""What only a GPU can tell: trainings on it are those on the CPU, and the kernels that only it has compute the same.

Without a GPU they are skipped. `LATHE_GPU_TESTS_ON_CPU=1` runs them on the CPU, to try the tests themselves.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import changed
from safetensors.torch import load_file
from shared import made_once
from small_training import SETTINGS, read_curve, train_small
from toy import PYTHONPATH, load_toy
from trl.trainer import add_fused_lm_head

from lathe.common import paths
from lathe.models.loading import load_base
from lathe.models.loss_mask import encode
from lathe.models.merge.merge import merge
from lathe.models.tokenizer import load_tokenizer
from lathe.sources.builtin import household_commands
from lathe.training.freeze_proof import hash_tensors
from lathe.training.packing import PaddingFreeCollator, build_dataset, build_packed_dataset
from lathe.training.row_attention import ROW_ATTENTION, attend_rows, build_attention_arguments, separate_rows
from lathe.training.training_step import autocast, compute_step_loss

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "4 bits": {"precision": "bf16", "quantization.load_in_4bit": True},
}
# Settings that compute the same as bf16 in another way, and how far a loss of its curve may be from the other's.
SAME_CURVE: dict[str, tuple[dict[str, Any], float]] = {
    "checkpointing": ({"gradient_checkpointing": True}, 1e-2),
    "padded, sdpa": ({"attn_implementation": "sdpa"}, 2e-2),
    "padded, eager": ({"attn_implementation": "eager"}, 2e-2),
    "accumulated": ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 2e-2),
}
OTHER_CURVE: dict[str, dict[str, Any]] = {
    "fp16": {"precision": "fp16"},
    "packed": {"sft.packing": True, "per_device_train_batch_size": 1, "learning_rate": 0.003},
    "full": {"tuning": "full", "learning_rate": 0.001},
    "dora": {"lora.use_dora": True},
    "dora, 4 bits": {"lora.use_dora": True, "quantization.load_in_4bit": True},
    "dropout": {"lora.lora_dropout": 0.1},
    "8-bit optimizer": {"optim": "adamw_8bit"},
}


def start(changes: dict[str, Any], base: Path, folder: Path, **variables: str) -> "subprocess.Popen[bytes]":
    """Train in a process of its own."""
    script = Path(__file__).parents[1] / "small_training.py"
    path = os.pathsep.join([PYTHONPATH, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(script), json.dumps(changes), str(base), str(folder)],
        env={**os.environ, "PYTHONPATH": path, **variables},
    )


@pytest.fixture(scope="session")
def cpu_curves(small_model, tmp_path_factory) -> dict[str, list[float]]:
    """The loss of the same trainings on the CPU of this machine."""

    def make(folder: Path) -> None:
        folder.mkdir()
        processes = [
            start(changes, small_model, folder / kind, CUDA_VISIBLE_DEVICES="") for kind, changes in KINDS.items()
        ]
        assert [process.wait() for process in processes] == [0] * len(KINDS)

    folder = made_once(tmp_path_factory, "cpu_curves", make)
    return {kind: read_curve(folder / kind) for kind in KINDS}


@pytest.fixture(scope="session")
def bf16(small_model, tmp_path_factory) -> Path:
    """A training in bf16."""

    def make(folder: Path) -> None:
        folder.mkdir()
        train_small(small_model, folder, {"precision": "bf16"})

    return made_once(tmp_path_factory, "bf16", make)


def distance(first: list[float], second: list[float]) -> float:
    assert len(first) == len(second)
    return max(abs(one - other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_has_the_cpus_curve_and_moves_nothing_frozen(
    kind, small_model, cpu_curves, tmp_path, record_property
):
    changes = KINDS[kind]
    params = changed(load_toy().params, {**SETTINGS, **changes})
    base = load_base(small_model, params.quantization, precision=str(changes["precision"]))
    before = hash_tensors(base.requires_grad_(False))
    result = train_small(small_model, tmp_path, changes)
    curve = read_curve(tmp_path)
    assert curve[-1] < curve[0] - 1
    record_property("largest difference of a loss to the CPU's", distance(curve, cpu_curves[kind]))
    assert distance(curve, cpu_curves[kind]) < 1e-2
    assert result.frozen
    frozen = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): digest
        for name, digest in result.frozen.items()
    }
    assert frozen == before  # as loaded, and as they were in the end
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in adapter.values())  # B begins as 0
    if DEVICE == "cuda":
        assert torch.cuda.max_memory_allocated() > 0


@pytest.mark.parametrize("kind", SAME_CURVE)
def test_another_way_to_compute_has_the_same_curve(kind, small_model, bf16, tmp_path, record_property):
    changes, allowed = SAME_CURVE[kind]
    train_small(small_model, tmp_path, {"precision": "bf16", **changes})
    record_property("largest difference of a loss", distance(read_curve(tmp_path), read_curve(bf16)))
    assert distance(read_curve(tmp_path), read_curve(bf16)) < allowed


@pytest.mark.parametrize("kind", OTHER_CURVE)
def test_every_kind_of_training_learns(kind, small_model, tmp_path):
    changes = {"precision": "bf16", **OTHER_CURVE[kind]}
    if DEVICE == "cpu" and changes["precision"] == "fp16":
        pytest.skip("fp16 needs a GPU")
    train_small(small_model, tmp_path, changes)
    curve = read_curve(tmp_path)
    assert curve[-1] < curve[0] - 1


def test_ligers_kernels_have_the_same_curve(small_model, bf16, tmp_path, record_property):
    pytest.importorskip("liger_kernel")
    if DEVICE == "cpu":
        pytest.skip("Liger's kernels need a GPU")
    train_small(small_model, tmp_path, {"precision": "bf16", "use_liger_kernel": True})
    record_property("largest difference of a loss", distance(read_curve(tmp_path), read_curve(bf16)))
    assert distance(read_curve(tmp_path), read_curve(bf16)) < 2e-2


def test_a_compiled_model_has_the_same_curve(small_model, bf16, tmp_path, record_property):
    train_small(small_model, tmp_path, {"precision": "bf16", "torch_compile": True})
    record_property("largest difference of a loss", distance(read_curve(tmp_path), read_curve(bf16)))
    assert distance(read_curve(tmp_path), read_curve(bf16)) < 2e-2


def test_a_killed_training_goes_on(small_model, bf16, tmp_path, caplog, record_property):
    process = start({"precision": "bf16"}, small_model, tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("scratch/*/checkpoint-8/sha256.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with caplog.at_level("INFO"):
        train_small(small_model, tmp_path, {"precision": "bf16"})
    assert "going on after step" in caplog.text
    curve, whole = read_curve(tmp_path), read_curve(bf16)
    assert len(curve) == len(whole)
    adapters = [load_file(folder / "adapter/adapter_model.safetensors") for folder in (tmp_path, bf16)]
    record_property("same bytes", all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0]))
    record_property("largest difference of a loss", distance(curve, whole))
    assert distance(curve, whole) < 1e-2  # sums of a GPU may come in another order


def test_the_same_seed_gives_the_same_curve(small_model, bf16, tmp_path, record_property):
    train_small(small_model, tmp_path, {"precision": "bf16"})
    record_property("same curve", read_curve(tmp_path) == read_curve(bf16))
    assert distance(read_curve(tmp_path), read_curve(bf16)) < 1e-2


def test_the_adapter_merges_and_converts(small_model, bf16, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lathe.gguf.convert import convert

    merged = tmp_path / "merged"
    merged.mkdir()
    merge(small_model, bf16 / "adapter", merged, dtype="auto", max_shard_size_bytes=5_000_000_000)
    ids = torch.arange(20, device=DEVICE)[None]

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = model.float().to(DEVICE).eval()(ids).logits
        return result

    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small_model), bf16 / "adapter")
    one, other = logits(trained), logits(AutoModelForCausalLM.from_pretrained(merged))
    assert (one - other).abs().max() < 0.05 * one.abs().max()  # merged weights are rounded to bf16
    convert(merged, tmp_path / "merged.gguf", outtype="f16", llama_cpp=paths.LLAMA_CPP, metadata={})
    assert (tmp_path / "merged.gguf").stat().st_size > 100_000


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("size", [64, 128])
def test_rows_end_to_end_attend_as_each_alone(window, kv_heads, size):
    lengths = [300, 129, 64, 1]
    generator = torch.Generator().manual_seed(1)

    def draw(heads: int) -> torch.Tensor:
        drawn = torch.randn(1, sum(lengths), heads, size, generator=generator).transpose(1, 2)
        return drawn.to(DEVICE, torch.bfloat16).requires_grad_()

    states = [draw(8), draw(kv_heads), draw(kv_heads)]
    module = torch.nn.Module()
    module.num_key_value_groups = 8 // kv_heads
    arguments = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in build_attention_arguments(lengths).items()
    }
    attended, _ = attend_rows(module, *states, None, sliding_window=window, **arguments)
    exact = [state.detach().float().requires_grad_() for state in states]
    parts, first = [], 0
    for length in lengths:
        query, key, value = (state[:, :, first : first + length] for state in exact)
        key, value = (part.repeat_interleave(8 // kv_heads, 1) for part in (key, value))
        visible = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
        if window:
            visible = visible.triu(1 - window)
        scores = (query @ key.transpose(-1, -2) * size**-0.5).masked_fill(~visible, -torch.inf)
        parts.append((scores.softmax(-1) @ value).transpose(1, 2))
        first += length
    expected = torch.cat(parts, 1)
    assert relative(attended, expected) < 1e-2
    gradient = torch.randn(expected.shape, generator=generator).to(DEVICE)
    attended.backward(gradient.to(attended.dtype))
    expected.backward(gradient)
    for state, reference in zip(states, exact, strict=True):
        assert state.grad is not None
        assert reference.grad is not None
        assert relative(state.grad, reference.grad) < 1e-2


def relative(one: torch.Tensor, reference: torch.Tensor) -> float:
    return float((one.float() - reference).norm() / reference.norm())


def test_packed_rows_have_the_loss_of_each_alone_and_see_no_other(small_model):
    params = load_toy().params
    model = load_base(small_model, params.quantization.model_copy(update={"load_in_4bit": False}), precision="bf16")
    tokenizer = load_tokenizer(small_model)
    rows = household_commands.make_rows(1)["train"][:16]
    sequences = encode(tokenizer, [row["messages"] for row in rows], supervise="all")
    assert separate_rows(model, "auto", precision="bf16")
    assert model.config._attn_implementation == ROW_ATTENTION
    collate = PaddingFreeCollator()

    def loss(examples: list[Any]) -> float:
        batch = {
            name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
            for name, value in collate(examples).items()
        }
        with torch.no_grad(), autocast(DEVICE, "bf16"):
            return compute_step_loss(model, batch).item()

    single = list(build_dataset(sequences))
    alone = [loss([example]) for example in single]
    together = loss(single)
    packed = loss(list(build_packed_dataset(sequences, max_length=2048)))
    assert together == pytest.approx(sum(alone), rel=2e-3)
    assert packed == pytest.approx(sum(alone), rel=2e-3)


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_pairs_and_rewards_train(method, small_model, tmp_path):
    from lathe.config.training_params import Reward

    changes: dict[str, Any] = {"method": method, "precision": "bf16", "eval_steps": 3, f"{method}.sft_epochs": 0.5}
    if method == "dpo":
        changes |= {"max_steps": 6, "dpo.per_device_train_batch_size": 4}
    else:
        reward = Reward(name="length", weight=1.0, max_characters=8)
        changes |= {
            "grpo.max_steps": 6,
            "grpo.per_device_train_batch_size": 8,
            "grpo.num_generations": 4,
            "grpo.max_completion_length": 16,
            "grpo.rewards": [reward],
        }
    train_small(small_model, tmp_path, changes)
    assert len(read_curve(tmp_path)) == 6
    with contextlib.suppress(FileNotFoundError):  # DPO has no rewards of answers
        assert len(read_curve(tmp_path, "plots/metrics/train/reward.tsv")) == 6
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() and tensor.abs().max() > 0 for tensor in adapter.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_in_tiles_is_that_of_held_logits(small_model, precision):
    tokenizer = load_tokenizer(small_model)
    rows = household_commands.make_rows(1)["train"][:8]
    sequences = encode(tokenizer, [row["messages"] for row in rows], supervise="all")
    model = load_base(
        small_model, load_toy().params.quantization.model_copy(update={"load_in_4bit": False}), precision=precision
    )
    assert separate_rows(model, "auto", precision=precision)
    add_fused_lm_head(model)
    batch = PaddingFreeCollator()(list(build_dataset(sequences)))
    batch = {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    found = []
    for in_tiles in (False, True):
        model.zero_grad()
        with autocast(DEVICE, precision):
            loss = compute_step_loss(model, batch, in_tiles=in_tiles)
        loss.backward()
        found.append((loss.item(), torch.cat([weight.grad.flatten().float() for weight in model.parameters()])))
    (held, gradient), (tiled, of_tiles) = found
    allowed = 1e-4 if precision == "fp32" else 2e-2
    assert tiled == pytest.approx(held, rel=allowed)
    assert (of_tiles - gradient).norm() < allowed * gradient.norm()
