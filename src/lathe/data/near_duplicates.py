"""Rows of one split that are nearly in another: how many of their word sequences occur there.

The measure is the one by which PaLM's authors called an evaluation row contaminated: at least 70 % of its sequences of
eight words occur in the training rows, each anywhere.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from zlib import crc32

import numpy
from numpy.typing import NDArray

N = 8  # words in a sequence; a shorter row is one sequence
NEAR = 0.7  # share of a row's sequences from which on it counts as nearly in the other split

# So much of a held-out split's text is looked for elsewhere: its first rows in the order of digests, a random sample.
SAMPLE_BYTES = 16_000_000

NOWHERE = numpy.iinfo(numpy.int64).max

Hashes = NDArray[numpy.uint64]
Numbers = NDArray[numpy.int64]

# Writing without spaces: there each character is a word.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")

# The same for ASCII, where it takes a quarter of the time: what belongs to no word becomes a space.
_ASCII_WORDS = bytes(
    ord(chr(byte).lower()) if byte < 128 and (chr(byte).isalnum() or chr(byte) == "_") else ord(" ")
    for byte in range(256)
)


def word_hashes(text: str) -> list[int]:
    """Return a hash of each word of the text, whatever its case."""
    if text.isascii():
        return list(map(crc32, text.encode().translate(_ASCII_WORDS).split()))
    return [crc32(word.encode()) for word in _WORD.findall(text.lower())]


@dataclass(frozen=True, eq=False)
class Sequences:
    """Hashes of the word sequences of some rows, row after row, and how many each row has."""

    hashes: Hashes
    counts: Numbers

    def first(self, rows: int) -> "Sequences":
        """Return those of the first rows."""
        counts = self.counts[:rows]
        # Copies: a view of nothing would still hold all of it.
        return Sequences(self.hashes[: counts.sum()].copy(), counts.copy())


# For an index: positions in it, and the place where each was seen first.
Seen = tuple[Numbers, Numbers]


def joined(parts: Sequence[Sequences]) -> Sequences:
    """Return the sequences of rows that follow each other."""
    nothing = sequences([])
    return Sequences(
        numpy.concatenate([nothing.hashes, *(part.hashes for part in parts)]),
        numpy.concatenate([nothing.counts, *(part.counts for part in parts)]),
    )


def sequences(rows: Sequence[Sequence[int]]) -> Sequences:
    """Return the sequences of rows given as hashes of their words."""
    padded = [[*row, *[0] * (N - len(row))] if 0 < len(row) < N else row for row in rows]
    lengths = numpy.array([len(row) for row in padded], dtype=numpy.int64)
    words = numpy.fromiter(chain.from_iterable(padded), dtype=numpy.uint64, count=int(lengths.sum()))
    counts = numpy.maximum(lengths - (N - 1), 0)
    if not counts.any():
        return Sequences(words[:0], counts)
    hashes = numpy.zeros(len(words) - (N - 1), dtype=numpy.uint64)
    for place in range(N):  # a polynomial in an odd number, modulo 2 ** 64
        hashes *= numpy.uint64(0x9E3779B97F4A7C15)
        hashes += words[place : place + len(hashes)]
    # Sequences that would begin in one row and end in the next are left out.
    inside = numpy.ones(len(words), dtype=numpy.bool_)
    ends = numpy.cumsum(lengths)[lengths > 0]
    for place in range(1, N):
        inside[ends - place] = False
    return Sequences(hashes[inside[: len(hashes)]], counts)


@dataclass(eq=False)
class Index:
    """The sequences of one held-out split, and where each was seen first in another split."""

    hashes: Hashes  # sorted, each once
    places: Numbers  # of each sequence of the split among them
    by_last_bits: NDArray[numpy.bool_]  # whether any hash ends so: most that are not here are told apart at once
    first_seen: Numbers = field(init=False)  # the row's place in its split

    def __post_init__(self) -> None:
        self.forget()

    @classmethod
    def of(cls, found: Sequences) -> "Index":
        """Return the index of a split's sequences; it has seen nothing yet."""
        hashes, places = numpy.unique(found.hashes, return_inverse=True)
        bits = min(26, max(10, 3 + len(hashes).bit_length()))
        by_last_bits = numpy.zeros(1 << bits, dtype=numpy.bool_)
        by_last_bits[(hashes & numpy.uint64(len(by_last_bits) - 1)).astype(numpy.int64)] = True
        return cls(hashes, places, by_last_bits)

    def forget(self) -> None:
        """Begin anew, for another split."""
        self.first_seen = numpy.full(len(self.hashes), NOWHERE)

    def see(self, found: Sequences, places: Numbers) -> None:
        """Note which sequences occur in rows that stand at these places of their split."""
        likely = self.by_last_bits[(found.hashes & numpy.uint64(len(self.by_last_bits) - 1)).astype(numpy.int64)]
        hashes, at = found.hashes[likely], numpy.repeat(places, found.counts)[likely]
        positions = numpy.searchsorted(self.hashes, hashes)
        positions[positions == len(self.hashes)] = 0
        known = self.hashes[positions] == hashes if len(self.hashes) else numpy.zeros(0, dtype=numpy.bool_)
        numpy.minimum.at(self.first_seen, positions[known], at[known])

    def seen(self) -> Seen:
        """Return what was seen, to be merged with what other processes saw."""
        positions = numpy.flatnonzero(self.first_seen != NOWHERE)
        return positions, self.first_seen[positions]

    def merge(self, seen: Iterable[Seen]) -> None:
        """Take what others saw for what was seen."""
        self.forget()
        for positions, places in seen:
            self.first_seen[positions] = numpy.minimum(self.first_seen[positions], places)


@dataclass(frozen=True, slots=True)
class Near:
    """A row of a split that is nearly in another: its place, how many of its sequences are there, and mostly where."""

    place: int
    found: int
    sequences: int
    source: int


def near(found: Sequences, index: Index, examples: int) -> tuple[int, list[Near]]:
    """Return how many of the rows that the index was made of are nearly in the split that it has seen since.

    With them come so many `examples`, the most alike first.
    """
    rows = numpy.repeat(numpy.arange(len(found.counts)), found.counts)
    first_seen = index.first_seen[index.places]
    hits = numpy.bincount(rows, weights=first_seen != NOWHERE, minlength=len(found.counts)).astype(numpy.int64)
    shares = hits / numpy.maximum(found.counts, 1)
    places = numpy.flatnonzero(shares >= NEAR)
    most = places[numpy.argsort(-shares[places], kind="stable")[:examples]]
    ends = numpy.cumsum(found.counts)
    return len(places), [
        Near(
            place=int(place),
            found=int(hits[place]),
            sequences=int(found.counts[place]),
            source=_mostly(first_seen[ends[place] - found.counts[place] : ends[place]]),
        )
        for place in most
    ]


def _mostly(first_seen: Numbers) -> int:
    sources, counts = numpy.unique(first_seen[first_seen != NOWHERE], return_counts=True)
    return int(sources[counts.argmax()])
