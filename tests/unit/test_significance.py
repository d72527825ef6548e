"""Intervals and p values against known truths and against scipy."""

import time
import tracemalloc

import numpy as np
import pytest
import scipy.stats

from lathe.evaluation import bootstrap, permutation_test
from lathe.evaluation.metrics import value


def ratio(sums):
    return value("exact_match", sums)


def interval(rows, of_sums=ratio, samples=1000, seed=1):
    """The interval of a score of rows (rows, k)."""
    return bootstrap.interval(
        float(of_sums(rows.sum(axis=0))),
        of_sums(bootstrap.bootstrap_sums(rows, samples, seed)),
        of_sums(bootstrap.left_out_sums(rows)),
    )


def p_value(ours, theirs, of_sums=ratio, samples=1000, seed=1):
    swapped = permutation_test.swapped_sums(ours - theirs, samples, seed)
    a, b = ours.sum(axis=0), theirs.sum(axis=0)
    observed = float(of_sums(a) - of_sums(b))
    return permutation_test.p_value(observed, of_sums(a - swapped) - of_sums(b + swapped))


def means(values):
    return np.stack([values, np.ones_like(values)], axis=1).astype(float)


@pytest.mark.parametrize(
    ("draw", "truth", "of_sums"),
    [
        (lambda g: means(g.random(120) < 0.8), 0.8, ratio),
        (lambda g: means(g.normal(0.5, 0.1, 120)), 0.5, ratio),
        (lambda g: means(g.beta(4, 1, 120)), 0.8, ratio),
        # Nats of answers of 1 to 20 tokens: what perplexity is made of.
        (
            lambda g: np.stack([g.gamma(tokens := g.integers(1, 21, 120), 0.5), tokens], axis=1),
            np.exp(0.5),
            lambda sums: value("perplexity", sums),
        ),
    ],
    ids=["share", "mean", "skewed mean", "perplexity"],
)
def test_nineteen_of_twenty_intervals_hold_the_truth(draw, truth, of_sums):
    generator = np.random.default_rng(0)
    trials = 600
    held = 0
    for trial in range(trials):
        low, high = interval(draw(generator), of_sums, samples=400, seed=trial)
        held += low <= truth <= high
    # Three standard deviations of a count of 600 with 95 %, and what 120 rows leave to be desired.
    assert 0.92 <= held / trials <= 0.98


def test_without_a_difference_p_is_even_and_with_one_it_is_small():
    generator = np.random.default_rng(0)
    ps = []
    for trial in range(400):
        both = generator.normal(0.5, 0.1, 60)
        ours, theirs = (means(both + generator.normal(0, 0.05, 60)) for _ in range(2))
        ps.append(p_value(ours, theirs, samples=200, seed=trial))
    assert scipy.stats.kstest(ps, "uniform").pvalue > 0.01
    assert 0.02 < np.mean(np.array(ps) <= 0.05) < 0.08

    ours, theirs = means(both + 0.1), means(both + generator.normal(0, 0.05, 60))
    assert p_value(ours, theirs) == pytest.approx(1 / 1001)


def test_equal_answers_do_not_differ():
    rows = means(np.random.default_rng(0).random(50))
    assert p_value(rows, rows.copy()) == 1


def test_intervals_are_those_of_scipy_for_the_same_resamples():
    rows = np.random.default_rng(3).gamma(2.0, 1.0, (80, 2))
    resampled = ratio(bootstrap.bootstrap_sums(rows, 999, 7))
    found = bootstrap.interval(float(ratio(rows.sum(axis=0))), resampled, ratio(bootstrap.left_out_sums(rows)))
    expected = scipy.stats.bootstrap(
        (np.arange(80),),
        lambda index, axis: ratio(rows[index].sum(axis=-2)),
        n_resamples=999,
        rng=np.random.default_rng(7),
        method="BCa",
        vectorized=True,
    )
    assert resampled == pytest.approx(expected.bootstrap_distribution)
    assert found == pytest.approx(tuple(expected.confidence_interval))


def test_the_interval_of_a_difference_is_that_of_scipys_paired_bootstrap():
    generator = np.random.default_rng(4)
    ours, theirs = (means(generator.random(70) < share) for share in (0.8, 0.6))
    both = np.hstack([ours, theirs])
    resampled = bootstrap.bootstrap_sums(both, 999, 7)
    left_out = bootstrap.left_out_sums(both)

    def of(sums):
        return ratio(sums[..., :2]) - ratio(sums[..., 2:])

    found = bootstrap.interval(float(of(both.sum(axis=0))), of(resampled), of(left_out))
    expected = scipy.stats.bootstrap(
        (ours[:, 0], theirs[:, 0]),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        n_resamples=999,
        paired=True,
        rng=np.random.default_rng(7),
    )
    assert found == pytest.approx(tuple(expected.confidence_interval), abs=2e-3)


def test_p_values_are_those_of_scipys_permutation_test():
    generator = np.random.default_rng(5)
    for shift in (0.0, 0.05, 0.2):
        ours, theirs = generator.normal(0.5 + shift, 0.2, 11), generator.normal(0.5, 0.2, 11)
        # All 2,048 ways to swap eleven rows, one by one.
        exact = scipy.stats.permutation_test(
            (ours, theirs), lambda a, b, axis: a.mean(axis) - b.mean(axis), permutation_type="samples", n_resamples=1e6
        ).pvalue
        assert p_value(means(ours), means(theirs), samples=20_000) == pytest.approx(exact, abs=0.015)


def test_a_score_that_is_equal_in_all_rows_has_an_interval_of_one_point():
    assert interval(means(np.ones(500))) == (1, 1)
    assert interval(means(np.full(30, 0.1))) == pytest.approx((0.1, 0.1))


def test_from_one_row_nothing_is_told():
    row = means(np.array([0.7]))
    assert interval(row) is None
    assert p_value(row, means(np.array([0.2]))) == 1


def test_rows_that_do_not_count_leave_the_interval_of_the_others():
    """As those that the judge has not marked: (0, 0)."""
    generator = np.random.default_rng(6)
    marked = means(generator.random(100))
    low, high = interval(marked)
    with_others = interval(np.vstack([marked, np.zeros((100, 2))]))
    assert with_others == pytest.approx((low, high), abs=0.02)
    assert interval(np.zeros((5, 2))) is None


def test_resamples_in_which_a_score_is_not_defined_are_left_out():
    rows = np.zeros((3, 2))
    rows[0] = (0.5, 1)
    assert interval(rows) == (0.5, 0.5)


def test_what_is_no_number_has_no_interval():
    rows = means(np.array([0.5, np.nan, 0.7]))
    assert interval(rows) is None


def test_equal_seeds_give_equal_resamples_however_many_other_columns_there_are():
    rows = np.random.default_rng(8).random((300, 4))
    alone = bootstrap.bootstrap_sums(rows[:, :2], 100, 9)
    beside = bootstrap.bootstrap_sums(rows, 100, 9)
    assert np.allclose(alone, beside[:, :2], rtol=1e-12)
    assert np.array_equal(bootstrap.bootstrap_sums(rows, 100, 9), beside)
    assert not np.array_equal(bootstrap.bootstrap_sums(rows, 100, 10), beside)


def test_ten_thousand_rows_take_seconds_and_little_memory():
    rows = np.random.default_rng(0).random((10_000, 60))
    started = time.process_time()
    tracemalloc.start()
    bootstrap.bootstrap_sums(rows, 1000, 1)
    permutation_test.swapped_sums(rows, 1000, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.process_time() - started < 20
    assert peak < 200e6
