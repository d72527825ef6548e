"""Labels: the classes of a dataset by number, kept in labels.json, and the rows of a split with theirs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lathe.common import json_files
from lathe.common.errors import InputError
from lathe.common.jsonl import read_jsonl

FILE = "labels.json"


@dataclass(frozen=True)
class Labels:
    """The classes in the order of their numbers, and whether a text may have several of them."""

    names: tuple[str, ...]
    multi_label: bool

    def number(self, name: str) -> int | None:
        """Return the number of a class; None if training has no row of it."""
        return self._numbers.get(name)

    def encode(self, rows: Sequence[Sequence[str]]) -> list[list[int]]:
        """Return the numbers of each row's labels, without those that training does not have."""
        numbers = self._numbers
        return [[numbers[name] for name in row if name in numbers] for row in rows]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def write(self, folder: Path) -> None:
        """Write labels.json into a folder."""
        json_files.write_json(folder / FILE, {"multi_label": self.multi_label, "labels": list(self.names)})


def read_labels(folder: Path) -> Labels:
    """Read labels.json of a folder. Raises InputError if it is missing or damaged."""
    content = json_files.read_json_object(folder / FILE)
    return Labels(tuple(content["labels"]), bool(content["multi_label"]))


def collect_labels(rows: Iterable[Sequence[str]], *, multi_label: bool) -> Labels:
    """Return the classes of training rows, sorted by name. Raises InputError if there are too few to tell apart."""
    names = sorted({name for row in rows for name in row})
    if len(names) < (1 if multi_label else 2):
        known = f"only the label {names[0]!r}" if names else "no label"
        raise InputError(
            f"the training rows have {known}; a classifier tells at least two classes apart; check the label column of "
            "the dataset's preset (completion)",
            code="too-few-labels",
        )
    return Labels(tuple(names), multi_label)


def read_split(folder: Path, split: str) -> tuple[list[str], list[list[str]]]:
    """Return the texts and the labels of a split that the stage prepare wrote."""
    rows = read_jsonl(folder / f"{split}.jsonl")
    return [row["text"] for row in rows], [row["labels"] for row in rows]
