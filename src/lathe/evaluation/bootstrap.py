"""Bootstrap: confidence intervals of scores and of their differences, by resampling the rows.

A score is a function of sums over rows (see `metrics`). The sums of a resample are the product of the counts of drawn
rows with the rows' statistics, so that 1,000 resamples of 10,000 rows take about a second, in bounded memory. All
artifacts are scored on the same resamples, which makes the differences between them paired.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

Array = NDArray[np.float64]

CONFIDENCE = 0.95
MAX_CELLS = 4_000_000  # of a (samples, rows) array of counts in memory, 8 bytes each
TIE_TOLERANCE = 1e-9  # relative difference up to which two values count as equal


def resample_sums(statistics: Array, samples: int, seed: int) -> Array:
    """Return the sums of row statistics over resamples of the rows with replacement, (rows, k) -> (samples, k)."""
    return np.concatenate([counts @ statistics for counts in draw_counts(len(statistics), samples, seed)])


def jackknife_sums(statistics: Array) -> Array:
    """Return the sums of row statistics with each row left out in turn, (rows, k) -> (rows, k)."""
    return statistics.sum(axis=0) - statistics


def compute_interval(observed: float, resampled: Array, left_out: Array) -> tuple[float, float] | None:
    """Return the 95 % interval of a score, bias-corrected and accelerated (BCa; Efron 1987).

    `observed` is its value on all rows, `resampled` (samples,) on resamples, `left_out` (rows,) with each row left out.
    None if fewer than two finite values of `left_out`, or none of `resampled`, are there. A score that is equal in all
    resamples, such as 500 correct answers of 500, has an interval of one point.
    """
    resampled, left_out = (values[np.isfinite(values)] for values in (resampled, left_out))
    if len(left_out) < 2 or not len(resampled):
        return None
    # Equal values that differ by rounding errors would move the median.
    tolerance = TIE_TOLERANCE * max(abs(observed), np.ptp(resampled))
    below = np.mean(resampled < observed - tolerance) + np.mean(np.abs(resampled - observed) <= tolerance) / 2
    influence = left_out.mean() - left_out
    spread = np.sum(influence**2) ** 1.5
    acceleration = np.sum(influence**3) / (6 * spread) if spread else 0.0
    ends = np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    shifted = ndtri(np.clip(below, 1 / (len(resampled) + 1), 1 - 1 / (len(resampled) + 1)))
    moved = shifted + ndtri(ends)
    corrected = ndtr(shifted + moved / (1 - acceleration * moved))
    low, high = np.quantile(resampled, corrected)
    return float(low), float(high)


def draw_counts(rows: int, samples: int, seed: int) -> Iterator[Array]:
    """Yield how often each row is drawn in each resample, in arrays (batch, rows) of `samples` resamples in total."""
    generator = np.random.default_rng(seed)
    for count in split_samples(samples, rows):
        drawn = generator.integers(0, rows, (count, rows)) + rows * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows).astype(np.float64)


def split_samples(samples: int, rows: int) -> Iterator[int]:
    """Yield batch sizes that add up to `samples`, such that a (batch, rows) array has at most MAX_CELLS cells."""
    batch = max(1, MAX_CELLS // max(1, rows))
    for start in range(0, samples, batch):
        yield min(batch, samples - start)
