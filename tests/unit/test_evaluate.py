"""Reports from made answers: scores, intervals, differences, rows with the worst first, the best file."""

import json
import math
import random
import time

import numpy as np
import pytest
from refusals import refused
from scipy import stats

from lathe.common import paths
from lathe.common.jsonl import write_jsonl
from lathe.evaluation.best_artifact import choose_best_artifact
from lathe.evaluation.evaluate import (
    Resampling,
    add_bert_score,
    define_scores,
    evaluate,
    make_plot_rows,
    read_answers,
    read_general_text,
    score_rows,
)

RESAMPLING = Resampling(samples=300, seed=1)
BYTES = {"base": 100, "base_few_shot": 100, "merged": 100, "Q4_1": 30}


def row(number=0, completion="", **fields):
    """A row as `generate` writes it, of an answer that ended by itself."""
    made = {
        "prompt": "?",
        "reference": str(number),
        "completion": completion,
        "finish_reason": "stop",
        "tokens": 2,
        "nll": 2.0,
        "reference_tokens": 4,
        "kl": None,
    }
    return made | fields


def answering(right, rows=20, **fields):
    return [row(n, str(n) if n < right else "-", **fields) for n in range(rows)]


def scores_of(*metrics, judged=False, weights=(0.4, 0.6)):
    return define_scores(
        metrics,
        normalize="none",
        answer_pattern=None,
        bert_score_weight=weights[0],
        judge_weight=weights[1] if judged else None,
    )


@pytest.fixture
def answers():
    """Artifacts that answer 0, 2, 20 and 15 of 20 rows right; the last is a quantized file."""
    return {
        "base": answering(0),
        "base_few_shot": answering(2, finish_reason="length"),
        "merged": answering(20, nll=0.4),
        "Q4_1": answering(15, nll=0.8, kl=0.01),
    }


def report_of(answers, *metrics, general=None, **options):
    return evaluate(answers, general or {}, BYTES, scores_of(*(metrics or ("exact_match",)), **options), RESAMPLING)


def delta(report, artifact, to, metric):
    [result] = [entry for entry in report[artifact]["deltas"] if (entry["to"], entry["metric"]) == (to, metric)]
    return result


def test_every_artifact_has_its_scores_in_the_order_of_the_report(answers):
    report = report_of(answers, "exact_match", "json_valid")
    assert [report[name]["exact_match"] for name in answers] == [0.0, 0.1, 1.0, 0.75]
    assert [report[name]["json_valid"] for name in answers] == [None] * 4
    assert report["merged"]["perplexity"] == round(math.exp(0.1), 4)
    assert [report[name]["kl"] for name in answers] == [None, None, None, 0.01]
    assert [report[name]["stop_rate"] for name in answers] == [1, 0, 1, 1]
    assert [report[name]["bytes"] for name in answers] == [100, 100, 100, 30]
    assert list(report["base"]) == [
        "exact_match",
        "json_valid",
        "perplexity",
        "kl",
        "stop_rate",
        "general_perplexity",
        "bytes",
        "intervals",
        "deltas",
    ]


def test_intervals_hold_the_score_and_what_does_not_apply_has_none(answers):
    report = report_of(answers, "exact_match", "json_valid")
    of_quantized = {entry["metric"]: entry for entry in report["Q4_1"]["intervals"]}
    assert set(of_quantized) == {"exact_match", "perplexity", "kl", "stop_rate"}
    assert 0.4 < of_quantized["exact_match"]["low"] < 0.75 < of_quantized["exact_match"]["high"] < 0.95
    assert of_quantized["kl"] == {"metric": "kl", "low": 0.01, "high": 0.01}


