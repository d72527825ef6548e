"""Overrides: what is no key is named before Hydra is asked, and a run says which values it changes."""

import pytest
from refusals import refused

from lathe.common import paths
from lathe.config import overrides
from lathe.config.load import load
from lathe.experiments import preflight, recipes, run_recipe

pytestmark = pytest.mark.usefixtures("toy_params")


@pytest.mark.parametrize(
    ("override", "code", "remedy"),
    [
        ("lora.rr=8", "unknown-key", "did you mean 'lora.r'?"),
        ("LORA.R=8", "unknown-key", "did you mean 'lora.r'?"),
        ("model.x=3", "unknown-key", "did you mean 'model'?"),
        ("learning_rate=1", "unknown-key", "did you mean 'training.learning_rate' or 'dpo.learning_rate' or "),
        ("lora=3", "unknown-key", "it is a section; name its keys, such as lora.r"),
        ("+zzzzzzzzzzzz=3", "unknown-key", "see `lathe schema` for the keys"),
        ("lora.r", "unreadable-override", "write -S lora.r=VALUE"),
        ("~lora.r", "unreadable-override", "write -S lora.r=VALUE"),
    ],
)
@pytest.mark.parametrize("read", [overrides.apply_overrides, overrides.expand_sweep])
def test_what_is_no_key_is_named_with_its_remedy(read, override, code, remedy):
    with refused(code, f"-S {override}: ", remedy) as caught:
        read(["seed=1", override])
    assert "\n" not in str(caught.value)


def test_every_wrong_key_is_named_at_once():
    with refused("unknown-key", "-S lora.rr=8", "-S lora.s=1") as caught:
        overrides.apply_overrides(["lora.rr=8", "seed=1", "lora.s=1"])
    assert len(str(caught.value).splitlines()) == 2


def test_of_many_overrides_the_one_that_hydra_cannot_read_is_named():
    with refused("unreadable-override", "-S lora.r=[8: ") as caught:
        overrides.expand_sweep(["seed=1", "lora.r=[8", "model=tiny"])
    assert "seed" not in str(caught.value)


@pytest.mark.parametrize("override", ["lora={r: 8}", "++lora.r=8", "lora.r=8"])
def test_the_forms_of_one_key_are_taken(override):
    assert overrides.apply_overrides([override]).params.lora.r == 8


def test_a_part_of_a_list_is_taken():
    assert overrides.apply_overrides(["grpo.rewards.0.weight=0.3"]).params.grpo.rewards[0].weight == 0.3


def test_params_yaml_differs_from_itself_in_nothing():
    assert overrides.compare_with_params(load(paths.PARAMS)) == {}


@pytest.mark.parametrize("name", ["tiny", "qwen3-600m", "smollm2-grpo"])
def test_the_changes_of_a_recipe_are_the_keys_it_sets_to_another_value(name):
    changes = overrides.compare_with_params(overrides.apply_overrides(recipes.load_recipe(name).build_overrides([])))
    wanted = recipes.load_recipe(name).recipe.overrides
    assert set(changes) <= set(wanted)
    for key, (then, now) in changes.items():
        assert now == wanted[key] != then


def test_changed_values_are_listed_one_a_line_and_the_many_counted():
    configs = [overrides.apply_overrides([f"lora.r={rank}", "seed=7"]) for rank in (4, 8)]
    then = load(paths.PARAMS).params
    assert list(run_recipe.describe_changes(configs)) == [
        "2 values are not as in params.yaml:",
        f"  seed: {then.seed} -> 7",
        f"  lora.r: {then.lora.r} -> 4, 8",
    ]
    assert list(run_recipe.describe_changes([load(paths.PARAMS)])) == ["every value is as in params.yaml"]
    many = {f"key{number}": (None, [number, "x" * 200]) for number in range(18)}
    lines = list(preflight.format_changes(many))
    assert len(lines) == 16
    assert lines[-1] == "  and 3 more"
    assert lines[0].startswith('  key0: null -> [0, "xxx')
    assert max(map(len, lines)) < 110
