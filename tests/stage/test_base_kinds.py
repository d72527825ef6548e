"""Every kind of base goes from fetch's check through training, merge and conversion, and stays the model it was.

The bases are random, one small model of each class (tests/base_models.py). Logits of the merged f16 GGUF are held
against those of the base with its adapter in transformers; a tensor that was lost or merged wrongly would move them by
far more than is allowed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import preloaded
import pytest
import torch
from base_models import KINDS, make
from conftest import changed, write_splits
from faithful import distance, of_gguf, of_transformers
from gguf_models import convert
from refusals import refused
from safetensors.torch import load_file
from toy import load_toy

from lathe.common import paths
from lathe.config.training_params import Reward
from lathe.gguf import convert as converter
from lathe.gguf import tokenizer_parity
from lathe.gguf.description import describe_gguf
from lathe.gguf.llama_model import LlamaModel
from lathe.gguf.quantize import quantize
from lathe.models.added_tokens import add_tokens
from lathe.models.check_base import check_base
from lathe.models.loss_mask import encode
from lathe.models.merge.merge import merge
from lathe.models.model_class import choose_model_class, read_model_config
from lathe.models.model_folder import open_model
from lathe.models.tokenizer import load_tokenizer
from lathe.sources.builtin import household_commands
from lathe.training.train import train

MADE = household_commands.make_rows(1)
SPLITS = {"train": MADE["train"][:8], "validation": MADE["validation"][:3]}
QUICK = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.02,
    "logging_steps": 1,
    "eval_steps": 100,
    "max_length": 256,
    "seed": 1,
    "quantization.load_in_4bit": False,
}
EXPERTS = {"lora.target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}

# The weights of experts, where they are called otherwise.
EXPERT_WEIGHTS = {
    "MixtralForCausalLM": EXPERTS["lora.target_parameters"],
    "OlmoeForCausalLM": EXPERTS["lora.target_parameters"],
    "GptOssForCausalLM": EXPERTS["lora.target_parameters"],
    "Qwen3VLMoeForConditionalGeneration": EXPERTS["lora.target_parameters"],
    "DeepseekV3ForCausalLM": EXPERTS["lora.target_parameters"],
    "GraniteMoeHybridForCausalLM": ["experts.gate_up_proj", "experts.down_proj"],
    "Llama4ForConditionalGeneration": ["experts.gate_up_proj", "experts.down_proj"],
}
METHODS = {
    "dpo": {
        "method": "dpo",
        "dpo.sft_epochs": 0.5,
        "dpo.per_device_train_batch_size": 2,
        "dpo.learning_rate": 0.02,
    },
    "grpo": {
        "method": "grpo",
        "grpo.sft_epochs": 1.0,
        "grpo.max_steps": 3,
        "grpo.per_device_train_batch_size": 4,
        "grpo.num_generations": 4,
        "grpo.max_completion_length": 8,
        "grpo.learning_rate": 0.02,
        "grpo.rewards": [Reward(name="length", weight=1.0, max_characters=40)],
    },
}
REFUSED = {"Glm4MoeForCausalLM"}  # by the converter, with this vocabulary


def load(folder: Path) -> Any:
    return choose_model_class(read_model_config(folder)).from_pretrained(folder, dtype=torch.float32)


def go_through(
    name: str,
    root: Path,
    changes: dict[str, Any] | None = None,
    *,
    prepare: Callable[[Path], None] = lambda base: None,
    splits: dict[str, list[dict[str, Any]]] = SPLITS,
) -> dict[str, Any]:
    """Take one base through every step; return the distances between its forms, and where they are."""
    from peft import PeftModel

    base, adapter, merged = (root / part for part in ("base", "adapter", "merged"))
    for folder in (adapter, merged):
        folder.mkdir(parents=True)
    make(name, base)
    prepare(base)
    check_base(base, f"model {name}")
    params = changed(load_toy().params, {**QUICK, **(changes or {})})
    result = train(base, write_splits(root / "data", splits), adapter, root / "metrics", params=params)
    report = merge(base, adapter, merged, dtype="auto", max_shard_size_bytes=10**9)
    gguf = convert(merged, root / "merged.gguf")
    quantize(gguf, root / "small.gguf", type="Q4_K_M", threads=1)

    # Many: in a mixture whose experts have moved, a rounding sends some token to another one, which moves it alone.
    scored = MADE["validation"][:20] if splits is SPLITS else splits["validation"]
    rows = encode(load_tokenizer(base), [row["messages"] for row in scored], supervise="all")
    before = list(of_transformers(load(base), rows))
    trained = list(of_transformers(PeftModel.from_pretrained(load(base), adapter), rows))
    together = list(of_transformers(load(merged), rows))
    in_gguf = list(of_gguf(gguf, rows, threads=1))
    return {
        "moved": distance(before, trained).mean,
        "merged": distance(trained, together).mean,
        "whole": distance(trained, in_gguf).mean,
        "gguf": distance(together, in_gguf).mean,
        "quantized": distance(trained, of_gguf(root / "small.gguf", rows, threads=1)).mean,
        "frozen": result.frozen,
        "report": report,
    }


def check(name: str, root: Path, changes: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    measured = go_through(name, root, changes, **options)
    shown = ", ".join(f"{key} {value:.1e}" for key, value in measured.items() if isinstance(value, float))
    print(f"{name}: {shown} nats per token")
    assert measured["moved"] > 0.05
    # The merged weights are rounded to 16 bits; in a mixture that moves some token to another expert.
    assert measured["merged"] < max(1e-3, 5e-3 * measured["moved"])
    assert measured["gguf"] < 1e-3
    assert measured["quantized"] < max(1.0, 0.25 * measured["moved"])
    return measured


def test_experts_are_trained_merged_and_shipped_one_by_one(tmp_path):
    measured = check("Qwen3MoeForCausalLM", tmp_path, EXPERTS)
    assert measured["report"].tensors_changed == 2 * (4 + 4 * 3)  # of each layer: attention, four experts of three
    assert any(name.endswith("mlp.gate.weight") for name in measured["frozen"]), "the router was trained"


def test_a_language_model_in_a_larger_one_is_trained_and_the_rest_carried_along(tmp_path):
    check("Mistral3ForConditionalGeneration", tmp_path)
    base, merged = (load_file(tmp_path / part / "model.safetensors") for part in ("base", "merged"))
    assert base.keys() == merged.keys()
    beside = [name for name in base if "vision" in name or "projector" in name]
    assert len(beside) > 5
    assert all(torch.equal(base[name], merged[name]) for name in beside)


def test_layers_that_remember_all_rows_are_trained_with_padding(tmp_path, caplog):
    check("Lfm2ForCausalLM", tmp_path)
    assert "does not keep rows apart without padding" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"])
def test_the_part_that_reads_images_becomes_a_gguf_of_its_own(tmp_path, name):
    make(name, tmp_path / "base")
    projector = tmp_path / "mmproj.gguf"
    with preloaded.forking():
        converter.convert_projector(tmp_path / "base", projector, llama_cpp=paths.LLAMA_CPP, metadata={})
    assert describe_gguf(projector)["metadata"]["general.architecture"] == "clip"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if name not in REFUSED])
def test_every_kind_of_base_stays_the_model_that_was_trained(tmp_path, name):
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERT_WEIGHTS)
def test_experts_of_every_kind_are_trained_and_shipped(tmp_path, name):
    measured = check(name, tmp_path, {"lora.target_parameters": EXPERT_WEIGHTS[name]})
    assert measured["report"].tensors_changed > 4


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Mistral3ForConditionalGeneration", {}),
        ("Gemma3ForConditionalGeneration", {}),
        ("Qwen3MoeForCausalLM", {}),
        ("Qwen3MoeForCausalLM", EXPERTS),
        ("Lfm2ForCausalLM", {}),
    ],
)
def test_pairs_and_rewards_train_a_new_kind_as_they_do_a_plain_one(tmp_path, name, changes, method):
    check(name, tmp_path, {**changes, **METHODS[method]})


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "tied LlamaForCausalLM"])
def test_tokens_of_the_users_own_are_learnt_and_are_one_id_everywhere(tmp_path, name):
    tokens = ["<call>", "<sensor-7>"]

    def prepare(base: Path) -> None:
        ids = add_tokens(base, tokens, "model mine")
        assert ids == [50259, 50260]

    rows = [
        {"messages": [{"role": "user", "content": f"<call> {n}"}, {"role": "assistant", "content": f"<sensor-7> {n}"}]}
        for n in range(8)
    ]
    changes = {"preprocess.added_tokens": tokens}
    splits = {"train": rows, "validation": rows[:3]}
    measured = check(name, tmp_path, changes, prepare=prepare, splits=splits)
    assert measured["report"].tensors_changed == (15 if name.startswith("tied") else 16)
    base, merged = (open_model(tmp_path / part) for part in ("base", "merged"))
    before, after = (model.read("model.embed_tokens.weight") for model in (base, merged))
    assert len(before) == len(after) == 50264
    assert torch.equal(before[:50259], after[:50259])
    assert not torch.equal(before[50259:50261], after[50259:50261])
    assert torch.equal(before[50261:], after[50261:])
    with LlamaModel(tmp_path / "merged.gguf", vocab_only=True) as vocabulary:
        assert vocabulary.tokenize("a<call>b <sensor-7>")[1::2][:1] == [50259]
        assert vocabulary.tokenize("<sensor-7>") == [50260]
    parity = tokenizer_parity.check_tokens(tmp_path / "merged", tmp_path / "merged.gguf", ["so <call> on"])
    assert parity > 20


def test_a_token_that_is_there_already_is_refused(tmp_path):
    make("LlamaForCausalLM", tmp_path / "base")
    with refused("token-known", "'<|im_end|>'", "model mine"):
        add_tokens(tmp_path / "base", ["<|im_end|>"], "model mine")
