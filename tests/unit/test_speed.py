"""Tokens per second and the share of the device's peak."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from toy import load_toy
from transformers import LlamaConfig, LlamaForCausalLM

from lathe.models.adapter import add_adapter
from lathe.training.throughput import ThroughputMeter, count_flops, get_peak_flops

HIDDEN, INNER, VOCABULARY, LAYERS = 32, 48, 100, 2


@pytest.fixture
def model() -> Any:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    return LlamaForCausalLM(config)


def test_a_step_needs_four_operations_per_frozen_weight_and_six_per_trained_one(model):
    layer = HIDDEN * (2 * HIDDEN + 2 * HIDDEN // 2) + 3 * HIDDEN * INNER  # q, o, k, v; gate, up, down
    assert count_flops(model) == (6 * LAYERS * layer, 6 * HIDDEN * VOCABULARY)
    lora = load_toy().params.lora
    adapted = add_adapter(model, lora)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    # No gradient goes to the input of the first trained layer, nor to what is before it.
    first = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * lora.r
    assert count_flops(adapted) == (4 * LAYERS * layer + 6 * trained - first, 4 * HIDDEN * VOCABULARY)


def test_no_backward_pass_is_counted_in_blocks_before_those_that_are_trained(model):
    layer = HIDDEN * (2 * HIDDEN + 2 * HIDDEN // 2) + 3 * HIDDEN * INNER
    lora = load_toy().params.lora.model_copy(update={"num_layers": 1})
    adapted = add_adapter(model, lora)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    first = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * lora.r
    assert count_flops(adapted)[0] == 2 * layer + 4 * layer + 6 * trained - first


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla T4", 65e12),
        ("AMD Instinct MI300X", None),
    ],
)
def test_the_peak_of_a_device_is_that_of_its_own_kind(device, peak):
    assert get_peak_flops(device) == peak


def test_rates_are_those_of_the_steps_alone_and_of_this_process(model):
    trainer = SimpleNamespace(trained_tokens=1000, trained_supervised_tokens=100)  # of a run that was interrupted
    speed = ThroughputMeter(model, precision="bf16")
    speed.follow(trainer)
    speed.on_train_begin(None, None, None)
    assert speed.measure_since_last() == speed.measure_overall() == {}
    for _ in range(2):
        speed.on_step_begin(None, None, None)
        trainer.trained_tokens += 300
        trainer.trained_supervised_tokens += 30
        time.sleep(0.02)
        speed.on_step_end(None, None, None)
        time.sleep(0.1)  # an evaluation
    overall = speed.measure_overall()
    assert overall["tokens_per_second"] == pytest.approx(600 / speed.seconds, abs=0.1)
    assert overall["tokens_per_second"] == pytest.approx(10 * overall["supervised_tokens_per_second"], abs=1)
    assert 0.04 <= speed.seconds < 0.1
    assert speed.measure_since_last().keys() == {*overall, "peak_memory_bytes"}
    assert speed.measure_since_last() == {}
    speed.peak = 1e9
    done = 600 * speed.per_token + 60 * speed.per_supervised_token
    assert speed.measure_overall()["model_flops_utilization"] == pytest.approx(done / speed.seconds / 1e9, abs=1e-4)
