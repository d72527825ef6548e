"""What a later stage would refuse because of model or tokenizer is said by the first one: a table of causes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import preloaded
import pytest
from base_models import make
from pydantic import ValidationError
from refusals import refused
from safetensors.torch import load_file, save_file
from shared import made_once
from toy import load_toy

from lathe.common import paths
from lathe.common.text import readable_bytes
from lathe.config.adapter_base import resolve_adapter
from lathe.config.presets import HubModel, LocalModel
from lathe.config.training_params import Lora
from lathe.gguf import tokenizer_parity
from lathe.gguf.check_template import check_template
from lathe.gguf.jinja_engine import find_engine
from lathe.gguf.vocabulary import get_vocabulary
from lathe.models.adapter import check_adapter
from lathe.models.check_base import check_base
from lathe.models.check_merge import check_merge
from lathe.models.merge import converted_changes
from lathe.models.tokenizer import load_tokenizer
from lathe.models.tokenizer_template import read_chat_template
from lathe.needs.disk_space import check_disk_space, find_shortages
from lathe.needs.estimate import estimate_disk
from lathe.sources import fetch

LLAMA_CPP, PARAMS = paths.LLAMA_CPP, load_toy().params


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "whole", lambda folder: make("LlamaForCausalLM", folder))


@pytest.fixture
def model(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model under models/local of a checkout of its own, to be damaged."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "MODELS_LOCAL", tmp_path / "models/local")
    monkeypatch.setattr(paths, "SCRATCH", tmp_path / ".scratch")
    folder = tmp_path / "models/local/mine"
    shutil.copytree(whole, folder)
    return folder


def run_fetch(model: Path, **preset: str) -> Path:
    """Do what the stage fetch does with a model, and return the folder that it fills."""
    base = paths.ROOT / "models/base"
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    fetch.fetch_model(LocalModel(source="local", path=f"models/local/{model.name}", **preset), base, seed=1)
    check_base(base, "model mine")
    # The converter runs with this checkout's code.
    with preloaded.forking(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "ROOT", Path(__file__).parents[2])
        vocabulary = get_vocabulary(base, llama_cpp=paths.LLAMA_CPP, shown="model mine")
    tokenizer_parity.compare_tokenizers(base, vocabulary, [], samples="rows", shown="model mine")
    check_template(read_chat_template(load_tokenizer(base)), llama_cpp=LLAMA_CPP, shown="model mine")
    return base


def edit(file: Path, **values: Any) -> None:
    content = {**json.loads(file.read_text(encoding="utf-8")), **values}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_weights(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def lose_head(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.pop("lm_head.weight"))


def cut_weights(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def add_second_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, model / "model-00001-of-00001.safetensors", {"format": "pt"})
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def lose_shard(model: Path) -> None:
    add_second_weights(model)
    (model / "model.safetensors").unlink()
    (model / "model-00001-of-00001.safetensors").unlink()
    (model / "model-00001-of-00002.safetensors").touch()


def pickle_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def become_pointer(model: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (model / "model.safetensors").write_text(text)


def link_to_nowhere(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    os.symlink("/nowhere/tokenizer.json", model / "tokenizer.json")


def add_byte_order_mark(model: Path) -> None:
    file = model / "tokenizer_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


def become_adapter(base: Any, *, config_beside: bool = False) -> Callable[[Path], None]:
    """Put an adapter of a `base` in the model's place; other programs leave the base's config.json in its folder."""

    def become(model: Path) -> None:
        (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
        (model / "model.safetensors").rename(model / "adapter_model.safetensors")
        if not config_beside:
            (model / "config.json").unlink()

    return become


def add_adapter_config(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")


def become(architecture: str) -> Callable[[Path], None]:
    return lambda model: edit(model / "config.json", architectures=[architecture])


def need_code(file: str, **values: Any) -> Callable[[Path], None]:
    """Say that the model comes with code, as `auto_map` does; the code ends the process if it is run."""

    def change(model: Path) -> None:
        (model / "own.py").write_text("raise SystemExit('code of the model was run')")
        auto = "AutoTokenizer" if file.startswith("tokenizer") else "AutoModelForCausalLM"
        edit(model / file, auto_map={auto: "own.Own"}, **values)
        if auto == "AutoTokenizer":
            (model / "tokenizer.json").unlink()

    return change


def become_encoder_with_decoder(model: Path) -> None:
    from transformers import T5Config

    config = T5Config(vocab_size=50264, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    (model / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["T5Model"]}))


def store_as_gptq(model: Path) -> None:
    def pack(tensors: dict[str, Any]) -> None:
        import torch

        for name in [name for name in tensors if "q_proj" in name]:
            tensors[name.replace("weight", "qweight")] = torch.zeros(8, 64, dtype=torch.int32)
            del tensors[name]

    edit_weights(model, pack)


def name_token(key: str) -> Callable[[Path], None]:
    return lambda model: edit(model / "tokenizer_config.json", **{key: "<|of another model|>"})


def put(name: str, text: str) -> Callable[[Path], object]:
    return lambda model: (model / name).write_text(text, encoding="utf-8")


def lose_weight_map(model: Path) -> None:
    lose_shard(model)
    (model / "model.safetensors.index.json").write_text("{}")


def go_deeper(model: Path) -> None:
    (model / "inner").mkdir()
    for file in [file for file in model.iterdir() if file.is_file()]:
        file.rename(model / "inner" / file.name)


def write_template(text: str) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        (model / "chat_template.jinja").write_text(text)

    return write


def end_answers_otherwise(model: Path) -> None:
    file = model / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_end|>", "<|im_start|>"))


def divide_words(model: Path) -> None:
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    file.write_text(json.dumps(content))
    edit(model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def shrink_embeddings(model: Path) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:50257].clone()

    edit_weights(model, cut)
    edit(model / "config.json", vocab_size=50257)


def add_adapter(change: Callable[[dict[str, Any]], None], **config: Any) -> Callable[[Path], dict[str, str]]:
    """Put an adapter beside the model that is `change`d before it is saved; return the keys of the preset."""

    def add(model: Path) -> dict[str, str]:
        folder = paths.MODELS_LOCAL / "update"
        save_adapter(model, folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        edit(folder / "adapter_config.json", **config)
        return {"adapter": "models/local/update"}

    return add


def save_adapter(model: Path, folder: Path) -> Any:
    """Save an adapter of the model as PEFT does, with weights that are not zero; return the model with it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), LoraConfig(target_modules=["q_proj"])
    )
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    adapted.save_pretrained(folder)
    return adapted


