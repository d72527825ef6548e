"""Numbers: rounding."""


def round_up(value: int, step: int) -> int:
    """Return the next multiple of `step`."""
    return -(-value // step) * step
