"""Metrics: the formula of each metric as a function of sums over rows.

The score of many rows is a function of sums of a few numbers per row, even for corpus metrics such as BLEU. Resampling
is therefore cheap and the same for all metrics: only the sums are computed again.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BLEU_ORDER, CHRF_ORDER, CHRF_BETA = 4, 6, 2.0


def compute_metric(metric: str, sums: Array) -> Array:
    """Return the metric's value for sums of row statistics, (..., k) -> (...); NaN if it is not defined."""
    return _FORMULAS.get(metric, _compute_ratio)(sums)


def make_combined(bert_score_weight: float, judge_weight: float | None) -> Callable[[Array], Array]:
    """Return the formula of `combined` for sums of (BERTScore, rows, judge score, judged rows), (..., 4) -> (...).

    bert_score_weight * BERTScore + judge_weight * judge / 100; BERTScore alone if judge_weight is None (no judge).
    """

    def compute(sums: Array) -> Array:
        bert_score = _compute_ratio(sums[..., :2])
        if judge_weight is None:
            return bert_score
        return bert_score_weight * bert_score + judge_weight * _compute_ratio(sums[..., 2:]) / 100

    return compute


@np.errstate(divide="ignore", invalid="ignore")
def _compute_ratio(sums: Array) -> Array:
    return np.divide(sums[..., 0], sums[..., 1])


@np.errstate(over="ignore")
def _compute_perplexity(sums: Array) -> Array:
    """Return exp(nats / tokens)."""
    return np.exp(_compute_ratio(sums))


@np.errstate(divide="ignore", invalid="ignore")
def _compute_bleu(sums: Array) -> Array:
    """Return sacrebleu's BLEU, 0 to 100, for sums of (words of answers, words of references, matches, n-grams).

    Matches and n-grams of the answers are for each order 1..4. Orders that no answer is long enough for are left out
    (`effective_order`), as a corpus of short answers would score 0.
    """
    answer, reference = sums[..., 0], sums[..., 1]
    matches, total = sums[..., 2 : 2 + BLEU_ORDER], sums[..., 2 + BLEU_ORDER :]
    counts = np.logical_and.accumulate(total > 0, axis=-1)
    # sacrebleu's "exp" smoothing: the first order without a match counts as half a match, the next as a quarter.
    missed = counts & (matches == 0)
    smoothed = np.where(missed, 0.5 ** np.cumsum(missed, axis=-1), matches)
    logs = np.where(counts, np.log(np.where(counts, smoothed, 1) / np.where(counts, total, 1)), 0)
    brevity = np.where(answer < reference, np.exp(1 - reference / answer), 1)
    score = 100 * brevity * np.exp(logs.sum(-1) / np.maximum(counts.sum(-1), 1))
    score = np.where(matches.any(-1), score, 0.0)
    return np.where(np.isnan(sums).any(-1), np.nan, score)


@np.errstate(divide="ignore", invalid="ignore")
def _compute_chrf(sums: Array) -> Array:
    """Return sacrebleu's chrF2, 0 to 100, for sums of (answer, reference, common n-grams) of each order 1..6."""
    answer, reference, common = (sums[..., start::3] for start in range(3))
    counts = (answer > 0) & (reference > 0)
    orders = np.maximum(counts.sum(-1), 1)
    precision = np.where(counts, common / answer, 0).sum(-1) / orders
    recall = np.where(counts, common / reference, 0).sum(-1) / orders
    factor = CHRF_BETA**2
    score = 100 * (1 + factor) * precision * recall / (factor * precision + recall)
    return np.where(precision + recall > 0, score, 0.0)


_FORMULAS: dict[str, Callable[[Array], Array]] = {
    "perplexity": _compute_perplexity,
    "general_perplexity": _compute_perplexity,
    "bleu": _compute_bleu,
    "chrf": _compute_chrf,
}
