"""Batch sizes that are auto: as many rows as fit, and always as many in a step."""

import json
from typing import Any

import pytest
from refusals import refused
from toy import load_toy

from lathe.config.params import Params
from lathe.needs.fit_batch import choose_batch_sizes, find_largest, measure_row_memory
from lathe.training.batch_sizes import BatchSizes, read_batch_sizes, set_batch_sizes
from lathe.training.optimizer_steps import count_training_steps

pytestmark = pytest.mark.heavy

QWEN = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 8192,
}


def choose(**changes: Any) -> Params:
    params = load_toy().params
    return params.model_copy(update={"training": params.training.model_copy(update=changes)})


AUTO = {"per_device_train_batch_size": "auto", "per_device_eval_batch_size": "auto", "gradient_accumulation_steps": 12}


def test_numbers_stay_as_they_are_and_nothing_is_estimated():
    chosen = choose(per_device_train_batch_size=3, gradient_accumulation_steps=5, per_device_eval_batch_size=7)
    assert choose_batch_sizes({}, chosen, memory=1) == BatchSizes(3, 5, 7)


@pytest.mark.parametrize(("fits", "train", "passes"), [(100, 12, 1), (11, 6, 2), (5, 4, 3), (1, 1, 12), (0, 1, 12)])
def test_as_many_of_the_rows_of_a_step_as_fit_go_through_the_model_at_once(fits, train, passes):
    chosen = choose(**AUTO)
    memory = measure_row_memory(QWEN, chosen).take(fits) + 1
    sizes = choose_batch_sizes(QWEN, chosen, memory=memory)
    assert (sizes.per_device_train_batch_size, sizes.gradient_accumulation_steps) == (train, passes)


@pytest.mark.parametrize(("fits", "rows"), [(1000, 64), (64, 64), (63, 32), (3, 2), (0, 1)])
def test_an_evaluation_takes_as_many_rows_as_fit(fits, rows):
    chosen = choose(**AUTO)
    memory = measure_row_memory(QWEN, chosen).evaluate(fits) + 1
    assert choose_batch_sizes(QWEN, chosen, memory=memory).per_device_eval_batch_size == rows


def test_shorter_rows_leave_room_for_more():
    chosen = choose(**AUTO)
    memory = measure_row_memory(QWEN, chosen).take(2)
    length = chosen.training.max_length
    long, short = (choose_batch_sizes(QWEN, chosen, memory=memory, length=n) for n in (length, length // 8))
    assert long.per_device_train_batch_size == 2
    assert short.per_device_train_batch_size > 4


def test_on_a_gpu_the_logits_of_more_rows_take_no_more():
    wide = {**QWEN, "vocab_size": 151_936}
    held, tiled = (
        measure_row_memory(wide, choose(**AUTO, max_length=512), device=device) for device in ("cpu", "cuda")
    )
    assert held.take(64) - held.take(32) == 32 * (held.activations + held.logits)
    assert tiled.take(64) - tiled.take(32) == 32 * tiled.activations
    assert tiled.take(64) < held.take(64) / 2
    assert tiled.take(1) <= held.take(1)


def test_a_model_whose_memory_cannot_be_estimated_gets_one_row(caplog):
    sizes = choose_batch_sizes({"model_type": "unknown"}, choose(**AUTO), memory=1 << 40)
    assert sizes == BatchSizes(1, 12, 1)
    assert "batch sizes that are auto become 1" in caplog.text


def test_a_step_has_the_same_rows_whatever_fits():
    chosen = choose(**AUTO)
    steps = set()
    for fits in (1, 5, 100):
        sizes = choose_batch_sizes(QWEN, chosen, memory=measure_row_memory(QWEN, chosen).take(fits) + 1)
        steps.add(count_training_steps(set_batch_sizes(chosen, sizes), examples=120, sequences=120)["steps_per_epoch"])
    assert steps == {10}


def test_training_takes_the_sizes_that_were_chosen(tmp_path):
    file = tmp_path / "batch_sizes.json"
    numbers = choose()
    assert read_batch_sizes(numbers, file) is numbers
    with refused("no-such-file", "batch_sizes.json", "stages/estimate.py"):
        read_batch_sizes(choose(**AUTO), file)
    file.write_text('{"batch_sizes": []}')
    with refused("no-batch-sizes", "stages/estimate.py"):
        read_batch_sizes(choose(**AUTO), file)
    file.write_text(json.dumps({"batch_sizes": [vars(BatchSizes(4, 3, 16))]}))
    training = read_batch_sizes(choose(**AUTO), file).training
    assert training.per_device_train_batch_size == 4
    assert training.gradient_accumulation_steps == 3
    assert training.per_device_eval_batch_size == 16


def test_the_largest_that_fits_is_before_the_first_that_does_not():
    assert find_largest([1, 2, 4, 8], lambda size: size < 5) == 4
    assert find_largest([3, 4], lambda size: False) == 3
