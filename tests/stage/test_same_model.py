"""What llama.cpp runs is what was trained: of every kind of tuning, the merged GGUF's logits are those of transformers.

The bases are random, but scaled so that they are as sure of their next token as a trained model, and training moves
them far: a tensor that was lost, or merged wrongly, would move the logits by far more than is allowed.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import changed, write_splits
from faithful import distance, of_gguf, of_transformers
from gguf_models import convert, make_llama3, make_qwen3
from safetensors.torch import load_file
from toy import load_toy

from lathe.models.loss_mask import encode
from lathe.models.merge.merge import merge
from lathe.models.model_folder import open_model
from lathe.models.tokenizer import load_tokenizer
from lathe.sources.builtin import household_commands
from lathe.training.train import train

SPLITS = {
    "train": household_commands.make_rows(1)["train"][:24],
    "validation": household_commands.make_rows(1)["validation"][:8],
}
QUICK = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.005,
    "logging_steps": 1,
    "eval_steps": 100,
    "max_length": 256,
    "seed": 1,
    "quantization.load_in_4bit": False,
}

BOTH = ["embed_tokens", "lm_head"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "4-bit base": {"quantization.load_in_4bit": True},
    "rslora": {"lora.use_rslora": True, "lora.r": 4},
    "dora": {"lora.use_dora": True},
    "dora on a 4-bit base": {"lora.use_dora": True, "quantization.load_in_4bit": True},
    "named layers": {"lora.target_modules": ["q_proj", "down_proj"]},
    "expression": {"lora.target_modules": r".*\.layers\.1\.(mlp\.up_proj|self_attn\.[vo]_proj)"},
    "embeddings updated": {"lora.target_modules": ["embed_tokens", "q_proj"]},
    "last block": {"lora.num_layers": 1},
    "head saved": {"lora.modules_to_save": ["lm_head"]},
    "both saved, 4-bit base": {"lora.modules_to_save": BOTH, "quantization.load_in_4bit": True},
    "norms saved, dora": {"lora.modules_to_save": ["norm"], "lora.use_dora": True},
    "block saved": {"lora.modules_to_save": ["layers.0.mlp"]},
    "full": {"tuning": "full"},
}


class Base(NamedTuple):
    make: Callable[[Path], None]
    tied: bool


@pytest.fixture(scope="module")
def bases(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes a base by name, or gives it if it is there."""
    made = {
        "tiny": Base(lambda folder: _make_tiny(small_model, folder), tied=True),
        "tiny untied": Base(lambda folder: _make_tiny(small_model, folder), tied=False),
        "qwen3": Base(make_qwen3, tied=True),
        "llama3": Base(make_llama3, tied=False),
    }
    root = tmp_path_factory.mktemp("bases")

    def get(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            made[name].make(folder)
            _make_sure(folder, tied=made[name].tied)
        return folder

    return get


def _make_tiny(small_model: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(small_model, folder)
    config = AutoConfig.from_pretrained(small_model)
    config.num_hidden_layers = 2
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def _make_sure(folder: Path, *, tied: bool) -> None:
    """Draw the weights anew, so that no layer is negligible and logits spread by about 3."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                wide = 3 if "embed" in name or "head" in name else 1
                parameter.normal_(std=wide / parameter.shape[1] ** 0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    model.to(torch.bfloat16).save_pretrained(folder)


def check(base: Path, folder: Path, kind: str) -> None:
    """Train, merge and convert, and hold the logits of the GGUF against transformers' on base and adapter."""
    adapter, merged = folder / "adapter", folder / "merged"
    for each in (adapter, merged):
        each.mkdir(parents=True)
    splits = write_splits(folder / "data", SPLITS)
    train(base, splits, adapter, folder / "metrics", params=changed(load_toy().params, {**QUICK, **KINDS[kind]}))
    merge(base, adapter, merged, dtype="auto", max_shard_size_bytes=10**9)
    gguf = convert(merged, folder / "merged.gguf")

    conversations = [row["messages"] for row in SPLITS["validation"]]
    rows = encode(load_tokenizer(base), conversations, supervise="all")
    before = list(of_transformers(_loaded(base), rows))
    trained = list(of_transformers(_trained(base, adapter), rows))
    moved = distance(before, trained)
    apart = distance(trained, of_gguf(gguf, rows, threads=2))
    print(f"{kind}: training moved the model by {moved.mean:.3f} nats per token; the GGUF is {apart.mean:.1e} away")
    assert moved.mean > 0.05
    assert apart.mean < 1e-3
    assert apart.tokens == sum(sum(row.supervised) for row in rows) > 100


def _loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _trained(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    model = _loaded(base)
    if (adapter / "adapter_config.json").exists():
        return PeftModel.from_pretrained(model, adapter)
    [file] = adapter.glob("*.safetensors")
    weights = load_file(file)
    assert weights.keys() == open_model(base).tensors.keys()
    model.load_state_dict(weights, strict=False)  # a tied head is there by its other name
    return model


@pytest.mark.parametrize(
    ("base", "kind"),
    [
        ("tiny", "dora on a 4-bit base"),
        ("tiny", "embeddings updated"),
        ("tiny", "full"),
        pytest.param("qwen3", "both saved, 4-bit base", marks=pytest.mark.slow),
    ],
)
def test_the_merged_gguf_answers_as_the_trained_model(bases, tmp_path, base, kind):
    check(bases(base), tmp_path, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["tiny", "tiny untied", "qwen3", "llama3"])
def test_the_merged_gguf_answers_as_the_trained_model_of_every_kind(bases, tmp_path, base, kind):
    check(bases(base), tmp_path, kind)
