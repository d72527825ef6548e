"""From raw files to validated splits of chat messages, with an account of every row."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lathe.data.conversations import Columns
from lathe.data.files import SPLITS, split_files, suffix_of
from lathe.data.messages import RowFault
from lathe.data.reading import Fault, read_rows
from lathe.data.splits import Row, Splits, divide, keyed
from lathe.errors import InputError

if TYPE_CHECKING:
    from lathe.params import DatasetPreset
    from lathe.template import Encoded

EXAMPLES = 3  # shown per reason

QUANTILES = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class Prepared:
    """The rows of each split, `{"messages": [{"role", "content"}, ...]}`, and the report on all that were read.

    A row made of a preference pair holds `rejected` too: the worse answer, as a list of one message.
    """

    splits: dict[str, list[dict[str, Any]]]
    report: dict[str, Any]


def prepare(
    raw: Path,
    preset: "DatasetPreset",
    *,
    tokenizer: Any,
    max_length: int,
    seed: int,
    validation_fraction: float,
    test_fraction: float,
    max_dropped_fraction: float,
    supervise: Literal["all", "last"],
) -> Prepared:
    """Read the files of the folder `raw` and return train, validation and test as conversations for `tokenizer`.

    An unusable row is dropped and counted; more than `max_dropped_fraction` of them are an error that names the first.
    Duplicates, prompts found in another split and rows over a limit of the preset are removed and counted, and are no
    fault. A row of more than `max_length` tokens is dropped as `too_long`, never cut: without its beginning a chat
    prompt is one that inference never sees, without its end an answer teaches not to stop.

    Rows are in the order of their content's seeded digest: reordering the input, or cutting it into shards, changes no
    byte of the output. Raises InputError for a file that cannot be read, missing columns, and an empty split.
    """
    from lathe.template import control_tokens

    account = _Account()
    rows = _read(raw, preset, control_tokens(tokenizer), seed, account)
    account.check(max_dropped_fraction, account.read())

    limits = {str(name): limit for name, limit in (preset.limits or {}).items()}
    splits = divide(rows, validation_fraction=validation_fraction, test_fraction=test_fraction, limits=limits)
    account.removed(splits)
    if preset.system_prompt:
        _add_system_prompt(splits, preset.system_prompt)

    lengths: dict[str, list[_Length]] = {}
    measured = sum(map(len, splits.rows.values()))
    for name in SPLITS:
        splits.rows[name], lengths[name] = _fitting(
            splits.rows[name], tokenizer, max_length, supervise, account.dropped[name]
        )
    account.check(max_dropped_fraction, measured)
    account.check_not_empty(splits)
    return Prepared(
        splits={name: [{"messages": row.messages, **row.extras} for row in splits.rows[name]] for name in SPLITS},
        report=account.report(splits, lengths),
    )


@dataclass(frozen=True, slots=True)
class _Length:
    prompt: int
    answer: int
    total: int
    supervised: int
    tokens: int  # of all the row's sequences


@dataclass(slots=True)
class _Dropped:
    """Rows that left one split, in the order they were found."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str | None]]] = field(default_factory=dict)
    unusable: list[tuple[str, Fault]] = field(default_factory=list)  # the first of this step
    unusable_count: int = 0

    def add(self, at: str, fault: Fault, *, unusable: bool) -> None:
        self.counts[fault.reason] += 1
        examples = self.examples.setdefault(fault.reason, [])
        if len(examples) < EXAMPLES:
            examples.append({"at": at, "field": fault.field, "problem": fault.problem})
        if unusable:
            self.unusable_count += 1
            if not self.unusable:
                self.unusable.append((at, fault))


