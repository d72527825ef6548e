"""The stage on answers made by the test, and what `python -m lathe gate` says of its metrics."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import Checkout, copy_of, make_checkout
from ruamel.yaml import YAML

from lathe.common.jsonl import read_jsonl, write_jsonl

TYPES = ["Q8_0", "Q4_K_M", "Q4_1"]
# Right answers of twelve, by artifact.
ARTIFACTS = {"base": 0, "base_few_shot": 3, "merged": 12, "Q8_0": 12, "Q4_K_M": 11, "Q4_1": 9}
GATES = ["merged.exact_match > base.exact_match", "quantized.exact_match >= merged.exact_match - 0.1"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout whose artifacts answered twelve rows, so many of them right, and were evaluated; to be copied."""
    checkout = make_checkout(tmp_path_factory.mktemp("evaluated") / "lathe")
    checkout.set({"evaluate.gates": GATES, "evaluate.bootstrap_samples": 100, "quantize.types": TYPES})
    for artifact, right in ARTIFACTS.items():
        write_answers(checkout, artifact, right)
    (checkout.root / "data/processed").mkdir(parents=True, exist_ok=True)
    for split in ("validation", "test"):
        write_jsonl([{"messages": []}] * 12, checkout.root / f"data/processed/{split}.jsonl")
    checkout.stage("evaluate")
    return checkout


@pytest.fixture
def checkout(evaluated: Checkout, tmp_path: Path) -> Checkout:
    return copy_of(evaluated, tmp_path / "lathe")


def write_answers(checkout: Checkout, artifact: str, right: int) -> None:
    folder = checkout.root / "data/generated" / artifact
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "prompt": f"user: {number}",
            "reference": f'{{"n":{number}}}',
            "completion": f'{{"n": {number if number < right else -1}}}'.replace(" ", ""),
            "finish_reason": "stop",
            "tokens": 6,
            "nll": 3.0 - right / 12,
            "reference_tokens": 5,
            "kl": 0.01 if artifact.startswith("Q") else None,
        }
        for number in range(12)
    ]
    for split in ("validation", "test"):
        write_jsonl(rows, folder / f"{split}.jsonl")
    if artifact != "base_few_shot":
        write_jsonl([{"text": "A paragraph.", "nll": 9.0, "tokens": 4}] * 5, folder / "general.jsonl")
    (checkout.root / f"metrics/generate/{artifact}.json").write_text('{"file": [{"bytes": 1000}]}\n')


def gate(checkout: Checkout) -> tuple[int, str]:
    done = checkout.run("python", "-m", "lathe", "gate", check=False, env={"PYTHONPATH": str(checkout.root / "src")})
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def test_reports_rows_gates_and_plots_are_written(checkout: Checkout) -> None:
    for split in ("validation", "test"):
        report = checkout.json(f"metrics/evaluate/{split}.json")
        assert list(report) == list(ARTIFACTS)
        assert [scores["exact_match"] for scores in report.values()] == [0, 0.25, 1, 1, 0.9167, 0.75]
        for artifact, right in ARTIFACTS.items():
            rows = read_jsonl(checkout.root / f"data/scored/{artifact}/{split}.jsonl")
            assert sorted(row["row"] for row in rows) == list(range(12))
            assert [row["scores"]["exact_match"] for row in rows] == [0.0] * (12 - right) + [1.0] * right
    assert checkout.json("metrics/evaluate/gates.json") == {
        "passed": False,
        "gates": {GATES[0]: {"passed": True, "margin": 1.0}, GATES[1]: {"passed": False, "margin": -0.15}},
    }
    plotted = (checkout.root / "metrics/evaluate/scores.csv").read_text().splitlines()
    assert plotted[0] == "split,artifact,metric,score,low,high,primary,megabytes"


def test_running_again_changes_no_byte(checkout: Checkout) -> None:
    def content() -> dict[str, bytes]:
        files = [*(checkout.root / "data/scored").rglob("*.jsonl"), *(checkout.root / "metrics/evaluate").iterdir()]
        return {str(file): file.read_bytes() for file in files}

    before = content()
    checkout.stage("evaluate")
    assert content() == before


