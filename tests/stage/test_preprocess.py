"""The stage itself: what it leaves, and what it says when it stops."""

import csv
import json

import pytest


@pytest.fixture
def fetched(small_checkout):
    small_checkout.stage("fetch")
    return small_checkout


def test_the_stage_leaves_rows_a_report_and_plots_that_draw_all_of_their_tables(fetched):
    fetched.stage("preprocess")
    assert sorted(file.name for file in (fetched.root / "data/processed").iterdir()) == [
        "test.jsonl",
        "train.jsonl",
        "validation.jsonl",
    ]
    report = fetched.json("metrics/preprocess/report.json")
    kept = report["splits"]["train"]["kept"]
    assert report["training"] == {"sequences": kept, "steps_per_epoch": -(-kept // 4), "steps": 4}
    text = (fetched.root / "metrics/preprocess/report.json").read_text()
    assert "second" not in text, "what varies from run to run stays out of the report"
    assert fetched.json("metrics/timings/preprocess.json")["rows_per_second"] > 0

    plots = json.loads(fetched.run("dvc", "plots", "show", "--json", "--split", "Token lengths", "Rows read").stdout)
    for name, table in (("Token lengths", "lengths"), ("Rows read", "rows")):
        (plot,) = plots["data"][name]
        drawn = plot["anchor_definitions"]["<DVC_METRIC_DATA>"]
        with (fetched.root / f"metrics/preprocess/{table}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(drawn) == len(rows)
        assert {row["split"] for row in rows} == {"train", "validation", "test"}
        assert {part["field"] for part in _parts(plot["content"]) if "field" in part} <= set(drawn[0])


def test_a_limit_that_is_passed_stops_the_stage_in_one_line_and_leaves_nothing(fetched):
    fetched.set({"training.max_length": 30})
    done = fetched.stage("preprocess", check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: few.jsonl:")
    assert "more than preprocess.max_dropped_fraction 0.01 allows; mend them or raise it" in line
    assert not (fetched.root / "data/processed").exists()
    assert not (fetched.root / "data/.processed.partial").exists()


def _parts(spec):
    """Yield every mapping in a specification."""
    if isinstance(spec, dict):
        yield spec
    for value in spec.values() if isinstance(spec, dict) else spec if isinstance(spec, list) else ():
        yield from _parts(value)