def test_each_artifact_is_compared_with_base_and_merged_on_the_same_rows(answers):
    report = report_of(answers)
    assert report["base"]["deltas"] == []
    assert {entry["to"] for entry in report["merged"]["deltas"]} == {"base"}
    assert [entry["to"] for entry in report["Q4_1"]["deltas"]] == ["base"] * 3 + ["merged"] * 3
    to_merged = delta(report, "Q4_1", "merged", "exact_match")
    assert to_merged["delta"] == -0.25
    assert to_merged["low"] < -0.25 < to_merged["high"] < 0
    # Five rows lost, none won: by chance one in sixteen, either way.
    assert to_merged["p"] == pytest.approx(stats.binomtest(0, 5).pvalue, abs=0.04)
    assert delta(report, "merged", "base", "exact_match")["p"] == round(1 / 301, 4)
    assert delta(report, "Q4_1", "base", "stop_rate") == {
        "to": "base",
        "metric": "stop_rate",
        "delta": 0.0,
        "low": 0.0,
        "high": 0.0,
        "p": 1.0,
        "detectable": 0.3665,
    }


def test_a_difference_is_told_from_fewer_rows_where_the_others_answer_alike():
    """Paired: what rows have in common does not count."""
    hard = random.Random(0).sample(range(200), 100)
    ours = [row(n, "-" if n in hard else str(n)) for n in range(200)]
    theirs = [row(n, "-" if n in hard[:-8] else str(n)) for n in range(200)]
    report = report_of({"base": ours, "merged": theirs})
    result = delta(report, "merged", "base", "exact_match")
    assert result["delta"] == 0.04
    assert result["p"] < 0.03  # eight rows lost, none won: 1 in 128, as far as 300 samples tell
    assert result["low"] > 0


def test_a_judges_marks_count_where_there_are_any():
    marks = [80.0, 77.0]
    answers = {"base": [row(n, "-", bert_score=0.8234, **({"judge": marks[n]} if n < 2 else {})) for n in range(50)]}
    report = report_of(answers, "exact_match", "bert_score", judged=True)["base"]
    assert report["judge"] == 78.5
    assert report["bert_score"] == 0.8234
    assert report["combined"] == 0.8004
    assert report_of(answers, "bert_score")["base"]["combined"] == 0.8234
    assert "judge" not in report_of(answers, "bert_score")["base"]
    assert "combined" not in report_of(answers, "exact_match", judged=True)["base"]


def test_without_a_marked_row_the_judges_score_is_null():
    report = report_of({"base": answering(3)}, judged=True)["base"]
    assert report["judge"] is None


def test_perplexity_of_general_text_shows_forgetting():
    paragraphs = [{"text": "a", "nll": 10.0 + n, "tokens": 5} for n in range(12)]
    forgot = [entry | {"nll": entry["nll"] + 2} for entry in paragraphs]
    answers = {"base": answering(1), "base_few_shot": answering(1), "merged": answering(1)}
    report = report_of(answers, general={"base": paragraphs, "merged": forgot})
    assert report["base"]["general_perplexity"] == round(math.exp(15.5 / 5), 4)
    assert report["base_few_shot"]["general_perplexity"] is None
    result = delta(report, "merged", "base", "general_perplexity")
    assert result["delta"] > 0
    assert result["low"] > 0
    assert result["p"] < 0.02


def test_one_row_has_a_score_and_no_interval():
    report = report_of({"base": answering(0, rows=1), "merged": answering(1, rows=1)}, "exact_match", "bleu")
    assert report["merged"]["exact_match"] == 1
    assert report["merged"]["intervals"] == []
    assert delta(report, "merged", "base", "exact_match") == {
        "to": "base",
        "metric": "exact_match",
        "delta": 1.0,
        "low": None,
        "high": None,
        "p": 1.0,
        "detectable": None,
    }


def test_what_a_broken_file_gives_is_null_and_harms_no_other_score():
    broken = [row(n, str(n), nll=math.nan if n == 3 else 1e9, kl=math.nan) for n in range(10)]
    report = report_of({"base": answering(5, rows=10), "merged": answering(5, rows=10), "Q4_1": broken})
    assert report["Q4_1"]["perplexity"] is None
    assert report["Q4_1"]["kl"] is None
    assert report["Q4_1"]["exact_match"] == 1
    assert {entry["metric"] for entry in report["Q4_1"]["intervals"]} == {"exact_match", "stop_rate"}
    json.dumps(report, allow_nan=False)
    json.dumps(score_rows(broken, scores_of("exact_match"), "exact_match"), allow_nan=False)


