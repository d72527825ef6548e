"""The stage preprocess: its outputs, and its message when it stops."""

import csv
import json
import math
import re

import pytest
from conftest import SMALL, copy_of

from lathe.config.load import load


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
    train = report["splits"][0]
    assert train["split"] == "train"
    assert train["sequences"] == train["kept"]
    text = (fetched.root / "metrics/preprocess/report.json").read_text()
    assert "second" not in text, "what varies from run to run stays out of the report"
    assert fetched.json("metrics/timings/preprocess.json")["rows_per_second"] > 0

    plots = json.loads(fetched.run("dvc", "plots", "show", "--json", "--split", "metrics/preprocess").stdout)
    for table in ("lengths", "rows"):
        (plot,) = plots["data"][f"metrics/preprocess/{table}.csv"]
        drawn = plot["anchor_definitions"]["<DVC_METRIC_DATA>"]
        with (fetched.root / f"metrics/preprocess/{table}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(drawn) == len(rows)
        assert {row["split"] for row in rows} == {"train", "validation", "test"}
        assert {part["field"] for part in _parts(plot["content"]) if "field" in part} <= set(drawn[0])


def test_the_stage_ends_with_a_line_about_all_rows(fetched):
    done = fetched.stage("preprocess")
    (line,) = [line for line in done.stderr.splitlines() if "rows:" in line]
    assert line == "INFO lathe.preprocess: 60 rows: 60 kept, none dropped"


def test_many_dropped_rows_are_warned_of_with_the_first_five_of_them(fetched):
    fetched.set({"training.max_length": 40, "preprocess.max_dropped_fraction": 0.9})
    file = fetched.root / "data/raw/few.jsonl"
    lines = file.read_text().splitlines()
    file.unlink()
    file.write_text("\n".join([*lines, '{"ask": "", "reply": "x"}']) + "\n")
    done = fetched.stage("preprocess")
    summary, *faults, warning = [line for line in done.stderr.splitlines() if "lathe.preprocess" in line]
    rows = fetched.json("metrics/preprocess/report.json")["rows"]
    long = rows["dropped"] - 1
    assert long > 5
    assert f"61 rows: {rows['kept']} kept, {rows['dropped']} dropped ({long} too long, 1 empty prompt)" in summary
    assert len(faults) == 5
    assert re.match(r"INFO lathe.preprocess: few.jsonl:\d+: too long: is \d+ tokens long", faults[0])
    assert "few.jsonl:61: empty prompt: ask is empty" in faults[1]
    assert warning.startswith(f"WARNING lathe.preprocess: {rows['dropped']} of 61 rows (")
    assert "metrics/preprocess/report.json" in warning


def test_a_limit_that_is_passed_stops_the_stage_and_leaves_nothing_but_a_report_of_the_rows(fetched):
    fetched.set({"training.max_length": 30})
    done = fetched.stage("preprocess", check=False)
    assert done.returncode == 2
    summary, *_, line = done.stderr.splitlines()
    assert summary.startswith("INFO lathe.preprocess: 60 rows: ")
    assert line.startswith("error: few.jsonl:")
    allowed = load(fetched.root / "params.yaml", fetched.root / "presets.yaml").params.preprocess.max_dropped_fraction
    assert f"more than preprocess.max_dropped_fraction {allowed} allows; " in line
    assert line.endswith("; .scratch/preprocess/report.json reports all rows")
    report = fetched.json(".scratch/preprocess/report.json")
    assert report["rows"]["read"] == 60
    assert sum(split["dropped"].get("too_long", 0) for split in report["splits"]) == report["rows"]["dropped"] > 0
    assert not (fetched.root / "data/processed").exists()
    assert not (fetched.root / "data/.processed.partial").exists()


def test_a_run_whose_answers_would_all_be_cut_is_refused_before_it_trains(fetched):
    fetched.set({"generate.max_new_tokens": 2})
    fetched.stage("preprocess")
    done = fetched.stage("train", check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"longer than generate.max_new_tokens 2: .*; set generate.max_new_tokens to \d+, ", line)
    assert not (fetched.root / "models/adapter").exists()
    ran = fetched.run("dvc", "repro", "--quiet", "train", check=False)
    assert line in ran.stderr + ran.stdout


def _parts(spec):
    """Yield every mapping in a specification."""
    if isinstance(spec, dict):
        yield spec
    for value in spec.values() if isinstance(spec, dict) else spec if isinstance(spec, list) else ():
        yield from _parts(value)


def test_the_estimate_foretells_steps_and_memory(reproduced):
    estimate = reproduced.json("metrics/estimate/training.json")
    train = reproduced.json("metrics/preprocess/report.json")["splits"][0]
    assert estimate["steps_per_epoch"] == math.ceil(train["kept"] / SMALL["training.per_device_train_batch_size"])
    assert estimate["steps"] == SMALL["training.max_steps"]
    parts = {part["part"]: part["bytes"] for part in estimate["memory"]}
    assert estimate["memory_bytes"] >= parts["weights"] + parts["adapter"] + parts["optimizer"] > 0


def test_an_architecture_that_cannot_be_estimated_is_warned_of_and_stops_nothing(reproduced, tmp_path):
    checkout = copy_of(reproduced, tmp_path / "lathe")
    config = checkout.root / "models/base/config.json"
    changed = config.read_text().replace('"llama"', '"llama-of-tomorrow"')
    config.unlink()  # linked into DVC's cache
    config.write_text(changed)
    done = checkout.stage("estimate")
    assert "memory cannot be estimated: base/config.json: model_type is 'llama-of-tomorrow'" in done.stderr
    assert checkout.json("metrics/estimate/training.json")["memory_bytes"] is None
