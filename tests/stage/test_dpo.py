"""Training on pairs of a better and a worse answer, on a model of one layer."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import changed, write_splits
from refusals import refused
from safetensors.torch import load_file
from toy import load_toy

from lathe.models.loading import load_base
from lathe.models.loss_mask import encode
from lathe.models.tokenizer import load_tokenizer
from lathe.models.tokenizer_template import read_chat_template
from lathe.sources.builtin import household_commands
from lathe.training.preference_pairs import build_pair_dataset, encode_pairs
from lathe.training.train import train

CONFIG = load_toy().params
SPLITS = {
    "train": household_commands.make_rows(1)["train"][:24],
    "validation": household_commands.make_rows(1)["validation"][:6],
}
QUICK = {
    "method": "dpo",
    "max_steps": 6,
    "max_length": 256,
    "logging_steps": 1,
    "eval_steps": 3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "dpo.sft_epochs": 0.5,
    "dpo.per_device_train_batch_size": 4,
    "dpo.learning_rate": 0.01,
    "dpo.beta": 0.5,
    "dpo.loss_type": "sigmoid",
}
EXACT = {"precision": "fp32", "quantization.load_in_4bit": False}


class Run:
    """One training, and what it left."""

    def __init__(self, base: Path, folder: Path, splits: dict[str, list] | None = None, **changes: object) -> None:
        self.adapter, self.metrics = folder / "adapter", folder / "metrics"
        self.adapter.mkdir(parents=True)
        chosen = changed(CONFIG, {"seed": 1, **QUICK, **changes})
        files = write_splits(folder / "data", splits or SPLITS)
        self.trained = train(base, files, self.adapter, self.metrics, params=chosen)

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.adapter / "adapter_model.safetensors")

    def curve(self, name: str) -> list[float]:
        lines = (self.metrics / f"plots/metrics/{name}.tsv").read_text().splitlines()
        return [float(line.split("\t")[1]) for line in lines[1:]]


@pytest.fixture
def run(small_model, tmp_path):
    """Return a function that trains with some parameters changed."""
    count = 0

    def new(splits=None, base=small_model, **changes) -> Run:
        nonlocal count
        count += 1
        return Run(base, tmp_path / str(count), splits, **changes)

    return new


@pytest.fixture(scope="module")
def done(small_model, tmp_path_factory):
    return Run(small_model, tmp_path_factory.mktemp("dpo"))


def test_the_margin_of_held_out_pairs_begins_at_nothing_and_rises(done):
    margins = done.curve("eval/reward_margin")
    assert margins[0] == 0.0, "the reference is the model as the pairs began"
    assert margins[0] < margins[1] < margins[2]
    assert done.curve("eval/loss")[0] == pytest.approx(0.6931, abs=1e-3)
    assert done.curve("eval/loss")[-1] < 0.69
    assert done.curve("eval/reward_accuracy")[-1] > 0.5
    assert len(done.curve("train/reward_margin")) == 6
    assert json.loads((done.metrics / "metrics.json").read_text())["eval"]["reward_margin"] == margins[-1]


def test_a_supervised_phase_comes_first(done, run):
    assert len(done.curve("sft/train/loss")) == 3
    assert not (run(**{"dpo.sft_epochs": 0, "max_steps": 1}).metrics / "plots/metrics/sft").exists()


def test_every_tensor_of_the_one_adapter_moves_and_none_of_the_base(done, run):
    other = run(**{"dpo.learning_rate": 0.001}).weights()
    for name, tensor in done.weights().items():
        assert tensor.dtype == torch.float32, name
        assert not torch.equal(tensor, other[name]), name
    assert {file.name for file in done.adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert not any("ref" in name.split(".") for name in [*done.weights(), *done.trained.frozen])


def test_the_rewards_are_those_of_the_paper(run, small_model):
    """beta * (log p - log p of the reference), here of the base, summed over the answer's tokens."""
    from peft import PeftModel

    done = run(**EXACT, **{"dpo.sft_epochs": 0})
    base = load_base(small_model, changed(CONFIG, EXACT).quantization, precision="fp32")
    model = PeftModel.from_pretrained(base, done.adapter)
    chosen, rejected = encode_pairs(load_tokenizer(small_model), SPLITS["validation"])

    def reward(row) -> float:
        now = log_probability(model, row)
        with model.disable_adapter():
            return 0.5 * (now - log_probability(model, row))

    margins = [reward(better) - reward(worse) for better, worse in zip(chosen, rejected, strict=True)]
    assert done.curve("eval/reward_margin")[-1] == pytest.approx(sum(margins) / len(margins), rel=1e-3)
    assert done.curve("eval/reward_accuracy")[-1] == pytest.approx(sum(m > 0 for m in margins) / len(margins))


