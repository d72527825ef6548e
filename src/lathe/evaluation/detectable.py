"""Detectable difference: the smallest true difference of a score that so many rows would show, four times of five.

A difference that is not significant says little where the rows could not have shown one that matters. This is the
minimum detectable effect (Bloom 1995): with a paired test at the level 0.05 and a power of 80 %.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betaincinv
from scipy.stats import nct, t

LEVEL, POWER = 0.05, 0.8


def compute_multiple(units: int) -> float:
    """Return how many standard errors a difference must have to be shown with the power, by the paired t test.

    `units` are the rows, or the clusters of rows, of which there must be two at least.
    """
    degrees = units - 1
    critical = float(t.ppf(1 - LEVEL / 2, degrees))

    def miss(shift: float) -> float:
        # That a difference is shown in the wrong direction, once in a million times, is left out.
        return float(nct.sf(critical, degrees, shift)) - POWER

    return float(brentq(miss, 0.0, 2 * critical))


def compute_smallest_share(units: int) -> float:
    """Return the smallest share of the units whose change is shown with the power, if all of them change alike.

    A paired test of signs reaches the level with six changes in one direction, and not with five, however many rows
    stay as they were. At this share there are six changes or more with the power. 1 if there are too few units.
    """
    needed = math.ceil(1 - math.log2(LEVEL))
    return float(betaincinv(needed, units - needed + 1, POWER)) if units >= needed else 1.0


def find_detectable_difference(resampled: NDArray[np.float64], units: int, *, counts: bool) -> float | None:
    """Return the smallest difference that is shown with the power; None if nothing is known of it.

    `resampled` (samples,) are the differences on resamples of the `units`. With `counts` a row is right or wrong, and
    the difference is at least that of `compute_smallest_share`. Otherwise None if all rows score alike.
    """
    known = resampled[np.isfinite(resampled)]
    if units < 2 or len(known) < 2:
        return None
    error = float(known.std(ddof=1))
    if counts:
        return min(1.0, max(compute_multiple(units) * error, compute_smallest_share(units)))
    return compute_multiple(units) * error if error > 1e-12 else None