def test_gate_prints_each_gate_and_its_exit_code_says_whether_all_passed(checkout: Checkout) -> None:
    assert gate(checkout) == (
        1,
        "passed  merged.exact_match > base.exact_match  (1.0 > 0.0, margin +1.0)\n"
        "failed  quantized.exact_match >= merged.exact_match - 0.1  (0.75 >= 0.9 for Q4_1, margin -0.15)\n",
    )
    write_answers(checkout, "Q4_1", 11)
    checkout.stage("evaluate")
    code, said = gate(checkout)
    assert code == 0
    assert said.count("passed  ") == 2
    checkout.set({"evaluate.gates": None})
    checkout.stage("evaluate")
    assert gate(checkout) == (0, "evaluate.gates is null: nothing is asked of the files\n")


def test_gate_refuses_metrics_that_are_not_of_these_gates(checkout: Checkout) -> None:
    keys = "evaluate.gates, quantize.types and export.formats"
    stale = f"error: metrics/evaluate is not of the {keys} in params.yaml; run `dvc repro`\n"
    checkout.set({"evaluate.gates": [*GATES, "Q4_1.bytes < 2000"]})
    assert gate(checkout) == (2, stale)
    checkout.set({"evaluate.gates": GATES, "quantize.types": [*TYPES, "Q2_K"]})
    assert gate(checkout) == (2, stale)
    checkout.set({"quantize.types": TYPES})
    report = checkout.root / "metrics/evaluate/validation.json"
    edited = report.read_text().replace('"exact_match": 0.75', '"exact_match": 0.99')
    report.write_text(edited)
    assert gate(checkout) == (
        2,
        "error: metrics/evaluate/gates.json is not of the validation.json beside it; run `dvc repro`\n",
    )
    checkout.set({"evaluate.gates": ["merged.exact_mach > 0"]})
    code, said = gate(checkout)
    assert code == 2
    assert "did you mean 'exact_match'?" in said
    report.unlink()
    checkout.set({"evaluate.gates": GATES})
    assert gate(checkout) == (2, "error: metrics/evaluate/validation.json: no such file; run `make repro` first\n")


def test_the_documented_hook_keeps_git_and_dvc_from_pushing_what_fails_a_gate(checkout: Checkout) -> None:
    page = (checkout.root / "docs/evaluation.md").read_text()
    [install] = re.findall(r"^printf '.*pre-push$", page, flags=re.MULTILINE)
    checkout.run("sh", "-c", install)
    checkout.run("chmod", "+x", ".git/hooks/pre-push")
    folder = checkout.root / ".venv/bin"
    folder.mkdir(parents=True)
    for name, does in (("lathe", f'exec {sys.executable} -m lathe "$@"'), ("dvc", "echo dvc was asked to push")):
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    remote = checkout.root.parent / "remote.git"
    checkout.run("git", "init", "--quiet", "--bare", str(remote))
    path = {"PYTHONPATH": str(checkout.root / "src")}

    refused = checkout.run("git", "push", str(remote), "main", check=False, env=path)
    assert refused.returncode != 0
    assert "failed  quantized.exact_match" in refused.stdout + refused.stderr
    assert "dvc was asked to push" not in refused.stdout + refused.stderr
    assert checkout.run("git", "--git-dir", str(remote), "branch").stdout == ""

    write_answers(checkout, "Q4_1", 11)
    checkout.stage("evaluate")
    passed = checkout.run("git", "push", str(remote), "main", env=path)
    assert "dvc was asked to push" in passed.stdout + passed.stderr
    assert "main" in checkout.run("git", "--git-dir", str(remote), "branch").stdout


def test_dvc_shows_the_primary_scores_the_best_file_and_the_gates_alone(checkout: Checkout) -> None:
    shown = json.loads(checkout.run("dvc", "metrics", "show", "--json").stdout)[""]["data"]
    assert not shown["metrics/evaluate/validation.json"]["data"]
    assert not shown["metrics/evaluate/gates.json"]["data"]
    summary = shown["metrics/evaluate/summary.json"]["data"]
    report = checkout.json("metrics/evaluate/validation.json")
    assert summary["exact_match"] == {artifact: scores["exact_match"] for artifact, scores in report.items()}
    assert summary["best"] == {"file": "Q8_0", "bytes": 1000}
    assert summary["gates_passed"] is False


