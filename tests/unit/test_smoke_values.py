"""Small values of `lathe smoke`: for every recipe they are valid, and leave nothing to chance."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from lathe.common import dotted_keys
from lathe.config.base import SPLITS
from lathe.config.overrides import apply_overrides, format_override
from lathe.config.params import Params
from lathe.experiments import recipes
from lathe.experiments.smoke import command, small_values


def configured(name: str, *further: str) -> Params:
    return apply_overrides(recipes.load_recipe(name).build_overrides(further)).params


def cut(params: Params) -> Params:
    values = small_values.choose_small_values(params, "data/x.txt") | small_values.choose_short_answers(params)
    return Params.model_validate(small_values.set_values(params.model_dump(), values))


@pytest.mark.parametrize("name", recipes.list_recipes())
def test_the_small_values_of_every_recipe_are_valid_parameters(name):
    params = configured(name)
    small = cut(params)
    steps = small.grpo.max_steps if params.training.method == "grpo" else small.training.max_steps
    assert steps == 2
    assert small.quantize.types == params.quantize.types[:1]
    assert small.generate.max_rows == 4
    assert small.generate.max_new_tokens <= 16
    assert not small.tracking.mlflow.enabled
    assert not small.tracking.wandb.enabled


@pytest.mark.parametrize("name", ["vikhr-8b", "smollm2-dpo", "smollm2-grpo", "tiny"])
def test_what_decides_memory_and_the_fetched_files_is_as_in_the_recipe(name):
    params = configured(name)
    changed = dotted_keys.compare(
        dotted_keys.flatten(params.model_dump()), dotted_keys.flatten(cut(params).model_dump())
    )
    kept = ("seed", "model", "dataset", "bert_score.", "evaluate.metrics", "lora.", "quantization.", "sft.", "merge.")
    assert [key for key in changed if key.startswith(kept)] == []
    assert "training.per_device_train_batch_size" not in changed
    assert "training.max_length" not in changed


def test_gates_of_a_type_that_is_left_out_go_and_the_others_stay():
    one, both = ["Q4_K_M.exact_match > 0"], ["Q4_K_M.exact_match > 0", "quantized.exact_match > 0.5"]
    assert cut(configured("tiny", format_override("evaluate.gates", both))).evaluate.gates == both[1:]
    assert cut(configured("tiny", format_override("evaluate.gates", one))).evaluate.gates is None


@given(st.floats(0, 0.95), st.dictionaries(st.sampled_from(SPLITS), st.integers(1, 5000)))
def test_enough_rows_are_kept_that_some_are_left_and_never_more_than_the_preset_keeps(dropped, limits):
    kept = small_values.choose_limits(limits, dropped)
    assert set(kept) == set(SPLITS)
    for name, rows in kept.items():
        assert 1 <= rows <= min(limits.get(name, 1000), 1000)
        if name not in limits:
            assert rows >= (20 if name == "train" else 4)
            assert dropped**rows < 1e-3


def test_a_fine_dataset_takes_about_twenty_rows():
    assert small_values.choose_limits(None, 0.01) == {"train": 21, "validation": 4, "test": 4}


def test_a_text_is_cut_between_words():
    assert small_values.shorten_text("a few words") == "a few words"
    shortened = small_values.shorten_text("word " * 500)
    assert len(shortened) <= 400
    assert set(shortened.split()) == {"word"}
    assert small_values.shorten_text("x" * 500)


def test_a_sweep_is_refused_before_anything_is_copied():
    with refused("sweep-in-smoke", "training.learning_rate=1e-3,2e-3", "2 runs"):
        command.run("tiny", ["training.learning_rate=1e-3,2e-3"])
    with refused("unknown-recipe", "tinny", "did you mean 'tiny'?"):
        command.run("tinny", [])
    with refused("unknown-key", "lora.rr", "did you mean 'lora.r'?"):
        command.run("tiny", ["lora.rr=1"])
