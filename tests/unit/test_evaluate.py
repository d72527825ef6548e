import json

import pytest

from lathe.evaluate import best, evaluate, plot_rows
from lathe.jsonl import write_jsonl


@pytest.fixture
def generated(tmp_path):
    """Three artifacts that answer 0, 4 and 3 of 4 rows right."""
    for artifact, right, size in (("base", 0, 100), ("merged", 4, 100), ("Q4_1", 3, 30)):
        rows = [{"prompt": "?", "reference": str(n), "completion": str(n) if n < right else "-"} for n in range(4)]
        (tmp_path / artifact).mkdir()
        write_jsonl(rows, tmp_path / artifact / "test.jsonl")
        facts = {"bytes": size, "test": {"perplexity": 1.5, "stop_rate": 1.0}}
        (tmp_path / f"{artifact}.json").write_text(json.dumps(facts))
    return tmp_path


def report_of(folder):
    return evaluate(folder, folder, ["base", "merged", "Q4_1"], "test", ["exact_match", "json_valid"])


def test_each_artifact_is_scored_and_compared_with_base_and_merged(generated):
    report = report_of(generated)
    assert [report[name]["exact_match"] for name in ("base", "merged", "Q4_1")] == [0.0, 1.0, 0.75]
    assert report["base"]["deltas"] == []
    assert report["merged"]["deltas"] == [{"to": "base", "exact_match": 1.0, "json_valid": None}]
    assert report["Q4_1"]["deltas"] == [
        {"to": "base", "exact_match": 0.75, "json_valid": None},
        {"to": "merged", "exact_match": -0.25, "json_valid": None},
    ]
    assert report["Q4_1"]["bytes"] == 30
    assert report["Q4_1"]["perplexity"] == 1.5


def test_the_best_artifact_is_the_one_with_the_highest_score_and_of_equals_the_smallest():
    report = {
        "big": {"exact_match": 0.9, "bytes": 10},
        "small": {"exact_match": 0.9, "bytes": 5},
        "tiny": {"exact_match": 0.8, "bytes": 1},
    }
    assert best(report, ["big", "small", "tiny"]) == "small"


def test_plots_get_one_row_per_split_artifact_and_metric_that_applies(generated):
    rows = plot_rows({"test": report_of(generated)})
    assert {row["metric"] for row in rows} == {"exact_match", "stop_rate"}
    assert len(rows) == 6
