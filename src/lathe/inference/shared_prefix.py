"""Shared prefix of many token sequences, decoded once: the system prompt, the examples of a few-shot prompt.

Sequences are read twice, and never kept in memory: once to be measured, which gives the length of the cache and the
prefix that all share, then to be decoded. What is decoded does not depend on which rows are already finished.
"""

import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from lathe.common.errors import InputError
from lathe.inference.kv_cache import KVCache

# Rows decoded together at least, so that every quantization type uses the kernels that it has for many.
MIN_ROWS = 8
# Logits that a cache gives at once: 64 MB, whatever the vocabulary.
MAX_LOGITS = 1 << 24


@dataclass(eq=False, slots=True)
class TokenSequence:
    """Token ids to decode: the number of their row, and the index of the first token whose logits are needed.

    `reference` is the row's prompt with its reference, without the end token, if that is to be scored too.
    """

    number: int
    tokens: "array[int]"
    first_output: int
    reference: "TokenSequence | None" = None

    @classmethod
    def of(cls, number: int, tokens: Sequence[int], *, n_ctx: int, first_output: int | None = None) -> Self:
        """Make a sequence whose logits are needed from `first_output` on (default: after the last token only).

        Raises InputError that names the row (from 0) if it is empty or fills `n_ctx` already.
        """
        if len(tokens) >= n_ctx:
            raise InputError(
                f"row {number}: {len(tokens)} tokens leave no room for an answer in a context of {n_ctx}; "
                f"shorten the row or raise generate.n_ctx",
                code="prompt-too-long",
            )
        if not tokens:
            raise InputError(
                f"row {number}: an empty prompt; the model needs at least one token to go on from", code="empty-prompt"
            )
        return cls(number, array("i", tokens), len(tokens) - 1 if first_output is None else first_output)


@dataclass(frozen=True)
class SequenceStats:
    """Number and greatest length of many sequences, and the prefix that all share, up to where logits are needed.

    `longest_reference` is the greatest length of the references of these, 0 without any.
    """

    count: int
    longest: int
    longest_reference: int
    prefix: "array[int]"

    @classmethod
    def of(cls, sequences: Iterable[TokenSequence]) -> Self:
        """Measure sequences; memory holds one at a time."""
        count, longest, longest_reference, first_output = 0, 0, 0, sys.maxsize
        prefix: array[int] = array("i")
        for sequence in sequences:
            prefix = prefix[: count_common_tokens(prefix, sequence.tokens)] if count else sequence.tokens
            count, longest = count + 1, max(longest, len(sequence.tokens))
            first_output = min(first_output, sequence.first_output)
            if reference := sequence.reference:
                # Its prompt may end in another token, but not before its first output.
                longest_reference = max(longest_reference, len(reference.tokens))
                first_output = min(first_output, reference.first_output)
        # Enough tokens are left for each row to use the kernels for many.
        length = min(len(prefix), first_output - MIN_ROWS + 1)
        return cls(count, longest, longest_reference, prefix[:length] if length >= MIN_ROWS else array("i"))


def decode_prefix(cache: KVCache, stats: SequenceStats, *, slots: int) -> int:
    """Decode the shared prefix once, copy it into every slot, and return its length in tokens."""
    length = len(stats.prefix)
    while cache.length(0) < length:
        cache.feed(0, stats.prefix, first_output=length)
    if length:
        for slot in range(1, slots):
            cache.copy(0, slot)
    return length


def count_common_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the prefix that two sequences share."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:  # compared in C: most sequences contain the whole prefix
        return shorter
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), shorter)
