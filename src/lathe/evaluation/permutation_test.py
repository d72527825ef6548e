"""Permutation test: the p-value of a difference between two artifacts on the same rows."""

import numpy as np

from lathe.evaluation.bootstrap import TIE, Array, _shares


def swapped_sums(differences: Array, samples: int, seed: int) -> Array:
    """Return the sums of the rows' `differences`, (rows, k), each row taken or left out by a coin: (samples, k).

    Of the differences of two artifacts' statistics this is what a sum gains or loses where they swap the rows that were
    taken: what no difference between them could have given as well.
    """
    generator = np.random.default_rng(seed)
    rows = len(differences)
    return np.concatenate(
        [
            generator.integers(0, 2, (count, rows), dtype=np.int8).astype(np.float64) @ differences
            for count in _shares(samples, rows)
        ]
    )


def p_value(observed: float, swapped: Array) -> float:
    """Return how often chance alone gives a difference as large, either way: the approximate randomisation test.

    `swapped` are the differences after swapping rows between the two at random (Noreen 1989). The real order counts as
    one more of them, so that 1 / (samples + 1) is the least that can come out.
    """
    # What rounding alone parts is as large; what is not finite tells nothing against chance.
    as_large = ~(np.abs(swapped) < abs(observed) * (1 - TIE))
    return float((1 + np.count_nonzero(as_large)) / (1 + len(swapped)))
