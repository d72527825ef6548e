"""What so many rows can tell: the smallest difference, against statsmodels and by simulation, and clustered rows."""

import dataclasses

import numpy as np
import pytest
from intervals import Kind, list_kinds, measure
from scipy import stats

from lathe.common.jsonl import write_jsonl
from lathe.evaluation import bootstrap
from lathe.evaluation.clusters import add_clusters, number_clusters, sum_clusters
from lathe.evaluation.detectable import compute_multiple, compute_smallest_share, find_detectable_difference
from lathe.evaluation.evaluate import Resampling, ScoreDefinition, evaluate
from lathe.evaluation.metrics import compute_metric

KINDS = {kind.name: kind for kind in list_kinds()}


def means(values):
    return np.stack([values, np.ones_like(values)], axis=1).astype(float)


# statsmodels 0.15.0: TTestPower().solve_power(nobs=rows, alpha=0.05, power=0.8), in standard deviations
@pytest.mark.parametrize(
    ("rows", "effect"),
    [(20, 0.6604416544380312), (100, 0.2829117119690806), (500, 0.12553231642698945), (5000, 0.0396303504923098)],
)
def test_the_smallest_difference_of_a_paired_test_is_that_of_statsmodels(rows, effect):
    assert compute_multiple(rows) / rows**0.5 == pytest.approx(effect, rel=1e-4)


@pytest.mark.parametrize("rows", [6, 50, 100, 2000])
def test_at_the_smallest_share_six_changes_of_one_direction_show_and_five_do_not(rows):
    assert stats.binomtest(6, 6).pvalue <= 0.05 < stats.binomtest(5, 5).pvalue
    assert stats.binom.sf(5, rows, compute_smallest_share(rows)) == pytest.approx(0.8)
    assert compute_smallest_share(5) == 1


def test_equal_answers_tell_what_is_known_of_shares_and_nothing_of_other_scores():
    same = np.zeros(1000)
    assert find_detectable_difference(same, 100, counts=True) == pytest.approx(0.0779, abs=1e-4)
    assert find_detectable_difference(same, 100, counts=False) is None
    assert find_detectable_difference(np.full(1000, np.nan), 100, counts=True) is None
    assert find_detectable_difference(same, 1, counts=True) is None
    assert find_detectable_difference(np.array([0.5, -0.5] * 500), 3, counts=True) == 1


def test_the_error_of_clustered_rows_is_that_of_statsmodels():
    values = np.array([((7 * i * i + 3 * i) % 11) / 11 + (i // 4 % 3) * 0.2 for i in range(60)])
    numbers = number_clusters([{"cluster": str(i // 4)} for i in range(60)])
    sums = bootstrap.resample_sums(sum_clusters(means(values), numbers), 20_000, 1)
    # statsmodels 0.15.0: OLS on a constant, cov_type="cluster", use_correction=False
    assert np.std(sums[:, 0] / sums[:, 1]) == pytest.approx(0.04424657514774301, rel=0.02)
    alone = bootstrap.resample_sums(means(values), 20_000, 1)
    assert np.std(alone[:, 0] / alone[:, 1]) == pytest.approx(values.std() / 60**0.5, rel=0.02)


def test_rows_without_a_cluster_are_their_own_and_equal_names_belong_together():
    rows = [{"cluster": "a"}, {}, {"cluster": "b"}, {"cluster": "a"}, {"cluster": None}]
    assert number_clusters(rows).tolist() == [0, 1, 2, 0, 3]
    summed = sum_clusters(np.arange(10.0).reshape(5, 2), number_clusters(rows))
    assert summed.tolist() == [[6, 8], [2, 3], [4, 5], [8, 9]]


def test_a_report_is_of_clusters_where_rows_have_them_and_the_scores_stay():
    score = ScoreDefinition("score", lambda row: row["statistics"], lambda sums: compute_metric("exact_match", sums))
    generator = np.random.default_rng(2)
    hard = np.repeat(generator.beta(1, 1, 30), 6)
    answers = {
        name: [{"statistics": (float(right), 1.0)} for right in generator.random(180) < hard]
        for name in ("base", "merged")
    }
    plain = evaluate(answers, {}, {"base": 0, "merged": 0}, [score], Resampling(1000, 0))
    for rows in answers.values():
        for number, row in enumerate(rows):
            row["cluster"] = str(number // 6)
    clustered = evaluate(answers, {}, {"base": 0, "merged": 0}, [score], Resampling(1000, 0))
    assert plain["base"]["score"] == clustered["base"]["score"]
    [narrow], [wide] = plain["base"]["intervals"], clustered["base"]["intervals"]
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"])
    [delta] = clustered["merged"]["deltas"]
    assert delta["clusters"] == 30
    assert "clusters" not in plain["merged"]["deltas"][0]


def test_clusters_of_a_split_are_those_of_the_rows_that_were_answered(tmp_path):
    write_jsonl([{"cluster": "a"}, {}, {"cluster": "b"}], tmp_path / "test.jsonl")
    answers = {"base": [{"n": 0}, {"n": 1}], "merged": [{"n": 0}, {"n": 1}]}
    add_clusters(answers, tmp_path / "test.jsonl")
    assert answers["merged"] == [{"n": 0, "cluster": "a"}, {"n": 1}]


@pytest.mark.parametrize("name", ["right or wrong, 100 rows", "100 clusters of 5 rows"])
def test_intervals_hold_the_truth_and_the_detectable_difference_shows_as_often_as_is_said(name):
    found = measure(KINDS[name], 200, samples=400)
    # Of 200 data sets three standard deviations are 4.6 points at 95 %, and 8.5 at 80 %.
    assert 0.90 <= found.score_held <= 0.99
    assert 0.90 <= found.difference_held <= 0.99
    assert found.false_alarms <= 0.10
    assert 0.70 <= found.power <= 0.90
    assert found.told == pytest.approx(1, abs=0.05)


def test_rows_that_belong_together_and_are_taken_for_their_own_give_false_alarms():
    kind: Kind = dataclasses.replace(KINDS["100 clusters of 5 rows"], ignores_clusters=True)
    assert measure(kind, 100, samples=200).false_alarms > 0.15
