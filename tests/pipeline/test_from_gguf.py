# ruff: noqa: F811 - a fixture is imported, then named as an argument
"""A GGUF file as base model goes through every stage, and is named wherever the results say where they come from."""

import hashlib
from pathlib import Path

import pytest
from conftest import FEW, Checkout, add_small_inputs
from gguf_models import METADATA, Made, convert, qwen, rewrite, tiny  # noqa: F401 - fixtures
from ruamel.yaml import YAML

from lathe.gguf.description import describe_gguf
from lathe.gguf.quantize import quantize

ESTIMATE = """
import os
from lathe.doctor import doctor
from lathe.common import paths
from lathe.config.load import load
for finding in doctor.check_model(load(), doctor.Circumstances(paths.ROOT, os.environ)):
    print(finding.check, finding.status, finding.text)
"""


def choose(checkout: Checkout, **preset: str) -> None:
    presets = checkout.root / "presets.yaml"
    tree = YAML().load(presets)
    tree["models"]["own"] = preset
    YAML().dump(tree, presets)
    checkout.set({"model": "own"})


@pytest.mark.slow  # the default pipeline does so too, with few steps after the quick tests
def test_a_gguf_file_goes_through_every_stage(
    checkout: Checkout, small_model: Path, tmp_path: Path, qwen: Made
) -> None:
    whole, own = tmp_path / "own-f16.gguf", tmp_path / "own.gguf"
    convert(qwen.folder, whole, metadata=METADATA | {"general.license": "apache-2.0"})
    quantize(whole, own, type="Q4_K_M", threads=2)
    add_small_inputs(checkout, small_model)
    (checkout.root / "models/local/own.gguf").write_bytes(own.read_bytes())
    checkout.run("dvc", "add", "--quiet", "models/local/own.gguf")
    choose(checkout, source="local", path="models/local/own.gguf")
    rows = {"training.per_device_train_batch_size": "auto", "training.gradient_accumulation_steps": 4}
    checkout.set({**FEW, **rows, "training.per_device_eval_batch_size": "auto"})

    before = checkout.run("python3", "-c", ESTIMATE, env={"PYTHONPATH": "src"}).stdout
    assert before.startswith("memory ok"), before
    assert not (checkout.root / "models/base").exists()

    checkout.run("dvc", "repro")
    assert list(checkout.json("metrics/evaluate/test.json")) == ["base", "base_few_shot", "merged", "Q8_0"]
    assert checkout.json("metrics/merge/report.json")["tensors_changed"] > 0
    for artifact in ("base", "merged"):
        assert checkout.json(f"metrics/check_converted/{artifact}.json")["tokens_compared"] > 800
    digest = hashlib.sha256(own.read_bytes()).hexdigest()
    [origin] = checkout.json("metrics/fetch/model.json")["origin"]
    assert (origin["gguf"], origin["sha256"], origin["source"]) == ("own.gguf", digest, "local")
    for name in ("base-f16", "merged-f16", "Q8_0"):
        metadata = describe_gguf(checkout.root / f"models/gguf/{name}.gguf")["metadata"]
        assert metadata["lathe.base.gguf"] == "own.gguf"
        assert metadata["lathe.base.sha256"] == digest
        assert metadata["lathe.base.quantization"] == origin["quantization"]
        assert metadata["general.license"] == "apache-2.0"
    [sizes] = checkout.json("metrics/estimate/batch_sizes.json")["batch_sizes"]
    assert (sizes["per_device_train_batch_size"], sizes["gradient_accumulation_steps"]) == (4, 1)
    card = (checkout.root / "models/gguf/README.md").read_text()
    assert "| rows per step and device | 4 |" in card
    assert "license: apache-2.0\n" in card
    assert f"from `own.gguf` ({origin['quantization']}, " in card
    assert digest in card


def test_a_file_that_is_refused_leaves_no_base(checkout: Checkout, tmp_path: Path, tiny: Made) -> None:
    rewrite(tiny.gguf, checkout.root / "models/local/own.gguf", {"llama.attention.causal": False})
    choose(checkout, source="local", path="models/local/own.gguf")
    done = checkout.stage("fetch", "model", check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: own.gguf: transformers reads another model from it")
    assert "Traceback" not in done.stderr
    assert not (checkout.root / "models/base").exists()
    assert not list((checkout.root / "models").glob(".base*"))
