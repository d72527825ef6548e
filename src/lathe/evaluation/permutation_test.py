"""Permutation test: the p-value of a score difference between two artifacts on the same rows."""

import numpy as np

from lathe.evaluation.bootstrap import TIE_TOLERANCE, Array, split_samples


def permute_sums(differences: Array, samples: int, seed: int) -> Array:
    """Return the sums of `differences` over random halves of the rows, (rows, k) -> (samples, k).

    For differences of two artifacts' row statistics, this is how much their sums change if the artifacts swap their
    answers on these rows: under the null hypothesis, swapping makes no difference.
    """
    generator = np.random.default_rng(seed)
    rows = len(differences)
    return np.concatenate(
        [
            generator.integers(0, 2, (count, rows), dtype=np.int8).astype(np.float64) @ differences
            for count in split_samples(samples, rows)
        ]
    )


def compute_p_value(observed: float, permuted: Array) -> float:
    """Return the two-sided p-value of an approximate randomisation test (Noreen 1989).

    `permuted` (samples,) are the differences after random swaps. The observed difference counts as one more of them, so
    that the smallest possible value is 1 / (samples + 1).
    """
    # Equal up to rounding errors counts as large; so do values that are not finite.
    as_large = ~(np.abs(permuted) < abs(observed) * (1 - TIE_TOLERANCE))
    return float((1 + np.count_nonzero(as_large)) / (1 + len(permuted)))
