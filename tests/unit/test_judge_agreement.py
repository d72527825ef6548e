"""The judge held against people: kappa as scikit-learn has it, intervals, and marks that cannot be used."""

import json

import numpy as np
import pytest
from refusals import refused

from lathe.common.jsonl import write_jsonl
from lathe.evaluation.judge_agreement import compare_with_marks, compute_kappa


@pytest.mark.parametrize("quadratic", [False, True])
def test_kappa_is_that_of_scikit_learn(quadratic):
    from sklearn.metrics import cohen_kappa_score

    generator = np.random.default_rng(0)
    one = generator.integers(0, 4, 200)
    other = np.where(generator.random(200) < 0.6, one, generator.integers(0, 4, 200))
    expected = cohen_kappa_score(one, other, weights="quadratic" if quadratic else None)
    assert compute_kappa(one, other, 4, quadratic=quadratic) == pytest.approx(expected)
    assert np.isnan(compute_kappa(np.ones(5), np.ones(5), 4))


@pytest.fixture
def judged(tmp_path):
    """A folder of verdicts: of single answers, or of pairs."""

    def write(scores=None, pairs=None):
        folder = tmp_path / "judged"
        (folder / "merged").mkdir(parents=True, exist_ok=True)
        (folder / "judge.json").write_text(json.dumps({"mode": "pairwise"} if pairs else {}))
        lines = [{"row": n, "score": score, "reason": ""} for n, score in enumerate(scores or [])]
        for row, (own_first, other_first) in enumerate(pairs or []):
            lines.append({"row": row, "first": "own", "score": own_first, "length_difference": 1})
            lines.append({"row": row, "first": "other", "score": other_first, "length_difference": 1})
        write_jsonl(lines, folder / "merged/validation.jsonl")
        return folder

    return write


def test_scores_are_held_against_those_of_a_person(judged, tmp_path):
    generator = np.random.default_rng(1)
    people = generator.integers(0, 5, 60) * 25
    judge = np.clip(people + generator.integers(-12, 20, 60), 0, 100)
    marks = tmp_path / "marks.jsonl"
    write_jsonl([{"artifact": "merged", "row": n, "mark": int(mark)} for n, mark in enumerate(people)], marks)
    found = compare_with_marks(marks, judged(judge.tolist()), seed=1)
    assert found.rows == 60
    kappa, low, high = found.measures["kappa"]
    assert 0.8 < low < kappa < high <= 1
    bias, low, high = found.measures["judge_less_person"]
    assert bias == pytest.approx(float((judge - people).mean()))
    assert low < bias < high
    text = "\n".join(found.describe())
    assert "60 marks of a person beside a verdict" in text
    assert "judge less person" in text


def test_winners_of_pairs_are_held_against_those_of_a_person_and_contradictions_are_ties(judged, tmp_path):
    folder = judged(pairs=[(100, 0)] * 10 + [(0, 100)] * 10 + [(90, 90)] * 10)
    marks = tmp_path / "marks.csv"
    names = ["own"] * 9 + ["tie"] + ["other"] * 10 + ["tie"] * 10
    marks.write_text("artifact,row,mark\n" + "".join(f"merged,{n},{name}\n" for n, name in enumerate(names)))
    found = compare_with_marks(marks, folder, seed=1)
    assert found.measures["same_winner"][0] == pytest.approx(29 / 30)
    kappa, low, high = found.measures["kappa"]
    assert low < kappa == pytest.approx(0.95, abs=0.001)
    assert high <= 1


def test_marks_of_answers_without_a_verdict_are_counted(judged, tmp_path):
    marks = tmp_path / "marks.jsonl"
    write_jsonl([{"artifact": "merged", "row": n, "mark": 50} for n in (0, 1, 7)], marks)
    found = compare_with_marks(marks, judged([50, 75]), seed=1)
    assert (found.rows, found.without_verdict) == (2, 1)
    assert "1 more marks are of answers without a verdict" in "\n".join(found.describe())


@pytest.mark.parametrize(
    ("line", "code", "part"),
    [
        ("[1]", "not-an-object", "marks.jsonl:1"),
        ("{", "not-json", "marks.jsonl:1"),
        ('{"artifact": "merged", "row": 0}', "missing-key", "has no mark"),
        ('{"artifact": "merged", "row": "x", "mark": 5}', "invalid-row", "'x'"),
        ('{"artifact": "merged", "row": 0, "mark": 101}', "invalid-mark", "101"),
        ('{"artifact": "merged", "row": 0, "mark": "own"}', "invalid-mark", "from 0 to 100"),
        ('{"artifact": "merged", "row": 0, "mark": true}', "invalid-mark", "from 0 to 100"),
        ('{"artifact": "merged", "split": "tset", "row": 0, "mark": 5}', "unknown-split", "did you mean 'test'?"),
        ('{"artifact": "merged", "row": 9, "mark": 5}', "no-common-rows", "none of its 1 marks"),
    ],
)
def test_marks_that_cannot_be_used_are_refused_with_their_line(judged, tmp_path, line, code, part):
    folder = judged([50])
    file = tmp_path / "marks.jsonl"
    file.write_text(line + "\n")
    with refused(code, part, kept=False):
        compare_with_marks(file, folder, seed=1)


def test_without_verdicts_or_a_file_it_says_so(judged, tmp_path):
    with refused("nothing-judged", "judge.enabled", kept=False):
        compare_with_marks(tmp_path / "marks.jsonl", tmp_path, seed=1)
    with refused("unreadable", "none.csv", kept=False):
        compare_with_marks(tmp_path / "none.csv", judged([50]), seed=1)
    twice = tmp_path / "marks.csv"
    twice.write_text("artifact,row,mark\nmerged,0,5\nmerged,0,6\n")
    with refused("marked-twice", "marks.csv:3", kept=False):
        compare_with_marks(twice, judged([50]), seed=1)
