"""Scores of sampled answers: means, pass@k without bias, spread, and what is refused."""

import itertools
import statistics
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from lathe.common.jsonl import write_jsonl
from lathe.evaluation.evaluate import Resampling, define_scores
from lathe.evaluation.sampled_scores import (
    compute_pass_at,
    evaluate_samples,
    list_pass_sizes,
    list_sampled,
    remove_unlisted_files,
)

SCORES = define_scores(
    ["exact_match", "token_f1"], normalize="none", answer_pattern=None, bert_score_weight=0.4, judge_weight=None
)
# Of four rows, which of four answers are right.
RIGHT = [[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]


def write_samples(folder: Path, name: str, right: list[list[int]], split: str = "test", **more: Any) -> None:
    answers = [
        {
            "row": row,
            "sample": sample,
            "reference": f"answer {row}",
            "completion": f"answer {row}" if good else "no idea",
            "finish_reason": "stop",
            "tokens": 3,
            **more,
        }
        for row, samples in enumerate(right)
        for sample, good in enumerate(samples)
    ]
    (folder / name).mkdir(parents=True, exist_ok=True)
    write_jsonl(answers, folder / name / f"{split}.jsonl")


def evaluate_files(folder: Path, files: list[str], *, clusters: list[str] | None = None, thinking: bool = True) -> Any:
    answered = [{"cluster": cluster} for cluster in clusters] if clusters else [{}] * 4
    sizes = {"merged": 3000, "Q8_0": 1600}
    options = (list_sampled(files), "test", answered, SCORES, sizes, Resampling(500, 1))
    return evaluate_samples(folder, *options, strip_thinking=thinking)


def test_the_score_is_the_mean_over_all_answers_and_pass_at_k_that_of_some_right_one(tmp_path):
    write_samples(tmp_path, "merged-f16", RIGHT)
    scores = evaluate_files(tmp_path, ["merged-f16"])["merged"]
    assert scores["exact_match"] == pytest.approx(7 / 16, abs=1e-4)
    assert scores["exact_match_pass_at_4"] == pytest.approx(3 / 4)
    assert scores["exact_match_pass_at_2"] == pytest.approx((1 + 1 / 2 + 0 + (1 - 1 / 6)) / 4, abs=1e-4)
    assert (scores["samples"], scores["bytes"], scores["stop_rate"]) == (4, 3000, 1)
    assert not {"perplexity", "kl", "combined", "token_f1_pass_at_2"} & scores.keys()
    of_runs = [sum(row[sample] for row in RIGHT) / 4 for sample in range(4)]
    [spread] = [each["deviation"] for each in scores["spread"] if each["metric"] == "exact_match"]
    assert spread == pytest.approx(statistics.stdev(of_runs), rel=1e-3)
    ends = {each["metric"]: each for each in scores["intervals"]}
    assert ends["exact_match"]["low"] < scores["exact_match"] < ends["exact_match"]["high"]


def test_files_are_compared_on_the_same_rows(tmp_path):
    write_samples(tmp_path, "merged-f16", RIGHT)
    write_samples(tmp_path, "Q8_0", [[0] * 4, *RIGHT[1:]])
    report = evaluate_files(tmp_path, ["merged-f16", "Q8_0"])
    deltas = {delta["metric"]: delta for delta in report["Q8_0"]["deltas"]}
    assert {delta["to"] for delta in deltas.values()} == {"merged"}
    assert deltas["exact_match"]["delta"] == pytest.approx(-1 / 4, abs=1e-4)
    assert deltas["exact_match_pass_at_4"]["delta"] == pytest.approx(-1 / 4, abs=1e-4)


def test_rows_that_belong_together_are_resampled_together(tmp_path):
    write_samples(tmp_path, "merged-f16", RIGHT)
    write_samples(tmp_path, "Q8_0", [[0] * 4, *RIGHT[1:]])
    scores = evaluate_files(tmp_path, ["merged-f16", "Q8_0"], clusters=["a", "b", "a", "b"])["Q8_0"]
    assert {delta["clusters"] for delta in scores["deltas"]} == {2}


def test_an_answer_is_what_is_said_after_the_thought(tmp_path):
    write_samples(tmp_path, "merged-f16", [[0] * 4] * 4, answer="same", reference_answer="same")
    assert evaluate_files(tmp_path, ["merged-f16"])["merged"]["exact_match"] == 1
    assert evaluate_files(tmp_path, ["merged-f16"], thinking=False)["merged"]["exact_match"] == 0


@pytest.mark.parametrize(("samples", "right", "k"), [(5, 0, 2), (5, 2, 3), (6, 1, 1), (4, 4, 2), (8, 3, 8)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_right_answer(samples, right, k):
    choices = list(itertools.combinations(range(samples), k))
    share = sum(any(index < right for index in choice) for choice in choices) / len(choices)
    assert compute_pass_at(k, samples=samples, right=right) == pytest.approx(share)


@pytest.mark.parametrize(("samples", "sizes"), [(2, [2]), (3, [2, 3]), (8, [2, 4, 8]), (10, [2, 4, 8, 10])])
def test_sizes_are_powers_of_two_and_all_samples(samples, sizes):
    assert list_pass_sizes(samples) == sizes


def test_without_files_there_is_no_report(tmp_path):
    assert evaluate_files(tmp_path, []) == {}


def test_other_rows_and_uneven_samples_are_refused(tmp_path):
    write_samples(tmp_path, "merged-f16", RIGHT)
    write_samples(tmp_path, "Q8_0", RIGHT[:3])
    with refused("different-rows", "holds other rows or samples than merged"):
        evaluate_files(tmp_path, ["merged-f16", "Q8_0"])
    write_samples(tmp_path, "Q8_0", [*RIGHT[:3], [1, 1]])
    with refused("samples", "rows with more samples than others", "dvc repro"):
        evaluate_files(tmp_path, ["merged-f16", "Q8_0"])


def test_what_is_no_longer_listed_is_removed(tmp_path):
    for name in ("Q8_0", "merged-f16"):
        (tmp_path / name).mkdir()
    (tmp_path / "README.md").touch()
    remove_unlisted_files(tmp_path, ["Q8_0"])
    remove_unlisted_files(tmp_path / "nowhere", ["Q8_0"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Q8_0", "README.md"]
