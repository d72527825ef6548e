"""Scores of benchmark tasks: intervals and differences on the same documents, groups of tasks, gates that name them."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from refusals import refused

from lathe.common.jsonl import write_jsonl
from lathe.config.gates import check_names, parse_gate
from lathe.evaluation import benchmark
from lathe.evaluation.benchmark_scores import (
    add_task_scores,
    evaluate_benchmark,
    list_task_scores,
    remove_unlisted_tasks,
)
from lathe.evaluation.evaluate import Resampling
from lathe.evaluation.gate_results import evaluate_gate
from lathe.experiments.task_differences import compare_tasks

ARTIFACTS = ["base", "merged", "Q8_0"]
BYTES = {"base": 3000, "merged": 3000, "Q8_0": 1600}
DOCUMENTS = 120


def describe(value: float, aggregation: str | None = "mean", **more: Any) -> dict[str, Any]:
    return {"value": value, "stderr": None, "lower_is_better": False, "aggregation": aggregation, **more}


def write_task(
    folder: Path, artifact: str, name: str, statistics: list[dict[str, Any]], asked: str | None = None, **scores: Any
) -> None:
    """Write documents with their statistics, four of a passage, and the task's description; asked for as `asked`."""
    own = folder / artifact / (asked or name)
    own.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "doc_id": n,
            "doc_hash": f"h{n}",
            "doc": {"passage": n // 4},
            "target": "",
            "responses": {},
            "statistics": each,
        }
        for n, each in enumerate(statistics)
    ]
    write_jsonl(rows, own / f"{name}.jsonl")
    file = own / "tasks.json"
    content = json.loads(file.read_text()) if file.exists() else {"asked": [], "tasks": {}, "groups": {}}
    content["asked"].append(name)
    content["tasks"][name] = {"documents": len(rows), "scores": scores}
    file.write_text(json.dumps(content))


def write_choices(folder: Path, right: dict[str, list[bool]], name: str = "choice", asked: str | None = None) -> None:
    for artifact, answers in right.items():
        statistics = [{"acc": [float(each), 1.0]} for each in answers]
        write_task(folder, artifact, name, statistics, asked, acc=describe(sum(answers) / len(answers)))


def evaluate_all(folder: Path, cluster_by: str | None = None, tasks: Sequence[str] = ("choice",)) -> Any:
    return evaluate_benchmark(folder, BYTES, ARTIFACTS, tasks, cluster_by=cluster_by, resampling=Resampling(1000, 1))


def find_delta(report: Any, task: str, artifact: str, to: str, metric: str) -> dict[str, Any]:
    [delta] = [each for each in report[task][artifact]["deltas"] if (each["to"], each["metric"]) == (to, metric)]
    return delta


def draw_answers() -> dict[str, list[bool]]:
    """The base is right on 60 %; the merged model loses one right answer of six; Q8_0 answers as it does."""
    drawn = random.Random(1)
    base = [drawn.random() < 0.6 for _ in range(DOCUMENTS)]
    merged = [each and drawn.random() > 1 / 6 for each in base]
    return {"base": base, "merged": merged, "Q8_0": merged}


