"""Every recipe that ships can be run, says what it must, and the learner's series changes one factor at a time."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from ruamel.yaml import YAML

from lathe.common import dotted_keys, paths
from lathe.common.errors import InputError
from lathe.config import overrides
from lathe.config.load import Config
from lathe.experiments import recipes

SERIES = {
    "more-context": {"training.max_length"},
    "adapter-capacity": {"lora.r", "lora.lora_alpha"},
    "dropout": {"lora.lora_dropout"},
    "full-fine-tune": {"training.tuning", "quantization.load_in_4bit"},
}
SHIPPED = {
    *SERIES,
    *("arxiv-ministral-3b", "baseline", "gsm8k-grpo", "laptop", "multi-gpu", "qwen3-600m", "tiny", "vikhr-8b"),
    *(
        "smollm2-banking",
        "smollm2-clinc",
        "smollm2-tools",
        "smollm2-dpo",
        "smollm2-grpo",
        "smollm2-gsm8k",
        "smollm2-judged",
        "smollm2-mixture",
        "smollm2-russian",
        "smollm2-tasks",
    ),
}
# What a recipe may leave to params.yaml, as it does not depend on the model: a new section is not among them.
NOT_OF_THE_MODEL = {
    *("convert", "judge", "tracking", "bert_score", "sampling", "benchmark", "export"),
    *("evaluate.general_text", "evaluate.bootstrap_samples", "evaluate.bert_score_weight", "evaluate.judge_weight"),
    *(
        "generate.engine",
        "generate.servers",
        "generate.concurrency",
        "generate.timeout_seconds",
        "generate.max_retries",
    ),
    *("generate.vllm_python", "generate.vllm_options", "evaluate.allow_mixed_engines"),
}
load_recipe = cache(recipes.load_recipe)
REAL = sorted(SHIPPED - {*SERIES, "baseline", "tiny"})


def configured(name: str) -> Config:
    return overrides.apply_overrides(load_recipe(name).build_overrides([]))


def read_resolved() -> dict[str, dict[str, Any]]:
    resolved: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("resolved_recipes.json").read_text())
    return resolved


def leaf(config: Config, key: str) -> object:
    value: object = config.params
    for step in key.split("."):
        value = getattr(value, step)
    return value


def test_what_ships_is_here():
    assert set(recipes.list_recipes()) >= SHIPPED


@pytest.mark.parametrize("name", recipes.list_recipes())
def test_the_overrides_of_a_recipe_become_the_parameters_of_its_run(name):
    config = configured(name)
    for key, value in load_recipe(name).recipe.overrides.items():
        configured_value = leaf(config, key)
        if key == "grpo.rewards":
            configured_value = [reward.model_dump(exclude_none=True) for reward in configured_value]
        assert configured_value == value, key
        assert type(configured_value) is type(value) or {type(configured_value), type(value)} == {int, float}, key


def test_the_others_are_of_the_toy() -> None:
    assert {name for name in SHIPPED if load_recipe(name).recipe.overrides["model"] != "tiny"} == set(REAL)


@pytest.mark.parametrize("name", REAL)
def test_a_recipe_for_a_real_model_leaves_nothing_of_training_to_params_yaml(name):
    method = configured(name).params.training.method
    unused = NOT_OF_THE_MODEL | {"dpo", "grpo"} - {method}
    wanted = {key for key in recipes.list_keys() if not {key, key.split(".")[0]} & unused}
    assert wanted - set(load_recipe(name).recipe.overrides) == set()


def test_every_key_of_params_yaml_may_stand_in_a_recipe():
    tree = YAML(typ="safe").load(paths.PARAMS.read_text())
    assert set(recipes.list_keys()) == set(dotted_keys.flatten(tree))


@pytest.mark.parametrize("name", sorted(SERIES))
def test_each_of_the_series_changes_one_factor_against_the_baseline(name):
    baseline, changed = (load_recipe(recipe).recipe.overrides for recipe in ("baseline", name))
    assert set(baseline) == set(changed)
    assert {key for key in baseline if baseline[key] != changed[key]} == SERIES[name]


def test_more_capacity_keeps_the_scale_of_the_update():
    lora, other = (configured(name).params.lora for name in ("baseline", "adapter-capacity"))
    assert other.lora_alpha / other.r == lora.lora_alpha / lora.r
    assert other.r > lora.r


def test_full_tuning_could_not_leave_the_base_in_4_bits():
    with refused("invalid-value", "training.tuning is 'full'", "4-bit weights cannot be trained"):
        overrides.apply_overrides(load_recipe("full-fine-tune").build_overrides(["quantization.load_in_4bit=true"]))


def test_no_recipe_goes_on_without_half_of_the_rows():
    key = "preprocess.max_dropped_fraction"
    shares = {name: overrides.get(key) for name, overrides in read_resolved().items()}
    assert {name: share for name, share in shares.items() if share is not None and share > 0.35} == {}


def test_the_baseline_is_the_toy():
    assert configured("baseline") == configured("tiny")


def test_the_toy_sets_every_section_that_the_model_decides():
    """What is left depends on the machine and on what the user has enabled."""
    left = set(recipes.list_keys()) - set(load_recipe("tiny").recipe.overrides)
    sections = {"convert", "judge", "tracking", "bert_score", "sampling", "benchmark", "export"}
    assert left == {key for key in recipes.list_keys() if key.split(".")[0] in sections}


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
    arguments = load_recipe("dropout").build_overrides(["lora.lora_dropout=0.2,0.3", "seed=7"])
    assert [override for override in arguments if override.startswith(("lora.lora_dropout", "seed"))] == [
        "lora.lora_dropout=0.2,0.3",
        "seed=7",
    ]
    assert len(overrides.expand_sweep(arguments)) == 2


def test_an_unknown_recipe_is_answered_with_the_near_one():
    with refused("unknown-recipe", "vikr-8b", "did you mean 'vikhr-8b'?"):
        recipes.load_recipe("vikr-8b")


SOUND = """\
description: One.
hypothesis: Two.
expect: Three.
overrides:
  lora.r: 8
