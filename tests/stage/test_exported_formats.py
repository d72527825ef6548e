# ruff: noqa: F811 - fixtures are imported, then named as arguments
"""Formats of other runtimes: the real conversions of a small model, measured by their own runtimes.

fp8 and awq need the environment of `make llmcompressor`, whose conversions are then made too.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import Checkout, copy_of
from generation_checkout import make_generation_checkout
from gguf_models import Made, learnt, qwen  # noqa: F401 - fixtures
from refusals import refused

from lathe.common import paths
from lathe.common.jsonl import read_jsonl
from lathe.config.artifacts import MERGED
from lathe.export.runtime import ExportedGenerator, RuntimeProcess
from lathe.inference import likelihood
from lathe.inference.generate import Generator

SETTINGS = {
    "generate.max_new_tokens": 8,
    "generate.n_ctx": 256,
    "generate.n_parallel": 8,
    "quantize.types": ["Q8_0"],
    "export.calibration_rows": 4,
}
ROWS = 6
LLMCOMPRESSOR = paths.MAIN / ".llmcompressor/bin/python"
NEEDED = {"onnx": "onnxruntime_genai", "onnx_int4": "onnxruntime_genai", "mlx": "mlx_lm", "mlx_4bit": "mlx_lm"}
# KL divergence from the merged GGUF, in nats per token: of 16 bits and more, and of 4 bits.
MOST_DIVERGENCE = {"onnx": 1e-4, "mlx": 1e-3, "fp8": 0.1, "onnx_int4": 1.0, "mlx_4bit": 1.0, "awq": 1.0}

SLOW = {"mlx", "onnx_int4"}  # made by the same code as mlx_4bit and onnx


def need(name: str) -> None:
    if name not in NEEDED:
        if not LLMCOMPRESSOR.exists():
            pytest.skip(f"{name} needs the environment of `make llmcompressor`")
    else:
        pytest.importorskip(NEEDED[name], reason="`make setup EXTRAS=export` installs what the format is made with")


@pytest.fixture(scope="module")
def made(tmp_path_factory, learnt: Made) -> Checkout:
    """A checkout with merged weights, their GGUF and its answers."""
    root = tmp_path_factory.mktemp("export") / "lathe"
    rows = {"train": 20, "validation": ROWS, "test": ROWS}
    checkout = make_generation_checkout(root, SETTINGS, rows, "switch on the attic lamp")
    checkout.set({"export.formats": list(MOST_DIVERGENCE), "export.llmcompressor_python": str(LLMCOMPRESSOR)})
    shutil.copy(learnt.gguf, root / "models/gguf/merged-f16.gguf")
    shutil.copytree(learnt.folder, root / "models/merged")
    (root / "models/merged/LICENSE").write_text("free\n")
    checkout.stage("generate", "merged")
    return checkout


def scores_of(checkout: Checkout, name: str) -> dict[str, float]:
    [split] = [each for each in checkout.json(f"metrics/generate/{name}.json")["splits"] if each["split"] == "test"]
    return split


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MOST_DIVERGENCE]
)
def test_a_format_is_made_and_measured_by_its_runtime(made: Checkout, name: str):
    need(name)
    made.stage("export", name)
    folder = made.root / "models/exported" / name
    names = {file.name for file in folder.iterdir()}
    assert {"tokenizer.model", "LICENSE", "lineage.json"} <= names
    assert not {"README.md", "recipe.yaml"} & names
    for file in ("tokenizer.model", "tokenizer_config.json"):
        assert (folder / file).read_bytes() == (made.root / "models/merged" / file).read_bytes()
    lineage = json.loads((folder / "lineage.json").read_text())
    assert lineage["lathe.artifact"] == name
    assert all(key.startswith("lathe.") for key in lineage)
    report = made.json(f"metrics/quantize/{name}.json")
    assert 3 < report["bits_per_weight"] < 40  # ONNX holds tables of positions too

    made.stage("generate_exported", name)
    scores, merged = scores_of(made, name), scores_of(made, MERGED)
    assert 0 <= scores["kl"] < MOST_DIVERGENCE[name]
    assert scores["perplexity"] == pytest.approx(merged["perplexity"], rel=0.01 + 2 * MOST_DIVERGENCE[name])
    rows, own = (read_jsonl(made.root / f"data/generated/{each}/test.jsonl") for each in (name, MERGED))
    runtime = {"onnx": "onnxruntime-genai", "mlx": "mlx-lm"}.get(name.partition("_")[0], "llmcompressor")
    assert all(row.pop("engine").startswith(f"{runtime} ") for row in rows)
    for key in ("prompt", "reference", "reference_tokens"):
        assert [row[key] for row in rows] == [row[key] for row in own]
    if name in ("onnx", "mlx"):
        same = sum(one["completion"] == two["completion"] for one, two in zip(rows, own, strict=True))
        assert same >= ROWS - 1, "other arithmetic may decide a tie otherwise"
    assert read_jsonl(made.root / f"data/generated/{name}/general.jsonl")[0]["tokens"]
    [file] = made.json(f"metrics/generate/{name}.json")["file"]
    assert file["bytes"] == sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())


@pytest.mark.parametrize("name", ["onnx", "mlx_4bit"])
def test_the_same_weights_make_the_same_bytes(made: Checkout, name: str, tmp_path: Path):
    need(name)
    folder = made.root / "models/exported" / name
    if not folder.exists():
        made.stage("export", name)
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    elsewhere = copy_of(made, tmp_path / "another clone")
    elsewhere.stage("export", name)
    after = (elsewhere.root / "models/exported" / name).iterdir()
    assert {file.name: file.read_bytes() for file in after if file.is_file()} == before


def open_process(made: Made, name: str, tmp_path: Path) -> RuntimeProcess:
    return RuntimeProcess(name, Path(sys.executable), made.folder, n_ctx=64, log=tmp_path / "runtime.log")


def test_weights_that_transformers_reads_give_the_logits_of_llama_cpp(learnt: Made, tmp_path: Path):
    """The runtime of fp8 and awq, on weights as they were before them."""
    pairs = [("<|im_start|>user\nlamp<|im_end|>\n", "on"), ("<|im_start|>user\nheater<|im_end|>\n", "off at 9")]
    with (
        Generator(learnt.gguf, n_parallel=1, n_ctx=64, threads=2) as merged,
        open_process(learnt, "fp8", tmp_path) as process,
    ):
        exported = ExportedGenerator(merged, process)
        found: dict[int, likelihood.Likelihood] = {}
        for number, result in likelihood.answer_and_score(exported, lambda: pairs, max_new_tokens=6, against=merged):
            if isinstance(result, likelihood.Likelihood):
                found[number] = result
        assert len(found) == len(pairs)
        for number, own in likelihood.score_references(merged, lambda: pairs):
            assert found[number].nll == pytest.approx(own.nll, rel=2e-2)
            assert found[number].tokens == own.tokens
            assert 0 <= (found[number].kl or 0) < 1e-3
        texts = [prompt + reference for prompt, reference in pairs]
        answers = [exported.complete([text], max_new_tokens=6)[0].text for text in texts]
        assert [answer.text for answer in exported.complete(texts, max_new_tokens=6)] == answers
        assert answers == [answer.text for answer in merged.complete(texts, max_new_tokens=6)]


def test_a_runtime_that_cannot_load_the_model_is_said_in_a_line(tmp_path: Path):
    broken = Made(tmp_path / "none", tmp_path / "none.gguf")
    with refused("runtime-fails", "the runtime of fp8 has ended with exit code 1", "runtime.log", kept=False) as caught:
        open_process(broken, "fp8", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_runtime_that_dies_is_said_in_a_line(learnt: Made, tmp_path: Path):
    with open_process(learnt, "fp8", tmp_path) as process:
        assert process.read(0, [1, 2, 3], 2).shape[0] == 2
        alive = [each for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE]
        [child] = [each for each in alive if "runtime_process" in " ".join(each.cmdline())]
        child.kill()
        with refused("runtime-fails", "has ended with exit code -9", kept=False):
            process.read(3, [4], 1)


def test_a_conversion_that_fails_is_said_in_a_line_and_leaves_nothing(made: Checkout, tmp_path: Path):
    need("mlx")
    checkout = copy_of(made, tmp_path / "lathe")
    shutil.rmtree(checkout.root / "models/exported", ignore_errors=True)
    [weights] = (checkout.root / "models/merged").glob("*.safetensors")
    weights.unlink()
    weights.write_bytes(b"no weights")
    done = checkout.stage("export", "mlx", check=False)
    assert done.returncode == 2
    assert "error: export mlx: -m mlx_lm convert has ended with exit code 1: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (checkout.root / "models/exported/mlx").exists()
    assert not list((checkout.root / ".scratch/export").glob(".export*"))


@pytest.mark.slow
def test_what_was_measured_before_a_kill_is_kept_and_the_runtime_ends(made: Checkout, tmp_path: Path):
    need("mlx")
    checkout = copy_of(made, tmp_path / "lathe")
    if not (checkout.root / "models/exported/mlx").exists():
        checkout.stage("export", "mlx")
    shutil.rmtree(checkout.root / "data/generated/mlx", ignore_errors=True)
    command = [sys.executable, "stages/generate_exported.py", "mlx"]
    running = subprocess.Popen(command, cwd=checkout.root, env=checkout.environment, stderr=subprocess.DEVNULL)
    journals = checkout.root / ".scratch/generate"
    while running.poll() is None and not _count_finished(journals):
        time.sleep(0.02)
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(running.pid).children()
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert not (checkout.root / "data/generated/mlx").exists()
    checkout.stage("generate_exported", "mlx")
    assert len(read_jsonl(checkout.root / "data/generated/mlx/test.jsonl")) == ROWS
    assert not _count_finished(journals)


def _count_finished(journals: Path) -> int:
    files = [file for file in journals.glob("*") if file.is_file() and not os.path.basename(file).endswith(".lock")]
    return sum(file.stat().st_size > 0 and b"/references" in file.read_bytes() for file in files)


def test_a_format_that_is_not_listed_is_no_item(made: Checkout, tmp_path: Path):
    checkout = copy_of(made, tmp_path / "lathe")
    checkout.set({"export.formats": ["mlx"]})
    done = checkout.stage("export", "--format", "onnx", check=False)
    assert (done.returncode, done.stderr) == (2, "error: export onnx: no such item; known: mlx\n")