def test_small_numbers_keep_three_digits(answers):
    for entry in answers["Q4_1"]:
        entry["kl"] = 0.0000123456
    report = report_of(answers)
    assert report["Q4_1"]["kl"] == 0.0000123
    assert report["base"]["perplexity"] == 1.6487


def test_equal_answers_give_equal_bytes(answers):
    once, again = (json.dumps(report_of(answers, "rouge_l", "chrf", "bleu")) for _ in range(2))
    assert once == again


def test_an_artifact_more_does_not_change_the_others_numbers(answers):
    without = report_of({name: rows for name, rows in answers.items() if name != "Q4_1"}, "rouge_l")
    with_it = report_of(answers, "rouge_l")
    assert {name: with_it[name] for name in without} == without


def test_rows_stand_with_the_worst_first_by_the_primary_score_then_by_the_others():
    rows = [
        row(0, "0", nll=8.0),
        row(1, "x 1", nll=4.0),
        row(2, "x", nll=1.0),
        row(3, "y", nll=6.0),
        row(4, "z", nll=1.0),
    ]
    scores = scores_of("exact_match", "token_f1")
    assert [entry["row"] for entry in score_rows(rows, scores, "exact_match")] == [3, 2, 4, 1, 0]
    assert [entry["row"] for entry in score_rows(rows, scores, "perplexity")] == [0, 3, 1, 2, 4]
    first = score_rows(rows, scores, "exact_match")[0]
    assert list(first) == ["row", "prompt", "reference", "completion", "finish_reason", "scores"]
    assert first["scores"] == {
        "exact_match": 0,
        "token_f1": 0,
        "perplexity": round(math.exp(1.5), 4),
        "kl": None,
        "stop_rate": 1,
    }


def test_rows_that_a_score_does_not_apply_to_come_last():
    rows = [
        row(n, "x", bert_score=0.5, **({"judge": mark} if mark is not None else {}))
        for n, mark in enumerate([None, 90.0, 10.0])
    ]
    result = score_rows(rows, scores_of("exact_match", "bert_score", judged=True), "judge")
    assert [entry["row"] for entry in result] == [2, 1, 0]
    assert [entry["scores"]["judge"] for entry in result] == [10, 90, None]
    assert result[0]["scores"]["combined"] == pytest.approx(0.4 * 0.5 + 0.6 * 0.1)


def test_a_corpus_score_of_one_row_is_that_of_the_row_alone():
    [result] = score_rows([row(0, "a b", reference="a b")], scores_of("bleu", "chrf"), "bleu")
    assert result["scores"]["bleu"] == 100
    assert result["scores"]["chrf"] == 100


def test_the_best_artifact_has_the_best_primary_score_and_of_equals_the_smallest_file():
    report = {
        "big": {"exact_match": 0.9, "perplexity": 1.2, "bytes": 10, "judge": None},
        "small": {"exact_match": 0.9, "perplexity": 1.3, "bytes": 5, "judge": 3.0},
        "tiny": {"exact_match": 0.8, "perplexity": 1.3, "bytes": 1, "judge": None},
    }
    assert choose_best_artifact(report, ["big", "small", "tiny"], "exact_match") == "small"
    assert choose_best_artifact(report, ["big", "small", "tiny"], "perplexity") == "big"
    assert choose_best_artifact(report, ["big", "small", "tiny"], "judge") == "small"
    assert choose_best_artifact(report, ["big", "tiny"], "judge") == "tiny"
    assert choose_best_artifact(report, ["big", "small", "tiny"], "bytes") == "tiny"


def test_plots_get_one_row_per_split_artifact_and_score_that_is_better_the_higher(answers):
    rows = make_plot_rows({"test": report_of(answers, "exact_match", "json_valid")}, "exact_match")
    assert {entry["metric"] for entry in rows} == {"exact_match", "stop_rate"}
    assert len(rows) == 8
    assert {entry["metric"] for entry in rows if entry["primary"] == "yes"} == {"exact_match"}
    assert all(entry["low"] <= entry["score"] <= entry["high"] for entry in rows)
    by_perplexity = make_plot_rows({"test": report_of(answers)}, "perplexity")
    assert {entry["metric"] for entry in by_perplexity if entry["primary"] == "yes"} == {"perplexity"}


