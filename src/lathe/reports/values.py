"""Values that know which file they stand in and where: what the page shows can be looked up, and is, by a test.

An address is `FILE#POINTER`, the latter a JSON pointer as URI fragment (RFC 6901, section 6):
`metrics/evaluate/test.json#/merged/bytes`. Rows of JSONL, CSV and TSV files are counted from 0.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lathe.common.json_files import read_json
from lathe.common.jsonl import read_jsonl
from lathe.config.yaml_files import read_yaml

DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True, slots=True)
class Value:
    """A JSON value with its place; `steps` lead there from the top of `file`."""

    content: Any
    file: str
    steps: tuple[str | int, ...] = ()

    @property
    def address(self) -> str:
        """The file and the pointer, without spaces."""
        steps = (str(step).replace("~", "~0").replace("/", "~1") for step in self.steps)
        return quote(self.file) + "#" + "".join("/" + quote(step, safe="~") for step in steps)

    def get(self, *steps: str | int) -> "Value | None":
        """Return the value that the steps lead to; None where there is none, or null."""
        found = self.content
        for step in steps:
            known = found if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ()
            if step not in known:
                return None
            found = found[step]
        return None if found is None else Value(found, self.file, (*self.steps, *steps))

    def items(self) -> Iterator[tuple[str, "Value"]]:
        """Yield the keys of an object with their values, but those that are null."""
        for key in self.content:
            if (value := self.get(key)) is not None:
                yield key, value

    def __iter__(self) -> Iterator["Value"]:
        """Yield the values of a list."""
        for index, value in enumerate(self.content):
            yield Value(value, self.file, (*self.steps, index))


def read(root: Path, name: str) -> Value | None:
    """Read a JSON, JSONL, CSV, TSV or YAML file; None where it does not exist.

    Raises InputError where it cannot be read as what its name says.
    """
    file = root / name
    if not file.is_file():
        return None
    if file.suffix == ".jsonl":
        return Value(read_jsonl(file), name)
    if file.suffix in {".yaml", ".lock"}:
        return Value(read_yaml(file), name)
    text = file.read_text(encoding="utf-8")
    if file.suffix in DELIMITERS:
        rows = csv.DictReader(text.splitlines(), delimiter=DELIMITERS[file.suffix])
        return Value([{key: _number_or_text(cell) for key, cell in row.items()} for row in rows], name)
    return Value(read_json(file, shown=name), name)


def _number_or_text(cell: str) -> Any:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return cell