"""


@pytest.mark.parametrize(
    ("old", "new", "code", "line", "part"),
    [
        ("Two.", "Two.\noveride: 1", "recipe-content", 3, "did you mean 'overrides'?"),
        ("description: One.\n", "", "recipe-content", 1, "description is missing; add it: "),
        ("Two.", "''", "recipe-content", 2, "hypothesis is empty; write "),
        ("One.", "''", "recipe-content", 1, "description is empty; write "),
        ("One.", "1", "recipe-content", 1, "description is 1; must be string"),
        ("\n  lora.r: 8", " 8", "recipe-content", 4, "overrides is not a mapping; write "),
        ("\n  lora.r: 8", " {}", "recipe-content", 4, "overrides is empty; write "),
        (
            "overrides:",
            "extends: 1\noverrides:",
            "recipe-content",
            4,
            "extends is 1; must be a file, or a list of files",
        ),
        ("overrides:", "extends: []\noverrides:", "recipe-content", 4, "extends is []; must be a file"),
        (
            "lora.r",
            "lora.rr",
            "recipe-overrides",
            5,
            "overrides: lora.rr is not a key of params.yaml; did you mean 'lora.r'?",
        ),
        (
            "lora.r: 8",
            "lora: 8",
            "recipe-overrides",
            5,
            "lora is not a key of params.yaml; it is a section; name its keys",
        ),
        ("8", "0", "recipe-overrides", 5, "overrides: lora.r is 0; must be greater than or equal to 1"),
        ("8", "'8'", "recipe-overrides", 5, "overrides: lora.r is '8'; must be integer"),
        (
            "  lora.r: 8",
            "  lora.r: 8\n  training.tuning: full",
            "recipe-overrides",
            6,
            "training.tuning is 'full'; 4-bit weights cannot be trained; set quantization.load_in_4bit to false",
        ),
        (
            "  lora.r: 8",
            "  seed: 1\n  model: qwen",
            "recipe-overrides",
            6,
            "overrides: model is 'qwen'; must be a name under models in ",
        ),
        ("8", "8\n  lora.r: 9", "not-yaml", 6, "not valid YAML: found duplicate key"),
        ("8", "[8", "not-yaml", 6, "not valid YAML: "),
    ],
)
def test_a_problem_of_a_recipe_is_reported_in_one_line_with_its_place(tmp_path, toy_params, old, new, code, line, part):
    file = tmp_path / "one.yaml"
    assert old in SOUND
    file.write_text(SOUND.replace(old, new, 1))
    with refused(code, f"{file}:{line}: ", part) as caught:
        recipes.read_recipe(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("grpo.max_steps: 7", "training.method is 'sft'"),
        ("dpo.beta: 0.7", "training.method is 'sft'"),
        ("judge.max_rows: 7", "judge.enabled is false"),
        ("bert_score.max_length: 77", "evaluate.metrics does not list bert_score"),
    ],
)
def test_a_value_of_a_section_that_is_off_is_refused_where_a_recipe_extends_another(tmp_path, toy_params, line, why):
    (tmp_path / "base.yaml").write_text("overrides:\n  seed: 7\n")
    file = tmp_path / "one.yaml"
    file.write_text(SOUND.replace("overrides:", "extends: base.yaml\noverrides:") + f"  {line}\n")
    with refused("recipe-overrides", f"{file}:7: overrides: ", f"changes nothing, as {why}"):
        recipes.read_recipe(file)
    file.write_text(SOUND + f"  {line}\n")  # that sets all values itself
    assert recipes.read_recipe(file).overrides[line.partition(":")[0]] is not None


BASE = """\
overrides:
  lora.r: 16
  lora.lora_dropout: 0.5
