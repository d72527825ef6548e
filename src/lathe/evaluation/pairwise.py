"""Pairwise verdicts: win rates of answers, whether the judge looks at the position, and how much is length.

Each pair was judged in both orders. A verdict above 50 is for the first answer, below for the second, 50 a tie. By each
order an answer is worth 1, 0.5 or 0, and a row the mean: a judge that contradicts itself when the order changes gives a
tie.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lathe.common.jsonl import read_jsonl
from lathe.evaluation import bootstrap
from lathe.evaluation.clusters import number_clusters, sum_clusters

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

# A position bias above this is a judge that says little: of three verdicts one goes by the position alone.
LARGE_BIAS = 1 / 3

# Of the logistic regression: a weak pull of its coefficients towards 0, without which a side that always wins has none.
PENALTY = 0.01
NEWTON_STEPS, CONVERGED = 50, 1e-9


def read_pairs(file: Path) -> dict[int, dict[str, Any]]:
    """Return by row what the judge said of its pair; an empty dict if there is no such file.

    `own_first` and `other_first` are what the own answer is worth in each order, None both for equal answers;
    `preference` is their mean, 0.5 for equal answers; `length_difference` is in characters.
    """
    lines = read_jsonl(file) if file.exists() else []
    pairs: dict[int, dict[str, Any]] = {}
    for line in lines:
        pair = pairs.setdefault(
            line["row"],
            {"own_first": None, "other_first": None, "length_difference": line.get("length_difference", 0)},
        )
        if not line.get("tie"):
            first_wins = (np.sign(line["score"] - 50) + 1) / 2
            own = line["first"] == "own"
            pair["own_first" if own else "other_first"] = float(first_wins if own else 1 - first_wins)
    for pair in pairs.values():
        values = [value for value in (pair["own_first"], pair["other_first"]) if value is not None]
        pair["preference"] = sum(values) / len(values) if values else 0.5
    return pairs


def summarize_pairs(
    answers: Mapping[str, Sequence[Mapping[str, Any]]], *, samples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Return for each artifact with judged pairs their counts, and win rates and position bias with 95 % intervals.

    Rows are those of `read_answers`, with `pair`. An interval is null where a single row was judged.
    """
    summaries = {}
    for artifact, rows in answers.items():
        judged = [row for row in rows if row.get("pair")]
        if judged:
            summaries[artifact] = _summarize(judged, samples, seed)
    return summaries


def warn_of_bias(summaries: Mapping[str, Mapping[str, Any]], split: str) -> None:
    """Log a warning for artifacts whose pairs were judged by the position more than by the answers."""
    biased = {
        artifact: bias["value"]
        for artifact, summary in summaries.items()
        if (bias := summary["position_bias"]) and abs(bias["value"]) > LARGE_BIAS
    }
    if biased:
        worst = max(biased, key=lambda artifact: abs(biased[artifact]))
        side = "first" if biased[worst] > 0 else "second"
        logger.warning(
            "%s: the judge prefers whichever answer comes %s (position bias %+.2f for %s); its win rates say little: "
            "take a stronger judge, or another rubric",
            split,
            side,
            biased[worst],
            worst,
        )


def fit_length_control(values: Array, lengths: Array, weights: Array) -> Array:
    """Return the win rate at equal length by logistic regression, for weights (..., rows) of rows -> (...).

    `values` (rows,) are preferences from 0 to 1, `lengths` (rows,) differences of length. As for AlpacaEval 2 (Dubois
    et al. 2024) the model is logit = a + b tanh(length / its standard deviation), and the rate is that at b = 0.
    """
    spread = float(lengths.std())
    feature = np.tanh(lengths / spread) if spread else np.zeros_like(lengths)
    intercept, slope = np.zeros(weights.shape[:-1]), np.zeros(weights.shape[:-1])
    for _ in range(NEWTON_STEPS):
        odds = intercept[..., None] + slope[..., None] * feature
        expected = 1 / (1 + np.exp(-odds))
        missed, curve = weights * (values - expected), weights * expected * (1 - expected)
        gradients = missed.sum(-1) - PENALTY * intercept, (missed * feature).sum(-1) - PENALTY * slope
        first, mixed, second = (
            curve.sum(-1) + PENALTY,
            (curve * feature).sum(-1),
            (curve * feature**2).sum(-1) + PENALTY,
        )
        determinant = first * second - mixed**2
        steps = (
            (second * gradients[0] - mixed * gradients[1]) / determinant,
            (first * gradients[1] - mixed * gradients[0]) / determinant,
        )
        # Halved where they are long: far from the solution the curve is flat.
        scale = 1 / np.maximum(1, np.maximum(abs(steps[0]), abs(steps[1])))
        intercept, slope = intercept + scale * steps[0], slope + scale * steps[1]
        if max(np.abs(steps[0]).max(), np.abs(steps[1]).max()) < CONVERGED:
            break
    return np.asarray(1 / (1 + np.exp(-intercept)), dtype=np.float64)


