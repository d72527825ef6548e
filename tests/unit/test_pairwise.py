"""Pairwise verdicts: both orders, ties, win rates with and without length, and judges that look at the position."""

import json

import numpy as np
import pytest
from refusals import refused

from lathe.common.jsonl import read_jsonl, write_jsonl
from lathe.config.load import load
from lathe.evaluation.evaluate import Resampling, define_scores, evaluate, read_answers
from lathe.evaluation.judge.judged_pairs import OtherAnswers, collect_pairs, read_other_answers
from lathe.evaluation.judge.judged_rows import write_verdicts
from lathe.evaluation.judge.verdict_cache import StoredVerdict
from lathe.evaluation.pairwise import fit_length_control, read_pairs, summarize_pairs, warn_of_bias

SETTINGS = load().params.judge.model_copy(update={"mode": "pairwise", "against": "base"})
IDENTITY = {"provider": "openai", "model": "careful-judge", "address": "http://127.0.0.1"}


def generated(folder, answers, split_rows=("validation", "test")):
    """Answers {artifact: [text, …]} as `generate` leaves them."""
    for artifact, texts in answers.items():
        (folder / artifact).mkdir(parents=True, exist_ok=True)
        rows = [
            {
                "prompt": f"question {n}",
                "reference": "right",
                "completion": text,
                "finish_reason": "stop",
                "nll": 1.0,
                "reference_tokens": 2,
                "kl": None,
            }
            for n, text in enumerate(texts)
        ]
        for split in split_rows:
            write_jsonl(rows, folder / artifact / f"{split}.jsonl")
    return folder


def judge_all(folder, pairs, judge):
    """Write the verdicts of a function of (first, second) -> score, as the stage does."""
    verdicts = {}
    for key, prompt in pairs.prompts.items():
        row = json.loads(prompt.user.split("\n")[3])
        verdicts[key] = StoredVerdict(judge(row["first"], row["second"]), "because", "a judge", 400, 20)
    folder.mkdir()
    write_verdicts(folder, pairs, verdicts)


@pytest.fixture
def judged(tmp_path):
    """Judge answers of `merged` against those of `base`; returns the summary on validation, and the answers."""

    def run(answers, judge, **settings):
        source = generated(tmp_path / "generated", answers)
        chosen = SETTINGS.model_copy(update=settings)
        others = read_other_answers(source, list(answers), chosen.against)
        pairs = collect_pairs(source, list(answers), "The right one is better.", chosen, IDENTITY, others)
        judge_all(tmp_path / "judged", pairs, judge)
        rows = read_answers(
            source, tmp_path / "judged", list(answers), "validation", strip_thinking=True, pairwise=True
        )
        return summarize_pairs(rows, samples=500, seed=1), rows, pairs

    return run


def prefer_right(first, second):
    return 50 if first == second or "right" not in (first, second) else 100 if first == "right" else 0


def test_a_judge_that_looks_at_the_answers_has_no_position_bias_and_the_better_side_wins(judged):
    answers = {"base": ["right"] * 10 + ["wrong"] * 30, "merged": ["right"] * 30 + ["wrong "] * 10}
    summaries, _, pairs = judged(answers, prefer_right)
    merged = summaries["merged"]
    assert merged["rows"] == 40
    assert (merged["wins"], merged["ties"], merged["losses"]) == (20, 20, 0)
    assert merged["win_rate"]["value"] == 0.75
    assert 0.65 < merged["win_rate"]["low"] < 0.75 < merged["win_rate"]["high"] < 0.85
    assert merged["position_bias"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert merged["consistent"] == 1
    # Ten equal answers, and those of base against itself, are asked about by nobody.
    assert merged["same_answers"] == 10
    assert summaries["base"]["win_rate"]["value"] == 0.5
    assert summaries["base"]["position_bias"] is None
    assert len([place for place in pairs.keys if place.artifact == "merged"]) == 2 * 2 * 30


def test_a_judge_that_always_prefers_the_first_answer_is_found_out(judged, caplog):
    answers = {"base": ["wrong"] * 40, "merged": ["right"] * 40}
    summaries, _, _ = judged(answers, lambda first, second: 90)
    assert summaries["merged"]["position_bias"]["value"] == 1
    assert summaries["merged"]["win_rate"]["value"] == 0.5
    assert summaries["merged"]["consistent"] == 0
    assert summaries["merged"]["ties"] == 40
    warn_of_bias(summaries, "validation")
    assert "prefers whichever answer comes first (position bias +1.00 for merged)" in caplog.text


def test_a_judge_that_always_prefers_the_second_has_a_bias_of_minus_one(judged):
    summaries, _, _ = judged({"base": ["wrong"] * 9, "merged": ["right"] * 9}, lambda first, second: 3)
    assert summaries["merged"]["position_bias"]["value"] == -1
    assert summaries["merged"]["win_rate"]["value"] == 0.5


def test_a_judge_that_prefers_the_longer_answer_gives_a_rate_that_length_explains(judged):
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 60, (2, 300))
    answers = {"base": ["x" * n for n in lengths[0]], "merged": ["y" * (n + 12) for n in lengths[1]]}

    def prefer_longer(first, second):
        return 100 if generator.random() < 1 / (1 + np.exp((len(second) - len(first)) / 12)) else 0

    summaries, _, _ = judged(answers, prefer_longer, max_rows=None)
    merged = summaries["merged"]
    assert merged["win_rate"]["low"] > 0.55
    controlled = merged["length_controlled_win_rate"]
    assert controlled["low"] < 0.5 < controlled["high"]