"""


@pytest.fixture
def folder(tmp_path: Path, toy_params: Path) -> Path:
    """A recipe that extends a base, beside another recipe."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/sane.yaml").write_text(BASE)
    (tmp_path / "one.yaml").write_text(SOUND.replace("overrides:", "extends: base/sane.yaml\noverrides:"))
    (tmp_path / "two.yaml").write_text(SOUND.replace("lora.r: 8", "seed: 1"))
    return tmp_path


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text, old
    file.write_text(text.replace(old, new, 1))


def test_a_recipe_has_the_overrides_of_its_base_and_its_own_ones_instead(folder):
    assert recipes.read_recipe(folder / "one.yaml").overrides == {"lora.r": 8, "lora.lora_dropout": 0.5}


def test_bases_extend_one_another_and_of_one_key_the_last_one_counts(folder):
    edit(folder / "one.yaml", "extends: base/sane.yaml", "extends: [two.yaml, base/more.yaml]")
    (folder / "base/more.yaml").write_text("extends: sane.yaml\noverrides:\n  seed: 2\n  lora.lora_dropout: 0.1\n")
    read = recipes.read_recipe(folder / "one.yaml").overrides
    assert read == {"seed": 2, "lora.r": 8, "lora.lora_dropout": 0.1}


@pytest.mark.parametrize(
    ("file", "old", "new", "code", "place", "part"),
    [
        ("one", "base/sane", "base/sain", "missing-base", "one.yaml:4", "did you mean 'base/sane.yaml'?"),
        ("one", "base/sane.yaml", "[two.yaml, no.yaml]", "missing-base", "one.yaml:4", "no.yaml: no such file"),
        ("one", "base/sane", "one", "circular-base", "one.yaml:4", "one.yaml -> one.yaml is a circle"),
        (
            "base/sane",
            "overrides:",
            "extends: ../one.yaml\noverrides:",
            "circular-base",
            "base/sane.yaml:1",
            "one.yaml -> sane.yaml -> one.yaml is a circle; ",
        ),
        ("one", "lora.r: 8", "lora.r: 16", "redundant-override", "one.yaml:6", "base/sane.yaml:2; remove this line"),
        ("base/sane", "16", "[16", "not-yaml", "base/sane.yaml:3", "not valid YAML"),
        ("base/sane", "lora.r:", "lora.rr:", "recipe-overrides", "base/sane.yaml:2", "did you mean 'lora.r'?"),
        ("base/sane", "0.5", "5", "recipe-overrides", "base/sane.yaml:3", "lora.lora_dropout is 5; must be less than"),
        ("base/sane", "overrides:", "overides:", "recipe-content", "base/sane.yaml:1", "did you mean 'overrides'?"),
    ],
)
def test_a_problem_of_what_a_recipe_extends_is_reported_with_its_place(folder, file, old, new, code, place, part):
    edit(folder / f"{file}.yaml", old, new)
    with refused(code, f"{folder}/{place}: ", part):
        recipes.read_recipe(folder / "one.yaml")


