"""Training on a model of one layer: what moves, what does not, and that the same is the same."""

import contextlib
import gc
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import termios
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import psutil
import pytest
import torch
from conftest import changed, write_splits
from pydantic import BaseModel
from refusals import check_refusal, compare_with_kept, refused
from safetensors.torch import load_file
from toy import PYTHONPATH, load_toy

from lathe.common import paths
from lathe.config import training_params
from lathe.models.loss_mask import Encoded, encode
from lathe.needs.estimate import OPTIMIZER_BYTES
from lathe.sources.builtin import household_commands
from lathe.training.train import TrainingResult, describe_unusual_rate, train

CONFIG = load_toy().params
SPLITS = {
    "train": household_commands.make_rows(1)["train"][:24],
    "validation": household_commands.make_rows(1)["validation"][:6],
}
QUICK = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "eval_steps": 100, "max_length": 256}


@pytest.fixture
def results() -> dict[Path, TrainingResult]:
    """What each training of a test returned, by the adapter's folder."""
    return {}


@pytest.fixture
def trained(small_model, tmp_path, results):
    """Return a function that trains with some parameters changed and gives the adapter's folder."""
    runs = 0

    def run(splits=SPLITS, base=small_model, **changes) -> Path:
        nonlocal runs
        runs += 1
        folder = tmp_path / str(runs)
        folder.mkdir()
        sections: dict[str, type[BaseModel]] = {
            "lora": training_params.Lora,
            "quantization": training_params.Quantization,
            "sft": training_params.Sft,
        }
        named = {
            next((f"{name}.{key}" for name, kind in sections.items() if key in kind.model_fields), key): value
            for key, value in {**QUICK, **changes}.items()
        }
        chosen = changed(CONFIG, {"seed": 1, **named})
        files = write_splits(tmp_path / f"data{runs}", splits)
        results[folder] = train(base, files, folder, tmp_path / f"metrics{runs}", params=chosen)
        return folder

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def digest(folder: Path) -> str:
    content = b"".join(file.read_bytes() for file in sorted(folder.iterdir()))
    return hashlib.sha256(content).hexdigest()


def encoded(model: Path) -> Sequence[Encoded]:
    """The rows of the training split as the trainer sees them."""
    from lathe.models.tokenizer import load_tokenizer

    return encode(load_tokenizer(model), [row["messages"] for row in SPLITS["train"]], supervise="all")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_dora": True, "modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
        {"modules_to_save": ["layers.0.mlp"], "load_in_4bit": False},
    ],
    ids=str,
)
def test_every_tensor_of_the_adapter_moves(trained, changes):
    first, second = weights(trained(**changes)), weights(trained(learning_rate=0.02, **changes))
    for name in changes.get("modules_to_save", []):
        assert any(f"{name}." in tensor for tensor in first), name
    for name, tensor in first.items():
        assert tensor.dtype == torch.float32, name
        # Both began at the same values; a tensor that does not move is the same whatever the rate.
        assert not torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("packing", [False, True])
def test_the_same_seed_gives_the_same_bytes(trained, packing):
    assert digest(trained(packing=packing)) == digest(trained(packing=packing))


def test_an_evaluation_in_between_changes_nothing(trained):
    """Evaluating must not repack the 4-bit weights: the steps after it would have wrong gradients."""
    assert digest(trained(eval_steps=1)) == digest(trained(eval_steps=100))


def test_training_on_a_16_bit_base_works_too(trained):
    assert weights(trained(load_in_4bit=False))