def test_the_length_controlled_rate_is_that_of_scikit_learns_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(3)
    lengths = generator.normal(20, 50, 200)
    values = (generator.random(200) < 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(lengths / 50))))).astype(float)
    feature = np.tanh(lengths / lengths.std())[:, None]
    expected = LogisticRegression(C=1e6).fit(feature, values)
    found = fit_length_control(values, lengths, np.ones((2, 200)))
    assert found[0] == found[1]
    assert found[0] == pytest.approx(1 / (1 + np.exp(-expected.intercept_[0])), abs=2e-3)
    # A weight is as good as a repeated row.
    counts = generator.integers(0, 3, 200).astype(float)
    repeated = np.repeat(np.arange(200), counts.astype(int))
    expected = LogisticRegression(C=1e6).fit(feature[repeated], values[repeated])
    assert fit_length_control(values, lengths, counts) == pytest.approx(
        1 / (1 + np.exp(-expected.intercept_[0])), abs=2e-3
    )


def test_answers_of_one_length_have_the_same_rate_and_a_side_that_always_wins_has_one_too():
    values = np.array([1.0, 1.0, 1.0, 0.0])
    assert fit_length_control(values, np.zeros(4), np.ones(4)) == pytest.approx(0.75, abs=0.01)
    assert 0.95 < fit_length_control(np.ones(50), np.arange(50.0), np.ones(50)) < 1


def test_the_win_rate_is_a_score_with_differences_like_any_other(judged):
    answers = {"base": ["wrong"] * 40, "merged": ["right"] * 30 + ["wrong"] * 10}
    _, rows, _ = judged(answers, prefer_right)
    scores = define_scores(
        ["exact_match"],
        normalize="none",
        answer_pattern=None,
        bert_score_weight=0.4,
        judge_weight=0.6,
        judge_score="win_rate",
    )
    report = evaluate(rows, {}, {"base": 1, "merged": 1}, scores, Resampling(300, 1))
    assert report["merged"]["win_rate"] == 0.875
    assert report["base"]["win_rate"] == 0.5
    [delta] = [entry for entry in report["merged"]["deltas"] if entry["metric"] == "win_rate"]
    assert delta["delta"] == 0.375
    assert delta["p"] < 0.01
    assert "judge" not in report["merged"]


def test_rows_of_another_run_are_matched_by_what_was_asked_and_the_others_get_no_verdict(tmp_path, caplog):
    source = generated(tmp_path / "generated", {"merged": ["a", "b", "c"]})
    others = read_jsonl(source / "merged/test.jsonl")[1:][::-1]
    rows = {("merged", split): [{**row, "completion": "other"} for row in others] for split in ("validation", "test")}
    pairs = collect_pairs(source, ["merged"], "r", SETTINGS, IDENTITY, OtherAnswers(rows, "c" * 40))
    assert {place.row for place in pairs.keys} == {1, 2}
    assert "1 of 3 rows have no answer of base to compare with" in caplog.text
    with refused("no-common-rows", "judge.against", "answered none of these rows"):
        collect_pairs(source, ["merged"], "r", SETTINGS, IDENTITY, OtherAnswers({}, "c" * 40))


def test_what_is_kept_names_order_and_lengths_and_is_read_again(judged, tmp_path):
    judged({"base": ["wrong", "same"], "merged": ["right", "same"]}, prefer_right)
    lines = read_jsonl(tmp_path / "judged/merged/test.jsonl")
    assert [(line["row"], line.get("first"), line.get("tie")) for line in lines] == [
        (0, "own", None),
        (0, "other", None),
        (1, None, True),
    ]
    assert read_pairs(tmp_path / "judged/merged/test.jsonl")[0] == {
        "own_first": 1.0,
        "other_first": 1.0,
        "length_difference": 0,
        "preference": 1.0,
    }
    assert read_pairs(tmp_path / "judged/none/test.jsonl") == {}


def test_an_unknown_name_to_compare_with_is_refused_with_the_artifacts(tmp_path):
    generated(tmp_path, {"base": ["a"], "merged": ["b"]})
    with refused("no-such-revision", "judge.against", "no-such-run", "base, merged", kept=False):
        read_other_answers(tmp_path, ["base", "merged"], "no-such-run")


def test_answers_of_two_engines_are_paired_only_if_that_is_asked_for(tmp_path, caplog):
    source = generated(tmp_path / "generated", {"base": ["wrong", "right"], "merged": ["right", "right"]})
    file = source / "merged/test.jsonl"
    write_jsonl([{**row, "engine": "vllm"} for row in read_jsonl(file)], file)
    others = read_other_answers(source, ["base", "merged"], "base")
    asked = (source, ["base", "merged"], "r", SETTINGS, IDENTITY, others)
    with refused("mixed-engines", "llama.cpp for base; vllm for merged", "evaluate.allow_mixed_engines"):
        collect_pairs(*asked)
    assert len(collect_pairs(*asked, allow_mixed_engines=True).prompts) == 2
    assert "differences are of engines as well as of weights" in caplog.text
    elsewhere = OtherAnswers({("merged", "test"): read_jsonl(source / "base/test.jsonl")}, "c" * 40)
    with refused("mixed-engines", "vllm for merged; llama.cpp for merged of base"):
        collect_pairs(source, ["merged"], "r", SETTINGS, IDENTITY, elsewhere)
