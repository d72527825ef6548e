"""Formats of other runtimes in the pipeline: added, measured, judged by gates, published, and taken off again."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import Checkout, copy_of

from lathe.common.jsonl import read_jsonl

for module in ("onnxruntime_genai", "mlx_lm"):
    pytest.importorskip(module, reason="`make setup EXTRAS=export` installs what the formats are made with")

GATES = ["onnx.kl < 1e-4", "mlx_4bit.kl >= onnx.kl", "quantized.kl >= 0"]


def ran(done: subprocess.CompletedProcess[str]) -> list[str]:
    return sorted(re.findall(r"^Running stage '([^']+)'", done.stdout, re.MULTILINE))


@pytest.fixture(scope="module")
def made(reproduced: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return copy_of(reproduced, tmp_path_factory.mktemp("formats") / "lathe")


@pytest.fixture(scope="module")
def exported(made: Checkout) -> Checkout:
    """The checkout with two formats; a stage that is not theirs and runs all the same fails every test."""
    made.set({"export.formats": ["onnx", "mlx_4bit"], "evaluate.gates": GATES})
    of_formats = [f"{stage}@{name}" for stage in ("export", "generate_exported") for name in ("mlx_4bit", "onnx")]
    assert ran(made.run("dvc", "repro")) == sorted(["card", "evaluate", "judge", *of_formats])
    return made


def lathe(checkout: Checkout, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(checkout.root / "src")}
    return checkout.run("python", "-m", "lathe", *arguments, check=check, env=environment)


def test_a_second_run_does_nothing(exported: Checkout):
    assert ran(exported.run("dvc", "repro")) == []
    assert exported.run("git", "status", "--porcelain", "models", "data").stdout == ""


def test_their_scores_stand_beside_those_of_the_gguf_files(exported: Checkout):
    report = exported.json("metrics/evaluate/test.json")
    assert list(report)[-2:] == ["onnx", "mlx_4bit"]
    assert report["onnx"]["kl"] < 1e-4
    assert report["onnx"]["engine"].startswith("onnxruntime-genai ")
    assert {delta["to"] for delta in report["mlx_4bit"]["deltas"]} == {"base", "merged"}
    assert len(read_jsonl(exported.root / "data/scored/mlx_4bit/test.jsonl")) > 0
    summary = exported.json("metrics/evaluate/summary.json")
    assert set(summary["kl"]) >= {"onnx", "mlx_4bit"}
    assert summary["best"]["file"] in yaml.safe_load((exported.root / "params.yaml").read_text())["quantize"]["types"]
    printed = lathe(exported, "metrics").stdout
    assert "mlx_4bit" in printed
    assert "onnxruntime-genai" in printed
    done = lathe(exported, "gate", check=False)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["passed"] * len(GATES)


def test_the_card_and_the_report_name_them(exported: Checkout):
    card = (exported.root / "models/gguf/README.md").read_text()
    [line] = [line for line in card.splitlines() if line.startswith("| `mlx_4bit/`")]
    bits = exported.json("metrics/quantize/mlx_4bit.json")["bits_per_weight"]
    assert f"| {bits:.2f} |" in line
    lathe(exported, "report")
    assert "mlx_4bit" in (exported.root / "metrics/report/index.html").read_text()


def test_a_format_alone_is_published_at_the_top_of_its_repository(exported: Checkout):
    done = lathe(exported, "publish", "me/small-mlx", "--files", "mlx_4bit")
    assert "nothing was uploaded" in done.stdout
    folder = exported.root / ".scratch/publish/me--small-mlx"
    for file in (exported.root / "models/exported/mlx_4bit").iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n", 2)[1])
    assert front["library_name"] == "mlx"
    assert "gguf" not in front["tags"]
    [entry] = front["model-index"]
    assert all("mlx_4bit" in metric["name"] for result in entry["results"] for metric in result["metrics"])
    assert "mlx_lm.chat --model me/small-mlx" in card
    assert "llama-cli" not in card
    assert "| mlx_4bit (here) |" in card
    assert "text generation by mlx_4bit" in card
    assert json.loads((folder / "lineage.json").read_text())["lathe.base.digest"] in card


def test_formats_beside_gguf_files_are_in_folders_of_their_names(exported: Checkout):
    done = lathe(exported, "publish", "me/small-GGUF", "--files", "Q8_0", "onnx")
    assert "onnx/model.onnx" in done.stdout
    card = (exported.root / ".scratch/publish/me--small-GGUF/README.md").read_text()
    assert "| `onnx/` |" in card
    assert "llama-cli -hf me/small-GGUF:Q8_0" in card
    assert "--include 'onnx/*'" in card
    assert "(mlx_4bit, not published)" in card
    everything = lathe(exported, "publish", "me/all-GGUF").stdout
    assert "onnx/" not in everything


def test_a_format_that_was_changed_is_not_published(exported: Checkout, tmp_path: Path):
    copy = copy_of(exported, tmp_path / "lathe")
    file = copy.root / "models/exported/onnx/genai_config.json"
    text = file.read_text()
    file.unlink()
    file.write_text(text + "\n")
    done = lathe(copy, "publish", "me/small", "--files", "onnx", check=False)
    assert (done.returncode, "differs from dvc.lock" in done.stderr) == (2, True)


def test_formats_taken_off_the_list_leave_nothing_behind(exported: Checkout, tmp_path: Path):
    copy = copy_of(exported, tmp_path / "lathe")
    copy.set({"export.formats": ["onnx"], "evaluate.gates": GATES[:1]})
    assert not [stage for stage in ran(copy.run("dvc", "repro")) if "export" in stage]
    for folder in ("models/exported", "data/generated"):
        assert not (copy.root / folder / "mlx_4bit").exists()
        assert (copy.root / folder / "onnx").exists()
    assert "mlx_4bit" not in copy.json("metrics/evaluate/validation.json")
    assert "mlx_4bit" not in (copy.root / "models/gguf/README.md").read_text()
    assert ran(copy.run("dvc", "repro")) == []