@pytest.mark.parametrize(("load_in_4bit", "packing"), [(False, False), (True, False), (False, True)])
def test_accumulated_passes_equal_one_large_pass(trained, load_in_4bit, packing):
    """The loss is normalised by the supervised tokens of the whole step, however they are divided."""
    # Packs of two or three rows: 24 rows make enough of them for steps of eight.
    same = {"load_in_4bit": load_in_4bit, "packing": packing, "max_length": 110, "max_steps": 3, "precision": "fp32"}
    whole = weights(trained(per_device_train_batch_size=8, **same))
    parts = weights(trained(per_device_train_batch_size=1, gradient_accumulation_steps=8, **same))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-2, atol=2e-4, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pack_trains_what_its_rows_train_one_by_one(trained, checkpointing):
    """One step on all rows, in one pack or in a pass each, moves every tensor alike."""
    once = {"max_steps": 1, "warmup_ratio": 0.0, "precision": "fp32", "gradient_checkpointing": checkpointing}
    rows = {**SPLITS, "train": SPLITS["train"][:8]}
    alone = weights(trained(rows, packing=False, per_device_train_batch_size=1, gradient_accumulation_steps=8, **once))
    packed = weights(trained(rows, packing=True, per_device_train_batch_size=1, max_length=1000, **once))
    for name, tensor in alone.items():
        torch.testing.assert_close(packed[name], tensor, rtol=1e-2, atol=2e-4, msg=name)


@pytest.mark.parametrize("packing", [False, True])
def test_tokens_per_second_count_each_row_once_an_epoch(trained, results, small_model, packing):
    speeds = results[trained(max_steps=None, num_train_epochs=1, packing=packing)].throughput
    rows = encoded(small_model)
    share = sum(sum(row.supervised) for row in rows) / sum(len(row.input_ids) for row in rows)
    assert speeds["supervised_tokens_per_second"] / speeds["tokens_per_second"] == pytest.approx(share, rel=1e-2)