def rename_layers(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[name.replace("model.layers.", "language_model.layers.")] = tensors.pop(name)


def lose_factor(tensors: dict[str, Any]) -> None:
    del tensors[min(tensors)]


def widen_factors(tensors: dict[str, Any]) -> None:
    for name in tensors:
        if "lora_A" in name:
            tensors[name] = tensors[name].repeat(1, 2)


CAUSES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "an architecture that transformers does not know": (
        "base-not-loaded",
        lambda model: edit(model / "config.json", model_type="no_such"),
    ),
    "an architecture that the converter does not know": (
        "conversion-refused",
        lambda model: edit(model / "config.json", architectures=["NoSuchForCausalLM"]),
    ),
    "a vocabulary that the converter does not know": ("conversion-refused", divide_words),
    "a head that is not there": ("weights-incomplete", lose_head),
    "weights of another shape": (
        "weights-of-other-shape",
        lambda model: edit(model / "config.json", intermediate_size=64),
    ),
    "quantized weights": (
        "weights-quantized",
        lambda model: edit(model / "config.json", quantization_config={"quant_method": "mxfp4"}),
    ),
    "weights that were cut short": ("safetensors-invalid", cut_weights),
    "two sets of weights": ("weights-twice", add_second_weights),
    "a shard that is missing": ("incomplete-model", lose_shard),
    "pickled weights": ("pickled-weights", pickle_weights),
    "a pointer of Git LFS": ("lfs-pointer", become_pointer),
    "a link to nowhere": ("broken-link", link_to_nowhere),
    "a byte-order mark": ("byte-order-mark", add_byte_order_mark),
    "an adapter whose base is elsewhere": ("adapter-as-base", become_adapter("/home/me/models/base")),
    "an adapter that names no base": ("adapter-as-base", become_adapter(None)),
    "an adapter with the base's configuration": ("adapter-as-base", become_adapter("models/base", config_beside=True)),
    "a model and an adapter in one folder": ("model-and-adapter", add_adapter_config),
    "a classifier": ("no-language-model", become("LlamaForSequenceClassification")),
    "a reward model": ("no-language-model", become("LlamaForRewardModel")),
    "an encoder with a decoder": ("no-language-model", become_encoder_with_decoder),
    "an architecture of its own code": ("needs-own-code", need_code("config.json", model_type="own")),
    "a tokenizer of its own code": ("needs-own-code", need_code("tokenizer_config.json", tokenizer_class="Own")),
    "weights of GPTQ without a word of it": ("weights-quantized", store_as_gptq),
    "a head that the configuration denies": (
        "tied-and-different",
        lambda model: edit(model / "config.json", tie_word_embeddings=True),
    ),
    "an end token without an embedding": ("token-without-embedding", name_token("eos_token")),
    "a padding token without an embedding": ("token-without-embedding", name_token("pad_token")),
    "an index without a map": ("index-without-weight-map", lose_weight_map),
    "weights of another name": (
        "weights-missing",
        lambda model: (model / "model.safetensors").rename(model / "model.fp16.safetensors"),
    ),
    "a template with a byte-order mark": ("byte-order-mark", put("chat_template.jinja", "﻿{{ messages }}")),
    "a generation configuration that is none": ("no-json-object", put("generation_config.json", "[1]")),
    "a tokenizer that is cut short": ("not-json", put("tokenizer.json", '{"model":')),
    "an old scaling of RoPE that is not known": (
        "base-not-loaded",
        lambda model: edit(
            model / "config.json", rope_scaling={"type": "own", "factor": 2.0}, rope_parameters=None, rope_theta=1e4
        ),
    ),
    "a model in a folder of it": ("incomplete-model", go_deeper),
    "no configuration": ("incomplete-model", lambda model: (model / "config.json").unlink()),
    "no chat template": ("no-chat-template", lambda model: (model / "chat_template.jinja").unlink()),
    "a template that is no Jinja": ("template-syntax", write_template("{% for %}")),
    "a template that does not write the answer": (
        "answer-not-written",
        write_template("{% for m in messages %}{{ m.role }}{% endfor %}"),
    ),
    "a template that llama.cpp cannot run": (
        "template-not-run",
        write_template("{% for m in messages %}{{ m.content | center(20) }}<|im_end|>{% endfor %}"),
    ),
    "answers that never end": ("answers-never-end", end_answers_otherwise),
    "tokens without embeddings": ("token-without-embedding", shrink_embeddings),
    "an adapter of another model, by its names": ("base-tensor-missing", add_adapter(rename_layers)),
    "an adapter of another model, by its shapes": ("shape-mismatch", add_adapter(widen_factors)),
    "an adapter that lacks a tensor": ("adapter-tensor-missing", add_adapter(lose_factor)),
    "an adapter of a kind that is not merged": (
        "adapter-unsupported",
        add_adapter(lambda _: None, init_lora_weights="pissa"),
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_fetch_says_what_a_later_stage_would_refuse(model: Path, cause: str) -> None:
    code, damage = CAUSES[cause]
    if code == "template-not-run" and not find_engine(LLAMA_CPP):
        pytest.skip("`python -m lathe.gguf.install_converter` builds llama.cpp's Jinja engine with a C++ compiler")
    preset = damage(model)
    named = preset if isinstance(preset, dict) else {}
    with refused(code, "models/local/" if named else "mine", kept=False) as caught:
        run_fetch(model, **named)
    assert "\n" not in str(caught.value)
    assert ".base." not in str(caught.value)  # a folder that is gone


def test_too_little_disk_is_said_by_fetch_and_warned_of_by_train(model, monkeypatch):
    run_fetch(model)
    root, params = paths.ROOT, PARAMS
    (root / ".dvc").mkdir()
    sizes = {path: size for path, size in estimate_disk(root / "models/base", params).items() if size}
    after = sum(size for path, size in sizes.items() if path.startswith(("models/merged", "models/gguf/")))
    # The checkpoints are gone when the merged model is written.
    needed = sizes["models/adapter"] + max(sizes[".scratch/train"], after)

    def leave(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    leave(needed)
    check_disk_space(params, root)
    assert find_shortages(params, root) == []
    leave(needed - 1)
    with refused("disk-too-small", f"{readable_bytes(needed)} (", "merged ", "quantize.types", kept=False):
        check_disk_space(params, root)
    # What is there may stay as it is, where nothing trains.
    for path in sizes:
        (root / path).mkdir(parents=True, exist_ok=True)
    leave(0)
    check_disk_space(params, root)
    [text] = find_shortages(params, root)
    assert "merged " in text
    assert "base-f16" not in text


def test_a_whole_model_passes_all_of_it(model):
    assert (run_fetch(model) / "model.safetensors").samefile(model / "model.safetensors")


def rewrite_in_three_types(tensors: dict[str, Any]) -> None:
    import torch

    types = [torch.float32, torch.float16, torch.bfloat16]
    for number, name in enumerate(sorted(tensors)):
        tensors[name] = tensors[name].to(types[number % 3])


def add_old_index(model: Path) -> None:
    """Leave the index of shards that are gone beside the weights in one file, which was saved over them."""
    add_second_weights(model)
    (model / "model-00001-of-00001.safetensors").unlink()


# What strangers' folders have, and is no fault.
TAKEN: dict[str, Callable[[Path], object]] = {
    "an index of shards that are gone": add_old_index,
    "weights of three types": lambda model: edit_weights(model, rewrite_in_three_types),
    "pickles, a GGUF and a trainer's files beside": lambda model: [
        (model / name).write_bytes(b"x")
        for name in ("pytorch_model.bin", "model-Q4_0.gguf", "optimizer.pt", "training_args.bin", "trainer_state.json")
    ],
    "code beside an architecture that is known": need_code("config.json"),
    "a padding token that is the end token": lambda model: edit(
        model / "tokenizer_config.json", pad_token="<|im_end|>"
    ),
    "values that generation would not take": lambda model: edit(
        model / "generation_config.json", do_sample=False, temperature=0.6, top_p=0.9, max_length=20
    ),
    "RoPE scaled with the older keys": lambda model: edit(
        model / "config.json", rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters=None, rope_theta=1e4
    ),
    "no word of tying": lambda model: edit(model / "config.json", tie_word_embeddings=None),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_no_fault_is_taken(model: Path, name: str) -> None:
    TAKEN[name](model)
    base = run_fetch(model)
    assert {file.suffix for file in base.iterdir()} <= {".json", ".jinja", ".safetensors", ".txt", ".md", ".model"}


def test_of_two_chat_templates_all_programs_get_the_one_of_transformers(model, caplog):
    import gguf

    expected = (model / "chat_template.jinja").read_text()
    edit(model / "tokenizer_config.json", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    base = run_fetch(model)
    assert "the other chat template, in tokenizer_config.json, is not" in caplog.text
    assert load_tokenizer(base).chat_template == expected
    assert gguf.SpecialVocab(base, load_merges=False).chat_template == expected  # what the converter takes
    assert gguf.SpecialVocab(model, load_merges=False).chat_template != expected


def test_the_chat_template_of_a_processor_is_taken_where_there_is_no_other(model):
    text = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    assert load_tokenizer(run_fetch(model)).chat_template == text


def test_weights_that_nothing_reads_are_named(model, caplog):
    def add_block(tensors: dict[str, Any]) -> None:
        tensors |= {name.replace("s.1.", "s.2."): one.clone() for name, one in tensors.items() if "layers.1." in name}

    edit_weights(model, add_block)
    run_fetch(model)
    assert "model.layers.2.input_layernorm.weight and 8 more of its files is read by nothing" in caplog.text


def test_of_templates_by_name_the_default_is_taken_and_none_is_refused(model):
    text = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": text}, {"name": "rag", "template": "{{ messages }}"}]
    edit(model / "tokenizer_config.json", chat_template=named)
    run_fetch(model)
    edit(model / "tokenizer_config.json", chat_template=named[1:])
    with refused("no-default-template", "rag", kept=False):
        run_fetch(model)


def test_a_base_with_an_adapter_of_it_is_taken_as_one_model(model):
    import torch

    adapted = save_adapter(model, paths.MODELS_LOCAL / "update")
    base = load_file(run_fetch(model, adapter="models/local/update") / "model.safetensors")
    before = load_file(model / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], base[name])}
    assert changed == {f"model.layers.{number}.self_attn.q_proj.weight" for number in (0, 1)}
    expected = adapted.merge_and_unload().state_dict()
    for name in changed:
        assert torch.allclose(base[name].float(), expected[name], atol=0.02)


@pytest.mark.parametrize("where", ["models/local/mine", "mine", "the whole path", "../local/mine"])
def test_an_adapter_in_place_of_a_model_is_taken_with_its_base(model, where):
    folder = paths.MODELS_LOCAL / "update"
    save_adapter(model, folder)
    named = str(model) if where == "the whole path" else where
    edit(folder / "adapter_config.json", base_model_name_or_path=named)
    preset = resolve_adapter(LocalModel(source="local", path="models/local/update", template="chatml"))
    assert preset == LocalModel(
        source="local", path="models/local/mine", adapter="models/local/update", template="chatml"
    )
    as_named = load_file(run_fetch(model, adapter="models/local/update") / "model.safetensors")
    base = paths.ROOT / "models/base"
    shutil.rmtree(base)
    base.mkdir()
    assert fetch.fetch_model(preset, base, seed=1) == {"adapter": "models/local/update"}
    taken = load_file(base / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in taken.items()} == {
        name: tensor.tolist() for name, tensor in as_named.items()
    }


def test_an_adapter_of_a_repository_is_read_as_that_with_the_adapter(model):
    folder = paths.MODELS_LOCAL / "update"
    save_adapter(model, folder)
    given = LocalModel(source="local", path="models/local/update")
    edit(folder / "adapter_config.json", base_model_name_or_path="owner/model", revision="v1")
    assert resolve_adapter(given) == HubModel(
        source="hub", id="owner/model", revision="v1", adapter="models/local/update"
    )
    shutil.copytree(model, paths.MODELS_LOCAL / "owner/model")  # as transformers: a folder of the name comes first
    assert resolve_adapter(given).path == "models/local/owner/model"
    for named in ("models/base", "models/local/update", "models/local/none", "..", "base", "a/b/c", "", 3, None):
        edit(folder / "adapter_config.json", base_model_name_or_path=named)
        assert resolve_adapter(given) == given
    (folder / "adapter_config.json").write_text("[")
    assert resolve_adapter(given) == given


def test_an_adapter_that_was_not_trained_leaves_the_base_as_it_is(model, caplog):
    folder = paths.MODELS_LOCAL / "update"
    save_adapter(model, folder)
    tensors = {name: 0 * tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    base = load_file(run_fetch(model, adapter="models/local/update") / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in base.items()} == {
        name: tensor.tolist() for name, tensor in load_file(model / "model.safetensors").items()
    }
    assert "models/local/update, an adapter of models/local/mine: all its deltas are zero" in caplog.text


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"lora_dropout": 0.1}, "lora.lora_dropout is 0.1"),
        ({"use_dora": True}, "lora.use_dora is true"),
    ],
)
def test_what_updates_of_experts_cannot_have_is_said_as_the_parameters_are_read(values, part):
    lora = {**load_toy().params.lora.model_dump(), "target_parameters": ["mlp.experts.down_proj"], **values}
    with pytest.raises(ValidationError, match=part):
        Lora(**lora)


