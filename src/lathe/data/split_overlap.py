"""Overlap of splits: rows of a held-out split that are nearly in another split, counted, reported and limited."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from lathe.data.duplicates import RowNumbers
from lathe.data.example_store import ExampleReader, StoredExamples
from lathe.data.near_duplicates import (
    MIN_SHARED_FRACTION,
    NGRAM_WORDS,
    SAMPLE_BYTES,
    NearDuplicate,
    NGramIndex,
    NGrams,
    concatenate_ngrams,
    find_near_duplicates,
    get_dialogue,
    hash_ngrams,
    hash_words,
)
from lathe.data.occurrences import MAX_SHOWN

ROWS_PER_BATCH = 512
# Held-out splits come first, as their n-grams are looked up in later ones.
ORDER = ("test", "validation", "train")


@dataclass(frozen=True)
class _Overlap:
    """How many `rows` of those `checked` in a held-out split are nearly in another one; `shown` are the most alike.

    `held_out` and `other` are the row numbers of both splits, which those in `shown` are indices of.
    """

    rows: int
    checked: int
    shown: list[NearDuplicate]
    held_out: RowNumbers
    other: RowNumbers


class SplitOverlap:
    """The near duplicates between all pairs of splits, by (held-out split, other split)."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], _Overlap] = {}

    def add(
        self, pair: tuple[str, str], ngrams: NGrams, index: NGramIndex, held_out: RowNumbers, other: RowNumbers
    ) -> None:
        """Count the rows of the held-out split, with these n-grams, that are nearly in what the index has just seen."""
        rows, shown = find_near_duplicates(ngrams, index, MAX_SHOWN)
        self.found[pair] = _Overlap(rows, len(ngrams.counts), shown, held_out, other)

    def count_rows(self) -> int:
        """Return how many rows are nearly in another split."""
        return sum(overlap.rows for overlap in self.found.values())

    def describe_excess(self, allowed: float, reader: ExampleReader) -> str | None:
        """Say that more rows are nearly in another split than `preprocess.max_overlap_fraction` allows; None if not."""
        for pair, overlap in sorted(self.found.items()):
            if overlap.checked and overlap.rows / overlap.checked > allowed:
                place, problem = _describe(pair, overlap, overlap.shown[0], reader)
                return (
                    f"{place}: {problem}; {overlap.rows} of {overlap.checked} {pair[0]} rows are nearly in {pair[1]}, "
                    f"more than preprocess.max_overlap_fraction {allowed} allows; remove them or raise it"
                )
        return None

    def make_report(self, reader: ExampleReader) -> list[dict[str, Any]]:
        """Return what is found of each pair as JSON values."""
        return [
            {
                "splits": f"{pair[0]}_in_{pair[1]}",
                "rule": f"at least {MIN_SHARED_FRACTION:.0%} of a row's sequences of {NGRAM_WORDS} words are in the "
                "other split",
                "rows": overlap.rows,
                "checked": overlap.checked,
                "share": round(overlap.rows / overlap.checked, 4) if overlap.checked else None,
                "examples": [
                    {"at": place, "problem": problem}
                    for place, problem in (_describe(pair, overlap, each, reader) for each in overlap.shown)
                ],
            }
            for pair, overlap in sorted(self.found.items())
        ]


def count_sampled_rows(stored: StoredExamples, numbers: RowNumbers) -> int:
    """Return how many of a held-out split's rows, from its first on, are looked up in other splits."""
    return int(numpy.searchsorted(numpy.cumsum(stored.lengths[numbers]), SAMPLE_BYTES))


def find_split_overlap(stored: StoredExamples, rows: Mapping[str, RowNumbers], reader: ExampleReader) -> SplitOverlap:
    """Return the near duplicates between the splits as they are, before any row is tokenised."""
    found = SplitOverlap()
    indexes: dict[str, tuple[NGramIndex, NGrams]] = {}
    for name in ORDER:
        numbers = rows[name]
        sampled: list[NGrams] = []
        sample = count_sampled_rows(stored, numbers) if name != "train" else 0
        for index, _ in indexes.values():
            index.reset()
        for start in range(0, len(numbers), ROWS_PER_BATCH):
            batch = numbers[start : start + ROWS_PER_BATCH]
            examples = (json.loads(reader.read_line(row)) for row in batch)
            ngrams = hash_ngrams([hash_words(get_dialogue(example["messages"])) for example in examples])
            for index, _ in indexes.values():
                index.mark_seen(ngrams, start + numpy.arange(len(batch)))
            if start < sample:
                sampled.append(ngrams.take_first(sample - start))
        for held_out, (index, own) in indexes.items():
            found.add((held_out, name), own, index, rows[held_out], numbers)
        if name != "train":
            own = concatenate_ngrams(sampled)
            indexes[name] = NGramIndex.build(own), own
    return found


def _describe(
    pair: tuple[str, str], overlap: _Overlap, duplicate: NearDuplicate, reader: ExampleReader
) -> tuple[str, str]:
    source = reader.read_place(overlap.other[duplicate.source])
    shared = f"{duplicate.shared_ngrams} of its {duplicate.ngrams} word sequences"
    place = reader.read_place(overlap.held_out[duplicate.row])
    return place, f"{shared} are in {pair[1]}, most of them in {source}"
