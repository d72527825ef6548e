"""Preprocessing report: what happened to every row, the limits on that, and the numbers for metrics and plots."""

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from lathe.common.errors import InputError
from lathe.data.example_store import ExampleReader
from lathe.data.mixture import count_by_dataset
from lathe.data.near_duplicates import NGramIndex
from lathe.data.occurrences import MAX_SHOWN, Occurrences, describe_excess
from lathe.data.read_files import Fault
from lathe.data.split_files import SPLITS
from lathe.data.split_overlap import SplitOverlap
from lathe.data.splits import Splits
from lathe.data.tokenization import TokenizedSplit

if TYPE_CHECKING:
    from lathe.config.params import Preprocess
    from lathe.data.read_examples import ExampleFiles

QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}

# Tukey's outer fence: a length is an outlier above the third quartile plus this many interquartile ranges.
FAR_OUT_FENCE = 3

HISTOGRAM_BARS = 40  # roughly, at most

FaultsByReason = dict[str, Occurrences[tuple[str, Fault]]]


class Account:
    """Where every row went: in each split, read + taken from train = kept + given to other splits + dropped."""

    def __init__(self, settings: "Preprocess") -> None:
        self.settings = settings
        self.files: dict[str, dict[str, Any]] = {}
        self.columns: list[dict[str, Any]] = []
        self.unused: Counter[str] = Counter()  # rows by the columns, and keys of messages, that nothing reads
        self.faults: dict[str, FaultsByReason] = {name: {} for name in SPLITS}
        self.splits = Splits(rows={}, removed={})
        self.tokenized: dict[str, TokenizedSplit] = {}
        self.near_duplicates = SplitOverlap()

    def count_rows(self, split: str | None = None) -> int:
        """Return the number of rows in the files of a split, or of all splits."""
        return sum(file["rows"] for file in self.files.values() if split in (None, file["split"]))

    def _count_not_read(self) -> dict[str, int]:
        """Return how many rows a limit left unread, if it did."""
        rows = sum(file.get("not_read", 0) for file in self.files.values())
        return {"not_read": rows} if rows else {}

    def get_source_splits(self, dataset: str = "") -> set[str]:
        """Return the splits that the source, or a dataset of a mixture, has files for."""
        return {file["split"] for file in self.files.values() if file.get("dataset", "") == dataset}

    def add_dataset(self, examples: "ExampleFiles") -> None:
        """Take note of the files and columns of a dataset whose records have been read."""
        self.files |= examples.files
        self.unused.update(examples.unused)
        self.columns.append({**({"dataset": examples.name} if examples.name else {}), **examples.columns})

    def add_fault(self, split: str, place: str, fault: Fault) -> None:
        """Count a record that did not become an example."""
        self.faults[split].setdefault(fault.reason, Occurrences()).add(lambda: (place, fault))

    def add_near_duplicates(self, held_out: str, other: str, index: NGramIndex) -> None:
        """Count the rows of a held-out split that are nearly in the other split, which its index has just seen."""
        mine = self.tokenized[held_out]
        self.near_duplicates.add((held_out, other), mine.ngrams, index, mine.rows, self.splits.rows[other])

    def check_records(self) -> None:
        """Raise InputError if more records were unusable than max_dropped_fraction allows."""
        self._check_faults([self.faults[name] for name in SPLITS], self.count_rows())

    def check_splits(self, reader: ExampleReader) -> None:
        """Raise InputError if a split is empty, or more rows were dropped, truncated or overlap than allowed."""
        rows = sum(map(len, self.splits.rows.values()))
        self._check_faults([self.tokenized[name].faults for name in SPLITS], rows)
        self._check_not_empty()
        self._check_truncated()
        self._check_overlap(reader)

    def _check_faults(self, faults: list[FaultsByReason], rows: int) -> None:
        occurrences = [cases for by_reason in faults for cases in by_reason.values()]
        unusable = sum(cases.count for cases in occurrences)
        if excess := describe_excess(unusable, rows, self.settings.max_dropped_fraction):
            place, fault = occurrences[0].first[0]
            raise InputError(f"{place}: {fault.reason}: {fault}; {excess}", code="too-many-dropped")

    def _check_not_empty(self) -> None:
        for name in SPLITS:
            if not len(self.tokenized[name].rows):
                counts = ", ".join(f"{count} {reason}" for reason, count in self._count_dropped(name).items())
                raise InputError(
                    f"no usable {name} row is left ({counts or 'none read'}); add {name} rows that can be used",
                    code="empty-split",
                )

    def _check_truncated(self) -> None:
        kept = sum(len(tokenized.rows) for tokenized in self.tokenized.values())
        occurrences = [self.tokenized[name].truncations.rows for name in SPLITS]
        rows, allowed = sum(cases.count for cases in occurrences), self.settings.max_truncated_fraction
        if rows / kept > allowed:
            place, problem = next(cases.first[0] for cases in occurrences if cases.first)
            raise InputError(
                f"{place}: {problem}; {rows} of {kept} rows lost part of their {self._get_truncated_side()}, more than "
                f"preprocess.max_truncated_fraction {allowed} allows; raise training.max_length or it",
                code="too-many-truncated",
            )

    def _check_overlap(self, reader: ExampleReader) -> None:
        if excess := self.near_duplicates.describe_excess(self.settings.max_overlap_fraction, reader):
            raise InputError(excess, code="too-much-overlap")

    def _get_truncated_side(self) -> str | None:
        return None if self.settings.too_long == "drop" else self.settings.too_long.removeprefix("truncate_")

    def _count_dropped(self, name: str) -> dict[str, int]:
        occurrences: list[tuple[str, Occurrences[Any]]] = [
            *self.faults[name].items(),
            *self.splits.removed.get(name, {}).items(),
            *(self.tokenized[name].faults.items() if name in self.tokenized else ()),
        ]
        return {reason: cases.count for reason, cases in sorted(occurrences)}

    def make_report(self, reader: ExampleReader) -> dict[str, Any]:
        """Return the report as JSON values; `reader` looks up the places of rows.

        Numbers that are compared between experiments are not in lists: DVC shows these alone as columns.
        """
        splits = [self._report_split(name) for name in SPLITS]
        return {
            "rows": {
                "read": self.count_rows(),
                **self._count_not_read(),
                "kept": sum(split["kept"] for split in splits),
                "dropped": sum(sum(split["dropped"].values()) for split in splits),
                "truncated": sum(split["truncated"]["rows"] for split in splits),
                "nearly_in_another_split": self.near_duplicates.count_rows(),
            },
            "supervised_tokens": next(split["supervised_tokens"] for split in splits if split["split"] == "train"),
            "columns": self.columns,
            **self._report_unused(),
            "files": [{"file": name, **facts} for name, facts in self.files.items()],
            "splits": splits,
            **self._report_datasets(reader),
            "overlap": [{"splits": pair, "rows": rows} for pair, rows in sorted(self.splits.overlap.items())],
            "near_overlap": self.near_duplicates.make_report(reader),
            "examples": [
                {
                    "split": name,
                    "dropped": self._report_dropped(name),
                    **_list_notable_rows(self.tokenized[name], reader),
                }
                for name in SPLITS
            ],
        }

    def _report_datasets(self, reader: ExampleReader) -> dict[str, Any]:
        """Return how many rows each dataset of a mixture has in each split, and its share of the training rows."""
        names = [columns["dataset"] for columns in self.columns if "dataset" in columns]
        if not names:
            return {}
        counts = {split: count_by_dataset(reader.stored, self.tokenized[split].rows, names) for split in SPLITS}
        total = sum(counts["train"].values())
        read = {name: sum(file["rows"] for file in self.files.values() if file["dataset"] == name) for name in names}
        kept = {name: {split: counts[split][name] for split in SPLITS} for name in names}
        return {
            "datasets": [
                {
                    "dataset": name,
                    "read": read[name],
                    **kept[name],
                    "dropped": read[name] - sum(kept[name].values()),
                    "share_of_train": round(kept[name]["train"] / total, 4) if total else None,
                }
                for name in names
            ]
        }

    def make_partial_report(self, reader: ExampleReader) -> dict[str, Any]:
        """Return as much of the report as is known where the stage fails; a row that is not dropped yet is kept."""
        splits = [self._report_known_split(name) for name in SPLITS]
        return {
            "rows": {name: sum(split[name] for split in splits) for name in ("read", "kept", "truncated")}
            | {"dropped": sum(sum(split["dropped"].values()) for split in splits), **self._count_not_read()},
            "columns": self.columns,
            **self._report_unused(),
            "files": [{"file": name, **facts} for name, facts in self.files.items()],
            "splits": splits,
            "near_overlap": self.near_duplicates.make_report(reader),
            "examples": [
                {
                    "split": name,
                    "dropped": self._report_dropped(name),
                    "truncated": [
                        {"at": place, "problem": problem} for place, problem in self._get_truncated(name).first
                    ],
                }
                for name in SPLITS
            ],
        }

    def _report_unused(self) -> dict[str, Any]:
        return {"unused": [{"name": name, "rows": rows} for name, rows in self.unused.items()]} if self.unused else {}

    def _report_known_split(self, name: str) -> dict[str, Any]:
        dropped = self._count_dropped(name)
        taken, given = self.splits.taken_from_train, sum(self.splits.taken_from_train.values())
        moved = -given if name == "train" else taken.get(name, 0)
        return {
            "split": name,
            "read": self.count_rows(name),
            "kept": self.count_rows(name) + moved - sum(dropped.values()),
            "dropped": dropped,
            "truncated": self._get_truncated(name).count,
        }

    def _get_truncated(self, name: str) -> Occurrences[tuple[str, str]]:
        return self.tokenized[name].truncations.rows if name in self.tokenized else Occurrences()

    def _report_split(self, name: str) -> dict[str, Any]:
        tokenized, given = self.tokenized[name], sum(self.splits.taken_from_train.values())
        return {
            "split": name,
            "read": self.count_rows(name),
            "taken_from_train": self.splits.taken_from_train.get(name, 0),
            "given_to_others": given if name == "train" else 0,
            "kept": len(tokenized.rows),
            "dropped": self._count_dropped(name),
            "truncated": self._report_truncations(tokenized),
            **_compute_token_statistics(tokenized),
            **({} if name == "train" else {"references": _describe_references(tokenized)}),
            "length_outliers": _count_length_outliers(tokenized),
            "scripts": _count_scripts(tokenized),
        }

    def _report_truncations(self, tokenized: TokenizedSplit) -> dict[str, Any]:
        truncations = tokenized.truncations
        return {
            "rows": truncations.rows.count,
            "side": self._get_truncated_side(),
            "tokens": truncations.tokens,
            "supervised_tokens": truncations.supervised_tokens,
        }

    def _report_dropped(self, name: str) -> dict[str, list[dict[str, str | None]]]:
        tokenized = self.tokenized[name].faults if name in self.tokenized else {}
        faults = [*self.faults[name].items(), *tokenized.items()]
        dropped = {
            reason: [{"at": place, "field": fault.field, "problem": fault.problem} for place, fault in cases.first]
            for reason, cases in faults
        }
        for reason, cases in self.splits.removed.get(name, {}).items():
            dropped[reason] = [{"at": place, "field": None, "problem": problem} for place, problem in cases.first]
        return dict(sorted(dropped.items()))

    def make_tables(self) -> dict[str, list[dict[str, Any]]]:
        """Return the tables for the plots: `lengths` (rows by token length) and `rows` (kept or dropped by reason)."""
        fates = [
            {"split": name, "fate": fate, "rows": rows}
            for name in SPLITS
            for fate, rows in {"kept": len(self.tokenized[name].rows), **self._count_dropped(name)}.items()
        ]
        return {"lengths": _make_histograms(self.tokenized), "rows": fates}