def log_probability(model, row) -> float:
    ids = torch.tensor([row.input_ids])
    with torch.no_grad():
        chances = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    said = chances.gather(1, ids[0, 1:, None])[:, 0]
    return said[torch.tensor(row.supervised[1:])].sum().item()


def test_prompt_and_answers_are_the_ids_of_inference_with_one_bos_and_the_end_token(small_model):
    tokenizer = load_tokenizer(small_model)
    chat = [
        {"role": "user", "content": "Is it on?"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "yes, now"},
    ]
    rows = [*SPLITS["train"], {"messages": chat, "rejected": [{"role": "assistant", "content": "yesterday"}]}]
    for row, example in zip(rows, build_pair_dataset(*encode_pairs(tokenizer, rows)), strict=True):
        *before, answer = row["messages"]
        prompt = read_chat_template(tokenizer).render(before, add_generation_prompt=True)
        assert example["prompt_ids"] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        for name, message in (("chosen_ids", answer), ("rejected_ids", row["rejected"][0])):
            whole = [*example["prompt_ids"], *example[name]]
            assert whole == encode(tokenizer, [[*before, message]], supervise="last")[0].input_ids
            assert whole.count(tokenizer.bos_token_id) == prompt.count(tokenizer.bos_token)
            assert example[name][-1] == tokenizer.eos_token_id
            assert example[name].count(tokenizer.eos_token_id) == 1
            assert tokenizer.decode(example[name][:-1]).strip() == message["content"]


def test_accumulated_passes_equal_one_large_pass(run):
    once = {**EXACT, "max_steps": 2, "dpo.sft_epochs": 0}
    whole = run(**once, **{"dpo.per_device_train_batch_size": 8}).weights()
    parts = run(**once, **{"dpo.per_device_train_batch_size": 2, "dpo.gradient_accumulation_steps": 4}).weights()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-2, atol=2e-4, msg=name)


def test_validation_is_the_mean_over_pairs_however_they_are_batched(run):
    parts, whole = (run(**EXACT, max_steps=2, per_device_eval_batch_size=size) for size in (4, 6))
    assert whole.curve("eval/reward_margin")[-1] != 0
    for name in ("loss", "reward_margin", "reward_accuracy"):
        assert parts.curve(f"eval/{name}")[-1] == pytest.approx(whole.curve(f"eval/{name}")[-1], rel=1e-4), name


def test_a_layer_that_is_trained_whole_learns_from_pairs(run):
    done = run(**{"lora.modules_to_save": ["lm_head"], "max_steps": 2})
    other = run(**{"lora.modules_to_save": ["lm_head"], "max_steps": 2, "dpo.learning_rate": 0.001})
    heads = [name for name in done.weights() if "lm_head" in name]
    assert heads
    assert not any(torch.equal(done.weights()[name], other.weights()[name]) for name in heads)


def test_all_weights_can_learn_from_pairs_without_a_second_model(run):
    done = run(**EXACT, tuning="full", max_steps=3, **{"dpo.learning_rate": 0.001})
    margins = done.curve("eval/reward_margin")
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert margins[-1] > margins[0]
    assert not list(done.adapter.glob("adapter*"))


def test_a_row_without_an_answer_to_reject_is_named_before_anything_is_loaded(run, tmp_path):
    lacking = {**SPLITS, "validation": [*SPLITS["validation"][:2], {"messages": SPLITS["train"][0]["messages"]}]}
    with refused("rejected-answer-missing", "data/processed/validation.jsonl:3: "):
        run(lacking, base=tmp_path / "no model here")


def test_an_adapter_on_the_output_layer_is_refused(run):
    with refused("layer-output-head", "it matches lm_head"):
        run(**{"lora.target_modules": ["q_proj", "lm_head"]})


def test_a_loss_that_is_no_number_names_step_and_rows(run):
    with refused("loss-not-finite", "data/processed/train.jsonl:", "dpo.learning_rate", kept=False) as caught:
        run(**{**EXACT, "dpo.learning_rate": 1.0, "max_grad_norm": 1e30, "dpo.beta": 1e38})
    assert re.match(r"(loss|grad_norm) is (nan|inf) at step \d+, not a number, with the rows of", str(caught.value))
