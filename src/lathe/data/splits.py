"""Which conversation goes into which split: by content and seed, never by its place in a file."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy

from lathe.common.errors import InputError
from lathe.data.counts import EXAMPLES
from lathe.data.duplicates import Numbers, Removed, _ranks, _without_duplicates
from lathe.data.row_store import Reader, Rows
from lathe.data.split_files import SPLITS


@dataclass(slots=True)
class Splits:
    """Row numbers by split in the order of their digests, what was removed from each, and what train gave to others.

    `removed` is by split and reason; `overlap` counts the rows removed from one split for being in another.
    """

    rows: dict[str, Numbers]
    removed: dict[str, dict[str, Removed]]
    taken_from_train: dict[str, int] = field(default_factory=dict)
    overlap: Counter[str] = field(default_factory=Counter)


def divide(
    rows: Rows,
    *,
    given: Collection[str],
    validation_fraction: float,
    test_fraction: float,
    limits: dict[str, int],
) -> Splits:
    """Return the three splits without duplicates and without a prompt that two of them share.

    A split that is not `given` by the source is taken from train: the prompts with the smallest digests, `*_fraction`
    of all, at least one. Of equal rows one stays; a prompt that is in two splits stays in test before validation before
    train; a split over its limit keeps the rows with the smallest digests. None of this depends on the order of the
    input.
    Raises InputError where a split would be empty.
    """
    splits = Splits(rows={}, removed={name: {} for name in SPLITS})
    prompts = _ranks(rows.prompt)
    with rows.reader() as reader:
        for number, name in enumerate(SPLITS):
            if name in given:
                numbers = numpy.flatnonzero(rows.splits == number)
                splits.rows[name] = _without_duplicates(numbers, rows, reader, splits.removed[name])
        _remove_overlap(splits, prompts, reader)
        _take_from_train(splits, prompts, {"test": test_fraction, "validation": validation_fraction})
        for name, limit in limits.items():
            over = splits.rows[name][limit:]
            if len(over):
                examples = [(reader.at(row), f"the split keeps {limit} rows") for row in over[:EXAMPLES]]
                splits.removed[name]["over_limit"] = Removed(len(over), examples)
            splits.rows[name] = splits.rows[name][:limit]
    return splits


def _remove_overlap(splits: Splits, prompts: Numbers, reader: Reader) -> None:
    nobody = -1
    owner = numpy.full(prompts.max(initial=-1) + 1, nobody)
    split_of = numpy.zeros(len(prompts), dtype=numpy.uint8)
    for name in ("test", "validation", "train"):
        if name not in splits.rows:
            continue
        rows = splits.rows[name]
        owners = owner[prompts[rows]]
        shared = owners != nobody
        if shared.any():
            examples = [
                (reader.at(row), f"its prompt is that of {reader.at(other)} in {SPLITS[split_of[other]]}")
                for row, other in zip(rows[shared][:EXAMPLES], owners[shared], strict=False)
            ]
            splits.removed[name]["in_other_split"] = Removed(int(shared.sum()), examples)
            for other, count in zip(*numpy.unique(split_of[owners[shared]], return_counts=True), strict=True):
                splits.overlap[f"{name}_in_{SPLITS[other]}"] = int(count)
        rows = splits.rows[name] = rows[~shared]
        owner[prompts[rows[::-1]]] = rows[::-1]  # of several rows with one prompt the first
        split_of[rows] = SPLITS.index(name)


def _take_from_train(splits: Splits, prompts: Numbers, fractions: dict[str, float]) -> None:
    train = splits.rows["train"]
    different = numpy.unique(prompts[train])
    wanted = {
        name: max(1, round(fraction * len(different)))
        for name, fraction in fractions.items()
        if name not in splits.rows
    }
    if wanted and len(different) < 1 + sum(wanted.values()):
        raise InputError(
            f"the dataset has {len(different)} different prompts; {' and '.join(wanted)} cannot be taken from so few; "
            f"add rows, or a file for {' and '.join(wanted)}"
        )
    start = 0
    for name, count in wanted.items():
        chosen = numpy.isin(prompts[train], different[start : start + count])
        start += count
        splits.rows[name], train = train[chosen], train[~chosen]
        splits.taken_from_train[name] = len(splits.rows[name])
    splits.rows["train"] = train
