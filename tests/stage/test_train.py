"""Training on a model of one layer: what moves, what does not, and that the same is the same."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lathe import params
from lathe.builtin import commands
from lathe.errors import InputError
from lathe.training.sft import train, unusual_rate

CONFIG = params.load().params
SPLITS = {"train": commands.rows(1)["train"][:24], "validation": commands.rows(1)["validation"][:6]}
QUICK = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "eval_steps": 100, "max_length": 256}


@pytest.fixture
def trained(small_model, tmp_path):
    """Return a function that trains with some parameters changed and gives the adapter's folder."""
    runs = 0

    def run(splits=SPLITS, **changes) -> Path:
        nonlocal runs
        runs += 1
        folder = tmp_path / str(runs)
        folder.mkdir()
        sections = {
            name: getattr(CONFIG, name).model_copy(
                update={k: v for k, v in {**QUICK, **changes}.items() if k in type(getattr(CONFIG, name)).model_fields}
            )
            for name in ("training", "lora", "quantization")
        }
        train(small_model, splits, folder, tmp_path / f"metrics{runs}", seed=1, supervise="all", **sections)
        return folder

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def digest(folder: Path) -> str:
    content = b"".join(file.read_bytes() for file in sorted(folder.iterdir()))
    return hashlib.sha256(content).hexdigest()


def test_every_tensor_of_the_adapter_moves(trained):
    first, second = weights(trained()), weights(trained(learning_rate=0.02))
    for name, tensor in first.items():
        assert tensor.dtype == torch.float32, name
        # Both began at the same values; a tensor that does not move is the same whatever the rate.
        assert not torch.equal(tensor, second[name]), name


def test_the_same_seed_gives_the_same_bytes(trained):
    assert digest(trained()) == digest(trained())


def test_an_evaluation_in_between_changes_nothing(trained):
    """Evaluating must not repack the 4-bit weights: the steps after it would have wrong gradients."""
    assert digest(trained(eval_steps=1)) == digest(trained(eval_steps=100))


def test_training_on_a_16_bit_base_works_too(trained):
    assert weights(trained(load_in_4bit=False))


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_accumulated_passes_equal_one_large_pass(trained, load_in_4bit):
    """The loss is normalised by the supervised tokens of the whole step, however they are divided."""
    whole = weights(trained(per_device_train_batch_size=8, load_in_4bit=load_in_4bit, precision="fp32"))
    parts = weights(
        trained(
            per_device_train_batch_size=1, gradient_accumulation_steps=8, load_in_4bit=load_in_4bit, precision="fp32"
        )
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-2, atol=2e-4, msg=name)


def test_only_the_answers_carry_loss(small_model):
    from lathe.model import load_tokenizer
    from lathe.training.loss import IGNORED
    from lathe.training.packing import row_dataset
    from lathe.training.sft import _encode

    tokenizer = load_tokenizer(small_model)
    for row, conversation in zip(row_dataset(_encode(tokenizer, SPLITS["train"], "all")), SPLITS["train"], strict=True):
        learnt = [token for token in row["labels"] if token != IGNORED]
        assert tokenizer.decode(learnt) == conversation["messages"][-1]["content"] + "<|im_end|>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_modules": ["q_proj", "query"]},
            "lora.target_modules: 'query' matches no layer; this model's layers:",
        ),
        ({"target_modules": r".*\.query"}, r"lora.target_modules: the expression '.*\\.query' matches no layer"),
        ({"target_modules": "("}, "lora.target_modules is '('; not a regular expression"),
        ({"modules_to_save": ["head"]}, "lora.modules_to_save: 'head' matches no layer"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(trained, changes, message):
    with pytest.raises(InputError) as caught:
        trained(**changes)
    assert message in str(caught.value)


def test_a_loss_that_is_not_finite_stops_the_run(trained):
    with pytest.raises(InputError, match=r"loss is (nan|inf) at step \d"):
        trained(learning_rate=1e30, max_grad_norm=1e30, precision="fp32")


@pytest.mark.parametrize(
    ("rate", "weights", "warned"),
    [(6e-3, 2_000_000, False), (6e-3, 600_000_000, True), (2e-4, 8_000_000_000, False), (1e-7, 2_000_000, True)],
)
def test_a_rate_that_fits_another_size_of_model_is_warned_of(rate, weights, warned):
    assert (unusual_rate(rate, weights=weights) is not None) == warned


def test_the_curves_have_one_point_per_logged_step(trained, tmp_path):
    trained(eval_steps=2)
    lines = (tmp_path / "metrics1/plots/metrics/eval/loss.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["step", "2", "4"]