def test_a_base_is_no_recipe(folder, monkeypatch):
    monkeypatch.setattr(recipes, "FOLDER", folder)
    assert recipes.list_recipes() == ["one", "two"]
    with refused("unknown-recipe", "base/sane", kept=False):
        recipes.load_recipe("base/sane")


def test_the_resolved_overrides_of_what_ships_are_these():
    """A change of a base is a change of every recipe that extends it: tests/unit/resolved_recipes.json shows which."""
    frozen = read_resolved()
    resolved = {name: load_recipe(name).recipe.overrides for name in SHIPPED}
    assert resolved == frozen
    # The same text too: 1 is neither 1.0 nor true.
    assert json.dumps(resolved, sort_keys=True) == json.dumps(frozen, sort_keys=True)


@pytest.mark.parametrize("name", REAL)
def test_a_recipe_for_a_real_model_names_only_what_is_different(name):
    lines = (paths.ROOT / f"experiments/{name}.yaml").read_text().splitlines()
    assert len(lines[lines.index("overrides:") + 1 :]) <= 21


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text(SOUND + "  lora.lora_dropout: 2\n  seed: -1\n")
    with pytest.raises(InputError) as caught:
        recipes.read_recipe(file)
    assert [line.split(": ")[0].rpartition(":")[2] for line in str(caught.value).splitlines()] == ["7", "6"]


def test_a_name_that_git_would_not_take_is_refused(tmp_path):
    file = tmp_path / "My Recipe.yaml"
    file.write_text(SOUND)
    with refused("recipe-name", "My Recipe.yaml", "rename the file"):
        recipes.read_recipe(file)


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

    [override] = to_hydra_overrides([overrides.format_override("a.b", value)])
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
    apply_overrides(file, [overrides.format_override("a", text)])
    assert YAML(typ="safe").load(file.read_text()) == {"a": text}


def test_a_sweep_is_multiplied_out_in_the_order_of_dvc():
    assert overrides.expand_sweep(["lora.r=8,16", "seed=1,2", "model=tiny"]) == [
        ["lora.r=8", "seed=1", "model=tiny"],
        ["lora.r=8", "seed=2", "model=tiny"],
        ["lora.r=16", "seed=1", "model=tiny"],
        ["lora.r=16", "seed=2", "model=tiny"],
    ]


@pytest.mark.parametrize("override", ["lora.r", "lora.r=[8"])
def test_an_override_that_cannot_be_read_is_refused_in_one_line(override):
    with refused("unreadable-override", f"-S {override}: ") as caught:
        overrides.expand_sweep([override])
    assert "\n" not in str(caught.value)


def test_the_folder_of_recipes_holds_nothing_that_is_none():
    files = [*(paths.ROOT / "experiments").iterdir(), *(paths.ROOT / "experiments/base").iterdir()]
    assert {file.suffix for file in files if file.is_file()} == {".yaml"}
