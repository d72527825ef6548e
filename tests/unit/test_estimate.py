"""Estimates against what models, files and trainings really take."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from refusals import refused
from toy import PYTHONPATH, load_toy

from lathe.common import paths
from lathe.common.text import readable_bytes
from lathe.config import params, training_params
from lathe.gguf import convert
from lathe.gguf.quantize import quantize
from lathe.models.adapter import add_adapter
from lathe.models.loading import load_base
from lathe.needs.estimate import (
    OPTIMIZER_BYTES,
    TrainingMemory,
    describe_largest_part,
    estimate_disk,
    estimate_training_memory,
    explain,
)
from lathe.training import sft, training_step
from lathe.training.loss import CHUNK_BYTES, IGNORE_INDEX
from lathe.training.optimizer_steps import count_training_steps
from lathe.training.packing import PaddedCollator
from lathe.training.training_step import compute_step_loss

pytestmark = pytest.mark.heavy

CONFIG = load_toy().params
TRAINING = CONFIG.training.model_copy(update={"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2})
WITHOUT_4BIT = CONFIG.quantization.model_copy(update={"load_in_4bit": False})

QWEN = {
    "model_type": "qwen3",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32_000,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {
    **QWEN,
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "tie_word_embeddings": False,
}
# The published shapes.
QWEN3_600M = {
    **QWEN,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
}
QWEN3_8B = {
    **QWEN3_600M,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}


def estimated(config: Any, *, training=TRAINING, lora=CONFIG.lora, quantization=CONFIG.quantization) -> TrainingMemory:
    return estimate_training_memory(config, sections(training=training, lora=lora, quantization=quantization))


def sections(**changed: Any) -> params.Params:
    return CONFIG.model_copy(update=changed)


def of_types(*types: str) -> params.Params:
    return sections(quantize=changed(CONFIG.quantize, types=list(types)))


def changed(section: Any, **values: Any) -> Any:
    return section.model_copy(update=values)


@pytest.mark.parametrize("double_quant", [False, True])
def test_weights_are_counted_as_bitsandbytes_packs_them(small_model, double_quant):
    quantization = changed(CONFIG.quantization, bnb_4bit_use_double_quant=double_quant)
    training = changed(TRAINING, precision="bf16")
    model = load_base(small_model, quantization, precision="bf16")
    taken = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):
            taken += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    assert estimated(small_model, training=training, quantization=quantization).weights == pytest.approx(
        taken, rel=1e-3
    )


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"r": 3},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*\.layers\.0\.mlp\.\w+_proj"},
        {"num_layers": 1},
        {"num_layers": 1, "target_modules": ["q_proj", "v_proj"]},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_the_adapter_is_counted_as_training_makes_it(small_model, choice):
    lora = changed(CONFIG.lora, **choice)
    model = add_adapter(load_base(small_model, WITHOUT_4BIT, precision="fp32"), lora)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    memory = estimated(small_model, lora=lora)
    assert memory.adapter == 4 * trained
    assert memory.gradients == 4 * trained


def test_under_full_tuning_every_weight_is_trained_and_none_frozen():
    whole = sections(training=changed(TRAINING, tuning="full", max_length=64), quantization=WITHOUT_4BIT)
    memory, disk = estimate_training_memory(QWEN, whole), estimate_disk(QWEN, whole)
    weights = disk["models/base"]
    assert weights is not None
    assert memory.adapter == memory.gradients == memory.optimizer / 2 == 4 * weights / 2  # stored in bf16
    assert memory.weights < weights / 1000  # buffers
    assert disk["models/adapter"] == weights
    assert disk[".scratch/train"] == 3 * 12 * weights / 2
    said = explain(memory, whole.training, WITHOUT_4BIT)
    assert re.fullmatch("most of it is adapter, gradients and optimizer, .*; set training.tuning to lora", said), said
    part = describe_largest_part(memory, whole.training, WITHOUT_4BIT)
    assert re.fullmatch(r"most of it is adapter, gradients and optimizer, [\d.]+ [MG]B", part), part


def test_every_optimizer_has_its_states_counted():
    assert OPTIMIZER_BYTES.keys() == set(get_args(training_params.Training.model_fields["optim"].annotation))


def test_published_sizes_are_met():
    """Parameters of Qwen3-0.6B and -8B as their cards give them; the published Q4_K_M files have 397 and 5,027 MB."""
    small, large = (estimate_disk(config, of_types("Q4_K_M")) for config in (QWEN3_600M, QWEN3_8B))
    assert small["models/base"] == 2 * 596_049_920
    assert large["models/base"] == 2 * 8_190_735_360
    assert small["models/gguf/Q4_K_M.gguf"] == pytest.approx(397e6, rel=0.03)
    assert large["models/gguf/Q4_K_M.gguf"] == pytest.approx(5_027e6, rel=0.03)


def test_what_the_data_alone_decides_is_not_estimated():
    disk = estimate_disk(QWEN, of_types("Q8_0"))
    assert [path for path, size in disk.items() if size is None] == ["data/raw", "data/processed", "data/generated"]


def test_gguf_files_have_the_estimated_size(small_model, tmp_path):
    types = ["Q8_0", "Q4_K_M", "Q4_1", "Q2_K", "Q5_K_S", "MXFP4_MOE"]
    wide = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    folder = random_model(tmp_path, {**LLAMA, **wide, "vocab_size": 8000}, small_model)
    source, target = tmp_path / "f16.gguf", tmp_path / "quantized.gguf"
    convert.convert(folder, source, outtype="f16", llama_cpp=paths.LLAMA_CPP, metadata={})
    disk = estimate_disk(folder, of_types(*types))
    assert disk["models/gguf/merged-f16.gguf"] == pytest.approx(source.stat().st_size, rel=0.03)
    for name in types:
        quantize(source, target, type=name, threads=2)
        assert disk[f"models/gguf/{name}.gguf"] == pytest.approx(target.stat().st_size, rel=0.03), name


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_checkpointing_takes_less_and_a_longer_batch_more(precision):
    training = changed(TRAINING, precision=precision)
    plain = estimated(QWEN3_600M, training=training)
    assert (
        estimated(QWEN3_600M, training=changed(training, gradient_checkpointing=True)).activations
        < plain.activations / 5
    )
    assert estimated(QWEN3_600M, training=changed(training, max_length=2048)).activations > 1.9 * plain.activations
    assert estimated(QWEN3_600M, training=changed(training, per_device_train_batch_size=4)).logits > 1.9 * plain.logits


def test_only_supervised_positions_have_logits():
    training = changed(TRAINING, precision="bf16")
    memory = estimate_training_memory(QWEN3_600M, sections(training=training), length=512, supervised_tokens=100)
    # In bf16 the logits and their gradient, and little besides.
    wide = training.per_device_train_batch_size * 100 * QWEN3_600M["vocab_size"]
    assert 4 * wide <= memory.logits < 4 * wide + 4 * CHUNK_BYTES["cpu"]


def test_a_gpu_holds_a_tile_where_the_logits_would_be_too_many():
    training = changed(TRAINING, precision="bf16", gradient_checkpointing=True, max_length=4096)

    def estimate(device: Any, columns: int, **changes: Any) -> TrainingMemory:
        return estimate_training_memory(
            QWEN3_600M, sections(training=training, **changes), supervised_tokens=columns, device=device
        )

    held, tiled = estimate("cpu", 4095), estimate("cuda", 4095)
    wide = 2 * 4095 * QWEN3_600M["vocab_size"]
    assert held.logits > 4 * wide
    assert 1 << 28 <= tiled.logits < (1 << 28) + (1 << 26)  # and those of one column
    assert tiled.total < held.total / 2
    assert tiled.activations > held.activations  # hidden states and their gradient
    few = [estimate(device, 100) for device in ("cpu", "cuda")]
    assert few[0] == few[1]
    added = sections().preprocess.model_copy(update={"added_tokens": ["<a>"]})
    assert estimate("cuda", 4095, preprocess=added) == held


def test_the_estimate_runs_the_step_of_the_trainer_on_a_batch_of_its_collator(small_model, monkeypatch):
    batches = []

    def record(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        batches.append(batch)
        return compute_step_loss(model, batch)

    assert sft.compute_step_loss is compute_step_loss
    monkeypatch.setattr(training_step, "compute_step_loss", record)
    estimated(QWEN)
    example = {"input_ids": [1, 2, 3], "labels": [IGNORE_INDEX, 2, 3], "seq_lengths": [3]}
    collated = PaddedCollator(0)([example])
    for batch in batches:
        assert training_step.select_model_inputs(batch).keys() == training_step.select_model_inputs(collated).keys()
        assert batch.keys() <= collated.keys()
    assert len(batches) == 4  # a step and an evaluation, with two and with four layers


def test_a_pack_is_counted_as_long_as_rows_may_be():
    training = changed(TRAINING, max_length=512)
    long, short, packed = (
        estimate_training_memory(
            QWEN, sections(training=training, sft=training_params.Sft(packing=packing)), length=length
        )
        for length, packing in ((512, False), (100, False), (100, True))
    )
    assert packed.activations == long.activations > short.activations


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text", "phi3", "mixtral", "gpt_neox"])
def test_other_architectures_are_counted_too(architecture):
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[architecture](
        hidden_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4
    )
    # An update of its experts together could not be merged, and is refused.
    modules = ["q_proj", "o_proj"] if architecture == "mixtral" else CONFIG.lora.target_modules
    lora = changed(CONFIG.lora, target_modules=modules)
    memory = estimated(config.to_dict(), training=changed(TRAINING, max_length=64), lora=lora)
    assert min(memory.weights, memory.adapter, memory.activations, memory.evaluation) > 0


@pytest.mark.parametrize(
    ("training", "quantization", "expected"),
    [
        ({}, {}, "activations, .*; set training.gradient_checkpointing to true"),
        (
            {"gradient_checkpointing": True, "per_device_train_batch_size": 8},
            {},
            r"logits, .*; lower training.per_device_train_batch_size \(now 8\), raise gradient_accumulation_steps",
        ),
        (
            {"per_device_eval_batch_size": 64},
            {},
            r"evaluation, .*; lower training.per_device_eval_batch_size \(now 64\)",
        ),
        ({"max_length": 64, "gradient_checkpointing": True}, {}, "weights, .*; choose a smaller model"),
        ({"max_length": 64}, {"load_in_4bit": False}, "weights, .*; set quantization.load_in_4bit to true"),
    ],
)
def test_the_largest_part_is_named_with_what_to_change(training, quantization, expected):
    training, quantization = changed(TRAINING, **training), changed(CONFIG.quantization, **quantization)
    memory = estimated(QWEN3_600M, training=training, quantization=quantization)
    said = explain(memory, training, quantization)
    assert re.fullmatch(f"most of it is {expected}.*", said), said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("config", "code", "part"),
    [
        ({}, "architecture-unknown", "model_type is None"),
        ({"model_type": "qwen99"}, "architecture-unknown", "model_type is 'qwen99'"),
        ({"model_type": "vit"}, "not-a-causal-model", "no causal language model"),
        ({**QWEN, "num_key_value_heads": 3}, "shapes-do-not-fit", "its layers do not fit together"),
        ({**QWEN, "hidden_size": "wide"}, "config-refused", "hidden_size"),
    ],
)
def test_a_configuration_of_no_use_is_refused_in_one_line(config, code, part):
    with refused(code, "config.json: ", part) as caught:
        estimated(config)
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "code"),
    [(None, "no-such-file"), ("{", "not-json"), ("[]", "no-json-object")],
)
def test_a_damaged_config_file_is_refused_in_one_line(tmp_path, content, code):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with refused(code, "config.json"):
        estimated(tmp_path)


def test_layers_that_do_not_exist_are_refused():
    with refused("layer-unknown", "lora.target_modules: 'query'"):
        estimated(QWEN, lora=changed(CONFIG.lora, target_modules=["query"]))


def test_more_blocks_than_the_model_has_are_refused():
    with refused("blocks-too-many", "lora.num_layers is 99"):
        estimated(QWEN, lora=changed(CONFIG.lora, num_layers=99))


def test_an_update_in_the_last_blocks_alone_takes_less_memory():
    whole, half = (estimated(QWEN, lora=changed(CONFIG.lora, num_layers=number)) for number in (None, 4))
    assert half.adapter == whole.adapter / 2
    assert half.activations < 0.7 * whole.activations


@pytest.mark.parametrize(
    ("count", "shown"), [(999, "0.999 kB"), (12_300_000, "12.3 MB"), (999_600_000, "1,000 MB"), (1.5e12, "1.5 TB")]
)
def test_bytes_are_shown_in_decimal_units(count, shown):
    assert readable_bytes(count) == shown


def test_a_training_takes_what_was_estimated(small_model, tmp_path):
    """Two shapes, one with checkpointing: peaks of the resident size in a process of its own.

    Malloc is told to return what is freed: what it keeps is no part of an estimate of what is needed.
    """
    cases = {
        "Qwen3": {"config": QWEN},
        "Llama, checkpointing": {"config": LLAMA, "training": {"gradient_checkpointing": True}},
    }
    for name, (measured, expected) in trainings(cases, small_model, tmp_path).items():
        assert 0.8 < measured / expected < 1.25, f"{name}: {measured / 1e6:.0f} MB, not {expected / 1e6:.0f}"


@pytest.mark.slow
def test_more_trainings_take_what_was_estimated(small_model, tmp_path):
    packed = {"load_in_4bit": True}
    large = {**QWEN, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16}
    cases = {
        "Qwen3, checkpointing": {"config": QWEN, "training": {"gradient_checkpointing": True}},
        "Llama": {"config": LLAMA},
        "fp32": {"config": QWEN, "training": {"precision": "fp32"}},
        "evaluation": {"config": QWEN, "training": {"gradient_checkpointing": True, "per_device_eval_batch_size": 24}},
        "large": {"config": large},
        "large, checkpointing": {"config": large, "training": {"gradient_checkpointing": True}},
        "DoRA": {"config": QWEN, "lora": {"use_dora": True}},
        "full": {"config": QWEN, "training": {"tuning": "full"}},
        "full, checkpointing": {"config": LLAMA, "training": {"tuning": "full", "gradient_checkpointing": True}},
    }
    for name, (measured, expected) in trainings(cases, small_model, tmp_path).items():
        assert 0.8 < measured / expected < 1.25, f"{name}: {measured / 1e6:.0f} MB, not {expected / 1e6:.0f}"
    # The 16-bit checkpoint stays mapped beside the packed weights, in pages that the kernel may take back.
    for name, (measured, expected) in trainings(
        {"4 bits": {"config": LLAMA, "quantization": packed}}, small_model, tmp_path
    ).items():
        assert 0.8 < measured / expected < 1.6, f"{name}: {measured / 1e6:.0f} MB, not {expected / 1e6:.0f}"


def random_model(folder: Path, config: dict[str, Any], tokenizer: Path) -> Path:
    """Save a model of random weights with the small model's tokenizer, whose 768 pieces are few of its vocabulary."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    target = folder / f"{config['model_type']}-{config['hidden_size']}"
    if not target.exists():
        made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).save_pretrained(target)
        for file in tokenizer.iterdir():
            if file.name.startswith(("token", "chat", "special")):
                shutil.copy(file, target / file.name)
    return target


