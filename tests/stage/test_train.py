"""Training on a model of one layer: what moves, what does not, and that the same is the same."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lathe import params
from lathe.builtin import commands
from lathe.errors import InputError
from lathe.training.sft import Trained, train, unusual_rate

CONFIG = params.load().params
SPLITS = {"train": commands.rows(1)["train"][:24], "validation": commands.rows(1)["validation"][:6]}
QUICK = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "eval_steps": 100, "max_length": 256}


@pytest.fixture
def results() -> dict[Path, Trained]:
    """What each training of a test returned, by the adapter's folder."""
    return {}


@pytest.fixture
def trained(small_model, tmp_path, results):
    """Return a function that trains with some parameters changed and gives the adapter's folder."""
    runs = 0

    def run(splits=SPLITS, base=small_model, **changes) -> Path:
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
        result = train(base, splits, folder, tmp_path / f"metrics{runs}", seed=1, supervise="all", **sections)
        results[folder] = result
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


@pytest.mark.parametrize("packing", [False, True])
def test_the_same_seed_gives_the_same_bytes(trained, packing):
    assert digest(trained(packing=packing)) == digest(trained(packing=packing))


def test_an_evaluation_in_between_changes_nothing(trained):
    """Evaluating must not repack the 4-bit weights: the steps after it would have wrong gradients."""
    assert digest(trained(eval_steps=1)) == digest(trained(eval_steps=100))


def test_training_on_a_16_bit_base_works_too(trained):
    assert weights(trained(load_in_4bit=False))


@pytest.mark.parametrize(("load_in_4bit", "packing"), [(False, False), (True, False), (False, True)])
def test_accumulated_passes_equal_one_large_pass(trained, load_in_4bit, packing):
    """The loss is normalised by the supervised tokens of the whole step, however they are divided."""
    # Packs of two or three rows: 24 rows make enough of them for steps of eight.
    same = {"load_in_4bit": load_in_4bit, "packing": packing, "max_length": 110, "max_steps": 3, "precision": "fp32"}
    whole = weights(trained(per_device_train_batch_size=8, **same))
    parts = weights(trained(per_device_train_batch_size=1, gradient_accumulation_steps=8, **same))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-2, atol=2e-4, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pack_trains_what_its_rows_train_one_by_one(trained, checkpointing):
    """One step on all rows, in one pack or in a pass each, moves every tensor alike."""
    once = {"max_steps": 1, "warmup_ratio": 0.0, "precision": "fp32", "gradient_checkpointing": checkpointing}
    rows = {**SPLITS, "train": SPLITS["train"][:8]}
    alone = weights(trained(rows, packing=False, per_device_train_batch_size=1, gradient_accumulation_steps=8, **once))
    packed = weights(trained(rows, packing=True, per_device_train_batch_size=1, max_length=1000, **once))
    for name, tensor in alone.items():
        torch.testing.assert_close(packed[name], tensor, rtol=1e-2, atol=2e-4, msg=name)


@pytest.mark.parametrize("packing", [False, True])
def test_tokens_per_second_count_each_row_once_an_epoch(trained, results, small_model, packing):
    from lathe.model import load_tokenizer
    from lathe.training.sft import _encode

    speed = results[trained(max_steps=None, num_train_epochs=1, packing=packing)]
    rows = _encode(load_tokenizer(small_model), SPLITS["train"], "all")
    share = sum(sum(row.supervised) for row in rows) / sum(len(row.input_ids) for row in rows)
    assert speed.supervised_tokens_per_second / speed.tokens_per_second == pytest.approx(share, rel=1e-2)


@pytest.fixture
def soft_capped_model(small_model, tmp_path):
    """A model whose attention cannot be told rows apart without padding."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    folder = tmp_path / "soft_capped"
    shutil.copytree(small_model, folder)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=768, num_key_value_heads=1, head_dim=16, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_model_that_would_mix_rows_is_padded_and_never_packed(soft_capped_model, trained, caplog):
    assert weights(trained(base=soft_capped_model, load_in_4bit=False))
    assert "batches are padded, which is slower" in caplog.text
    with pytest.raises(InputError, match=r"packing is true; Gemma2ForCausalLM does not keep packed rows apart"):
        trained(base=soft_capped_model, load_in_4bit=False, packing=True)


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
