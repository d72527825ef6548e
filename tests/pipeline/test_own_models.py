# ruff: noqa: F811 - a fixture is imported, then named as an argument
"""Models of the user's own go through every stage: other architectures, real vocabularies, several files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FEW, Checkout, add_small_inputs
from gguf_models import make_llama3, make_qwen3, quantize_program  # noqa: F401 - a fixture

from lathe.common import paths
from lathe.gguf.description import describe_gguf
from lathe.models.model_folder import INDEX_FILE


def run_all_stages(checkout: Checkout, model: Path, overrides: dict[str, str] | None = None) -> None:
    add_small_inputs(checkout, model)
    checkout.set({**FEW, **(overrides or {})})
    checkout.run("dvc", "repro")
    for split in ("validation", "test"):
        assert list(checkout.json(f"metrics/evaluate/{split}.json")) == ["base", "base_few_shot", "merged", "Q8_0"]
    assert checkout.json("metrics/merge/report.json")["tensors_changed"] > 0


@pytest.mark.slow  # a model with Qwen's vocabulary goes through every stage in test_from_gguf.py
@pytest.mark.parametrize("make", [make_qwen3, make_llama3], ids=["qwen3", "llama3"])
def test_a_model_with_a_real_vocabulary_goes_through_every_stage(
    checkout: Checkout, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    """Convert itself holds the ids of transformers and llama.cpp equal on `gguf.SAMPLE_TEXTS`, and fails otherwise."""
    make(tmp_path / "model")
    run_all_stages(checkout, tmp_path / "model")
    for artifact in ("base", "merged"):
        compared = checkout.json(f"metrics/check_converted/{artifact}.json")["tokens_compared"]
        assert compared > 800
    own, used = (checkout.root / f"models/{name}/model.safetensors" for name in ("local/small", "base"))
    assert own.samefile(used), "the weights were copied"
    described = describe_gguf(checkout.root / "models/gguf/Q8_0.gguf")
    assert described["chat_template"] == (tmp_path / "model/chat_template.jinja").read_text()


def test_a_model_in_three_files_stays_in_three_and_takes_the_users_own_programs(
    checkout: Checkout, small_model: Path, tmp_path: Path, quantize_program: Path
) -> None:
    sharded, converter = tmp_path / "model", tmp_path / "llama.cpp"
    divide(small_model, sharded)
    shutil.copytree(paths.LLAMA_CPP, converter, ignore=shutil.ignore_patterns("models"))
    script = converter / "convert_hf_to_gguf.py"
    script.write_text(script.read_text() + f"\nopen({str(tmp_path / 'converted')!r}, 'w').close()\n")
    own_programs = {"convert.llama_cpp_dir": str(converter), "quantize.binary": str(quantize_program)}
    run_all_stages(checkout, sharded, own_programs)

    index = json.loads((checkout.root / "models/merged" / INDEX_FILE).read_text())
    assert index["weight_map"] == json.loads((sharded / INDEX_FILE).read_text())["weight_map"]
    assert len(set(index["weight_map"].values())) == 3
    assert (tmp_path / "converted").exists()
    assert quantize_program.with_suffix(".used").exists()


def divide(model: Path, target: Path) -> None:
    """Copy a model folder with its weights in three files of about equal size."""
    from transformers import AutoModelForCausalLM

    third = (model / "model.safetensors").stat().st_size // 3
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(target, max_shard_size=third * 11 // 10)
