"""Answers that are rewarded become more frequent; nothing but the adapter moves; a run that died goes on exactly."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import Checkout, changed, write_splits
from refusals import refused
from safetensors.torch import load_file
from toy import load_toy

from lathe.config.training_params import Reward
from lathe.models.tokenizer import load_tokenizer
from lathe.models.tokenizer_template import read_chat_template
from lathe.sources.builtin import household_commands
from lathe.training.grpo import encode_prompts
from lathe.training.train import TrainingResult, train
from lathe.training.weighted_rewards import weight_rewards

CONFIG = load_toy().params
SPLITS = {
    "train": household_commands.make_rows(1)["train"][:12],
    "validation": household_commands.make_rows(1)["validation"][:6],
}
SHORT = Reward(name="length", weight=1.0, max_characters=8)
SETTING = {
    "method": "grpo",
    "max_length": 256,
    "per_device_train_batch_size": 4,
    "logging_steps": 2,
    "eval_steps": 4,
    "save_steps": 3,
    "lora.lora_dropout": 0.1,
    "grpo.sft_epochs": 0.0,
    "grpo.max_steps": 6,
    "grpo.per_device_train_batch_size": 8,
    "grpo.gradient_accumulation_steps": 1,
    "grpo.num_generations": 4,
    "grpo.max_completion_length": 12,
    "grpo.learning_rate": 0.01,
    "grpo.rewards": [SHORT],
}


class Run:
    """One training of the small model."""

    def __init__(
        self, base: Path, out: Path, changes: dict[str, Any], *, splits: dict[str, Any] = SPLITS, **options: Any
    ) -> None:
        self.out = out
        (out / "adapter").mkdir(parents=True)
        chosen = changed(CONFIG, {**SETTING, **changes})
        files = write_splits(out.with_name(f"{out.name} data"), splits)
        self.trained: TrainingResult = train(base, files, out / "adapter", out / "metrics", params=chosen, **options)

    def curve(self, name: str) -> list[tuple[int, float]]:
        lines = (self.out / f"metrics/plots/metrics/{name}.tsv").read_text().splitlines()[1:]
        return [(int(step), float(value)) for step, value in (line.split("\t") for line in lines)]

    def digests(self) -> dict[str, str]:
        files = sorted(path for path in self.out.rglob("*") if path.is_file())
        return {str(path.relative_to(self.out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_rewarded_kind_of_answer_becomes_more_frequent_and_only_the_adapter_moves(small_model, tmp_path):
    changes = {"grpo.max_steps": 24, "grpo.per_device_train_batch_size": 32, "grpo.max_completion_length": 24}
    run = Run(small_model, tmp_path, changes)
    before, *_, after = [value for _, value in run.curve("eval/reward")]
    assert before < 0.5
    assert after > before + 0.3
    assert run.curve("train/reward")[-1][1] > run.curve("train/reward")[0][1] + 0.3
    assert run.curve("eval/rewards/length") == run.curve("eval/reward")
    assert run.curve("eval/completion_length")[-1][1] < run.curve("eval/completion_length")[0][1]
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in adapter.values())  # B begins as 0
    assert run.trained.frozen
    assert not [name for name in run.trained.frozen if "lora" in name]
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


class DiedError(Exception):
    """What a run dies of in these tests."""


@pytest.mark.parametrize(
    "changes",
    [
        # The checkpoint lies between two steps that are made from the same answers, and between two log entries.
        {"grpo.sft_epochs": 1.0, "grpo.beta": 0.1, "grpo.num_iterations": 2},
        {"grpo.gradient_accumulation_steps": 2, "grpo.max_steps": 7, "load_best_model_at_end": True},
    ],
    ids=["answers used twice, after a supervised phase", "more prompts than there are rows"],
)
def test_a_run_that_died_goes_on_bit_for_bit(small_model, tmp_path, changes):
    calls = 0

    def counted(completion: str, reference: str, row: dict[str, Any]) -> float:
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise DiedError
        return 1 / (1 + len(completion))

    options: dict[str, Any] = {"functions": {"here:counted": counted}, "scratch": tmp_path / "scratch"}
    rewards = [Reward(name="function", weight=0.5, function="here:counted"), SHORT]
    changes = {**changes, "grpo.rewards": rewards}
    dies_at = 0
    expected = Run(small_model, tmp_path / "never", changes, **options).digests()
    calls, dies_at = 0, calls - 8  # while the last answers are scored, or the last evaluation is made
    with pytest.raises(DiedError):
        Run(small_model, tmp_path / "died", changes, **options)
    checkpoints = list(tmp_path.glob("scratch/*/checkpoint-3"))
    assert len(checkpoints) == 1
    calls, dies_at = 0, 0
    resumed = Run(small_model, tmp_path / "resumed", changes, **options)
    assert resumed.digests() == expected
    assert 0 < calls < len(expected) * 100
    assert list((tmp_path / "scratch").iterdir()) == []


def test_with_a_reference_the_divergence_begins_at_zero_and_grows(small_model, tmp_path):
    changes = {"grpo.sft_epochs": 1.0, "grpo.beta": 0.01, "lora.lora_dropout": 0.0, "grpo.max_steps": 3}
    shorter = Reward(name="function", weight=1.0, function="here:shorter")
    run = Run(
        small_model,
        tmp_path,
        {**changes, "logging_steps": 1, "grpo.rewards": [shorter]},
        functions={"here:shorter": lambda completion, reference, row: 1 / (1 + len(completion))},
    )
    divergence = [value for _, value in run.curve("train/kl")]
    assert divergence[0] == pytest.approx(0, abs=1e-6)  # the model at the start of the phase, not the bare base
    assert divergence[-1] > 1e-3
    assert [path.name for path in (tmp_path / "adapter").iterdir() if path.is_dir()] == []
    assert (tmp_path / "metrics/plots/metrics/sft/train/loss.tsv").exists()


def test_the_evaluation_begins_before_the_first_step_and_ends_behind_the_last(small_model, tmp_path):
    run = Run(small_model, tmp_path, {})
    assert [step for step, _ in run.curve("eval/reward")] == [0, 4, 6]
    assert [step for step, _ in run.curve("train/reward")] == [2, 4, 6]
    summary = json.loads((tmp_path / "metrics/metrics.json").read_text())
    assert set(summary["eval"]) == {"reward", "rewards", "completion_length", "unfinished"}
    assert all(math.isfinite(value) for value in summary["eval"]["rewards"].values())


def test_prompts_are_those_of_inference(small_model):
    tokenizer = load_tokenizer(small_model)
    system = [{"role": "system", "content": "be brief"}]
    talk = [*SPLITS["train"][0]["messages"], *SPLITS["train"][1]["messages"]]
    rows = [*SPLITS["train"], {"messages": system + talk}]
    for question, row in zip(encode_prompts(tokenizer, rows), rows, strict=True):
        prompt = read_chat_template(tokenizer).render(row["messages"][:-1], add_generation_prompt=True)
        assert question.prompt_ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert question.reference == row["messages"][-1]["content"]


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}
ASK = {"role": "user", "content": "Oslo?"}
CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"at": "Oslo"}}}
ROW = {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": [WEATHER]}


@pytest.fixture(scope="module")
def mistral(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with Mistral's template, whose calls begin with a control token."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("mistral") / "model"
    tokenizer = load_tokenizer(small_model)
    names = ("INST", "/INST", "TOOL_CALLS", "AVAILABLE_TOOLS", "/AVAILABLE_TOOLS", "TOOL_RESULTS", "/TOOL_RESULTS")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"[{name}]" for name in names]})
    tokenizer.chat_template = (Path(__file__).parents[1] / "templates/mistral-tools.jinja").read_text()
    model = AutoModelForCausalLM.from_pretrained(small_model)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_call_that_begins_with_a_control_token_earns_its_reward(mistral, tmp_path):
    seen = []

    def see(completion: str, reference: str, row: dict[str, Any]) -> float:
        seen.append((completion, reference))
        return 0.5

    changes = {
        "tuning": "full",
        "quantization.load_in_4bit": False,
        "learning_rate": 0.01,
        "max_length": 512,
        "grpo.sft_epochs": 40.0,
        "grpo.max_steps": 1,
        "grpo.max_completion_length": 64,
        "grpo.learning_rate": 1e-6,
        "grpo.rewards": [
            *(Reward(name=name, weight=1.0) for name in ("tool_calls", "tool_calls_f1", "exact_match")),
            Reward(name="function", weight=1.0, function="here:see"),
        ],
    }
    run = Run(
        mistral,
        tmp_path,
        changes,
        splits={"train": [ROW] * 4, "validation": [ROW]},
        functions={"here:see": see},
    )
    expected = '[TOOL_CALLS][{"name": "weather", "arguments": {"at": "Oslo"}, "id": "call00001"}]'
    assert {reference for _, reference in seen} == {expected}
    assert seen[0][0] == expected  # greedily, before the first step
    assert sum(completion == expected for completion, _ in seen) > 5
    for reward in ("tool_calls", "tool_calls_f1", "exact_match"):
        assert run.curve(f"eval/rewards/{reward}")[0] == (0, 1.0)
        assert run.curve(f"train/rewards/{reward}")[0][1] > 0.5


def test_calls_are_rewarded_as_they_are_scored(mistral):
    tokenizer = load_tokenizer(mistral)
    template = read_chat_template(tokenizer)
    plain = {"messages": [ASK, {"role": "assistant", "content": "3 degrees"}]}
    named, without = encode_prompts(tokenizer, [ROW, plain])
    equal, f1 = weight_rewards([Reward(name=name, weight=1.0) for name in ("tool_calls", "tool_calls_f1")], {})
    other = '[TOOL_CALLS][{"name": "weather", "arguments": {"at": "Oslo"}, "id": "abcdefghi"}'
    for text, prompt, expected in (
        (f"{other}]", named, (1, 1)),  # whatever its id
        (f'{other}, {{"name": "weather", "arguments": {{"at": "Rome"}}, "id": "abcdefghj"}}]', named, (0, 2 / 3)),
        ("It is cold.", named, (0, 0)),
        ("It is cold.", without, (1, 1)),
        (f"{other}]", without, (0, 0)),
    ):
        assert tuple(reward.compute(text, prompt, template) for reward in (equal, f1)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("base", "rows", "code", "said"),
    [
        ("small_model", [ROW], "calls-not-read", "template: chatml-tools"),
        ("mistral", SPLITS["train"], "no-calls-to-reward", "no row of data/processed/train.jsonl has tools"),
    ],
)
def test_a_reward_of_calls_that_nothing_can_earn_is_refused(request, tmp_path, base, rows, code, said):
    changes = {"grpo.rewards": [Reward(name="tool_calls", weight=1.0)]}
    with refused(code, "grpo.rewards lists tool_calls", said):
        Run(request.getfixturevalue(base), tmp_path, changes, splits={"train": rows, "validation": rows})


def test_rewards_of_one_name_are_told_apart():
    digits, letters = (Reward(name="regex", weight=weight, pattern=p) for weight, p in ((1.0, r"\d"), (0.5, "[a-z]")))
    own = Reward(name="function", weight=2.0, function="mine:regex")
    rewards = weight_rewards([digits, letters, own], {"mine:regex": lambda completion, reference, row: 0.25})
    assert [(reward.name, reward.weight) for reward in rewards] == [("regex", 1.0), ("regex_2", 0.5), ("regex_3", 2.0)]
    assert [reward.function("a", "", {}) for reward in rewards] == [0, 1, 0.25]


@pytest.mark.parametrize(
    ("changes", "code", "part"),
    [
        ({"lora.target_modules": ["q_proj", "lm_head"]}, "layer-output-head", "lm_head"),
        (
            {"grpo.rewards": [SHORT.model_copy(update={"weight": 1e37})], "grpo.scale_rewards": "none"},
            "loss-not-finite",
            "inf at step 1, not a number, with the rows of data/processed/train.jsonl:",
        ),
        ({"metric_for_best_model": "loss"}, "metric-not-evaluated", "training.metric_for_best_model is 'loss'; grpo"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(small_model, tmp_path, changes, code, part):
    with refused(code, part, kept=code != "loss-not-finite") as caught:
        Run(small_model, tmp_path, changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"grpo.num_generations": 7, "grpo.per_device_train_batch_size": 8},
            "grpo.per_device_train_batch_size x grpo.gradient_accumulation_steps is 8; must be a multiple of "
            "grpo.num_generations, 7",
        ),
        ({"grpo.rewards": [{"name": "exact_mach", "weight": 1.0}]}, "did you mean 'exact_match'?"),
        (
            {"grpo.rewards": [{"name": "function", "weight": 1.0, "function": "example:brevety"}]},
            "grpo.rewards: example.py has no function 'brevety'; did you mean 'brevity'?",
        ),
    ],
)
def test_a_bad_parameter_is_refused_in_one_line_before_anything_is_loaded(checkout: Checkout, changes, said):
    checkout.set({"training.method": "grpo", **changes})
    done = checkout.stage("train", check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
