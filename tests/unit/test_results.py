"""The table of runs, the metrics of one, and the summary that a pipeline ends with."""

import json

import pytest
import report_run
from experiment_repository import ROWS, Repository, copy_repository
from refusals import refused

from lathe.common import paths, text
from lathe.experiments import results, results_table
from lathe.provenance.revisions import find_revision
from lathe.reports import run_summary


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    made = Repository(tmp_path_factory.mktemp("untouched"))
    made.run("half", [row < ROWS // 2 for row in range(ROWS)], {"training.learning_rate": 0.001, "lora.r": 8})
    made.run("most", [row < 36 for row in range(ROWS)], {"training.learning_rate": 0.002})
    return made


@pytest.fixture
def repository(untouched, tmp_path, monkeypatch):
    made = copy_repository(untouched, tmp_path / "repository")
    monkeypatch.setattr(paths, "ROOT", made.root)
    return made


def test_each_run_has_a_row_with_its_score_its_changes_and_its_own_seconds(repository):
    rows = results.read_results()
    assert [row.name for row in rows] == ["main", "most", "half"]
    main, most, half = rows
    assert (main.score, half.score, most.score) == (0.0, 0.5, 0.9)
    assert half.changed == {"training.learning_rate": (0.006, 0.001), "lora.r": (16, 8)}
    assert main.changed == {}
    assert half.artifact == "Q8_0"
    assert half.low is not None
    assert half.low < 0.5 < half.high
    assert half.bytes == 1000
    # The timings of `evaluate` have another peak in each run, those of `train` other seconds.
    assert half.seconds == pytest.approx(12.0 + 2.5)
    assert main.seconds == pytest.approx(10.0 + 2.5)


def test_the_workspace_is_a_row_while_it_differs_from_the_commit(repository):
    parameters = repository.root / "params.yaml"
    parameters.write_text(parameters.read_text().replace("learning_rate: 0.006", "learning_rate: 0.009"))
    row = results.read_results()[0]
    assert row.name == "workspace"
    assert row.changed == {"training.learning_rate": (0.006, 0.009)}


def test_a_run_of_an_earlier_layout_is_read_too(repository):
    file = repository.root / "metrics/evaluate/validation.json"
    file.write_text(json.dumps(json.loads(file.read_text())[0]))
    repository.git("commit", "--quiet", "--all", "--message", "as it was")
    assert results.read_results()[0].score == 0.0


def test_a_commit_that_was_never_run_has_an_empty_row(repository):
    repository.git("rm", "-r", "--quiet", "metrics")
    repository.git("commit", "--quiet", "--message", "no metrics")
    row = results.read_results()[0]
    assert (row.score, row.artifact, row.gates_passed, row.seconds) == (None, None, None, None)


@pytest.mark.parametrize(
    ("sort", "names"),
    [("name", ["half", "main", "most"]), ("score", ["most", "half", "main"]), ("seconds", ["main", "half", "most"])],
)
def test_runs_are_sorted_by_a_column(repository, capsys, sort, names):
    results_table.run(sort=sort, as_json=True)
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == names


def test_the_table_fits_the_terminal_and_says_how_many_changes_it_leaves_out(repository):
    rows = results.read_results()
    wide = list(results_table.format_results(rows, width=None))
    assert "training.learning_rate=0.001, lora.r=8" in "\n".join(wide)
    narrow = list(results_table.format_results(rows, width=100))
    assert max(map(len, narrow)) <= 100
    assert any(line.endswith(("+1", "…")) for line in narrow)


def test_without_a_result_the_table_says_what_to_do(tmp_path, monkeypatch, repository):
    empty = list(results_table.format_results([], width=80))
    assert len(empty) == 1
    assert "make repro" in empty[0]


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """What a whole run leaves."""
    report_run.build(tmp_path)
    for name in ("params.yaml", "presets.yaml"):
        (tmp_path / name).write_text((paths.ROOT / name).read_text())
    (tmp_path / "stages").mkdir()
    for name in ("train", "generate"):
        (tmp_path / f"stages/{name}.py").touch()
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    return find_revision("workspace")


def test_the_summary_has_each_file_the_gates_the_best_file_and_the_rows_left_out(finished):
    lines = list(run_summary.summarize_run(finished))
    assert len(lines) <= 14
    printed = "\n".join(lines)
    report = finished.read_json("metrics/evaluate/test.json")
    for artifact, scores in report.items():
        [line] = [line for line in lines if line.startswith(f"{artifact} ")]
        assert f"{scores['exact_match']:.4g} [" in line
        assert text.readable_bytes(scores["bytes"]) in line
    failed = [
        name for name, gate in finished.read_json("metrics/evaluate/gates.json")["gates"].items() if not gate["passed"]
    ]
    assert all(name in printed for name in failed)
    assert ("FAILED" in printed) == bool(failed)
    assert "models/gguf/" in printed
    assert "rows: " in printed
    assert "lathe chat" in printed


def test_the_engines_that_answered_are_named_where_one_is_not_llama_cpp(finished):
    for split in ("validation", "test"):
        assert "answered by" not in "\n".join(run_summary.describe_metrics(finished, split))
        file = paths.ROOT / f"metrics/evaluate/{split}.json"
        [report] = json.loads(file.read_text())
        report["merged"]["engine"] = "vllm"
        file.write_text(json.dumps([report]))
        lines = list(run_summary.describe_metrics(finished, split))
        assert [line for line in lines if line.startswith("answered by llama.cpp for base")]
        assert not [line for line in lines if line.startswith("engine ")]
    assert [line for line in run_summary.summarize_run(finished) if line.startswith("answered by llama.cpp for base")]


def test_sampled_answers_have_a_table_of_their_own(finished):
    assert "sampled answers" not in "\n".join(run_summary.describe_metrics(finished, "test"))
    interval = {"metric": "exact_match", "low": 0.5, "high": 0.66}
    scores = {"exact_match": 0.61, "exact_match_pass_at_8": 0.8, "bytes": 9, "intervals": [interval], "deltas": []}
    report = {"validation": {}, "test": {"merged": {**scores, "samples": 8, "spread": []}}}
    report_run.write_json(paths.ROOT / "metrics/evaluate/samples.json", [report])
    lines = list(run_summary.describe_metrics(finished, "test"))
    start = next(number for number, line in enumerate(lines) if "test, mean of 8 sampled answers" in line)
    assert "0.61 [0.5, 0.66]" in lines[start + 1]
    assert lines[start + 2].split() == ["exact_match_pass_at_8", "0.8"]
    assert "sampled answers" not in "\n".join(run_summary.describe_metrics(finished, "validation"))


def test_the_metrics_of_a_run_are_all_there(finished):
    printed = "\n".join(run_summary.describe_metrics(finished, "validation"))
    for metric in (*report_run.METRICS, "perplexity", "eval.loss", "train ", "generate "):
        assert metric in printed
    assert set(run_summary.read_metrics(finished)) >= {"metrics/evaluate/test.json", "metrics/timings/train.json"}


def test_metrics_of_what_was_never_run_are_refused(repository):
    repository.git("rm", "-r", "--quiet", "metrics")
    with refused("not-evaluated", "workspace"):
        list(run_summary.describe_metrics(find_revision("workspace"), "test"))


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (99.4, "99 s"), (100, "1:40"), (3599.6, "1:00:00"), (7384, "2:03:04")]
)
def test_durations_are_readable(seconds, shown):
    assert text.readable_seconds(seconds) == shown
