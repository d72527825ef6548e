"""Every recipe that ships can be run, says what it must, and the learner's series changes one factor at a time."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from lathe.common import dotted_keys, paths
from lathe.common.errors import InputError
from lathe.config import overrides
from lathe.config.load import Config, load
from lathe.experiments import recipes

SERIES = {
    "more-context": {"training.max_length"},
    "adapter-capacity": {"lora.r", "lora.lora_alpha"},
    "dropout": {"lora.lora_dropout"},
    "full-fine-tune": {"training.tuning", "quantization.load_in_4bit"},
}
SHIPPED = {
    *SERIES,
    *("arxiv-ministral-3b", "baseline", "gsm8k-grpo", "laptop", "multi-gpu", "qwen3-600m", "vikhr-8b"),
}
# What a recipe may leave to params.yaml, as it does not depend on the model: a new section is not among them.
NOT_OF_THE_MODEL = {
    *("convert", "judge", "tracking", "bert_score"),
    *("evaluate.general_text", "evaluate.bootstrap_samples", "evaluate.bert_score_weight", "evaluate.judge_weight"),
}
REAL = sorted(name for name in SHIPPED if recipes.find(name).recipe.overrides["model"] != "tiny")


def configured(name: str) -> Config:
    return overrides.applied(recipes.find(name).arguments([]))


def leaf(config: Config, key: str) -> object:
    value: object = config.params
    for step in key.split("."):
        value = getattr(value, step)
    return value


def test_what_ships_is_here():
    assert set(recipes.names()) >= SHIPPED


@pytest.mark.parametrize("name", recipes.names())
def test_the_overrides_of_a_recipe_become_the_parameters_of_its_run(name):
    config = configured(name)
    for key, value in recipes.find(name).recipe.overrides.items():
        found = leaf(config, key)
        if key == "grpo.rewards":
            found = [reward.model_dump(exclude_none=True) for reward in found]
        assert found == value, key
        assert type(found) is type(value) or {type(found), type(value)} == {int, float}, key


@pytest.mark.parametrize("name", REAL)
def test_a_recipe_for_a_real_model_leaves_nothing_of_training_to_the_values_of_the_toy(name):
    method = configured(name).params.training.method
    unused = NOT_OF_THE_MODEL | {"dpo", "grpo"} - {method}
    wanted = {key for key in recipes.leaves() if not {key, key.split(".")[0]} & unused}
    assert wanted - set(recipes.find(name).recipe.overrides) == set()


def test_every_key_of_params_yaml_may_stand_in_a_recipe():
    tree = YAML(typ="safe").load(paths.PARAMS.read_text())
    assert set(recipes.leaves()) == set(dotted_keys.flatten(tree))


@pytest.mark.parametrize("name", sorted(SERIES))
def test_each_of_the_series_changes_one_factor_against_the_baseline(name):
    baseline, changed = (recipes.find(each).recipe.overrides for each in ("baseline", name))
    assert set(baseline) == set(changed)
    assert {key for key in baseline if baseline[key] != changed[key]} == SERIES[name]


def test_more_capacity_keeps_the_scale_of_the_update():
    lora, other = (configured(name).params.lora for name in ("baseline", "adapter-capacity"))
    assert other.lora_alpha / other.r == lora.lora_alpha / lora.r
    assert other.r > lora.r


def test_full_tuning_could_not_leave_the_base_in_4_bits():
    with pytest.raises(InputError, match="4-bit weights cannot be trained"):
        overrides.applied(recipes.find("full-fine-tune").arguments(["quantization.load_in_4bit=true"]))


def test_the_baseline_is_what_is_committed():
    committed = load()
    assert configured("baseline") == committed


def test_vikhr_is_as_the_set_up_that_it_replaces():
    config = configured("vikhr-8b").params
    assert (config.quantization.load_in_4bit, config.quantization.bnb_4bit_quant_type) == (True, "nf4")
    assert (config.training.precision, config.quantization.bnb_4bit_compute_dtype) == ("fp16", "float16")
    assert (config.lora.r, config.lora.lora_alpha, config.lora.modules_to_save) == (16, 32, ["lm_head"])
    batches = (config.training.per_device_train_batch_size, config.training.gradient_accumulation_steps)
    assert (*batches, config.training.learning_rate, config.training.max_length) == (1, 4, 2e-5, 2048)
    assert config.training.gradient_checkpointing
    assert config.quantize.types == ["Q4_1"]


def test_the_laptop_holds_one_short_row_at_a_time():
    training = configured("laptop").params.training
    assert (training.max_length, training.per_device_train_batch_size, training.gradient_accumulation_steps) == (
        *(256, 1),
        8,
    )


def test_a_further_override_takes_the_place_of_the_recipe_s_own():
    arguments = recipes.find("dropout").arguments(["lora.lora_dropout=0.2,0.3", "seed=7"])
    assert [each for each in arguments if each.startswith(("lora.lora_dropout", "seed"))] == [
        "lora.lora_dropout=0.2,0.3",
        "seed=7",
    ]
    assert len(overrides.combinations(arguments)) == 2


def test_an_unknown_recipe_is_answered_with_the_near_one():
    with pytest.raises(InputError, match=r"^vikr-8b: no such recipe in experiments/; did you mean 'vikhr-8b'\?$"):
        recipes.find("vikr-8b")


SOUND = """\
description: One.
hypothesis: Two.
expect: Three.
overrides:
  lora.r: 8
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Two.", "Two.\noveride: 1", "3: overide is not a known key; did you mean 'overrides'?"),
        ("hypothesis: Two.\n", "", "1: hypothesis is missing; add it: what it should show, and by which number"),
        ("One.", "''", "1: description is empty; write what is run, in a sentence"),
        ("One.", "1", "1: description is 1; must be string"),
        ("\n  lora.r: 8", " 8", "4: overrides is not a mapping; write KEY: VALUE, one a line"),
        ("\n  lora.r: 8", " {}", "4: overrides is empty; write values by their keys in params.yaml, such as "),
        ("lora.r", "lora.rr", "5: overrides: lora.rr is not a key of params.yaml; did you mean 'lora.r'?"),
        (
            "lora.r: 8",
            "lora: 8",
            "5: overrides: lora is not a key of params.yaml; it is a section; name its keys, such as lora.r",
        ),
        ("8", "0", "5: overrides: lora.r is 0; must be greater than or equal to 1"),
        ("8", "'8'", "5: overrides: lora.r is '8'; must be integer"),
        (
            "  lora.r: 8",
            "  lora.r: 8\n  training.tuning: full",
            "6: overrides: training.tuning is 'full'; 4-bit weights cannot be trained; "
            "set quantization.load_in_4bit to false",
        ),
        ("  lora.r: 8", "  seed: 1\n  model: qwen", "6: overrides: model is 'qwen'; must be a name under models in "),
        ("8", "8\n  lora.r: 9", "6: not valid YAML: found duplicate key"),
        ("8", "[8", "6: not valid YAML: "),
    ],
)
def test_what_is_wrong_in_a_recipe_is_said_in_one_line_with_its_place(tmp_path, monkeypatch, old, new, message):
    monkeypatch.setattr(recipes, "FOLDER", tmp_path / "experiments")
    file = tmp_path / "experiments/one.yaml"
    file.parent.mkdir()
    assert old in SOUND
    file.write_text(SOUND.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        recipes.read(file)
    assert str(caught.value).startswith(f"{file}:{message}"), caught.value
    assert "\n" not in str(caught.value)


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text(SOUND + "  lora.lora_dropout: 2\n  seed: -1\n")
    with pytest.raises(InputError) as caught:
        recipes.read(file)
    assert [line.split(": ")[0].rpartition(":")[2] for line in str(caught.value).splitlines()] == ["7", "6"]


def test_a_name_that_git_would_not_take_is_refused(tmp_path):
    file = tmp_path / "My Recipe.yaml"
    file.write_text(SOUND)
    with pytest.raises(InputError, match="small letters, digits and hyphens; rename the file"):
        recipes.read(file)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(-1e9, 1e9)
    | st.text(st.characters(blacklist_categories=("Cc", "Cs", "Zl", "Zp")), max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "weight"]), inner, max_size=2),
    max_leaves=4,
)


