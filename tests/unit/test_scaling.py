"""What trainings take on paper: near what was measured on one H100, and by plain rules on several."""

import pytest
from refusals import refused

from lathe.doctor import scaling

ONE = ["training.tuning=lora", "quantization.load_in_4bit=false"]


# Tokens per second and GiB of one H100, docs/benchmarks.md.
@pytest.mark.parametrize(
    ("model", "rows", "checkpointing", "speed", "gib"),
    [
        ("qwen3-0.6b", 4, "false", 50_922, 31.1),
        ("llama-8b", 1, "false", 13_144, 39.0),
        ("llama-8b", 1, "true", 8_888, 17.4),
    ],
)
def test_estimates_are_near_what_was_measured(model, rows, checkpointing, speed, gib):
    overrides = [
        *ONE,
        f"training.gradient_checkpointing={checkpointing}",
        f"training.per_device_train_batch_size={rows}",
    ]
    needs = scaling.measure_needs(model, scaling.parse_gpus("H100"), 1000, overrides)
    (training,) = needs.trainings
    assert training.tokens_per_second == pytest.approx(speed, rel=0.05)
    assert 1 < training.bytes_on_one / (gib * 2**30) < 1.35
    assert training.seconds == pytest.approx(1000 * 4096 / training.tokens_per_second, rel=1e-3)
    assert training.shards == 1
    assert training.gigabytes_per_second is None


def test_what_does_not_fit_one_gpu_is_sharded_over_as_few_as_hold_it():
    overrides = ["training.tuning=full"]
    (alone,) = scaling.measure_needs("llama-8b", scaling.parse_gpus("H100"), 10, overrides).trainings
    assert (alone.shards, alone.tokens_per_second) == (None, None)
    (eight,) = scaling.measure_needs("llama-8b", scaling.parse_gpus("8xH100"), 10, overrides).trainings
    assert eight.shards == 4
    assert eight.bytes_on_one == alone.bytes_on_one
    assert eight.bytes_of_each < 0.9 * 80e9 < alone.bytes_on_one
    assert eight.gigabytes_per_second > 0
    lines = list(scaling.format_needs(scaling.measure_needs("llama-8b", scaling.parse_gpus("H100"), 10, overrides)))
    assert "8.03 B weights" in lines[0]
    assert "does not fit" in lines[2]


@pytest.mark.parametrize(
    ("text", "count", "name", "gigabytes"),
    [
        ("8xH100", 8, "H100", 80),
        ("h200", 1, "H200", 141),
        ("2 x rtx-4090", 2, "RTX 4090", 24),
        ("4xL40S", 4, "L40S", 48),
    ],
)
def test_gpus_are_read_from_a_number_and_a_name(text, count, name, gigabytes):
    gpus = scaling.parse_gpus(text)
    assert (gpus.count, gpus.name, gpus.memory) == (count, name, gigabytes * 10**9)
    assert gpus.peak > 60e12


@pytest.mark.parametrize("text", ["0xH100", "9999xH100", "8xH1000", "", "x", "8x", "H100; rm"])
def test_other_gpus_are_refused(text):
    with refused("no-such-gpu", kept=False):
        scaling.parse_gpus(text)


def test_every_gpu_whose_speed_is_known_has_a_memory():
    from lathe.training.throughput import PEAK_FLOPS

    for name in PEAK_FLOPS:
        assert scaling.parse_gpus(f"2x{name}").memory >= 16e9


def test_unknown_shapes_and_trainings_that_are_not_compared_are_refused():
    gpus = scaling.parse_gpus("H100")
    with refused("no-such-shape", "llama-70b", kept=False):
        scaling.measure_needs("llama-7b", gpus, 10, [])
    with refused("nothing-compared", "training.tuning", kept=False):
        scaling.measure_needs("llama-8b", gpus, 10, ["training.tuning=full", "quantization.load_in_4bit=true"])