def _summarize(rows: Sequence[Mapping[str, Any]], samples: int, seed: int) -> dict[str, Any]:
    pairs = [row["pair"] for row in rows]
    values = np.array([pair["preference"] for pair in pairs])
    lengths = np.array([pair["length_difference"] for pair in pairs], dtype=np.float64)
    numbers = number_clusters(rows)
    asked = [pair for pair in pairs if pair["own_first"] is not None and pair["other_first"] is not None]
    # Sums of (preference, rows, verdicts for the first less those for the second, verdicts).
    table = np.array(
        [
            (pair["preference"], 1.0, *(2.0 * (pair["own_first"] - pair["other_first"]), 2.0))
            if pair["own_first"] is not None and pair["other_first"] is not None
            else (pair["preference"], 1.0, 0.0, 0.0)
            for pair in pairs
        ]
    )
    statistics = sum_clusters(table, numbers)
    counts = bootstrap.draw_counts(len(statistics), samples, seed)
    controlled, resampled = [], []
    for batch in counts:
        resampled.append(batch @ statistics)
        controlled.append(fit_length_control(values, lengths, batch[:, numbers]))
    sums, left_out = np.concatenate(resampled), bootstrap.jackknife_sums(statistics)
    without = np.concatenate(
        [
            fit_length_control(values, lengths, (numbers[None, :] != left[:, None]).astype(np.float64))
            for left in _split_numbers(len(statistics), len(rows))
        ]
    )
    whole = float(fit_length_control(values, lengths, np.ones(len(values))))
    return {
        "rows": len(rows),
        "same_answers": len(rows) - len(asked),
        "wins": int((values > 0.5).sum()),
        "ties": int((values == 0.5).sum()),
        "losses": int((values < 0.5).sum()),
        "win_rate": _describe(float(values.mean()), sums[:, 0] / sums[:, 1], left_out[:, 0] / left_out[:, 1]),
        "length_controlled_win_rate": _describe(whole, np.concatenate(controlled), without),
        "position_bias": _describe_bias(statistics, sums, left_out) if asked else None,
        "consistent": round(sum(p["own_first"] == p["other_first"] for p in asked) / len(asked), 4) if asked else None,
    }


def _split_numbers(count: int, rows: int) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers from 0 to `count` in parts, of which a table with `rows` columns has a bounded size."""
    start = 0
    for size in bootstrap.split_samples(count, rows):
        yield np.arange(start, start + size)
        start += size


@np.errstate(divide="ignore", invalid="ignore")
def _describe_bias(statistics: Array, sums: Array, left_out: Array) -> dict[str, float | None]:
    """Return the share of verdicts for the first answer less that for the second: 1 if the first always wins."""
    whole = statistics.sum(axis=0)
    return _describe(float(whole[2] / whole[3]), sums[:, 2] / sums[:, 3], left_out[:, 2] / left_out[:, 3])


def _describe(value: float, resampled: Array, left_out: Array) -> dict[str, float | None]:
    ends = bootstrap.compute_interval(value, resampled, left_out)
    low, high = (None, None) if ends is None else (round(end, 4) for end in ends)
    return {"value": round(value, 4), "low": low, "high": high}