def test_only_what_is_left_of_types_no_longer_listed_is_removed(checkout: Checkout) -> None:
    gguf = checkout.root / "models/gguf"
    gguf.mkdir(parents=True, exist_ok=True)
    kept = ["README.md", "Modelfile", "adapter/adapter-f16.gguf", "merged-f16.gguf", "base-f16.gguf", "Q8_0.gguf"]
    for name in (*kept, "Q2_K.gguf"):
        (gguf / name).parent.mkdir(exist_ok=True)
        (gguf / name).write_bytes(b"")
    (checkout.root / "metrics/quantize/imatrix.json").write_text("{}\n")
    write_answers(checkout, "Q2_K", 1)
    checkout.stage("evaluate")
    assert sorted(str(file.relative_to(gguf)) for file in gguf.rglob("*") if file.is_file()) == sorted(kept)
    assert (checkout.root / "metrics/quantize/imatrix.json").exists()
    assert not (checkout.root / "metrics/generate/Q2_K.json").exists()


def test_a_judges_marks_are_scored_where_the_judge_is_enabled(checkout: Checkout) -> None:
    checkout.set({"judge.enabled": True, "evaluate.primary_metric": "judge"})
    for artifact in ARTIFACTS:
        for split in ("validation", "test"):
            folder = checkout.root / "data/judged" / artifact
            folder.mkdir(parents=True, exist_ok=True)
            marks = [{"row": number, "score": 10 * number + 50, "reason": "…"} for number in (2, 0)]
            write_jsonl(marks, folder / f"{split}.jsonl")
    checkout.stage("evaluate")
    assert checkout.json("metrics/evaluate/test.json")["merged"]["judge"] == 60
    rows = read_jsonl(checkout.root / "data/scored/merged/test.jsonl")
    assert [row["scores"]["judge"] for row in rows[:3]] == [50, 70, None]