@given(VALUES)
def test_any_value_of_yaml_comes_back_from_the_override_that_is_written_of_it(value):
    from dvc.utils.hydra import to_hydra_overrides

    [override] = to_hydra_overrides([overrides.written("a.b", value)])
    assert plain(override.value()) == value
    assert not override.is_sweep_override()


def plain(value: object) -> object:
    """What Hydra's parser made of it, without its own class for a quoted text."""
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, dict):
        return {plain(key): plain(inner) for key, inner in value.items()}
    return value


@pytest.mark.parametrize(
    "text", ["", "'", '"', "\\", "\\'", "a\\\\'b\\", "#### (\\S+)", "a, b=c", "null", "8", " x ", "é"]
)
def test_a_text_that_reads_like_something_else_stays_a_text_in_params_yaml(tmp_path, text):
    from dvc.utils.hydra import apply_overrides

    file = tmp_path / "params.yaml"
    file.write_text("a: 1\n")
    apply_overrides(file, [overrides.written("a", text)])
    assert YAML(typ="safe").load(file.read_text()) == {"a": text}


def test_a_sweep_is_multiplied_out_in_the_order_of_dvc():
    assert overrides.combinations(["lora.r=8,16", "seed=1,2", "model=tiny"]) == [
        ["lora.r=8", "seed=1", "model=tiny"],
        ["lora.r=8", "seed=2", "model=tiny"],
        ["lora.r=16", "seed=1", "model=tiny"],
        ["lora.r=16", "seed=2", "model=tiny"],
    ]


@pytest.mark.parametrize("override", ["lora.r", "lora.r=[8"])
def test_an_override_that_cannot_be_read_is_refused_in_one_line(override):
    with pytest.raises(InputError, match=r"^-S .*; see `python -m lathe schema` for the keys$"):
        overrides.combinations([override])


def test_the_folder_of_recipes_holds_nothing_that_is_none():
    assert {file.suffix for file in Path(paths.ROOT / "experiments").iterdir() if file.is_file()} == {".yaml"}