def _compute_token_statistics(tokenized: TokenizedSplit) -> dict[str, Any]:
    supervised = int(tokenized.get_lengths("supervised").sum(dtype=numpy.int64))
    tokens = int(tokenized.get_lengths("tokens").sum(dtype=numpy.int64))
    pairs = ["rejected"] if tokenized.get_lengths("rejected").any() else []
    return {
        "sequences": int(tokenized.get_lengths("sequences").sum()),
        "tokens": {
            part: _compute_quantiles(tokenized.get_lengths(part)) for part in ("prompt", "answer", "total", *pairs)
        },
        "supervised_tokens": supervised,
        "supervised_share": round(supervised / tokens, 4) if tokens else None,
    }


def _describe_references(tokenized: TokenizedSplit) -> dict[str, Any]:
    """Return lengths and kind of a held-out split's references: what the checks before a training need."""
    prompts = tokenized.get_lengths("conversation") - tokenized.get_lengths("reference")
    with_tools = int(tokenized.get_lengths("tools").sum())
    return {
        "tokens": _compute_quantiles(tokenized.get_lengths("reference")),
        "prompt_tokens": _compute_quantiles(prompts),
        "conversation_tokens": _compute_quantiles(tokenized.get_lengths("conversation")),
        "words": _compute_quantiles(tokenized.get_lengths("words")),
        "json_rows": int(tokenized.get_lengths("json").sum()),
        **({"tool_rows": with_tools} if with_tools else {}),
        **({"documents": documents} if (documents := int(tokenized.get_lengths("document").sum())) else {}),
    }


