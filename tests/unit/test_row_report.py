"""What preprocess says of the rows when it ends, and what is kept of its report where it fails."""

import pytest
from byte_chat import Bench, byte_chat, chat

from lathe.common import json_files, paths, row_report
from lathe.data.prepare import UnusableRowsError


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path, byte_chat())


def put_others(bench):
    bench.put("validation.jsonl", [chat("v", "w")])
    bench.put("test.jsonl", [chat("x", "y")])


def test_the_line_counts_every_row_and_names_the_most_frequent_reason_first(bench):
    good = [chat(f"q{number}", "a") for number in range(4)]
    bench.put("train.jsonl", [*good, good[0], chat("q", "a" * 99), chat("r", "a" * 99), {"text": "no messages"}])
    put_others(bench)
    report = bench.run(max_length=60).report
    line = "10 rows: 6 kept, 4 dropped (2 too long, 1 duplicate, 1 missing column)"
    assert row_report.summarize_rows(report) == line


def test_truncated_rows_are_in_the_line(bench):
    bench.put("train.jsonl", [chat("q" * 99, "a"), chat("r", "a")])
    put_others(bench)
    report = bench.run(max_length=60, too_long="truncate_prompt").report
    assert row_report.summarize_rows(report) == "4 rows: 4 kept (1 of them truncated), none dropped"


def test_five_faults_are_listed_with_one_of_each_reason_first_and_no_duplicates_among_them(bench):
    bench.put("train.jsonl", [chat("q", "a"), chat("q", "a"), *[chat("", "a")] * 7, chat("q", " "), {}])
    put_others(bench)
    faults = row_report.list_faults(bench.run().report)
    places = [(fault.split(": ")[0], fault.split(": ")[1]) for fault in faults]
    assert places == [
        ("train.jsonl:3", "empty prompt"),
        ("train.jsonl:10", "empty answer"),
        ("train.jsonl:11", "missing column"),
        ("train.jsonl:4", "empty prompt"),
        ("train.jsonl:5", "empty prompt"),
    ]


def logged(caplog, report):
    caplog.clear()
    with caplog.at_level("INFO", logger="lathe"):
        row_report.log_rows(report, file="report.json")
    return [(record.levelname, record.getMessage()) for record in caplog.records]


@pytest.mark.parametrize(
    ("dropped", "warns"), [({"over_limit": 50}, False), ({"template": 1}, False), ({"template": 2}, True)]
)
def test_more_than_one_in_a_hundred_is_warned_of_unless_the_preset_asks_for_it(caplog, dropped, warns):
    report = {
        "rows": {"read": 100, "kept": 50, "dropped": sum(dropped.values()), "truncated": 0},
        "splits": [{"split": "train", "dropped": dropped}],
        "examples": [],
    }
    lines = logged(caplog, report)
    assert ("WARNING" in [level for level, _ in lines]) == warns
    if warns:
        assert lines[-1][1] == "2 of 100 rows (2 %) were dropped; report.json has more of them"


@pytest.mark.parametrize(
    ("rows", "options", "code", "counts"),
    [
        ([chat("q", "a"), {}, {}], {"max_dropped_fraction": 0.1}, "too-many-dropped", (5, 3, {"missing_column": 2})),
        ([chat("q", "a" * 99)], {"max_length": 60}, "empty-split", (3, 2, {"too_long": 1})),
    ],
)
def test_a_stage_that_fails_leaves_an_account_of_the_rows(bench, rows, options, code, counts):
    bench.put("train.jsonl", rows)
    put_others(bench)
    with pytest.raises(UnusableRowsError) as caught:
        bench.run(**options)
    assert caught.value.code == code
    report = caught.value.report
    assert (report["rows"]["read"], report["rows"]["kept"], report["splits"][0]["dropped"]) == counts
    (cases,) = report["examples"][0]["dropped"].values()
    assert {case["at"].partition(":")[0] for case in cases} == {"train.jsonl"}


def test_rows_too_few_to_split_are_accounted_for(bench):
    bench.put("rows.jsonl", [chat("q", "a"), {}])
    with pytest.raises(UnusableRowsError) as caught:
        bench.run()
    assert caught.value.code == "too-few-prompts"
    assert row_report.summarize_rows(caught.value.report) == "2 rows: 1 kept, 1 dropped (1 missing column)"


def test_the_account_is_kept_outside_of_what_dvc_removes(tmp_path, monkeypatch, bench):
    monkeypatch.setattr(paths, "SCRATCH", tmp_path / ".scratch")
    bench.put("rows.jsonl", [chat("q", "a"), {}])
    with pytest.raises(UnusableRowsError) as caught:
        bench.run()
    shown = row_report.keep_report(caught.value.report)
    assert shown == str(tmp_path / ".scratch/preprocess/report.json")
    assert json_files.read_json(tmp_path / ".scratch/preprocess/report.json") == caught.value.report