def test_bert_score_of_a_local_encoder_reaches_report_rows_and_gates(checkout: Checkout) -> None:
    from encoders import make_encoder

    encoder = checkout.root / "models/local/encoder"
    encoder.mkdir()
    make_encoder(encoder)
    presets = checkout.root / "presets.yaml"
    tree = YAML().load(presets)
    tree["encoders"]["mine"] = {"source": "local", "path": "models/local/encoder"}
    YAML().dump(tree, presets)
    checkout.set(
        {
            "bert_score.model": "mine",
            "bert_score.max_length": 32,
            "evaluate.metrics": ["exact_match", "bert_score"],
            "evaluate.gates": ["quantized.combined >= 0.5 * merged.bert_score"],
        }
    )
    checkout.stage("fetch", "encoder")
    assert {file.name for file in (checkout.root / "models/encoder").iterdir()} == {f.name for f in encoder.iterdir()}
    checkout.stage("evaluate")
    report = checkout.json("metrics/evaluate/validation.json")
    assert report["merged"]["bert_score"] == report["merged"]["combined"] == 1
    assert 0.9167 < report["Q4_K_M"]["bert_score"] < 1
    assert {one["metric"] for one in report["Q4_K_M"]["intervals"]} >= {"bert_score", "combined"}
    assert gate(checkout)[0] == 0
    [cache] = (checkout.root / ".scratch/bert_score").iterdir()
    before = cache.stat().st_mtime_ns
    again = checkout.stage("evaluate")
    assert cache.stat().st_mtime_ns == before
    assert "BERTScore" not in again.stderr

    checkout.set({"bert_score.max_length": 512})
    refused = checkout.stage("evaluate", check=False)
    assert refused.returncode == 2
    assert refused.stderr == "error: bert_score.max_length is 512; the encoder takes 64 tokens; lower it\n"
    shutil.rmtree(encoder)
    refused = checkout.stage("fetch", "encoder", check=False)
    assert refused.returncode == 2
    assert "models/local/encoder: no such file or folder; put it there" in refused.stderr
    shutil.rmtree(checkout.root / "models/encoder")
    refused = checkout.stage("evaluate", check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: bert_score.model: ")


def test_pairs_of_a_judge_that_prefers_the_first_answer_make_win_rates_and_a_warning(checkout: Checkout) -> None:
    checkout.set({"judge.enabled": True, "judge.mode": "pairwise"})
    for artifact in ARTIFACTS:
        for split in ("validation", "test"):
            lines: list[dict[str, object]] = [{"row": 0, "tie": True, "reason": "the answers are equal"}]
            for row in range(1, 12):
                own = {"row": row, "length_difference": 3, "score": 90, "reason": "the first"}
                lines += [own | {"first": "own"}, own | {"first": "other"}]
            (checkout.root / "data/judged" / artifact).mkdir(parents=True, exist_ok=True)
            write_jsonl(lines, checkout.root / "data/judged" / artifact / f"{split}.jsonl")
    done = checkout.stage("evaluate")
    assert "prefers whichever answer comes first (position bias +1.00" in done.stderr
    pairs = checkout.json("metrics/evaluate/pairwise.json")
    merged = pairs["test"]["merged"]
    assert merged["position_bias"]["value"] == 1
    assert merged["win_rate"]["value"] == 0.5
    assert (merged["rows"], merged["ties"], merged["same_answers"], merged["consistent"]) == (12, 12, 1, 0)
    report = checkout.json("metrics/evaluate/test.json")
    assert report["merged"]["win_rate"] == 0.5
    assert "judge" not in report["merged"]
    checkout.set({"evaluate.primary_metric": "judge"})
    refused = checkout.stage("evaluate", check=False)
    assert refused.returncode == 2
    assert "judge.mode to score" in refused.stderr


def test_rows_that_belong_together_are_resampled_together_and_told_in_the_metric_files(checkout: Checkout) -> None:
    for split in ("validation", "test"):
        rows = [{"messages": [], "cluster": f"document {number // 4}"} for number in range(12)]
        write_jsonl(rows, checkout.root / f"data/processed/{split}.jsonl")
    before = checkout.json("metrics/evaluate/test.json")
    checkout.set({"evaluate.cluster_by": "source"})
    checkout.stage("evaluate")
    after = checkout.json("metrics/evaluate/test.json")
    for artifact in ARTIFACTS:
        assert after[artifact]["exact_match"] == before[artifact]["exact_match"]
    [delta] = [
        delta for delta in after["Q4_1"]["deltas"] if (delta["to"], delta["metric"]) == ("merged", "exact_match")
    ]
    assert delta["clusters"] == 3
    assert delta["detectable"] > 0
    assert all("clusters" not in delta for delta in before["Q4_1"]["deltas"])
    shown = checkout.run("dvc", "metrics", "show", "--json").stdout
    assert "detectable" not in json.dumps(list(json.loads(shown)[""]["data"]["metrics/evaluate/test.json"]["data"]))


def test_scores_of_two_engines_are_refused_unless_that_is_asked_for_and_then_named(checkout):
    before = checkout.json("metrics/evaluate/validation.json")
    for artifact in ("base", "base_few_shot", "merged"):
        for split in ("validation", "test"):
            file = checkout.root / f"data/generated/{artifact}/{split}.jsonl"
            write_jsonl([{**row, "engine": "vllm"} for row in read_jsonl(file)], file)
    done = checkout.stage("evaluate", check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "vllm for base, base_few_shot, merged; llama.cpp for Q8_0, Q4_K_M, Q4_1" in done.stderr
    assert "evaluate.allow_mixed_engines" in done.stderr
    assert checkout.json("metrics/evaluate/validation.json") == before
    checkout.set({"evaluate.allow_mixed_engines": True})
    done = checkout.stage("evaluate")
    assert "WARNING" in done.stderr
    assert "differences are of engines as well as of weights" in done.stderr
    marked = checkout.json("metrics/evaluate/validation.json")
    assert {name: scores.pop("engine", None) for name, scores in marked.items()} == {
        **dict.fromkeys(("base", "base_few_shot", "merged"), "vllm"),
        **dict.fromkeys(TYPES),
    }
    assert marked == before
    assert "vllm" not in (checkout.root / "metrics/evaluate/scores.csv").read_text()
