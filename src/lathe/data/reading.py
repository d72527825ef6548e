"""From files as the source gave them to rows that know where they stand."""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lathe.errors import InputError

SPLITS = ("train", "validation", "test")

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
_SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row is unusable: a stable name, the field, and what is wrong with it."""

    reason: str
    field: str | None
    problem: str

    def __str__(self) -> str:
        return f"{self.field} {self.problem}" if self.field else self.problem


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a file: where it stands (`train.jsonl:12`, `train.parquet row 12`) and its columns, or its fault."""

    at: str
    value: dict[str, Any] | Fault


@dataclass(frozen=True, slots=True)
class RepeatedKey:
    """Stands for a JSON object in which a key occurs twice: which of the values is meant cannot be known."""

    key: str


def split_files(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of a folder by split, shards sorted by name; hidden files are passed over.

    Files are named for their split (`train.jsonl`, `val-00000-of-00002.parquet`); a folder of which no file is, is all
    train. Raises InputError for another extension, and where names do not say which file is which.
    """
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    if not files:
        raise InputError(f"{folder.name}: holds no data file; expected one of {_extensions()}")
    for file in files:
        if file.suffix.lower() not in READERS or not file.is_file():
            raise InputError(f"{file.name}: not a data file; expected one of {_extensions()}; remove or convert it")

    names = {file: _split_name(file) for file in files}
    if not any(names.values()):
        return {"train": files}
    by_split: dict[str, list[Path]] = {}
    for file, name in names.items():
        if name is None:
            raise InputError(
                f"{file.name}: belongs to no split while other files do; begin its name with one of "
                f"{', '.join(SPLITS)}, or remove it"
            )
        others = by_split.setdefault(_SPLIT_OF[name], [])
        if others and (names[others[0]], others[0].suffix.lower()) != (name, file.suffix.lower()):
            raise InputError(
                f"{file.name}: {others[0].name} is the {_SPLIT_OF[name]} split too; keep one of them, "
                "or name shards alike (train-0.jsonl, train-1.jsonl)"
            )
        others.append(file)
    return {split: by_split[split] for split in SPLITS if split in by_split}


def read_rows(file: Path) -> Iterator[RawRow]:
    """Yield the rows of a JSONL, JSON, CSV or Parquet file; a value that is a Fault is a row that cannot be read.

    Raises InputError where the file as a whole is at fault: not UTF-8, cut short, empty, a quote left open.
    """
    empty = True
    for row in READERS[file.suffix.lower()](file):
        empty = False
        yield row
    if empty:
        raise InputError(f"{file.name}: holds no row; give a file with data or remove it")


def _split_name(file: Path) -> str | None:
    word = re.split(r"[-_.]", file.name.lower(), maxsplit=1)[0]
    return word if word in _SPLIT_OF else None


def _extensions() -> str:
    return ", ".join(f"*{suffix}" for suffix in READERS)


def _read_jsonl(file: Path) -> Iterator[RawRow]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = _text(line, file, number).rstrip("\r\n")
            if not text.strip():
                continue
            try:
                value = json.loads(text, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                value = Fault("malformed_json", None, f"is not a JSON object: {_json_problem(error)}")
            yield RawRow(f"{file.name}:{number}", _columns(value))


def _read_json(file: Path) -> Iterator[RawRow]:
    text = _text(file.read_bytes(), file, 1)
    if not text.strip():
        return
    try:
        values = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        remedy = "rename it to .jsonl" if error.msg == "Extra data" else "is the file cut short?"
        raise InputError(f"{file.name}:{error.lineno}: not a JSON array: {_json_problem(error)}; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file.name}: not a JSON array: {_json_problem(error)}; mend the file") from None
    if not isinstance(values, list):
        raise InputError(
            f"{file.name}:1: holds {kind(values)}; expected an array of objects, or one object per line in a .jsonl"
        )
    for number, value in enumerate(values, start=1):
        yield RawRow(f"{file.name} row {number}", _columns(value))


def _read_csv(file: Path) -> Iterator[RawRow]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 kB
    with file.open("rb") as lines:
        reader = csv.reader((_text(line, file, number) for number, line in enumerate(lines, start=1)), strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise InputError(f"{file.name}:{line}: {_csv_problem(error)}") from None
            if not fields:
                continue
            if header is None:
                header = _header(fields, file, line)
            elif len(fields) != len(header):
                problem = f"has {len(fields)} fields; expected {len(header)} as in the header"
                yield RawRow(f"{file.name}:{line}", Fault("wrong_field_count", None, problem))
            else:
                yield RawRow(f"{file.name}:{line}", dict(zip(header, fields, strict=True)))


def _read_parquet(file: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=4096):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{file.name} row {number}", value)
    except UnicodeDecodeError:
        raise InputError(f"{file.name} after row {number}: a text is not UTF-8; write the file anew") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{file.name} after row {number}: not a whole Parquet file: {_first_line(error)}; is it cut short?"
        ) from None


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _text(data: bytes, file: Path, line: int) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise InputError(
            f"{file.name}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def _columns(value: Any) -> dict[str, Any] | Fault:
    if isinstance(value, dict | Fault):
        return value
    if isinstance(value, RepeatedKey):
        return Fault("duplicate_key", value.key, "occurs twice in one object; expected once")
    return Fault("not_an_object", None, f"is {kind(value)}; expected an object with named columns")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | RepeatedKey:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    keys = [key for key, _ in pairs]
    return RepeatedKey(next(key for key in keys if keys.count(key) > 1))


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        problem = error.msg.removesuffix(" at")
        return f"{problem[0].lower()}{problem[1:]} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else _first_line(error)


def _csv_problem(error: csv.Error) -> str:
    if "unexpected end of data" in str(error):
        return "the quote opened in this row is never closed; close it"
    return f"not CSV: {_first_line(error)}; mend this row"


def _header(names: list[str], file: Path, line: int) -> list[str]:
    for name in names:
        if not name.strip():
            raise InputError(f"{file.name}:{line}: the header names no column {names.index(name) + 1}; name it")
        if names.count(name) > 1:
            raise InputError(f"{file.name}:{line}: the header names {name!r} twice; rename one of them")
    return names


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def kind(value: Any) -> str:
    """Name a JSON value's type as a reader of the file would."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value!r}" if len(repr(value)) <= 40 else "a long number"
        case str():
            return f"the text {value[:37] + '...' if len(value) > 40 else value!r}"
        case list():
            return "a list"
        case dict() | RepeatedKey():
            return "an object"
    return f"a {type(value).__name__}"
