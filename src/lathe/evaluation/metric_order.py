"""Order of a metric's values: whether higher or lower is better."""

import math

LOWER_IS_BETTER = frozenset({"perplexity", "kl", "general_perplexity", "bytes"})


def orient_score(metric: str, value: float | None) -> float:
    """Return a number that is higher for a better value of the metric; -inf for None.

    Lower is better for LOWER_IS_BETTER, closer to 1 for `length_ratio`, and higher for all others.
    """
    if value is None:
        return -math.inf
    if metric == "length_ratio":
        return -abs(value - 1)
    return -value if metric in LOWER_IS_BETTER else value