@pytest.mark.parametrize("name", ["Qwen3VLMoeForConditionalGeneration", "Mistral3ForConditionalGeneration"])
def test_the_merge_is_planned_before_the_training(tmp_path, monkeypatch, name):
    make(name, tmp_path / "base")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if "Moe" in name else None
    lora = PARAMS.lora.model_copy(update={"target_parameters": experts})
    check_merge(tmp_path / "base", lora, tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []

    def fail(*_: Any) -> None:
        raise AttributeError("no such weight")

    monkeypatch.setattr(converted_changes, "convert_to_file_names", fail)
    with refused("merge-impossible", "lora.target_modules", "AttributeError: no such weight"):
        check_merge(tmp_path / "base", lora, tmp_path / "scratch")
    monkeypatch.undo()
    weights = tmp_path / "base/model.safetensors"
    tensors = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    with refused("base-tensor-missing", "layers.1.", kept=False):
        check_merge(tmp_path / "base", lora, tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"target_modules": ["q_proj", "no_such"]}, "layer-unknown"),
        ({"target_modules": ["q_proj", "gate_proj"]}, "layer-names-experts"),
        ({"target_modules": ["q_proj"], "target_parameters": ["mlp.no_such"]}, "parameter-unknown"),
        ({"num_layers": 9}, "blocks-too-many"),
    ],
)
def test_an_update_that_fits_no_layer_is_refused_before_the_model_is_loaded(tmp_path, values, code):
    make("Qwen3MoeForCausalLM", tmp_path / "moe")
    for file in (tmp_path / "moe").glob("*.safetensors"):
        file.unlink()  # no weight is read
    with refused(code, "lora."):
        check_adapter(tmp_path / "moe", load_toy().params.lora.model_copy(update=values))
