"""From files as the source gave them to rows that know where they stand."""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from lathe.common.errors import InputError
from lathe.data.split_files import suffix_of

ROWS_PER_BATCH = 1000  # made Python objects at once, of an Arrow or Parquet file

ARROW_FILE = b"ARROW1"
ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


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


def read_rows(file: Path) -> Iterator[RawRow]:
    """Yield the rows of a data file, of one of `files.SUFFIXES`; a value that is a Fault is a row that cannot be read.

    Rows are read as they are asked for; a JSON array alone is read whole. Raises InputError where the file as a whole
    is at fault: not UTF-8, cut short, empty, a quote left open.
    """
    number = 0
    try:
        for row in READERS[suffix_of(file) or ""](file):
            number += 1
            yield row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{file.name} after row {number}: not a whole gzip file: {_first_line(error)}; is it cut short?"
        ) from None
    if number == 0:
        raise InputError(f"{file.name}: holds no row; give a file with data or remove it")


def _opened(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file)) if file.suffix.lower() == ".gz" else file.open("rb")


def _read_jsonl(file: Path) -> Iterator[RawRow]:
    with _opened(file) as lines:
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
    with _opened(file) as whole:
        text = _text(whole.read(), file, 1)
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
    with _opened(file) as lines:
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
    import pyarrow.parquet

    def batches() -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from table.iter_batches(batch_size=ROWS_PER_BATCH)

    return _table_rows(file, "Parquet", batches)


def _read_arrow(file: Path) -> Iterator[RawRow]:
    """Both forms of Arrow's IPC: the file, and the stream that `datasets.save_to_disk` writes."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with file.open("rb") as start:
            is_file = start.read(len(ARROW_FILE)) == ARROW_FILE
        with pyarrow.OSFile(str(file)) as source:
            if is_file:
                table = pyarrow.ipc.open_file(source)
                for index in range(table.num_record_batches):
                    yield table.get_batch(index)
                return
            yield from pyarrow.ipc.open_stream(source)
            # A stream cut between two batches reads like a shorter one.
            source.seek(max(0, source.size() - len(ARROW_STREAM_END)))
            if source.read() != ARROW_STREAM_END:
                raise pyarrow.ArrowInvalid("the end mark of the stream is missing")

    return _table_rows(file, "Arrow", batches)


def _table_rows(file: Path, form: str, batches: Callable[[], Iterator[Any]]) -> Iterator[RawRow]:
    import pyarrow

    number = 0
    try:
        for batch in batches():
            _header(batch.schema.names, file, None)
            labels = _label_names(batch.schema)
            for start in range(0, batch.num_rows, ROWS_PER_BATCH):
                for value in batch.slice(start, ROWS_PER_BATCH).to_pylist():
                    number += 1
                    for column, names in labels.items():
                        if isinstance(value[column], int):
                            value[column] = names[value[column]] if 0 <= value[column] < len(names) else None
                    yield RawRow(f"{file.name} row {number}", value)
    except UnicodeDecodeError:
        raise InputError(f"{file.name} after row {number}: a text is not UTF-8; write the file anew") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{file.name} after row {number}: not a whole {form} file: {_first_line(error)}; is it cut short?"
        ) from None


def _label_names(schema: Any) -> dict[str, list[str]]:
    """Return the names of each class label column, which `datasets` stores as numbers and describes in the schema."""
    described = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(described).get("info", {}).get("features", {}) if described else {}
    return {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and column in schema.names
    }


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".jsonl.gz": _read_jsonl,
    ".json.gz": _read_json,
    ".csv.gz": _read_csv,
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


def _header(names: list[str], file: Path, line: int | None) -> list[str]:
    at = f"{file.name}:{line}" if line else file.name
    for name in names:
        if not name.strip():
            raise InputError(f"{at}: the header names no column {names.index(name) + 1}; name it")
        if names.count(name) > 1:
            raise InputError(f"{at}: the header names {name!r} twice; rename one of them")
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
