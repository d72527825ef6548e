"""Weights trained whole: saved as their base is stored, and merged by taking its tensors' place."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file

from lathe.models.merge.merge import merge
from lathe.models.merge.write_shards import MergeReport
from lathe.training.full_tuning import save_full_model

pytestmark = pytest.mark.heavy

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 8},
    "mixtral": {"num_local_experts": 2},  # whose experts lie one by one on disk, and stacked in the model
    "gpt2": {"bos_token_id": 0, "eos_token_id": 1},  # transposed layers, and names without the model's prefix
}


def make(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SIZES, **KINDS[kind])
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, max_shard_size="20KB")
    return folder


def loaded(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def trained(base: Path, folder: Path) -> Any:
    """Move every weight of the base, save it as training does, and return the model."""
    model = loaded(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    folder.mkdir()
    save_full_model(model, base, folder)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def weight_map(folder: Path) -> Any:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def merged(base: Path, adapter: Path, out: Path, dtype: str = "auto") -> MergeReport:
    out.mkdir()
    return merge(base, adapter, out, dtype=dtype, max_shard_size_bytes=10**9)


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory.mktemp("bases") / request.param)


def test_the_merged_model_is_the_trained_one_rounded_once(base, tmp_path):
    model = trained(base, tmp_path / "adapter")
    report = merged(base, tmp_path / "adapter", tmp_path / "out")
    again = loaded(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor.to(torch.bfloat16)), name
    before, after = tensors(base), tensors(tmp_path / "out")
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {
        name: (t.dtype, t.shape) for name, t in after.items()
    }
    assert report == MergeReport(
        tensors_total=len(before),
        tensors_changed=len(before),
        largest_change=max(float((after[name].float() - before[name].float()).abs().max()) for name in before),
        bytes_written=sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")),
    )
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()
    assert weight_map(tmp_path / "out") == weight_map(base)


def test_weights_that_nothing_moved_are_saved_byte_for_byte(base, tmp_path):
    (tmp_path / "adapter").mkdir()
    save_full_model(loaded(base), base, tmp_path / "adapter")
    files = sorted(base.glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        assert (tmp_path / "adapter" / file.name).read_bytes() == file.read_bytes()
    with refused("merge-changes-nothing", "adapter", "all its tensors are the base's"):
        merged(base, tmp_path / "adapter", tmp_path / "out")


def test_the_type_of_the_merged_weights_can_be_chosen(tmp_path):
    base = make("llama", tmp_path / "base", torch.float32)
    model = trained(base, tmp_path / "adapter")
    merged(base, tmp_path / "adapter", tmp_path / "out", dtype="float16")
    after = tensors(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(after[name], tensor.to(torch.float16)), name


def test_a_tied_head_that_the_base_stores_all_the_same_is_written_once_and_stays_tied(tmp_path):
    base = make("qwen3", tmp_path / "base")
    stored = tensors(base)
    shutil.rmtree(base)
    make("qwen3", base)
    for file in base.glob("*.safetensors*"):
        file.unlink()
    save_file(
        {**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    model = trained(base, tmp_path / "adapter")
    embeddings = model.get_input_embeddings().weight.to(torch.bfloat16)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(tensors(tmp_path / "adapter")[name], embeddings)
    # Gathered from several processes, each weight is there once.
    (tmp_path / "gathered").mkdir()
    save_full_model(model, base, tmp_path / "gathered", dict(model.named_parameters()))
    for file in (tmp_path / "adapter").iterdir():
        assert (tmp_path / "gathered" / file.name).read_bytes() == file.read_bytes()
    merged(base, tmp_path / "adapter", tmp_path / "out")
    after = tensors(tmp_path / "out")
    assert "lm_head.weight" not in after
    assert torch.equal(after["model.embed_tokens.weight"], embeddings)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


def test_what_the_model_does_not_have_is_left_as_it_is(tmp_path):
    """Some bases hold layers that predict further tokens, which transformers does not load."""
    base = make("llama", tmp_path / "base", torch.float32)
    extra = base / "model-00099-of-00099.safetensors"
    save_file({"model.mtp.weight": torch.ones(2, 2)}, extra, metadata={"format": "pt"})
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.mtp.weight"] = extra.name
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    trained(base, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/tuning.json").read_text())["left"] == ["model.mtp.weight"]
    report = merged(base, tmp_path / "adapter", tmp_path / "out")
    assert report.tensors_changed == report.tensors_total - 1
    assert torch.equal(tensors(tmp_path / "out")["model.mtp.weight"], torch.ones(2, 2))


def test_a_model_with_weights_that_its_base_lacks_is_refused(tmp_path):
    base = make("llama", tmp_path / "base")
    model = loaded(base)
    model.register_parameter("gate", torch.nn.Parameter(torch.ones(3)))
    (tmp_path / "adapter").mkdir()
    with refused("base-tensor-missing", "no tensor gate, which LlamaForCausalLM has"):
        save_full_model(model, base, tmp_path / "adapter")


NAME = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path, dict[str, torch.Tensor]], Any], str, str]] = {
    "another shape": (
        lambda folder, tensors: tensors.update({NAME: torch.ones(31).bfloat16()}),
        "shape-mismatch",
        f"trained tensor {NAME} is BF16 of shape [31]",
    ),
    "another type": (
        lambda folder, tensors: tensors.update({NAME: torch.ones(32)}),
        "shape-mismatch",
        f"trained tensor {NAME} is F32 of shape [32]",
    ),
    "an unknown name": (
        lambda folder, tensors: tensors.update({"model.other.weight": torch.ones(2)}),
        "base-tensor-missing",
        "base: no tensor model.other.weight for the trained one of shape [2]",
    ),
    "a missing tensor": (lambda folder, tensors: tensors.pop(NAME), "tensor-missing", f"adapter: no tensor {NAME}"),
    "no number": (
        lambda folder, tensors: tensors.update({NAME: torch.full((32,), float("nan")).bfloat16()}),
        "merge-not-finite",
        f"{NAME}: NaN or infinity in the merged tensor, from the adapter",
    ),
    "no note of what it is": (
        lambda folder, tensors: (folder / "tuning.json").write_text('{"tuning": "half", "left": []}'),
        "tuning-note-invalid",
        "tuning.json: ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_belong_to_the_base_is_refused_in_one_line(tmp_path, damage):
    base = make("llama", tmp_path / "base")
    trained(base, tmp_path / "adapter")
    content = tensors(tmp_path / "adapter")
    change, code, part = DAMAGES[damage]
    change(tmp_path / "adapter", content)
    for file in (tmp_path / "adapter").glob("*.safetensors*"):
        file.unlink()
    save_file(content, tmp_path / "adapter/model.safetensors")
    with refused(code, part) as caught:
        merged(base, tmp_path / "adapter", tmp_path / "out")
    assert "\n" not in str(caught.value)