def write(folder, artifact, rows, split="test"):
    (folder / artifact).mkdir(parents=True, exist_ok=True)
    write_jsonl(rows, folder / artifact / f"{split}.jsonl")


def test_marks_are_read_into_their_rows(tmp_path):
    for artifact in ("base", "merged"):
        write(tmp_path / "generated", artifact, answering(1, rows=3))
        write(tmp_path / "judged", artifact, [{"row": 2, "score": 40, "reason": "…"}])
    read = read_answers(tmp_path / "generated", tmp_path / "judged", ["base", "merged"], "test", strip_thinking=True)
    assert [entry.get("judge") for entry in read["merged"]] == [None, None, 40]
    assert "judge" not in read_answers(tmp_path / "generated", None, ["base"], "test", strip_thinking=True)["base"][2]


def test_what_is_said_after_a_thought_is_scored_unless_thoughts_are_wanted(tmp_path):
    thoughtful = {
        "answer": "4",
        "reference_answer": "4",
        "completion": "<think>a</think>4",
        "reference": "<think>b</think>4",
    }
    write(tmp_path, "base", [{**row, **thoughtful} for row in answering(1, rows=2)])
    [row, _] = read_answers(tmp_path, None, ["base"], "test", strip_thinking=True)["base"]
    assert (row["completion"], row["reference"]) == ("4", "4")
    [row, _] = read_answers(tmp_path, None, ["base"], "test", strip_thinking=False)["base"]
    assert row["completion"] == "<think>a</think>4"


CALL = {"name": "f", "arguments": {"a": 1, "b": [True, "x"]}}


@pytest.mark.parametrize(
    ("calls", "expected", "exact", "f1"),
    [
        ([CALL], [CALL], 1, 1),
        ([{"arguments": {"b": [True, "x"], "a": 1.0}, "name": "f"}], [CALL], 1, 1),
        ([{"name": "f", "arguments": {"a": True, "b": [True, "x"]}}], [CALL], 0, 0),
        ([{"name": "f", "arguments": {"a": 1, "b": [1, "x"]}}], [CALL], 0, 0),
        ([{"name": "f", "arguments": {"a": 1}}], [CALL], 0, 0),
        ([{"name": "g", "arguments": CALL["arguments"]}], [CALL], 0, 0),
        ([CALL, {"name": "g", "arguments": {}}], [{"name": "g", "arguments": {}}, CALL], 0, 1),
        ([CALL, CALL], [CALL], 0, 2 / 3),
        ([], [CALL], 0, 0),
        ([CALL], [], 0, 0),
        ([], [], 1, 1),
        (None, [CALL], 0, 0),  # the chat template writes no calls
    ],
)
def test_calls_are_scored_by_name_and_arguments(calls, expected, exact, f1):
    definitions = define_scores(
        ["tool_calls", "tool_calls_f1"], normalize="none", answer_pattern=None, bert_score_weight=0.4, judge_weight=None
    )[:2]
    row = {"calls": calls, "reference_calls": expected}
    assert [definition.get_statistics(row) for definition in definitions] == [(exact, 1), (f1, 1)]
    assert [definition.get_statistics({}) for definition in definitions] == [(0, 0)] * 2  # a row without tools


def test_general_text_is_read_where_an_artifact_has_one(tmp_path):
    write(tmp_path, "base", [{"text": "a", "nll": 1.0, "tokens": 2}], split="general")
    (tmp_path / "base_few_shot").mkdir()
    assert list(read_general_text(tmp_path, ["base", "base_few_shot"])) == ["base"]


def test_artifacts_that_answered_other_rows_are_refused(tmp_path):
    write(tmp_path, "base", answering(1, rows=3))
    write(tmp_path, "merged", answering(1, rows=2))
    with refused("different-rows", "merged/test.jsonl: ", "base"):
        read_answers(tmp_path, None, ["base", "merged"], "test", strip_thinking=True)
    write(tmp_path, "base", [])
    with refused("empty-file", "base/test.jsonl: "):
        read_answers(tmp_path, None, ["base"], "test", strip_thinking=True)


