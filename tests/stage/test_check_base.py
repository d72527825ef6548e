"""A base that cannot become a GGUF that answers is refused as it is fetched, for what is wrong with it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from base_models import KINDS, make
from refusals import refused
from safetensors.torch import load_file, save_file

from lathe.common import paths
from lathe.models.check_base import ENDING_TOKENS, check_base
from lathe.models.weight_range import check_finite


@pytest.fixture
def model(small_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    return folder


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def rename_weights(folder: Path, name: Callable[[str], str | None]) -> None:
    file = folder / "model.safetensors"
    tensors = {name(old): tensor.clone() for old, tensor in load_file(file).items()}
    save_file({new: tensor for new, tensor in tensors.items() if new}, file, {"format": "pt"})


def test_a_whole_model_is_taken(model):
    check_base(model, "model mine")


def test_a_model_without_its_head_is_refused(model):
    change_json(model / "config.json", tie_word_embeddings=False)
    with refused("weights-incomplete", "model mine", "lm_head.weight", "tie_word_embeddings"):
        check_base(model, "model mine")


def test_weights_under_names_that_nothing_reads_are_refused(model):
    rename_weights(model, lambda name: f"_orig_mod.{name}")
    with refused("weights-incomplete", "11 more", "nothing reads _orig_mod."):
        check_base(model, "model mine")


def test_one_missing_weight_is_named(model):
    rename_weights(model, lambda name: None if name == "model.layers.0.mlp.up_proj.weight" else name)
    with refused("weights-incomplete", "no weights for model.layers.0.mlp.up_proj.weight, which"):
        check_base(model, "model mine")


def test_weights_of_another_shape_are_refused(model):
    change_json(model / "config.json", intermediate_size=128)
    with refused("weights-of-other-shape", "mlp", "config.json"):
        check_base(model, "model mine")


def test_an_architecture_that_transformers_does_not_know_is_refused(model):
    change_json(model / "config.json", model_type="llamma", architectures=["LlammaForCausalLM"])
    with refused("base-not-loaded", "llamma", kept=False):
        check_base(model, "model mine")


@pytest.mark.parametrize(("value", "count"), [(float("nan"), 1), (float("-inf"), 3)])
def test_weights_that_are_no_numbers_are_refused(model, value, count):
    check_finite(model, "model mine")
    file, name = model / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name].view(-1)[-count:] = value
    save_file(tensors, file, {"format": "pt"})
    with refused("weights-not-finite", f"model mine: {name} holds {count} of", str(value)):
        check_finite(model, "model mine")


# A vocabulary as large as that of Qwen3.5 takes twenty seconds.
WRAPPED = [name for name in KINDS if name.endswith("ForConditionalGeneration")]
SLOW = {"Qwen3_5ForConditionalGeneration": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in WRAPPED])
def test_a_larger_model_around_a_language_model_is_taken(tmp_path, name):
    make(name, tmp_path / "base")
    check_base(tmp_path / "base", "model mine")


def add_token(model: Path, template: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|answer|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)


def test_a_template_with_a_token_beyond_the_embeddings_is_refused_and_one_without_it_is_not(model):
    start = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['content'] }}"
    end = "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    add_token(model, f"{start}{end}")
    check_base(model, "model mine")
    add_token(model, f"{start}<|answer|>{end}")
    with refused("token-without-embedding", "'<|answer|>', token 768"):
        check_base(model, "model mine")


def test_answers_that_llama_cpp_would_not_end_are_refused(model):
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template.replace("<|im_end|>", "<|im_start|>"))
    with refused("answers-never-end", "'<|im_start|>'", "eos_token"):
        check_base(model, "model mine")


def test_the_ending_tokens_are_those_of_llama_cpp():
    source = (paths.LLAMA_CPP / "src/llama-vocab.cpp").read_text(encoding="utf-8")
    [block] = re.findall(r"if \(false((?:\s*\|\| t\.first == \"[^\"]+\"[^\n]*)+)\s*\) \{\s*special_eog_ids", source)
    assert set(re.findall(r't\.first == "([^"]+)"', block)) == ENDING_TOKENS


def test_all_linear_layers_of_a_mixture_leave_experts_and_router_frozen_until_they_are_named(tmp_path):
    import torch
    from gguf_models import make_qwen3_moe
    from toy import load_toy

    from lathe.models.adapter import add_adapter, check_adapter
    from lathe.models.model_class import choose_model_class, read_model_config

    def list_trained(**values: object) -> set[str]:
        with torch.device("meta"):
            config = read_model_config(tmp_path / "moe")
            model = add_adapter(choose_model_class(config).from_config(config), lora.model_copy(update=values))
        names = (name.partition(".lora_")[0] for name, weight in model.named_parameters() if weight.requires_grad)
        return {name.partition("layers.0.")[2].replace(".base_layer", "") for name in names if "layers.0." in name}

    make_qwen3_moe(tmp_path / "moe")
    lora = load_toy().params.lora
    check_adapter(tmp_path / "moe", lora.model_copy(update={"target_modules": "all-linear"}))
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    assert list_trained(target_modules="all-linear") == attention
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert list_trained(target_modules="all-linear", target_parameters=experts) == {*attention, "mlp.experts"}
    assert list_trained(target_modules="all-linear", target_parameters=["mlp.gate.weight"]) == {*attention, "mlp.gate"}
    assert list_trained(target_modules="all-linear", target_parameters=experts, num_layers=1) == set()