@pytest.fixture
def soft_capped_model(small_model, tmp_path):
    """A model whose attention cannot be told rows apart without padding."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    folder = tmp_path / "soft_capped"
    shutil.copytree(small_model, folder)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=768, num_key_value_heads=1, head_dim=16, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_model_that_would_mix_rows_is_padded_and_never_packed(soft_capped_model, trained, caplog):
    assert weights(trained(base=soft_capped_model, load_in_4bit=False))
    assert "batches are padded, which is slower" in caplog.text
    with refused("packing-impossible", "sft.packing", "Gemma2ForCausalLM"):
        trained(base=soft_capped_model, load_in_4bit=False, packing=True)


def test_only_the_answers_carry_loss(small_model):
    from lathe.models.tokenizer import load_tokenizer
    from lathe.training.loss import IGNORE_INDEX
    from lathe.training.packing import build_dataset

    tokenizer = load_tokenizer(small_model)
    for row, conversation in zip(build_dataset(encoded(small_model)), SPLITS["train"], strict=True):
        learnt = [token for token in row["labels"] if token != IGNORE_INDEX]
        assert tokenizer.decode(learnt) == conversation["messages"][-1]["content"] + "<|im_end|>"


@pytest.mark.parametrize(
    ("changes", "code", "part"),
    [
        (
            {"target_modules": ["q_proj", "query"]},
            "layer-unknown",
            "lora.target_modules: 'query' matches no layer; this",
        ),
        ({"target_modules": r".*\.query"}, "layer-unknown", r"lora.target_modules is '.*\\.query'"),
        ({"target_modules": "("}, "layer-expression", "lora.target_modules is '('"),
        ({"target_modules": r".*mlp.*"}, "layer-not-updatable", "model.layers.0.mlp, a LlamaMLP"),
        ({"target_modules": ["act_fn"]}, "layer-not-updatable", "model.layers.0.mlp.act_fn, a SiLUActivation"),
        ({"target_modules": r".*norm"}, "layer-not-updatable", "model.layers.0.input_layernorm, a LlamaRMSNorm"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]},
            "layer-unknown",
            "lora.target_modules is ['q_proj']; it matches no layer besides those in modules_to_save",
        ),
        ({"modules_to_save": ["head"]}, "layer-unknown", "lora.modules_to_save: 'head'"),
        ({"modules_to_save": ["act_fn"]}, "layer-without-weights", "model.layers.0.mlp.act_fn, a SiLUActivation"),
        ({"modules_to_save": ["gate_proj"]}, "layer-4bit", "model.layers.0.mlp.gate_proj"),
        ({"modules_to_save": ["mlp", "up_proj"]}, "layer-inside-another", "model.layers.0.mlp.up_proj"),
        (
            {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
            "layer-named-twice",
            "lora.modules_to_save: 'lm_head' is in lora.target_modules",
        ),
        ({"target_modules": ["q_proj", "lm_head"]}, "layer-output-head", "it matches lm_head"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(trained, changes, code, part):
    with refused(code, part):
        trained(**changes)


def test_a_loss_that_is_not_finite_stops_the_run(trained):
    with refused("loss-not-finite", "data/processed/train.jsonl:", "training.learning_rate", kept=False) as caught:
        trained(learning_rate=1e30, max_grad_norm=1e30, precision="fp32")
    assert re.match(r"(loss|grad_norm) is (nan|inf) at step [23], .*train.jsonl:(\d+, ){3}\d+;", str(caught.value))


def test_the_rows_named_are_those_of_the_step(small_model):
    from lathe.training.nonfinite_loss import make_nonfinite_error

    rows = encoded(small_model)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[n].input_ids) for n in (4, 9)], batch_first=True)
    packed = torch.tensor([rows[2].input_ids + rows[17].input_ids])
    error = make_nonfinite_error("loss", float("nan"), 3, [padded, packed], rows)
    parts = ("loss is nan at step 3", "train.jsonl:3, 5, 10, 18;", "inspect --row 3")
    check_refusal(error, "loss-not-finite", *parts, kept=False)
    compare_with_kept("training", error.code, str(error))


@pytest.mark.parametrize(
    ("rate", "weights", "tuning", "warned"),
    [
        (6e-3, 2_000_000, "lora", False),
        (6e-3, 600_000_000, "lora", True),
        (3e-3, 135_000_000, "lora", False),
        (6e-3, 135_000_000, "lora", True),
        (2e-4, 8_000_000_000, "lora", False),
        (1e-7, 2_000_000, "lora", True),
        (1e-3, 600_000_000, "full", True),
        (1e-5, 8_000_000_000, "full", False),
    ],
)
def test_a_rate_that_fits_another_size_of_model_is_warned_of(rate, weights, tuning, warned):
    assert (describe_unusual_rate(rate, weights=weights, tuning=tuning) is not None) == warned


def test_the_curves_have_one_point_per_logged_step(trained, tmp_path):
    trained(eval_steps=2)
    lines = (tmp_path / "metrics1/plots/metrics/eval/loss.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["step", "2", "4"]


def test_each_logged_step_is_a_line_of_json_and_speeds_stay_out_of_the_metrics(small_model, tmp_path, caplog):
    (tmp_path / "adapter").mkdir()
    chosen = changed(CONFIG, {**QUICK, "logging_steps": 2})
    with caplog.at_level(logging.INFO, "lathe.training.dvclive_curves"):
        files = write_splits(tmp_path / "data", SPLITS)
        train(small_model, files, tmp_path / "adapter", tmp_path / "m", params=chosen, throughput=tmp_path / "s")
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [(line["step"], line["of"]) for line in lines] == [(2, 4), (4, 4), (4, 4)]
    shown = {"train/loss", "train/grad_norm", "train/learning_rate", "train/tokens"}
    speeds = {"tokens_per_second", "supervised_tokens_per_second", "peak_memory_bytes"}
    assert lines[0].keys() == {"step", "of", *shown, *speeds, "seconds_left"}
    assert lines[2].keys() == {"step", "of", "eval/loss"}
    assert lines[1]["train/tokens"] > lines[0]["train/tokens"] > 0
    assert {path.stem for path in (tmp_path / "s/plots/metrics/train").iterdir()} == speeds
    assert {path.stem for path in (tmp_path / "m/plots/metrics/train").iterdir()} == {
        name.removeprefix("train/") for name in shown
    }
    assert json.loads((tmp_path / "s/metrics.json").read_text())["train"].keys() == speeds


def test_on_a_terminal_there_is_one_bar_with_the_last_values(small_model, tmp_path, monkeypatch, caplog):
    (tmp_path / "adapter").mkdir()
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 160))
    printed: list[bytes] = []

    def read_terminal() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(master, 4096):
                printed.append(data)

    reader = threading.Thread(target=read_terminal)
    reader.start()
    with os.fdopen(slave, "w") as terminal, caplog.at_level(logging.INFO, "lathe.training.dvclive_curves"):
        monkeypatch.setattr(sys, "stderr", terminal)
        files, chosen = write_splits(tmp_path / "data", SPLITS), changed(CONFIG, {**QUICK, "logging_steps": 2})
        train(small_model, files, tmp_path / "adapter", tmp_path / "m", params=chosen)
        monkeypatch.undo()
    reader.join()
    os.close(master)
    last = b"".join(printed).decode().rpartition("training")[2]
    assert not caplog.records
    assert "4/4" in last, b"".join(printed)
    for shown in (", loss ", "validation loss ", "rate ", "tokens/s ", "memory "):
        assert shown in last.replace("step, ", "step, , "), shown


def test_the_estimate_knows_every_optimizer():
    assert set(OPTIMIZER_BYTES) == set(get_args(training_params.Training.model_fields["optim"].annotation))


@pytest.mark.slow
@pytest.mark.parametrize(
    "optim",
    ["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_32bit", "lion_8bit", "adafactor"],
)
def test_every_optimizer_moves_the_adapter(trained, optim):
    first = weights(trained(optim=optim, max_steps=2, warmup_ratio=0.0, learning_rate=1e-3))
    assert any(tensor.any() for name, tensor in first.items() if "lora_B" in name)


@pytest.mark.slow
def test_a_compiled_model_trains_alike(trained):
    """Compiling takes minutes on a CPU."""
    same = {"max_steps": 2, "warmup_ratio": 0.0, "precision": "fp32", "load_in_4bit": False}
    compiled = weights(trained(torch_compile=True, **same))
    for name, tensor in weights(trained(**same)).items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-2, atol=2e-4, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_rows_train_what_rows_end_to_end_train(trained, attention):
    same = {"max_steps": 2, "warmup_ratio": 0.0, "precision": "fp32"}
    padded = weights(trained(attn_implementation=attention, **same))
    for name, tensor in weights(trained(**same)).items():
        torch.testing.assert_close(padded[name], tensor, rtol=1e-2, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    ("changes", "code", "part"),
    [
        (
            {"attn_implementation": "flash_attention_2"},
            "flash-attention-unavailable",
            "training.attn_implementation is",
        ),
        ({"use_liger_kernel": True}, "liger-kernel-missing", "training.use_liger_kernel is true"),
        ({"attn_implementation": "sdpa", "packing": True}, "packing-impossible", "attn_implementation is 'sdpa'"),
    ],
)
def test_what_the_machine_or_another_key_does_not_allow_is_refused(trained, changes, code, part):
    with refused(code, part):
        trained(**changes)


def test_memory_is_given_back_after_training(trained):
    """The first runs load what stays; from then on a run may leave nothing behind."""
    held, before = [], tensors_alive()
    for _ in range(10):
        trained(max_steps=2)
        held.append((resident_bytes(), tensors_alive()))
    assert held[-1][1] - before < 20, held  # the model alone has more
    assert held[-1][0] - held[2][0] < 30_000_000, held


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def tensors_alive() -> int:
    return sum(1 for each in gc.get_objects() if issubclass(type(each), torch.Tensor))


def test_out_of_memory_is_one_line_that_says_what_was_used_and_what_to_change(small_model):
    """The limit is real, and so is the batch that does not fit: see the program."""
    program = paths.ROOT / "tests/stage/out_of_memory.py"
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(
        [sys.executable, str(program), str(small_model)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert re.fullmatch(
        r"error: out of memory: this machine had no more when training used [\d.]+ [MG]B; rows of 1024 tokens take "
        r".* GB beside the process itself; most of it is .*; set training.gradient_checkpointing to true",
        done.stderr.splitlines()[-1],
    )
