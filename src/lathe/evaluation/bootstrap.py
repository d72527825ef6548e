"""How sure a score is, and whether two differ: by resampling the rows that it was measured on.

A score is a function of sums over rows (see `metrics`), so that a resample of the rows is a product of how often each
was drawn with the rows' statistics: a thousand resamples of ten thousand rows take a moment, in bounded memory. Every
artifact's scores are taken from the same resamples, which makes the differences between them paired.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

Array = NDArray[np.float64]

CONFIDENCE = 0.95
CELLS_AT_ONCE = 4_000_000  # draws of rows held in memory at a time, 8 bytes each
TIE = 1e-9  # relative difference below which two values are equal but for rounding


def bootstrap_sums(statistics: Array, samples: int, seed: int) -> Array:
    """Return the sums of the rows' statistics, (rows, k), over resamples of the rows with replacement: (samples, k)."""
    return np.concatenate([counts @ statistics for counts in _drawn(len(statistics), samples, seed)])


def left_out_sums(statistics: Array) -> Array:
    """Return the sums of the rows' statistics without each row in turn (the jackknife): (rows, k) -> (rows, k)."""
    return statistics.sum(axis=0) - statistics


def interval(observed: float, resampled: Array, left_out: Array) -> tuple[float, float] | None:
    """Return the 95 % interval of a score, bias-corrected and accelerated (BCa; Efron 1987).

    Takes its value on all rows, on resamples and without each row in turn. None where a single row or nothing finite is
    left to tell from. A score that is equal in all resamples, such as 500 of 500 right, has an interval of one point.
    """
    resampled, left_out = (values[np.isfinite(values)] for values in (resampled, left_out))
    if len(left_out) < 2 or not len(resampled):
        return None
    # Ties that rounding broke would move the median.
    near = TIE * max(abs(observed), np.ptp(resampled))
    below = np.mean(resampled < observed - near) + np.mean(np.abs(resampled - observed) <= near) / 2
    influence = left_out.mean() - left_out
    spread = np.sum(influence**2) ** 1.5
    acceleration = np.sum(influence**3) / (6 * spread) if spread else 0.0
    ends = np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    shifted = ndtri(np.clip(below, 1 / (len(resampled) + 1), 1 - 1 / (len(resampled) + 1)))
    moved = shifted + ndtri(ends)
    corrected = ndtr(shifted + moved / (1 - acceleration * moved))
    low, high = np.quantile(resampled, corrected)
    return float(low), float(high)


def _drawn(rows: int, samples: int, seed: int) -> Iterator[Array]:
    """Yield how often each row is drawn, (some samples, rows), until there are `samples`."""
    generator = np.random.default_rng(seed)
    for count in _shares(samples, rows):
        drawn = generator.integers(0, rows, (count, rows)) + rows * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows).astype(np.float64)


def _shares(samples: int, rows: int) -> Iterator[int]:
    at_once = max(1, CELLS_AT_ONCE // max(1, rows))
    for start in range(0, samples, at_once):
        yield min(at_once, samples - start)