def _compute_quantiles(values: NDArray[numpy.int32]) -> dict[str, int]:
    """Return the nearest-rank quantiles, so that each is a length that occurs."""
    ordered = numpy.sort(values)
    return {name: int(_select_quantile(ordered, fraction)) for name, fraction in QUANTILES.items()}


def _select_quantile(ordered: NDArray[numpy.int32], fraction: float) -> int:
    return int(ordered[max(0, math.ceil(fraction * len(ordered)) - 1)])


def _count_length_outliers(tokenized: TokenizedSplit) -> dict[str, int]:
    totals = numpy.sort(tokenized.get_lengths("total"))
    low, high = _select_quantile(totals, 0.25), _select_quantile(totals, 0.75)
    limit = high + FAR_OUT_FENCE * (high - low)
    return {"above_tokens": limit, "rows": int((totals > limit).sum())}


def _count_scripts(tokenized: TokenizedSplit) -> dict[str, int]:
    """Return the number of rows by writing system, the most frequent first."""
    by_count = sorted(tokenized.scripts.items(), key=lambda item: (-item[1].count, item[0]))
    return {name: cases.count for name, cases in by_count}


def _list_notable_rows(tokenized: TokenizedSplit, reader: ExampleReader) -> dict[str, Any]:
    """Return the places of rows worth a look: the longest, the shortest, truncated ones, those in other scripts."""
    totals = tokenized.get_lengths("total")
    by_length = numpy.argsort(totals, kind="stable")
    _, *others = _count_scripts(tokenized)
    return {
        "longest": [_describe_length(tokenized, row, reader) for row in by_length[::-1][:MAX_SHOWN]],
        "shortest": [_describe_length(tokenized, row, reader) for row in by_length[:MAX_SHOWN]],
        "truncated": [{"at": place, "problem": problem} for place, problem in tokenized.truncations.rows.first],
        "other_scripts": {name: tokenized.scripts[name].first for name in others},
    }


def _describe_length(tokenized: TokenizedSplit, row: int, reader: ExampleReader) -> dict[str, Any]:
    return {"at": reader.read_place(tokenized.rows[row]), "tokens": int(tokenized.get_lengths("total")[row])}


def _make_histograms(tokenized: dict[str, TokenizedSplit]) -> list[dict[str, Any]]:
    longest = max(int(split.get_lengths("total").max()) for split in tokenized.values())
    width = _round_width(longest / HISTOGRAM_BARS)
    return [
        {"split": name, "part": part, "tokens": number * width, "rows": int(rows)}
        for part in ("prompt", "answer", "total")
        for name in SPLITS
        # An empty bar at the end, so that the plot's steps end after the last bar.
        for number, rows in enumerate([*numpy.bincount(tokenized[name].get_lengths(part) // width), 0])
    ]


def _round_width(width: float) -> int:
    """Return the next larger of 1, 2, 5, 10, 20, 50, ..."""
    power = 10 ** max(0, math.floor(math.log10(max(width, 1))))
    return next(power * step for step in (1, 2, 5, 10) if power * step >= width)
