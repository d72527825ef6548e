"""Values with their place in a file, so that a test can look up every number that the page shows.

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
    """A JSON value with its place: the keys and indices (`steps`) that lead to it in `file`."""

    content: Any
    file: str
    steps: tuple[str | int, ...] = ()

    @property
    def address(self) -> str:
        """The file and the pointer, without spaces."""
        steps = (str(step).replace("~", "~0").replace("/", "~1") for step in self.steps)
        return quote(self.file) + "#" + "".join("/" + quote(step, safe="~") for step in steps)

    def get(self, *steps: str | int) -> "Value | None":
        """Return the value that the steps lead to; None if there is none, or null."""
        content = self.content
        for step in steps:
            known = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
            if step not in known:
                return None
            content = content[step]
        return None if content is None else Value(content, self.file, (*self.steps, *steps))

    def items(self) -> Iterator[tuple[str, "Value"]]:
        """Yield the keys of an object with their values, but those that are null."""
        for key in self.content:
            if (value := self.get(key)) is not None:
                yield key, value

    def __iter__(self) -> Iterator["Value"]:
        """Yield the values of a list."""
        for index, value in enumerate(self.content):
            yield Value(value, self.file, (*self.steps, index))


def read_value(root: Path, name: str) -> Value | None:
    """Read a JSON, JSONL, CSV, TSV or YAML file; None if it does not exist.

    Raises InputError if its content is not what its name says.
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
        return Value([{key: _parse_cell(cell) for key, cell in row.items()} for row in rows], name)
    return Value(read_json(file, shown=name), name)


def read_report(root: Path, name: str) -> Value | None:
    """Read a report, which its file holds in a list of one; None if it does not exist."""
    value = read_value(root, name)
    return value.get(0) if value and isinstance(value.content, list) else value


def _parse_cell(cell: str) -> Any:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return cell
