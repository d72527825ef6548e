"""What became of every row: the account that is kept on the way, its limits, and the report made of it."""

import math
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from lathe.common.errors import InputError
from lathe.data.counts import EXAMPLES, Tally
from lathe.data.near_duplicates import NEAR, Index, N, Near, near
from lathe.data.read_files import Fault
from lathe.data.row_store import Reader
from lathe.data.split_files import SPLITS
from lathe.data.splits import Splits
from lathe.data.tokenization import Measured

if TYPE_CHECKING:
    from lathe.config.params import Preprocess

QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}

# Tukey's far-out fence: lengths beyond the third quartile by more than so many times the distance of the quartiles.
FAR_OUT = 3

BARS = 40  # of a histogram, at most about

Faults = dict[str, Tally[tuple[str, Fault]]]


class Account:
    """Where every row went: for each split, read + taken from train = kept + given + dropped."""

    def __init__(self, settings: "Preprocess") -> None:
        self.settings = settings
        self.files: dict[str, dict[str, Any]] = {}
        self.columns: dict[str, Any] = {}
        self.faults: dict[str, Faults] = {name: {} for name in SPLITS}
        self.splits = Splits(rows={}, removed={})
        self.measured: dict[str, Measured] = {}
        self.near: dict[tuple[str, str], tuple[int, int, list[Near]]] = {}

    def read(self, split: str | None = None) -> int:
        """Return how many rows the files of a split, or all of them, have."""
        return sum(file["rows"] for file in self.files.values() if split in (None, file["split"]))

    def given(self) -> set[str]:
        """Return the splits that the source has."""
        return {file["split"] for file in self.files.values()}

    def unusable(self, split: str, at: str, fault: Fault) -> None:
        """Count a row that could not be read as a conversation."""
        self.faults[split].setdefault(fault.reason, Tally()).add(lambda: (at, fault))

    def compare(self, held_out: str, other: str, index: Index) -> None:
        """Note which rows of a held-out split are nearly in the other, which its index has just seen."""
        found = self.measured[held_out].sequences
        count, examples = near(found, index, EXAMPLES)
        self.near[held_out, other] = count, len(found.counts), examples

    def check_read(self) -> None:
        """Raise InputError if more rows were unusable than allowed."""
        self._check_faults([self.faults[name] for name in SPLITS], self.read())

    def check_measured(self, reader: Reader) -> None:
        """Raise InputError where a split is empty, or more rows were dropped, cut or are elsewhere than allowed."""
        looked_at = sum(map(len, self.splits.rows.values()))
        self._check_faults([self.measured[name].faults for name in SPLITS], looked_at)
        self._check_not_empty()
        self._check_truncated()
        self._check_overlap(reader)

    def _check_faults(self, faults: list[Faults], rows: int) -> None:
        tallies = [tally for by_reason in faults for tally in by_reason.values()]
        unusable, allowed = sum(tally.count for tally in tallies), self.settings.max_dropped_fraction
        if unusable and unusable / rows > allowed:
            at, fault = tallies[0].examples[0]
            raise InputError(
                f"{at}: {fault.reason}: {fault}; {unusable} of {rows} rows are unusable, more than "
                f"preprocess.max_dropped_fraction {allowed} allows; mend them or raise it"
            )

    def _check_not_empty(self) -> None:
        for name in SPLITS:
            if not len(self.measured[name].rows):
                counts = ", ".join(f"{count} {reason}" for reason, count in self._dropped(name).items())
                raise InputError(
                    f"no usable {name} row is left ({counts or 'none read'}); give {name} rows that can be kept"
                )

    def _check_truncated(self) -> None:
        kept = sum(len(measured.rows) for measured in self.measured.values())
        tallies = [self.measured[name].cut.rows for name in SPLITS]
        rows, allowed = sum(tally.count for tally in tallies), self.settings.max_truncated_fraction
        if rows / kept > allowed:
            at, problem = next(tally.examples[0] for tally in tallies if tally.examples)
            raise InputError(
                f"{at}: {problem}; {rows} of {kept} rows lost part of their {self._side()}, more than "
                f"preprocess.max_truncated_fraction {allowed} allows; raise training.max_length or it"
            )

    def _check_overlap(self, reader: Reader) -> None:
        allowed = self.settings.max_overlap_fraction
        for pair, (rows, checked, examples) in sorted(self.near.items()):
            if checked and rows / checked > allowed:
                at, problem = self._near_example(pair, examples[0], reader)
                raise InputError(
                    f"{at}: {problem}; {rows} of {checked} {pair[0]} rows are nearly in {pair[1]}, more than "
                    f"preprocess.max_overlap_fraction {allowed} allows; remove them or raise it"
                )

    def _near_example(self, pair: tuple[str, str], example: Near, reader: Reader) -> tuple[str, str]:
        held_out, other = pair
        source = reader.at(self.splits.rows[other][example.source])
        problem = f"{example.found} of its {example.sequences} word sequences are in {other}, most of them in {source}"
        return reader.at(self.measured[held_out].rows[example.place]), problem

    def _side(self) -> str | None:
        return None if self.settings.too_long == "drop" else self.settings.too_long.removeprefix("truncate_")

    def _dropped(self, name: str) -> dict[str, int]:
        tallies: list[tuple[str, Tally[Any]]] = [
            *self.faults[name].items(),
            *self.splits.removed[name].items(),
            *self.measured[name].faults.items(),
        ]
        return {reason: tally.count for reason, tally in sorted(tallies)}

    def report(self, reader: Reader) -> dict[str, Any]:
        """Return the report as JSON values; `reader` tells where rows stood.

        What is no list is what one compares between experiments: DVC makes columns of it.
        """
        splits = [self._split(name) for name in SPLITS]
        return {
            "rows": {
                "read": self.read(),
                "kept": sum(split["kept"] for split in splits),
                "dropped": sum(sum(split["dropped"].values()) for split in splits),
                "truncated": sum(split["truncated"]["rows"] for split in splits),
                "nearly_in_another_split": sum(rows for rows, _, _ in self.near.values()),
            },
            "supervised_tokens": next(split["supervised_tokens"] for split in splits if split["split"] == "train"),
            "columns": [self.columns],
            "files": [{"file": name, **facts} for name, facts in self.files.items()],
            "splits": splits,
            "overlap": [{"splits": pair, "rows": rows} for pair, rows in sorted(self.splits.overlap.items())],
            "near_overlap": [self._near(pair, reader) for pair in sorted(self.near)],
            "examples": [
                {"split": name, "dropped": self._dropped_examples(name), **_examples(self.measured[name], reader)}
                for name in SPLITS
            ],
        }

    def _split(self, name: str) -> dict[str, Any]:
        measured, given = self.measured[name], sum(self.splits.taken_from_train.values())
        return {
            "split": name,
            "read": self.read(name),
            "taken_from_train": self.splits.taken_from_train.get(name, 0),
            "given_to_others": given if name == "train" else 0,
            "kept": len(measured.rows),
            "dropped": self._dropped(name),
            "truncated": self._truncated(measured),
            **_token_statistics(measured),
            "length_outliers": _length_outliers(measured),
            "scripts": _scripts(measured),
        }

    def _truncated(self, measured: Measured) -> dict[str, Any]:
        cut = measured.cut
        return {
            "rows": cut.rows.count,
            "side": self._side(),
            "tokens": cut.tokens,
            "supervised_tokens": cut.supervised_tokens,
        }

    def _near(self, pair: tuple[str, str], reader: Reader) -> dict[str, Any]:
        rows, checked, examples = self.near[pair]
        shown = [self._near_example(pair, example, reader) for example in examples]
        return {
            "splits": f"{pair[0]}_in_{pair[1]}",
            "rule": f"at least {NEAR:.0%} of a row's sequences of {N} words are in the other split",
            "rows": rows,
            "checked": checked,
            "share": round(rows / checked, 4) if checked else None,
            "examples": [{"at": at, "problem": problem} for at, problem in shown],
        }

    def _dropped_examples(self, name: str) -> dict[str, list[dict[str, str | None]]]:
        faults = [*self.faults[name].items(), *self.measured[name].faults.items()]
        found = {
            reason: [{"at": at, "field": fault.field, "problem": fault.problem} for at, fault in tally.examples]
            for reason, tally in faults
        }
        for reason, tally in self.splits.removed[name].items():
            found[reason] = [{"at": at, "field": None, "problem": problem} for at, problem in tally.examples]
        return dict(sorted(found.items()))

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Return the tables of the plots: how many rows of which length, and what became of how many."""
        fates = [
            {"split": name, "fate": fate, "rows": rows}
            for name in SPLITS
            for fate, rows in {"kept": len(self.measured[name].rows), **self._dropped(name)}.items()
        ]
        return {"lengths": _histograms(self.measured), "rows": fates}


def _token_statistics(measured: Measured) -> dict[str, Any]:
    supervised = int(measured.length("supervised").sum(dtype=numpy.int64))
    tokens = int(measured.length("tokens").sum(dtype=numpy.int64))
    pairs = ["rejected"] if measured.length("rejected").any() else []
    return {
        "sequences": int(measured.length("sequences").sum()),
        "tokens": {part: _quantiles(measured.length(part)) for part in ("prompt", "answer", "total", *pairs)},
        "supervised_tokens": supervised,
        "supervised_share": round(supervised / tokens, 4) if tokens else None,
    }


def _quantiles(values: NDArray[numpy.int32]) -> dict[str, int]:
    """Nearest-rank quantiles: each is a length that occurs."""
    ordered = numpy.sort(values)
    return {name: int(_quantile(ordered, share)) for name, share in QUANTILES.items()}


def _quantile(ordered: NDArray[numpy.int32], share: float) -> int:
    return int(ordered[max(0, math.ceil(share * len(ordered)) - 1)])


def _length_outliers(measured: Measured) -> dict[str, int]:
    totals = numpy.sort(measured.length("total"))
    low, high = _quantile(totals, 0.25), _quantile(totals, 0.75)
    limit = high + FAR_OUT * (high - low)
    return {"above_tokens": limit, "rows": int((totals > limit).sum())}


def _scripts(measured: Measured) -> dict[str, int]:
    """Return how many rows are mostly in which script, the most frequent first."""
    by_count = sorted(measured.scripts.items(), key=lambda item: (-item[1].count, item[0]))
    return {name: tally.count for name, tally in by_count}


def _examples(measured: Measured, reader: Reader) -> dict[str, Any]:
    """Return where rows stand that one may want to look at."""
    totals = measured.length("total")
    by_length = numpy.argsort(totals, kind="stable")
    _, *others = _scripts(measured)
    return {
        "longest": [_with_length(measured, row, reader) for row in by_length[::-1][:EXAMPLES]],
        "shortest": [_with_length(measured, row, reader) for row in by_length[:EXAMPLES]],
        "truncated": [{"at": at, "problem": problem} for at, problem in measured.cut.rows.examples],
        "other_scripts": {name: measured.scripts[name].examples for name in others},
    }


def _with_length(measured: Measured, row: int, reader: Reader) -> dict[str, Any]:
    return {"at": reader.at(measured.rows[row]), "tokens": int(measured.length("total")[row])}


def _histograms(measured: dict[str, Measured]) -> list[dict[str, Any]]:
    longest = max(int(split.length("total").max()) for split in measured.values())
    width = _round_width(longest / BARS)
    return [
        {"split": name, "part": part, "tokens": number * width, "rows": int(rows)}
        for part in ("prompt", "answer", "total")
        for name in SPLITS
        # The last, empty one ends the one before it.
        for number, rows in enumerate([*numpy.bincount(measured[name].length(part) // width), 0])
    ]


def _round_width(width: float) -> int:
    """Return the next larger of 1, 2, 5, 10, 20, 50, ..."""
    power = 10 ** max(0, math.floor(math.log10(max(width, 1))))
    return next(power * step for step in (1, 2, 5, 10) if power * step >= width)
