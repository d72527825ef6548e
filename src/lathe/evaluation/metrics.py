"""Every score by name: from sums over rows to its value, and which of two values is the better one.

A score of many rows is a function of sums of a few numbers per row, corpus scores such as BLEU included. That makes
resampling cheap and the same for all of them: only the sums are taken anew.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BLEU_ORDER, CHRF_ORDER, CHRF_BETA = 4, 6, 2.0

LOWER_IS_BETTER = frozenset({"perplexity", "kl", "general_perplexity", "bytes"})


def value(metric: str, sums: Array) -> Array:
    """Return the metric for sums of statistics, (..., k) -> (...); NaN where it is not defined."""
    return _OF_SUMS.get(metric, _ratio)(sums)


def goodness(metric: str, value: float | None) -> float:
    """Return a number that is the higher the better the value is; no value is the worst of all."""
    if value is None:
        return -np.inf
    if metric == "length_ratio":
        return -abs(value - 1)
    return -value if metric in LOWER_IS_BETTER else value


def combined(bert_score_weight: float, judge_weight: float | None) -> Callable[[Array], Array]:
    """Return the value of `combined` for sums (BERTScores, rows, judge's marks, judged rows), (..., 4) -> (...).

    bert_score_weight x BERTScore + judge_weight x judge / 100; BERTScore alone where judge_weight is None, no judge.
    """

    def of_sums(sums: Array) -> Array:
        bert_score = _ratio(sums[..., :2])
        if judge_weight is None:
            return bert_score
        return bert_score_weight * bert_score + judge_weight * _ratio(sums[..., 2:]) / 100

    return of_sums


@np.errstate(divide="ignore", invalid="ignore")
def _ratio(sums: Array) -> Array:
    return np.divide(sums[..., 0], sums[..., 1])


@np.errstate(over="ignore")
def _perplexity(sums: Array) -> Array:
    """Return exp(nats / tokens)."""
    return np.exp(_ratio(sums))


@np.errstate(divide="ignore", invalid="ignore")
def _bleu(sums: Array) -> Array:
    """Return sacrebleu's BLEU, 0 to 100, for sums of (words given, words wanted, matches 1..4, n-grams given 1..4).

    Orders that no answer is long enough for do not count (`effective_order`), or a corpus of short answers scores 0.
    """
    given, wanted = sums[..., 0], sums[..., 1]
    matches, total = sums[..., 2 : 2 + BLEU_ORDER], sums[..., 2 + BLEU_ORDER :]
    counts = np.logical_and.accumulate(total > 0, axis=-1)
    # "exp" smoothing: the first order without a match counts as half a match, the next as a quarter.
    missed = counts & (matches == 0)
    smoothed = np.where(missed, 0.5 ** np.cumsum(missed, axis=-1), matches)
    logs = np.where(counts, np.log(np.where(counts, smoothed, 1) / np.where(counts, total, 1)), 0)
    brevity = np.where(given < wanted, np.exp(1 - wanted / given), 1)
    score = 100 * brevity * np.exp(logs.sum(-1) / np.maximum(counts.sum(-1), 1))
    score = np.where(matches.any(-1), score, 0.0)
    return np.where(np.isnan(sums).any(-1), np.nan, score)


@np.errstate(divide="ignore", invalid="ignore")
def _chrf(sums: Array) -> Array:
    """Return sacrebleu's chrF2, 0 to 100, for sums of (n-grams given, wanted, common) of each order 1..6."""
    given, wanted, common = (sums[..., start::3] for start in range(3))
    counts = (given > 0) & (wanted > 0)
    orders = np.maximum(counts.sum(-1), 1)
    precision = np.where(counts, common / given, 0).sum(-1) / orders
    recall = np.where(counts, common / wanted, 0).sum(-1) / orders
    factor = CHRF_BETA**2
    score = 100 * (1 + factor) * precision * recall / (factor * precision + recall)
    return np.where(precision + recall > 0, score, 0.0)


_OF_SUMS: dict[str, Callable[[Array], Array]] = {
    "perplexity": _perplexity,
    "general_perplexity": _perplexity,
    "bleu": _bleu,
    "chrf": _chrf,
}
