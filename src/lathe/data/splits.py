"""Splits: which example goes into which split, decided by content and seed, never by its place in a file."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy

from lathe.common.errors import InputError
from lathe.data.duplicates import RemovedRows, RowNumbers, rank_digests, remove_duplicates
from lathe.data.example_store import ExampleReader, StoredExamples
from lathe.data.occurrences import MAX_SHOWN
from lathe.data.split_files import SPLITS


@dataclass(slots=True)
class Splits:
    """Row numbers by split, in the order of their digests, and what was removed or moved.

    `removed` is by split and reason. `taken_from_train` counts the rows that train gave to a split which the source
    does not have. `overlap` counts the rows removed from one split for being in another, by `train_in_test` and so on.
    """

    rows: dict[str, RowNumbers]
    removed: dict[str, dict[str, RemovedRows]]
    taken_from_train: dict[str, int] = field(default_factory=dict)
    overlap: Counter[str] = field(default_factory=Counter)


def assign_splits(
    stored: StoredExamples,
    *,
    source_splits: Collection[str],
    numbers: RowNumbers | None = None,
    taken: Collection[str] = ("test", "validation"),
    shown: str = "the dataset",
    validation_fraction: float,
    test_fraction: float,
    limits: dict[str, int],
) -> Splits:
    """Return the three splits without duplicates, and without a prompt that is in two of them.

    With `numbers`, only these rows are looked at. `shown` names the dataset in messages.

    - A split that is in `taken` and not in `source_splits` is taken from train: the prompts with the smallest digests,
      `*_fraction` of all distinct prompts, at least one.
    - Of equal examples one is kept.
    - A prompt of two splits is kept in test rather than in validation, and in validation rather than in train.
    - A split over its limit keeps the rows with the smallest digests.

    None of this depends on the order of the input. Raises InputError if a split would be empty.
    """
    splits = Splits(rows={}, removed={name: {} for name in SPLITS})
    prompts = rank_digests(stored.prompt)
    with stored.open_reader() as reader:
        for number, name in enumerate(SPLITS):
            if name in source_splits:
                mine = numpy.flatnonzero(stored.splits == number)
                mine = mine if numbers is None else numpy.intersect1d(mine, numbers, assume_unique=True)
                splits.rows[name] = remove_duplicates(mine, stored, reader, splits.removed[name])
        _remove_overlap(splits, prompts, reader)
        fractions = {"test": test_fraction, "validation": validation_fraction}
        _take_from_train(splits, prompts, {name: fractions[name] for name in taken}, shown)
        for name, limit in limits.items():
            if name not in splits.rows:
                continue
            over = splits.rows[name][limit:]
            if len(over):
                first = [(reader.read_place(row), f"the split keeps {limit} rows") for row in over[:MAX_SHOWN]]
                splits.removed[name]["over_limit"] = RemovedRows(len(over), first)
            splits.rows[name] = splits.rows[name][:limit]
    return splits


def remove_overlap(splits: Splits, stored: StoredExamples, reader: ExampleReader) -> None:
    """Remove the prompts that are in two of the splits from one of them, and count them."""
    _remove_overlap(splits, rank_digests(stored.prompt), reader)


def _remove_overlap(splits: Splits, prompts: RowNumbers, reader: ExampleReader) -> None:
    no_row = -1
    owner = numpy.full(prompts.max(initial=-1) + 1, no_row)  # of each prompt: the row of an earlier split that has it
    split_of = numpy.zeros(len(prompts), dtype=numpy.uint8)
    for name in ("test", "validation", "train"):
        if name not in splits.rows:
            continue
        rows = splits.rows[name]
        owners = owner[prompts[rows]]
        shared = owners != no_row
        if shared.any():
            first = [
                (
                    reader.read_place(row),
                    f"its prompt is that of {reader.read_place(other)} in {SPLITS[split_of[other]]}",
                )
                for row, other in zip(rows[shared][:MAX_SHOWN], owners[shared], strict=False)
            ]
            splits.removed[name]["in_other_split"] = RemovedRows(int(shared.sum()), first)
            for other, count in zip(*numpy.unique(split_of[owners[shared]], return_counts=True), strict=True):
                splits.overlap[f"{name}_in_{SPLITS[other]}"] += int(count)
        rows = splits.rows[name] = rows[~shared]
        owner[prompts[rows[::-1]]] = rows[::-1]  # reversed: of several rows with one prompt, the first is its owner
        split_of[rows] = SPLITS.index(name)


def _take_from_train(splits: Splits, prompts: RowNumbers, fractions: dict[str, float], shown: str) -> None:
    if "train" not in splits.rows:
        return
    train = splits.rows["train"]
    distinct = numpy.unique(prompts[train])
    counts = {
        name: max(1, round(fraction * len(distinct))) for name, fraction in fractions.items() if name not in splits.rows
    }
    if counts and len(distinct) < 1 + sum(counts.values()):
        names = " and ".join(counts)
        raise InputError(
            f"{shown} has {len(distinct)} different prompts, too few to take {names} from; "
            f"add rows, or a file for {names}",
            code="too-few-prompts",
        )
    start = 0
    for name, count in counts.items():
        chosen = numpy.isin(prompts[train], distinct[start : start + count])
        start += count
        splits.rows[name], train = train[chosen], train[~chosen]
        splits.taken_from_train[name] = len(splits.rows[name])
    splits.rows["train"] = train