class _Account:
    """Where every row went: for each split, read + taken from train = kept + given + dropped."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self.columns: dict[str, Any] = {}
        self.dropped = {name: _Dropped() for name in SPLITS}

    def read(self, split: str | None = None) -> int:
        return sum(file["rows"] for file in self.files.values() if split in (None, file["split"]))

    def removed(self, splits: Splits) -> None:
        for name, removed in splits.removed.items():
            for item in removed:
                self.dropped[name].add(item.row.at, Fault(item.reason, None, item.problem), unusable=False)

    def check(self, max_dropped_fraction: float, rows: int) -> None:
        """Raise InputError if more of the `rows` just looked at are unusable than allowed; then begin the next step."""
        unusable = sum(dropped.unusable_count for dropped in self.dropped.values())
        first = [found for dropped in self.dropped.values() for found in dropped.unusable]
        if unusable and unusable / rows > max_dropped_fraction:
            at, fault = first[0]
            raise InputError(
                f"{at}: {fault.reason}: {fault}; {unusable} of {rows} rows are unusable, more than "
                f"preprocess.max_dropped_fraction {max_dropped_fraction} allows; mend them or raise it"
            )
        for dropped in self.dropped.values():
            dropped.unusable, dropped.unusable_count = [], 0

    def check_not_empty(self, splits: Splits) -> None:
        for name in SPLITS:
            if not splits.rows[name]:
                counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped[name].counts.items()))
                raise InputError(
                    f"no usable {name} row is left ({counts or 'none read'}); give {name} rows that can be kept"
                )

    def report(self, splits: Splits, lengths: dict[str, list[_Length]]) -> dict[str, Any]:
        given = sum(splits.taken_from_train.values())
        return {
            "columns": self.columns,
            "files": self.files,
            "rows": {
                "read": self.read(),
                "kept": sum(len(splits.rows[name]) for name in SPLITS),
                "dropped": sum(dropped.counts.total() for dropped in self.dropped.values()),
            },
            "splits": {
                name: {
                    "read": self.read(name),
                    "taken_from_train": splits.taken_from_train.get(name, 0),
                    "given_to_others": given if name == "train" else 0,
                    "kept": len(splits.rows[name]),
                    "dropped": dict(sorted(self.dropped[name].counts.items())),
                    **_token_statistics(lengths[name]),
                }
                for name in SPLITS
            },
            "overlap": dict(sorted(splits.overlap.items())),
            "dropped_examples": {
                name: dict(sorted(dropped.examples.items()))
                for name, dropped in self.dropped.items()
                if dropped.examples
            },
        }


def _read(
    raw: Path, preset: "DatasetPreset", control_tokens: re.Pattern[str], seed: int, account: _Account
) -> dict[str, list[Row]]:
    files = split_files(raw)
    if "train" not in files:
        raise InputError(
            f"{next(iter(files.values()))[0].name}: there is no train split beside it; name the training file train.*"
        )
    rows: dict[str, list[Row]] = {}
    columns: Columns | None = None
    for split, shards in files.items():
        rows[split] = []
        for file in shards:
            names: dict[str, None] = {}
            count = 0
            for raw_row in read_rows(file):
                count += 1
                if isinstance(raw_row.value, Fault):
                    account.dropped[split].add(raw_row.at, raw_row.value, unusable=True)
                    continue
                names.update(dict.fromkeys(raw_row.value))
                columns = columns or Columns(preset, names, file.name, control_tokens)
                try:
                    messages, extras = columns.conversation(raw_row.value), columns.extras(raw_row.value)
                    rows[split].append(keyed(raw_row.at, messages, seed, extras))
                except RowFault as error:
                    account.dropped[split].add(raw_row.at, error.fault, unusable=True)
            if columns and names:
                columns.require(names, file.name)
            account.files[file.name] = {"split": split, "format": (suffix_of(file) or "")[1:], "rows": count}
    if columns:
        account.columns = {**columns.description, "detected": columns.detected}
    return rows


def _add_system_prompt(splits: Splits, system_prompt: str) -> None:
    for rows in splits.rows.values():
        for row in rows:
            if row.messages[0]["role"] != "system":
                row.messages.insert(0, {"role": "system", "content": system_prompt})


def _fitting(
    rows: list[Row], tokenizer: Any, max_length: int, supervise: Literal["all", "last"], dropped: _Dropped
) -> tuple[list[Row], list[_Length]]:
    from lathe.template import TemplateError, encode_each

    kept, lengths = [], []
    encoded = encode_each(tokenizer, [row.messages for row in rows], supervise=supervise)
    for row, result in zip(rows, encoded, strict=True):
        if isinstance(result, TemplateError):
            dropped.add(row.at, Fault("template", None, str(result)), unusable=True)
            continue
        length = _length(result)
        if length.total > max_length:
            problem = (
                f"is {length.total} tokens long ({length.prompt} prompt, {length.answer} answer); "
                f"expected at most training.max_length {max_length}"
            )
            dropped.add(row.at, Fault("too_long", None, problem), unusable=True)
            continue
        kept.append(row)
        lengths.append(length)
    return kept, lengths


def _length(sequences: Sequence["Encoded"]) -> _Length:
    longest = max(sequences, key=lambda sequence: len(sequence.input_ids))
    return _Length(
        prompt=len(longest.input_ids) - sum(longest.supervised),
        answer=sum(longest.supervised),
        total=len(longest.input_ids),
        supervised=sum(sum(sequence.supervised) for sequence in sequences),
        tokens=sum(len(sequence.input_ids) for sequence in sequences),
    )


def _token_statistics(lengths: list[_Length]) -> dict[str, Any]:
    supervised, tokens = sum(row.supervised for row in lengths), sum(row.tokens for row in lengths)
    return {
        "tokens": {
            "prompt": _quantiles([row.prompt for row in lengths]),
            "answer": _quantiles([row.answer for row in lengths]),
            "total": _quantiles([row.total for row in lengths]),
        },
        "supervised_tokens": supervised,
        "supervised_share": round(supervised / tokens, 4) if tokens else None,
    }


def _quantiles(values: list[int]) -> dict[str, int]:
    """Nearest-rank quantiles: each is a length that occurs."""
    ordered = sorted(values)
    return {name: ordered[max(0, math.ceil(share * len(ordered)) - 1)] for name, share in QUANTILES.items()}
