"""Mixture: the rows of several datasets in one, each with its own splits, and the share that each has in training.

Which rows of a dataset are taken is decided as for a limit, by the digests of their content, and their number exactly:
a random draw, as `datasets.interleave_datasets` makes it, would give another number with each seed, repeat rows to
reach a share, and depend on the order of the rows.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy

from lathe.common.errors import InputError
from lathe.data.duplicates import RemovedRows, RowNumbers, remove_duplicates
from lathe.data.example_store import ExampleReader, StoredExamples
from lathe.data.occurrences import MAX_SHOWN
from lathe.data.split_files import SPLITS

if TYPE_CHECKING:
    from lathe.config.presets import SingleDataset
    from lathe.data.splits import Splits


def assign_all_splits(
    stored: StoredExamples,
    datasets: "Mapping[str, SingleDataset]",
    *,
    source_splits: Mapping[str, Collection[str]],
    validation_fraction: float,
    test_fraction: float,
) -> "Splits":
    """Return the three splits of a mixture's datasets, or of a single one that is named "".

    `source_splits` are those that each has files for. Raises InputError if a split would be empty.
    """
    from lathe.data.splits import assign_splits

    fractions: dict[str, Any] = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
    if list(datasets) != [""]:
        return assign_mixed_splits(stored, datasets, source_splits=source_splits, **fractions)
    limits = {str(name): limit for name, limit in (datasets[""].limits or {}).items()}
    return assign_splits(stored, source_splits=source_splits[""], limits=limits, **fractions)


def assign_mixed_splits(
    stored: StoredExamples,
    datasets: "Mapping[str, SingleDataset]",
    *,
    source_splits: Mapping[str, Iterable[str]],
    validation_fraction: float,
    test_fraction: float,
) -> "Splits":
    """Return the three splits of several datasets, whose rows in `stored` are numbered in the order of `datasets`.

    Each dataset is split for itself. What is twice among them, or in two splits, is then kept once, as of a single one;
    at last each dataset gives as many training rows as its weight or number of rows says. `source_splits` are those
    that each has files for. Raises InputError if a split would be empty.
    """
    from lathe.data.splits import Splits, assign_splits, remove_overlap

    mixed = Splits(rows={name: numpy.empty(0, dtype=numpy.int64) for name in SPLITS}, removed={n: {} for n in SPLITS})
    for index, (name, preset) in enumerate(datasets.items()):
        only = getattr(preset, "split", None)
        part = assign_splits(
            stored,
            numbers=numpy.flatnonzero(stored.datasets == index),
            source_splits=list(source_splits[name]),
            taken=() if only else ("test", "validation"),
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            limits={str(split): limit for split, limit in (preset.limits or {}).items()},
            shown=f"the dataset {name} of the mixture",
        )
        for split, rows in part.rows.items():
            mixed.rows[split] = numpy.concatenate([mixed.rows[split], rows])
            _add_removed(mixed, split, part.removed.get(split, {}))
        for split, count in part.taken_from_train.items():
            mixed.taken_from_train[split] = mixed.taken_from_train.get(split, 0) + count
        mixed.overlap.update(part.overlap)
    with stored.open_reader() as reader:
        for split in SPLITS:
            removed: dict[str, RemovedRows] = {}
            mixed.rows[split] = remove_duplicates(mixed.rows[split], stored, reader, removed)
            _add_removed(mixed, split, removed)
        before = {split: mixed.removed[split].pop("in_other_split", RemovedRows()) for split in SPLITS}
        remove_overlap(mixed, stored, reader)
        for split, cases in before.items():
            if cases.count:
                _add_removed(mixed, split, {"in_other_split": cases})
        _choose_shares(mixed, stored, datasets, reader)
    for split in SPLITS:
        mixed.rows[split] = _interleave(mixed.rows[split], stored)
    return mixed


def choose_counts(available: Mapping[str, int], presets: "Mapping[str, Any]") -> dict[str, int]:
    """Return how many of its training rows each dataset gives.

    With weights they are as many as there can be in these proportions without repeating a row.
    """
    weights = {name: preset.weight for name, preset in presets.items() if available.get(name) and preset.weight}
    if not weights:
        return {name: min(count, presets[name].rows or count) for name, count in available.items()}
    whole = sum(weights.values())
    total = min(available[name] / (weight / whole) for name, weight in weights.items())
    return {
        name: min(available[name], max(1, round(total * weight / whole))) if (weight := weights.get(name)) else count
        for name, count in available.items()
    }


def count_by_dataset(stored: StoredExamples, rows: RowNumbers, names: Iterable[str]) -> dict[str, int]:
    """Return how many of the rows are of each dataset."""
    counts = numpy.bincount(stored.datasets[rows], minlength=len(list(names)))
    return {name: int(count) for name, count in zip(names, counts, strict=False)}


def _choose_shares(
    mixed: "Splits", stored: StoredExamples, datasets: "Mapping[str, Any]", reader: ExampleReader
) -> None:
    train = mixed.rows["train"]
    available = count_by_dataset(stored, train, list(datasets))
    for name, preset in datasets.items():
        if not available[name] and preset.split in (None, "train"):
            raise InputError(
                f"the dataset {name} of the mixture: no training row is left; add rows, or leave it out",
                code="empty-split",
            )
    counts = choose_counts(available, datasets)
    kept = numpy.ones(len(train), dtype=numpy.bool_)
    for index, name in enumerate(datasets):
        over = numpy.flatnonzero(stored.datasets[train] == index)[counts[name] :]
        kept[over] = False
        if len(over):
            problem = f"the mixture takes {counts[name]} training rows of {name}"
            first = [(reader.read_place(row), problem) for row in train[over][:MAX_SHOWN]]
            _add_removed(mixed, "train", {"over_limit": RemovedRows(len(over), first)})
    mixed.rows["train"] = train[kept]


def _interleave(rows: RowNumbers, stored: StoredExamples) -> RowNumbers:
    """Return the rows so that each dataset is spread evenly over them, in its own order.

    By their digests, the few rows that are taken of a dataset would come before those of the others.
    """
    places = numpy.empty(len(rows))
    for index in numpy.unique(stored.datasets[rows]):
        mine = numpy.flatnonzero(stored.datasets[rows] == index)
        places[mine] = (numpy.arange(len(mine)) + 0.5) / len(mine)
    return rows[numpy.argsort(places, kind="stable")]


def _add_removed(splits: "Splits", split: str, removed: Mapping[str, RemovedRows]) -> None:
    for reason, cases in removed.items():
        splits.removed[split].setdefault(reason, RemovedRows()).extend(cases)
