"""Near duplicates: examples of one split most of whose word n-grams occur in another split.

The rule is PaLM's for contaminated evaluation data (Chowdhery et al. 2022): an example is a near duplicate if at least
70 % of its 8-grams of words occur somewhere in the training data.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from zlib import crc32

import numpy
from numpy.typing import NDArray

NGRAM_WORDS = 8  # an example with fewer words has one n-gram, of all its words
MIN_SHARED_FRACTION = 0.7  # of an example's n-grams that occur in the other split

# Only this much text of a held-out split is looked up in the other splits: its first rows in the order of their
# digests, which is a random sample.
SAMPLE_BYTES = 16_000_000

NOT_SEEN = numpy.iinfo(numpy.int64).max

Hashes = NDArray[numpy.uint64]
Integers = NDArray[numpy.int64]

# Scripts without spaces between words: each character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")

# The same for ASCII text, in a quarter of the time: lower case, and a space for every byte that belongs to no word.
_ASCII_WORDS = bytes(
    ord(chr(byte).lower()) if byte < 128 and (chr(byte).isalnum() or chr(byte) == "_") else ord(" ")
    for byte in range(256)
)


def get_dialogue(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the texts of all messages but the system message, which is often the same in every example."""
    contents = (message["content"] for message in messages if message["role"] != "system")
    return "\n".join(text for text in contents if isinstance(text, str))


def hash_words(text: str) -> list[int]:
    """Return the CRC-32 of each word of the text in lower case."""
    if text.isascii():
        return list(map(crc32, text.encode().translate(_ASCII_WORDS).split()))
    return [crc32(word.encode()) for word in _WORD.findall(text.lower())]


@dataclass(frozen=True, eq=False)
class NGrams:
    """Hashes of the n-grams of some rows, one row after another; `counts` (rows,) says how many each row has."""

    hashes: Hashes
    counts: Integers

    def take_first(self, rows: int) -> "NGrams":
        """Return the n-grams of the first rows, as copies: a view would keep all of the hashes in memory."""
        counts = self.counts[:rows]
        return NGrams(self.hashes[: counts.sum()].copy(), counts.copy())


# What an index has seen: positions in `hashes`, and for each the first row of the other split that has it.
FirstSeen = tuple[Integers, Integers]


def concatenate_ngrams(parts: Sequence[NGrams]) -> NGrams:
    """Return the n-grams of consecutive parts of the rows."""
    empty = hash_ngrams([])
    return NGrams(
        numpy.concatenate([empty.hashes, *(part.hashes for part in parts)]),
        numpy.concatenate([empty.counts, *(part.counts for part in parts)]),
    )


def hash_ngrams(rows: Sequence[Sequence[int]]) -> NGrams:
    """Return the n-grams of rows that are given as hashes of their words."""
    padded = [[*row, *[0] * (NGRAM_WORDS - len(row))] if 0 < len(row) < NGRAM_WORDS else row for row in rows]
    lengths = numpy.array([len(row) for row in padded], dtype=numpy.int64)
    words = numpy.fromiter(chain.from_iterable(padded), dtype=numpy.uint64, count=int(lengths.sum()))
    counts = numpy.maximum(lengths - (NGRAM_WORDS - 1), 0)
    if not counts.any():
        return NGrams(words[:0], counts)
    hashes = numpy.zeros(len(words) - (NGRAM_WORDS - 1), dtype=numpy.uint64)
    for offset in range(NGRAM_WORDS):  # a polynomial in an odd number, modulo 2 ** 64
        hashes *= numpy.uint64(0x9E3779B97F4A7C15)
        hashes += words[offset : offset + len(hashes)]
    # N-grams that would begin in one row and end in the next are left out.
    inside = numpy.ones(len(words), dtype=numpy.bool_)
    ends = numpy.cumsum(lengths)[lengths > 0]
    for offset in range(1, NGRAM_WORDS):
        inside[ends - offset] = False
    return NGrams(hashes[inside[: len(hashes)]], counts)