def test_differences_are_of_the_same_documents_and_have_intervals(tmp_path):
    right = draw_answers()
    write_choices(tmp_path, right)
    report = evaluate_all(tmp_path)
    lost = sum(right["base"]) - sum(right["merged"])
    delta = find_delta(report, "choice", "merged", "base", "acc")
    assert delta["delta"] == pytest.approx(-lost / DOCUMENTS, abs=1e-4)
    assert delta["low"] < delta["delta"] < delta["high"] < 0
    assert delta["p"] < 0.01
    # Of 120 answers that are not paired the same difference would not show: its interval would be 0.25 wide.
    assert delta["high"] - delta["low"] < 0.15
    same = find_delta(report, "choice", "Q8_0", "merged", "acc")
    assert (same["delta"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    [interval] = report["choice"]["base"]["intervals"]
    assert interval["low"] < report["choice"]["base"]["acc"] < interval["high"]
    assert report["choice"]["base"]["documents"] == DOCUMENTS
    assert report["choice"]["Q8_0"]["bytes"] == 1600


def test_documents_of_one_passage_are_resampled_together(tmp_path):
    # All four questions of a passage are answered alike, so that 120 documents say as much as 30.
    drawn = random.Random(2)
    passages = {artifact: [drawn.random() < 0.5 for _ in range(DOCUMENTS // 4)] for artifact in ARTIFACTS}
    write_choices(tmp_path, {name: [each for each in own for _ in range(4)] for name, own in passages.items()})
    alone, clustered = (
        find_delta(evaluate_all(tmp_path, cluster_by), "choice", "merged", "base", "acc")
        for cluster_by in (None, "passage")
    )
    assert clustered["clusters"] == DOCUMENTS // 4
    assert "clusters" not in alone
    widths = [delta["high"] - delta["low"] for delta in (alone, clustered)]
    assert widths[1] / widths[0] == pytest.approx(2, rel=0.2)
    assert find_delta(evaluate_all(tmp_path, "no such field"), "choice", "merged", "base", "acc") == alone


def test_perplexities_are_of_all_words_and_bits_of_all_bytes(tmp_path):
    for artifact, worse in (("base", 1.0), ("merged", 1.2), ("Q8_0", 1.2)):
        statistics = [{"word_perplexity": [worse * 3.0 * n, n], "bits": [worse * n, 5.0 * n]} for n in (4, 9, 2, 7)]
        write_task(
            tmp_path,
            artifact,
            "prose",
            statistics,
            word_perplexity=describe(2.718281828 ** (worse * 3), "weighted_perplexity", lower_is_better=True),
            bits=describe(worse / 5, "bits_per_byte", lower_is_better=True),
            f1=describe(0.5, None),
        )
    report = evaluate_all(tmp_path, tasks=["prose"])
    delta = find_delta(report, "prose", "merged", "base", "word_perplexity")
    assert delta["delta"] == pytest.approx(2.718281828**3.6 - 2.718281828**3, abs=1e-3)
    assert find_delta(report, "prose", "merged", "base", "bits")["delta"] == pytest.approx(0.04)
    assert report["prose"]["base"]["lower_is_better"] == ["word_perplexity", "bits"]
    assert report["prose"]["base"]["f1"] == 0.5, "what is no function of sums has its value alone"
    assert {entry["metric"] for entry in report["prose"]["base"]["intervals"]} == {"word_perplexity", "bits"}


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_is_the_mean_of_its_documents_or_of_its_tasks(tmp_path, by_size):
    sizes = {"small": 20, "large": 100}
    right = {
        "base": {"small": 20, "large": 50},
        "merged": {"small": 10, "large": 50},
        "Q8_0": {"small": 10, "large": 50},
    }
    for artifact, of_tasks in right.items():
        values = []
        for name, size in sizes.items():
            write_choices(tmp_path, {artifact: [n < of_tasks[name] for n in range(size)]}, name, "both")
            values.append(of_tasks[name] / size)
        file = tmp_path / artifact / "both/tasks.json"
        content = json.loads(file.read_text())
        mean = sum(of_tasks.values()) / 120 if by_size else sum(values) / 2
        content["groups"]["both"] = {
            "tasks": list(sizes),
            "documents": 120,
            "scores": {"acc": describe(mean, weight_by_size=by_size)},
        }
        file.write_text(json.dumps(content))
    report = evaluate_all(tmp_path, tasks=["both"])
    assert list(report) == ["both", "small", "large"]
    delta = find_delta(report, "both", "merged", "base", "acc")
    difference = report["both"]["merged"]["acc"] - report["both"]["base"]["acc"]
    assert delta["delta"] == pytest.approx(difference, abs=1e-4)
    assert difference == pytest.approx(-10 / 120 if by_size else -0.25)


def test_without_tasks_there_is_no_report(tmp_path):
    assert evaluate_all(tmp_path, tasks=[]) == {}


def test_a_task_that_was_asked_and_not_measured_is_refused(tmp_path):
    with refused("missing-file", "base/choice/tasks.json: no such file", "dvc repro"):
        evaluate_all(tmp_path)


def test_a_task_that_belongs_to_two_that_were_asked_is_reported_once(tmp_path):
    right = draw_answers()
    for asked in ("both", "choice"):
        write_choices(tmp_path, right, "choice", asked)
    write_choices(tmp_path, right, "other", "both")
    report = evaluate_all(tmp_path, tasks=["both", "choice"])
    assert list(report) == ["choice", "other"]
    assert report["choice"] == evaluate_all(tmp_path)["choice"]


def test_what_is_no_longer_listed_is_removed(tmp_path):
    for artifact in ("base", "Q8_0", "Q4_0"):
        for task in ("kept.x-y", "dropped"):
            (tmp_path / f"data/{artifact}/{task}").mkdir(parents=True)
            (tmp_path / f"data/{artifact}/{task}/tasks.json").touch()
            (tmp_path / f"metrics/{artifact}").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"metrics/{artifact}/{task}.json").touch()
    (tmp_path / "data/README.md").touch()
    for folder in ("data", "metrics", "nowhere"):
        remove_unlisted_tasks(tmp_path / folder, ["base", "Q8_0"], ["kept.x-y"])
    left = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert left == [
        *("data/Q8_0/kept.x-y/tasks.json", "data/README.md", "data/base/kept.x-y/tasks.json"),
        *("metrics/Q8_0/kept.x-y.json", "metrics/base/kept.x-y.json"),
    ]
    assert not (tmp_path / "data/Q4_0").exists()


def test_other_documents_are_refused(tmp_path):
    write_choices(tmp_path, {"base": [True] * 8, "merged": [True] * 8, "Q8_0": [True] * 7})
    with refused("different-rows", "other documents of choice than base", "dvc repro"):
        evaluate_all(tmp_path)


def test_gates_name_scores_of_tasks(tmp_path):
    write_choices(tmp_path, draw_answers())
    report = evaluate_all(tmp_path)
    validation = {name: {"exact_match": 0.5} for name in ("base", "base_few_shot", "merged", "Q8_0")}
    gate = parse_gate("quantized.choice.acc >= base.choice.acc - 0.5 * merged.exact_match")
    check_names(gate, types=["Q8_0"], scores=["exact_match"], tasks=True)
    outcome = evaluate_gate(gate, add_task_scores(validation, report, [gate]), ["Q8_0"])
    scores = list_task_scores(report)
    assert outcome.passed
    margin = scores["Q8_0"]["choice.acc"] - scores["base"]["choice.acc"] + 0.25
    assert float(outcome.margin) == pytest.approx(margin)
    wrong = parse_gate("merged.choice.acc_norm > 0.5")
    with refused("unknown-score", "names choice.acc_norm", "did you mean 'choice.acc'"):
        add_task_scores(validation, report, [wrong])


@pytest.mark.parametrize(
    ("expression", "tasks", "words"),
    [
        ("merged.mmlu.acc > 0.5", False, "list the task in benchmark.tasks"),
        ("base_few_shot.mmlu.acc > 0.5", True, "take base.mmlu.acc"),
        ("mergd.mmlu.acc > 0.5", True, "did you mean 'merged'"),
    ],
)
def test_a_gate_on_a_task_that_is_not_measured_is_refused(expression, tasks, words):
    with pytest.raises(ValueError, match=words):
        check_names(parse_gate(expression), types=["Q8_0"], scores=["exact_match"], tasks=tasks)


@pytest.mark.parametrize("expression", ["merged.a.b.c > 1", "merged..acc > 1", "merged.mmlu. > 1"])
def test_a_score_has_two_or_three_parts(expression):
    with pytest.raises(ValueError, match="is not a comparison of scores"):
        parse_gate(expression)


def test_experiments_are_compared_on_the_documents_that_both_were_asked(tmp_path):
    right = draw_answers()
    for name, artifact in (("first", "base"), ("other", "merged")):
        write_choices(tmp_path / name, {"Q8_0": right[artifact]})
    rows = (tmp_path / "other/Q8_0/choice/choice.jsonl").read_text().splitlines()
    (tmp_path / "other/Q8_0/choice/choice.jsonl").write_text("\n".join(rows[:100]) + "\n")
    parameters = {"seed": 1, "evaluate": {"bootstrap_samples": 200}, "benchmark": {"tasks": ["choice"]}}

    def find(name: str) -> Any:
        def find_cached_file(repo: Any, folder: str, file: str) -> Path | None:
            path = tmp_path / name / Path(folder).relative_to("data/benchmark") / file
            return path if path.exists() else None

        return find_cached_file

    revisions: Any = [
        SimpleNamespace(name=name, parameters=parameters, find_cached_file=find(name)) for name in ("first", "other")
    ]
    repo: Any = None
    [delta], [warning] = compare_tasks(repo, revisions, ["Q8_0", "Q8_0"])
    assert (delta["metric"], delta["rows"]) == ("choice.acc", 100)
    lost = sum(right["base"][:100]) - sum(right["merged"][:100])
    assert delta["delta"] == pytest.approx(-lost / 100)
    assert delta["same_answers"] == 100 - lost
    assert "first answered 120 documents of choice and other 100, 100 of them the same" in warning
    (tmp_path / "other/Q8_0/choice/choice.jsonl").unlink()
    assert compare_tasks(repo, revisions, ["Q8_0", "Q8_0"])[0] == []


def test_columns_are_those_of_what_was_asked(tmp_path):
    score = describe(0.5, stderr=0.1)
    results = benchmark.BenchmarkResults(
        asked=["both"],
        tasks={"small": {"scores": {"acc": score}}},
        groups={"both": {"scores": {"acc": score}}},
        rows={},
    )
    summary = results.summarize(cut=3)
    assert summary["both"] == {"acc": 0.5, "acc_stderr": 0.1}
    assert "small" not in summary
    assert [entry["task"] for entry in summary["tasks"]] == ["small", "both"]
    assert summary["cut"] == [3]
