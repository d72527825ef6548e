"""`lathe recipe new`: the recipe loads, its values fit model, data and memory, and guesses are named as such."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from refusals import refused
from ruamel.yaml import YAML

from lathe import cli
from lathe.common import paths
from lathe.config.load import load
from lathe.experiments import recipes
from lathe.new_recipe import choose_values, fit_memory, measure_data, measure_model, token_lengths, write_recipe
from lathe.new_recipe.fit_memory import Memory
from lathe.new_recipe.measure_data import DataFacts
from lathe.new_recipe.measure_model import ModelFacts
from lathe.new_recipe.token_lengths import LengthsInTokens
from lathe.training.train import describe_unusual_rate

ANSWERS = {
    "json": '{"device":"lamp","on":true}',
    "short": "card arrival",
    "prose": "It is on its way, and will be with you within the next few days, as the post in your part of the country "
    "takes somewhat longer than elsewhere.",
}


@pytest.fixture
def root(tmp_path: Path, small_model: Path, toy_params: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a local model and three local files, as far as these commands look at one."""
    root = tmp_path / "checkout"
    (root / "data/local").mkdir(parents=True)
    shutil.copytree(small_model, root / "models/local/small")
    shutil.copytree(paths.ROOT / "experiments/base", root / "experiments/base")
    tree = YAML().load(paths.PRESETS)
    tree["models"]["small"] = {"source": "local", "path": "models/local/small"}
    for kind, answer in ANSWERS.items():
        rows = [{"prompt": f"What about number {number}?", "completion": answer} for number in range(300)]
        (root / f"data/local/{kind}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        tree["datasets"][kind] = {"source": "local", "path": f"data/local/{kind}.jsonl"}
    presets = root / "presets.yaml"
    YAML().dump(tree, presets)
    for name, path in (("ROOT", root), ("PRESETS", presets), ("METRICS", root / "metrics")):
        monkeypatch.setattr(paths, name, path)
    monkeypatch.setattr(paths, "MODEL_BASE", root / "models/base")
    monkeypatch.setattr(paths, "DATA_RAW", root / "data/raw")
    monkeypatch.setattr(load, "__defaults__", (paths.PARAMS, presets))
    monkeypatch.setattr(recipes, "FOLDER", root / "experiments")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return root


def create(name="mine", model="small", dataset="json", *, gpu="8GB", method="sft", force=False):
    write_recipe.create_recipe(name, model, dataset, gpu=gpu, method=method, force=force)


@pytest.mark.parametrize(("kind", "metric"), [("json", "exact_match"), ("short", "exact_match"), ("prose", "rouge_l")])
def test_a_recipe_loads_and_its_values_fit(root, capsys, kind, metric):
    create(dataset=kind)
    values = recipes.load_recipe("mine").recipe.overrides
    assert (values["model"], values["dataset"]) == ("small", kind)
    assert values["evaluate.primary_metric"] == metric
    assert metric in values["evaluate.metrics"]
    assert ("json_fields" in values["evaluate.metrics"]) == (kind == "json")
    assert 64 <= values["training.max_length"] <= 192
    step = values["training.per_device_train_batch_size"] * values["training.gradient_accumulation_steps"]
    assert step == 8, "of 300 rows"
    assert values["training.num_train_epochs"] == 3
    assert values["generate.max_new_tokens"] == values["generate.n_ctx"] == "auto"
    assert not values["quantization.load_in_4bit"]
    assert not values["training.gradient_checkpointing"]
    assert describe_unusual_rate(values["training.learning_rate"], weights=1_000_000, tuning="lora") is None
    lines = (root / "experiments/mine.yaml").read_text().splitlines()
    own = lines[lines.index("overrides:") + 1 :]
    assert 10 <= len(own) <= 22
    assert all(" # " in line or above.lstrip().startswith("# ") for above, line in pairwise(own))
    printed = capsys.readouterr().out
    assert printed.endswith("next:\n  lathe smoke mine\n  lathe doctor --recipe mine\n  lathe run mine\n")
    assert "guess" not in printed


def test_rows_with_tools_are_scored_by_their_calls_and_take_the_room_of_the_definitions(root):
    tool = {
        "name": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "d" * 100}}},
    }
    call = {"name": "f", "arguments": {"a": "x"}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows = [{"messages": [{"role": "user", "content": f"Ask {n}"}, answer], "tools": [tool]} for n in range(300)]
    (root / "data/local/short.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    create(dataset="short")
    values = recipes.load_recipe("mine").recipe.overrides
    assert values["evaluate.metrics"] == ["tool_calls", "tool_calls_f1", "exact_match"]
    assert values["evaluate.primary_metric"] == "tool_calls"
    assert values["training.max_length"] >= 128


def add_mixture(root, **parts):
    presets = root / "presets.yaml"
    tree = YAML().load(presets)
    tree["datasets"]["mixed"] = {"source": "mixture", "datasets": parts}
    YAML().dump(tree, presets)


def part(kind, **keys):
    return {"source": "local", "path": f"data/local/{kind}.jsonl", **keys}


def test_a_mixture_has_a_recipe_by_the_rows_that_it_takes_of_each_dataset(root, capsys):
    paragraphs = {"source": "builtin", "content": "paragraphs", "split": "train", "weight": 0.1}
    add_mixture(root, answers=part("json", weight=0.9), prose=paragraphs)
    create(dataset="mixed")
    text = (root / "experiments/mine.yaml").read_text()
    values = recipes.load_recipe("mine").recipe.overrides
    assert (values["dataset"], values["evaluate.primary_metric"]) == ("mixed", "exact_match")
    assert values["training.max_length"] <= 192, "by the requests; documents are cut"
    # 240 of the 300 rows are left for training at a tenth for either held-out split, and 27 paragraphs beside them.
    assert "267 training rows" in text
    assert values["preprocess.test_fraction"] == 0.1
    assert "of 300 rows" in text
    assert "guess" not in capsys.readouterr().out


def test_documents_have_a_recipe_of_their_own_kind(root):
    rows = [{"text": f"Document {number} is about nothing much. " * 99} for number in range(300)]
    (root / "data/local/prose.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    create(dataset="prose")
    values = recipes.load_recipe("mine").recipe.overrides
    assert values["evaluate.primary_metric"] == "perplexity"
    assert values["evaluate.gates"] == ["merged.perplexity < base.perplexity", "quantized.kl < 0.1"]
    assert values["sft.packing"] is True
    assert "preprocess.too_long" not in values or values["preprocess.too_long"] == "drop"
    add_mixture(root, one=part("short"), two=part("prose"))
    with refused("documents-without-prompts", "--method dpo", "300 rows"):
        create("other", dataset="mixed", method="dpo")


def test_a_mixture_with_a_dataset_that_has_not_been_fetched_is_a_guess(root, capsys):
    hub = {"source": "hub", "id": "openai/gsm8k", "train_split": "train", "prompt": "question", "completion": "answer"}
    add_mixture(root, one=part("json"), two=hub)
    create(dataset="mixed")
    assert "training.max_length" in capsys.readouterr().out.partition("guesses: ")[2]


def test_a_recipe_without_a_name_is_called_by_its_model_and_its_dataset(root):
    words = ["recipe", "new", "--model", "small", "--dataset", "json", "--gpu", "8GB"]
    arguments = cli.build_parser().parse_args(words)
    arguments.run(arguments)
    assert (root / "experiments/small-json.yaml").is_file()


@pytest.mark.heavy
def test_nothing_is_written_where_something_is_refused(root):
    create()
    before = (root / "experiments/mine.yaml").read_text()
    with refused("recipe-exists", "experiments/mine.yaml", "--force"):
        create(dataset="prose")
    with refused("recipe-name", "My_own"):
        create("My_own")
    with refused("unknown-preset", "--model smal", "did you mean 'small'?"):
        create("other", model="smal")
    with refused("unknown-preset", "--dataset jsn", "did you mean 'json'?"):
        create("other", dataset="jsn")
    with refused("gpu-size", "--gpu much", "24GB"):
        create("other", gpu="much")
    with refused("no-pairs", "--method dpo", "300 of 300 rows"):
        create("other", method="dpo")
    with refused("no-reward", "--method grpo"):
        create("other", dataset="prose", method="grpo")
    (root / "data/local/json.jsonl").unlink()
    with refused("no-such-file", "data/local/json.jsonl"):
        create("other")
    (root / "data/local/short.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    with refused("no-usable-rows", "data/local/short.jsonl"):
        create("other", dataset="short")
    (root / "models/local/small/config.json").unlink()
    with refused("no-such-file", "config.json"):
        create("other", dataset="commands")
    shutil.rmtree(root / "models/local/small")
    with refused("no-such-file", "models/local/small"):
        create("other", dataset="commands")
    assert (root / "experiments/mine.yaml").read_text() == before
    assert recipes.list_recipes() == ["mine"]
    create(model="tiny", dataset="prose", force=True)
    assert (root / "experiments/mine.yaml").read_text() != before


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_other_methods_have_values_of_their_own(root, method):
    create(dataset="commands", method=method)
    values = recipes.load_recipe("mine").recipe.overrides
    assert values["training.method"] == method
    assert values[f"{method}.learning_rate"] < values["training.learning_rate"]
    if method == "grpo":
        assert [reward["name"] for reward in values["grpo.rewards"]] == ["exact_match", "json_fields"]


def test_what_has_not_been_fetched_is_a_guess_and_said_to_be(root, capsys):
    create(model="qwen3-600m", dataset="gsm8k", gpu="24GB")
    values = recipes.load_recipe("mine").recipe.overrides
    assert values["training.learning_rate"] == 2e-4
    printed = capsys.readouterr().out
    guesses = next(line for line in printed.splitlines() if line.startswith("guesses: "))
    assert {"training.max_length", "training.learning_rate"} <= set(guesses.removeprefix("guesses: ").split(", "))
    assert "warning: config.json of Qwen/Qwen3-0.6B" in printed
    text = (root / "experiments/mine.yaml").read_text()
    assert "model: qwen3-600m # 600 M weights, a guess by the name" in text
    assert "# a guess: " in text


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("weights", [1_400_000, 135_000_000, 600_000_000, 3_000_000_000, 8_000_000_000])
def test_the_rate_is_one_that_training_takes_for_usual(weights, tuning):
    rate = choose_values.choose_learning_rate(weights, tuning)
    assert describe_unusual_rate(rate, weights=weights, tuning=tuning) is None


@pytest.mark.heavy
def test_less_memory_gives_smaller_batches_and_then_a_smaller_form(toy_params):
    llama = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
    llama |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32_000, "tie_word_embeddings": True}
    params = load(paths.PARAMS).params

    def fit(size: int) -> fit_memory.Fit:
        return fit_memory.fit_training(llama, 40_000_000, params, Memory(size, "cuda", "here"), rows=16, per_row=1)

    much, less, least = fit(10**11), fit(2 * 10**9), fit(10**7)
    assert (much.batch_size, much.gradient_checkpointing, much.load_in_4bit) == (16, False, False)
    assert less.fits
    assert less.total is not None
    assert less.total <= 2 * 10**9
    assert less.batch_size < 16 or less.gradient_checkpointing
    assert not least.fits
    assert least.batch_size == 1


def test_rows_longer_than_the_context_are_cut_and_not_refused():
    data = DataFacts(known=True, kind="prose", splits={"train": 90}, row_characters=[4000] * 100)
    model = ModelFacts(10**9, "", {}, 512, None)
    lengths = LengthsInTokens(4.0, 10, "measured")
    length = choose_values.choose_length(data, model, lengths)
    assert length.value == 512
    chosen = {choice.key: choice.value for choice in choose_values._choose_rows(data, length, lengths)}
    assert chosen["preprocess.too_long"] == "truncate_prompt"
    assert chosen["preprocess.max_truncated_fraction"] == 1.0


@pytest.mark.parametrize(
    ("lacking", "chosen", "training_rows"),
    [
        (("validation", "test"), ["validation", "test"], 560),
        (("validation",), ["validation"], 608),
        ((), [], 652),
    ],
)
def test_training_rows_are_those_that_the_chosen_held_out_splits_leave(lacking, chosen, training_rows):
    splits = {"train": 652, "validation": 24, "test": 24}
    given = {split: 1_000 for split in splits if split != "train" and split not in lacking}
    characters = [100] * 700
    data = DataFacts(known=True, kind="short", splits=splits | given, lacking=lacking, row_characters=characters)
    model, lengths = ModelFacts(10**8, "", {}, 512, None), LengthsInTokens(4.0, 10, "measured")
    rows = choose_values._choose_rows(data, choose_values.choose_length(data, model, lengths), lengths)
    assert [choice.key for choice in rows] == [f"preprocess.{split}_fraction" for split in chosen]
    reasons = {choice.key: choice.reason for choice in choose_values._choose_rates(model, data, "sft")}
    assert reasons["training.num_train_epochs"] == f"{training_rows} training rows"


def test_one_row_that_is_far_longer_than_the_others_does_not_decide_the_length():
    data = DataFacts(known=True, kind="prose", splits={"train": 900}, row_characters=[400] * 999 + [40_000])
    choice = choose_values.choose_length(data, ModelFacts(1, "", {}, None, None), LengthsInTokens(4.0, 10, "measured"))
    assert choice.value == 128


def test_lengths_are_those_of_the_tokenizer_and_cautious_without_one(root, small_model):
    sample = [[{"role": "user", "content": "turn on the lamp"}, {"role": "assistant", "content": '{"on":true}'}]]
    measured = token_lengths.measure_token_lengths(small_model, sample)
    assert measured.source == "by the model's tokenizer"
    assert measured.template_tokens > 0
    assumed = token_lengths.measure_token_lengths(None, sample)
    assert assumed.characters_per_token == 3
    russian = [[{"role": "user", "content": "включи свет на кухне"}]]
    assert token_lengths.measure_token_lengths(None, russian).characters_per_token == 2
    facts = measure_model.measure_model(load())
    assert measure_data.measure_data(load()).kind == "json"
    assert facts.known