@dataclass(eq=False)
class NGramIndex:
    """The n-grams of one held-out split, and the first row of another split that has each of them."""

    hashes: Hashes  # sorted and distinct
    positions: Integers  # in `hashes`, of each n-gram of the split
    by_last_bits: NDArray[numpy.bool_]  # whether a hash ends in these bits: rules out most other hashes at once
    first_seen: Integers = field(init=False)  # (distinct hashes,): row in the other split, or NOT_SEEN

    def __post_init__(self) -> None:
        self.reset()

    @classmethod
    def build(cls, ngrams: NGrams) -> "NGramIndex":
        """Return the index of a split's n-grams, none of which has been seen yet."""
        hashes, positions = numpy.unique(ngrams.hashes, return_inverse=True)
        bits = min(26, max(10, 3 + len(hashes).bit_length()))
        by_last_bits = numpy.zeros(1 << bits, dtype=numpy.bool_)
        by_last_bits[(hashes & numpy.uint64(len(by_last_bits) - 1)).astype(numpy.int64)] = True
        return cls(hashes, positions, by_last_bits)

    def reset(self) -> None:
        """Forget what was seen, before another split is looked at."""
        self.first_seen = numpy.full(len(self.hashes), NOT_SEEN)

    def mark_seen(self, ngrams: NGrams, rows: Integers) -> None:
        """Note which n-grams of the index occur in these rows of the other split."""
        likely = self.by_last_bits[(ngrams.hashes & numpy.uint64(len(self.by_last_bits) - 1)).astype(numpy.int64)]
        hashes, row_of_hash = ngrams.hashes[likely], numpy.repeat(rows, ngrams.counts)[likely]
        positions = numpy.searchsorted(self.hashes, hashes)
        positions[positions == len(self.hashes)] = 0
        known = self.hashes[positions] == hashes if len(self.hashes) else numpy.zeros(0, dtype=numpy.bool_)
        numpy.minimum.at(self.first_seen, positions[known], row_of_hash[known])

    def get_first_seen(self) -> FirstSeen:
        """Return what was seen, to be merged with what other processes saw."""
        positions = numpy.flatnonzero(self.first_seen != NOT_SEEN)
        return positions, self.first_seen[positions]

    def merge_first_seen(self, parts: Iterable[FirstSeen]) -> None:
        """Replace what was seen by what several processes saw, each in its share of the rows."""
        self.reset()
        for positions, rows in parts:
            self.first_seen[positions] = numpy.minimum(self.first_seen[positions], rows)


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """A row (its index in the split) that is nearly in another split: how many of its n-grams are there.

    `source` is the row of the other split that was the first to have most of them.
    """

    row: int
    shared_ngrams: int
    ngrams: int
    source: int


def find_near_duplicates(ngrams: NGrams, index: NGramIndex, max_shown: int) -> tuple[int, list[NearDuplicate]]:
    """Return how many rows are nearly in the split that the index has seen, and `max_shown` of them, most alike first.

    `ngrams` are those that the index was built from.
    """
    row_of_ngram = numpy.repeat(numpy.arange(len(ngrams.counts)), ngrams.counts)
    first_seen = index.first_seen[index.positions]
    shared = numpy.bincount(row_of_ngram, weights=first_seen != NOT_SEEN, minlength=len(ngrams.counts)).astype(
        numpy.int64
    )
    fractions = shared / numpy.maximum(ngrams.counts, 1)
    rows = numpy.flatnonzero(fractions >= MIN_SHARED_FRACTION)
    shown = rows[numpy.argsort(-fractions[rows], kind="stable")[:max_shown]]
    ends = numpy.cumsum(ngrams.counts)
    return len(rows), [
        NearDuplicate(
            row=int(row),
            shared_ngrams=int(shared[row]),
            ngrams=int(ngrams.counts[row]),
            source=_find_most_frequent(first_seen[ends[row] - ngrams.counts[row] : ends[row]]),
        )
        for row in shown
    ]


def _find_most_frequent(first_seen: Integers) -> int:
    rows, counts = numpy.unique(first_seen[first_seen != NOT_SEEN], return_counts=True)
    return int(rows[counts.argmax()])