def trainings(cases: dict[str, Any], small_model: Path, folder: Path) -> dict[str, tuple[int, int]]:
    """Train once for each case, one after the other; return measured and estimated bytes of each."""
    todo = {
        name: {**case, "model": str(random_model(folder, case["config"], small_model))} for name, case in cases.items()
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("measure_training.py")), str(small_model), json.dumps(todo)],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_WAIT_POLICY": "PASSIVE"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: tuple(result) for name, result in json.loads(done.stdout.splitlines()[-1]).items()}


def test_optimizer_steps_are_counted_as_the_trainer_counts_them():
    training = CONFIG.training.model_copy(
        update={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "num_train_epochs": 2.5}
    )

    def steps(rows: int, **changes: Any) -> dict[str, int | None]:
        return count_training_steps(sections(training=changed(training, **changes)), examples=rows, sequences=rows)

    assert steps(100) == {"steps_per_epoch": 9, "steps": 23}
    assert steps(1)["steps"] == 3
    assert steps(100, max_steps=7)["steps"] == 7


def test_another_method_has_steps_of_its_own_behind_those_of_its_supervised_phase():
    supervised = {"per_device_train_batch_size": 10, "gradient_accumulation_steps": 1, "max_steps": None}
    chosen = sections(
        training=changed(TRAINING, method="dpo", **supervised),
        dpo=changed(
            CONFIG.dpo,
            sft_epochs=0.5,
            num_train_epochs=3.0,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
        ),
        grpo=changed(CONFIG.grpo, sft_epochs=0.0, max_steps=60),
    )
    # A conversation of which every turn is learnt may make several sequences; it is one pair.
    assert count_training_steps(chosen, examples=100, sequences=120) == {
        "sft_steps": 6,
        "steps_per_epoch": 13,
        "steps": 39,
    }
    chosen = chosen.model_copy(update={"training": changed(chosen.training, method="grpo")})
    assert count_training_steps(chosen, examples=100, sequences=120) == {
        "sft_steps": 0,
        "steps_per_epoch": None,
        "steps": 60,
    }


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_memory_is_not_guessed_for_a_method_that_was_not_measured(method):
    with refused("method-not-estimated", f"training.method is '{method}'"):
        estimate_training_memory(QWEN, sections(training=changed(TRAINING, method=method)))
