"""What every way of putting many rows through a GGUF shares: how rows are measured, what they all begin with.

Rows are read twice, and never held: once to be measured, which tells how long the cache must be and what all of them
begin with, then to be decoded. What is decoded does not depend on which rows are already done.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lathe.common.errors import InputError
from lathe.inference.kv_cache import Cache

# Rows decoded together at least, so that every type goes through the kernels that it uses for many.
FEWEST = 8
# Logits kept at once by a cache: 64 MB, whatever the vocabulary.
MAX_LOGITS = 1 << 24


@dataclass(eq=False, slots=True)
class Row:
    """Token ids to decode: which row they are of, and the index of the first whose logits are wanted."""

    number: int
    tokens: "array[int]"
    first_output: int

    @classmethod
    def of(cls, number: int, tokens: Sequence[int], *, n_ctx: int, first_output: int | None = None) -> "Row":
        """Make a row that asks for logits from `first_output` on (default: behind the last token).

        Raises InputError that names the row (from 0) if it is empty or fills `n_ctx` already.
        """
        if len(tokens) >= n_ctx:
            raise InputError(
                f"row {number}: {len(tokens)} tokens leave no room for an answer in a context of {n_ctx}; "
                f"shorten the row or raise generate.n_ctx"
            )
        if not tokens:
            raise InputError(f"row {number}: an empty prompt; the model needs at least one token to go on from")
        return cls(number, array("i", tokens), len(tokens) - 1 if first_output is None else first_output)


@dataclass(frozen=True)
class Survey:
    """Of many rows: their number, the longest one's length, and what all begin with, up to where logits are wanted."""

    rows: int
    longest: int
    shared: "array[int]"

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Survey":
        """Measure rows, each given up before the next is read."""
        count, longest, first_output = 0, 0, sys.maxsize
        shared: array[int] = array("i")
        for row in rows:
            shared = shared[: common_length(shared, row.tokens)] if count else row.tokens
            count, longest = count + 1, max(longest, len(row.tokens))
            first_output = min(first_output, row.first_output)
        # Enough tokens stay outside to go through the kernels for many.
        length = min(len(shared), first_output - FEWEST + 1)
        return cls(count, longest, shared[:length] if length >= FEWEST else array("i"))


def share_prefix(cache: Cache, survey: Survey, *, slots: int) -> int:
    """Decode what all rows begin with once, copy it into every slot, and return its length in tokens."""
    length = len(survey.shared)
    while cache.length(0) < length:
        cache.feed(0, survey.shared, first_output=length)
    if length:
        for slot in range(1, slots):
            cache.copy(0, slot)
    return length


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with alike."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:  # compared in C: most rows hold the whole of what is shared
        return shorter
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), shorter)
