"""P values of several comparisons, adjusted for their number."""

from collections.abc import Mapping


def adjust_p_values(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p values adjusted for several comparisons (Holm 1979)."""
    adjusted, least = {}, 0.0
    for number, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(p_values) - number) * p))
        adjusted[name] = least
    return adjusted