def test_bert_score_is_put_into_every_row_and_rescaled_by_one_baseline_for_both_splits(tmp_path, monkeypatch):
    from lathe.config.params import BertScore
    from lathe.evaluation import bert_score

    class Letters:
        """Texts are as alike as their lengths: for the arithmetic around the encoder."""

        num_layers = 1

        def __init__(self, folder, **_):
            pass

    monkeypatch.setattr(bert_score, "Encoder", Letters)
    monkeypatch.setattr(
        bert_score,
        "compute_scores",
        lambda pairs, *_, **__: {pair: 1.0 if pair[0] == pair[1] else 0.6 for pair in pairs},
    )
    settings = BertScore(model="mine", num_layers=None, max_length=8, batch_size=4, baseline="shuffled")
    splits = [{"base": answering(5, rows=10), "merged": answering(10, rows=10)} for _ in range(2)]
    add_bert_score(splits, settings, seed=1, cache=tmp_path)
    assert [entry["bert_score"] for entry in splits[1]["base"]] == [1.0] * 5 + [0.0] * 5

    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (tmp_path / "baseline.tsv").write_text("LAYER,P,R,F\n0,0,0,0\n1,0.1,0.1,0.2\n")
    for baseline, expected in (("baseline.tsv", 0.5), (None, 0.6)):
        add_bert_score(splits, settings.model_copy(update={"baseline": baseline}), seed=1, cache=tmp_path)
        assert splits[0]["base"][9]["bert_score"] == expected


@pytest.mark.heavy
def test_ten_thousand_rows_are_scored_in_seconds():
    generator = random.Random(0)
    words = [f"word{number}" for number in range(300)]
    references = [" ".join(generator.choices(words, k=20)) for _ in range(10_000)]
    answers = {
        name: [
            row(reference=text, completion=text if generator.random() < share else text[::-1], kl=0.1)
            for text in references
        ]
        for name, share in (("base", 0.1), ("merged", 0.8), ("Q4_1", 0.8))
    }
    started = time.process_time()
    scores = scores_of("exact_match", "token_f1", "json_valid", "rouge_l", "length_ratio", "distinct_1")
    report = evaluate(answers, {}, BYTES, scores, Resampling(1000, 1))
    assert time.process_time() - started < 60
    [exact] = [one for one in report["merged"]["intervals"] if one["metric"] == "exact_match"]
    # 10,000 rows: a standard error of 0.004.
    assert exact["high"] - exact["low"] == pytest.approx(2 * 1.96 * math.sqrt(0.8 * 0.2 / 10_000), rel=0.1)
    assert np.isfinite(exact["low"])


def test_each_dataset_of_a_mixture_has_scores_of_its_own_rows_alone():
    from lathe.evaluation.evaluate import Resampling, define_scores, evaluate_datasets

    def row(reference: str, answer: str, *, reason: str | None = "stop") -> dict:
        return {
            "prompt": "p" if reason else "",
            "reference": reference,
            "completion": answer,
            "finish_reason": reason,
            "nll": 2.0,
            "reference_tokens": 4,
            "kl": None,
        }

    answers = {"base": [row("a", "a"), row("b", "x"), row("a text", "", reason=None), row("c", "c")]}
    scores = define_scores(
        ["exact_match", "bleu"], normalize="none", answer_pattern=None, bert_score_weight=0.5, judge_weight=None
    )
    names = ["one", "two", "texts", "one", "two"]  # more than were answered
    report = evaluate_datasets(answers, names, {"base": 7}, scores, Resampling(100, 1))
    assert {name: of["base"]["exact_match"] for name, of in report.items()} == {"one": 1.0, "two": 0.0, "texts": None}
    assert report["texts"]["base"]["stop_rate"] is report["texts"]["base"]["bleu"] is None
    assert report["texts"]["base"]["perplexity"] == round(math.exp(0.5), 4)
    assert evaluate_datasets(answers, ["one"] * 9, {"base": 7}, scores, Resampling(100, 1)) == {}
    assert evaluate_datasets(answers, [], {"base": 7}, scores, Resampling(100, 1)) == {}
