"""Faults of labels: classes with few rows, equal texts and near duplicates that have different labels."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lathe.data.near_duplicates import hash_words

FEW_ROWS = 8  # of a class in training, below which its scores mean little
SHOWN = 10  # pairs
LEAST_WORDS = 6  # of a text that one other word makes a near duplicate; in a shorter one it may be all that matters


@dataclass(frozen=True)
class LabelledText:
    """A row: its place in the user's file, its text, and its labels."""

    place: str
    text: str
    labels: tuple[str, ...]


def describe_labels(rows: Sequence[LabelledText]) -> dict[str, Any]:
    """Return how many rows each class has, and how unequal that is."""
    counts = Counter(label for row in rows for label in row.labels)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {
        "rows": len(rows),
        "without_label": sum(not row.labels for row in rows),
        "classes": len(counts),
        "largest": ordered[0][1] if ordered else 0,
        "smallest": ordered[-1][1] if ordered else 0,
        "imbalance": round(ordered[0][1] / ordered[-1][1], 2) if ordered else None,
        "few": [label for label, count in ordered if count < FEW_ROWS],
        "counts": [{"label": label, "rows": count} for label, count in ordered],
    }


def find_contradictions(rows: Sequence[LabelledText]) -> dict[str, Any]:
    """Return pairs of rows that say the same, or nearly, and have different labels.

    Equal texts have the same words in the same order, whatever case and punctuation. Near duplicates, of at least
    LEAST_WORDS words, differ in one word that is another, or is left out.
    """
    words = [tuple(hash_words(row.text)) for row in rows]
    first: dict[tuple[int, ...], int] = {}
    equal: list[tuple[int, int]] = []
    for number, key in enumerate(words):
        other = first.setdefault(key, number)
        if other != number and rows[other].labels != rows[number].labels:
            equal.append((other, number))
    near = _find_near(rows, words, first)
    return {
        "equal_texts": len(equal),
        "near_duplicates": len(near),
        "equal_examples": [_describe_pair(rows, pair) for pair in equal[:SHOWN]],
        "near_examples": [_describe_pair(rows, pair) for pair in near[:SHOWN]],
    }


def _find_near(
    rows: Sequence[LabelledText], words: Sequence[tuple[int, ...]], first: dict[tuple[int, ...], int]
) -> list[tuple[int, int]]:
    """Return for each row the first earlier one with another label that differs in one word."""
    # A text without one of its words: two texts that differ in one word have one of these in common.
    shortened: defaultdict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
    pairs = []
    for number, key in enumerate(words):
        if first[key] != number or len(key) < LEAST_WORDS:
            continue
        known: set[int] = set()
        for place in range(len(key)):
            without = key[:place] + key[place + 1 :]
            known.update(shortened[place, without])
            shortened[place, without].append(number)
            if without in first:
                known.add(first[without])
        others = [other for other in known if other != number and rows[other].labels != rows[number].labels]
        if others:
            pairs.append((min(others), number))
    return pairs


def _describe_pair(rows: Sequence[LabelledText], pair: tuple[int, int]) -> dict[str, Any]:
    one, other = (rows[number] for number in pair)
    return {
        "at": [one.place, other.place],
        "texts": [one.text, other.text],
        "labels": [list(one.labels), list(other.labels)],
    }
