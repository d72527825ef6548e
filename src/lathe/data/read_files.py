"""Data files: the records of JSONL, JSON, CSV, Parquet and Arrow files, each with its place in the file."""

import codecs
import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.common.git_lfs import refuse_pointer
from lathe.common.text import summarize_error
from lathe.data.arrow_features import get_label_names, make_decoders
from lathe.data.json_arrays import find_layout, iterate_items, open_text
from lathe.data.json_rows import find_rows_key, iterate_rows, name_messages
from lathe.data.json_text import Decode, skip_item
from lathe.data.json_values import RepeatedKey, decode_item, describe_json_error, describe_value, load_json
from lathe.data.misnamed_files import refuse_misnamed
from lathe.data.part_of_file import Part
from lathe.data.split_files import get_suffix
from lathe.data.text_files import (
    BY_CONTENT,
    SEPARATOR_LINE,
    TextForm,
    find_delimiter,
    find_encoding,
    iterate_lines,
    open_file,
)

ROWS_PER_BATCH = 1000  # rows of an Arrow or Parquet file that are Python objects at a time

PART_BUFFER_BYTES = 1 << 20  # read of a column at a time, where only some rows of a Parquet file are wanted

ARROW_FILE = b"ARROW1"
ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a record or an example is dropped: reason (a key of the report), field, and problem."""

    reason: str
    field: str | None
    problem: str

    def __str__(self) -> str:
        return f"{self.field} {self.problem}" if self.field else self.problem


@dataclass(frozen=True, slots=True)
class RawRecord:
    """A row of a data file: its place (`train.jsonl:12`, `train.parquet row 12`), and its columns or its fault."""

    place: str
    value: dict[str, Any] | Fault


def read_records(file: Path, form: TextForm = BY_CONTENT, part: Part | None = None) -> Iterator[RawRecord]:
    """Yield the records of a data file with one of `split_files.SUFFIXES`; a text file is read in its `form`.

    With a `part`, only these rows become records.

    The value of a record that cannot be read is its Fault. Files are streamed. Raises
    InputError if the file itself cannot be read: not UTF-8, truncated, empty, a quote that is never closed.
    """
    number = 0
    refuse_pointer(file, file.name)
    refuse_misnamed(file, file.name)
    try:
        for row in _READERS[get_suffix(file) or ""](file, form, part):
            number += 1
            yield row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{file.name} after row {number}: not a complete gzip file: {summarize_error(error)}; is it truncated?",
            code="truncated-file",
        ) from None
    if number == 0:
        raise InputError(f"{file.name}: holds no row; give a file with data or remove it", code="empty-file")


def find_text_form(file: Path, form: TextForm = BY_CONTENT) -> tuple[str, str | None] | None:
    """Return the encoding that a text file is read in, and the delimiter if it is CSV; None for other files."""
    suffix = (get_suffix(file) or "").removesuffix(".gz")
    if suffix in (".parquet", ".arrow"):
        return None
    encoding = find_encoding(file, form)
    return encoding, find_delimiter(file, encoding, form) if suffix in (".csv", ".tsv") else None


def has_byte_order_mark(file: Path) -> bool:
    """Return whether a text file begins with UTF-8's byte order mark, which is read as nothing."""
    with open_file(file) as source:
        return source.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def _read_jsonl(file: Path, form: TextForm, part: Part | None) -> Iterator[RawRecord]:
    if find_layout(file, form) == "array":
        yield from _read_json(file, form, part)
        return
    for number, line in enumerate(iterate_lines(file, find_encoding(file, form)), start=1):
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        if part and not part.holds(number - 1):
            part.left_out += 1
            continue
        try:
            value = load_json(text)
        except (ValueError, RecursionError) as error:
            value = Fault(
                "malformed_json",
                None,
                f"is not a JSON object: {describe_json_error(error)}; expected one per line",
            )
        yield RawRecord(f"{file.name}:{number}", _require_object(value))


def _read_json(file: Path, form: TextForm, part: Part | None) -> Iterator[RawRecord]:
    layout = find_layout(file, form)
    if layout == "lines":
        yield from _read_jsonl(file, form, part)
        return
    try:
        if layout == "array":
            yield from _read_array(file, form, part)
            return
        if open_text(file, form).peek() == "{":
            yield from _read_object(file, form, part)
            return
        text = "".join(iterate_lines(file, find_encoding(file, form)))
        if not text.strip():
            return
        value = load_json(text)
    except json.JSONDecodeError as error:
        # Never into the file itself, which a shell empties first.
        target = f"{file.stem}{'.rows' * (file.suffix == '.jsonl')}.jsonl"
        remedy = f"`jq -c . {file.name} > {target}`" if error.msg == "Extra data" else "is the file truncated?"
        raise InputError(
            f"{file.name}:{error.lineno}: not a JSON array: {describe_json_error(error)}; {remedy}", code="not-json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file.name}: not a JSON array: {describe_json_error(error)}; correct the file", code="not-json"
        ) from None
    raise InputError(
        f"{file.name}:1: holds {describe_value(value)}; expected an array of objects, or one object per line in a "
        ".jsonl",
        code="not-an-array",
    )


def _read_array(file: Path, form: TextForm, part: Part | None) -> Iterator[RawRecord]:
    yield from _make_records(file, part, lambda choose: iterate_items(file, form, choose))


def _read_object(file: Path, form: TextForm, part: Part | None) -> Iterator[RawRecord]:
    key = form.rows_key or find_rows_key(open_text(file, form), file.name)
    yield from _make_records(file, part, lambda choose: iterate_rows(open_text(file, form), key, file.name, choose))


def _make_records(
    file: Path, part: Part | None, iterate: Callable[[Callable[[int], Decode]], Iterator[Any]]
) -> Iterator[RawRecord]:
    """Yield the records of a JSON list; `iterate` yields its items, given what chooses the decoder of each."""
    for number, value in enumerate(
        iterate(lambda number: decode_item if not part or part.holds(number) else skip_item)
    ):
        if not part or part.holds(number):
            yield RawRecord(f"{file.name} row {number + 1}", _require_object(value))
        else:
            part.left_out += 1
            if number >= part.ranges[-1][1]:  # the rest is not read
                part.left_out = part.total - sum(stop - start for start, stop in part.ranges)
                return


def _read_text(file: Path, form: TextForm, part: Part | None) -> Iterator[RawRecord]:
    """Read raw texts: the whole file as one document, or what stands between blank lines."""
    lines: list[str] = []
    start = 1

    def make_record() -> Iterator[RawRecord]:
        if part and not part.holds(start - 1):
            part.left_out += 1
        else:
            yield RawRecord(f"{file.name}:{start}", {"text": "".join(lines).strip("\r\n")})

    for number, line in enumerate(iterate_lines(file, find_encoding(file, form)), start=1):
        if line.strip() or (form.is_one_document and lines):
            start = start if lines else number
            lines.append(line.replace("\r\n", "\n"))
        elif lines:
            yield from make_record()
            lines.clear()
    if lines:
        yield from make_record()


def _read_csv(file: Path, form: TextForm, part: Part | None) -> Iterator[RawRecord]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts over 128 kB
    encoding = find_encoding(file, form)
    delimiter = find_delimiter(file, encoding, form)
    reader = csv.reader(iterate_lines(file, encoding), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    unnamed = 0
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{file.name}:{line}: {_describe_csv_error(error)}", code="not-csv") from None
        if not fields or (line == 1 and fields[0].startswith(SEPARATOR_LINE)):
            continue
        if header is None:
            unnamed = _count_unnamed(fields)
            header = _check_header(_name_index(fields[: len(fields) - unnamed]), file, line)
        elif part and not part.holds(line - 1):
            part.left_out += 1
        elif not any(fields):
            continue  # a line of delimiters alone: a row that the sheet shows empty
        elif len(fields) != len(header) and not (
            len(fields) == len(header) + unnamed and not any(fields[len(header) :])
        ):
            yield RawRecord(f"{file.name}:{line}", _describe_fields(fields, header, unnamed))
        else:
            yield RawRecord(f"{file.name}:{line}", dict(zip(header, fields, strict=False)))


def _name_index(header: list[str]) -> list[str]:
    """Return the header with a name for the first column where it has none: pandas writes its row numbers so."""
    is_index = len(header) > 1 and not header[0].strip() and "Unnamed: 0" not in header
    return ["Unnamed: 0", *header[1:]] if is_index else header


def _count_unnamed(fields: list[str]) -> int:
    """Return how many columns at the end have no name, as a spreadsheet writes those that were once used."""
    named = [index for index, name in enumerate(fields) if name.strip()]
    return len(fields) - named[-1] - 1 if named else 0


def _describe_fields(fields: list[str], header: list[str], unnamed: int) -> Fault:
    if len(fields) == len(header) + unnamed:
        number = next(index for index in range(len(header), len(fields)) if fields[index])
        return Fault(
            "unnamed_column", None, f"has text in column {number + 1}, which the header does not name; name it"
        )
    problem = f"has {len(fields)} fields; expected {len(header) + unnamed} as in the header"
    return Fault("wrong_field_count", None, problem)


def _read_parquet(file: Path, _: TextForm, part: Part | None) -> Iterator[RawRecord]:
    import pyarrow.parquet

    def batches() -> Iterator[tuple[int, Any]]:
        with pyarrow.parquet.ParquetFile(file, buffer_size=PART_BUFFER_BYTES if part else 0) as table:
            if part is None:
                yield from _count_starts(table.iter_batches(batch_size=ROWS_PER_BATCH))
                return
            start = 0
            for group in range(table.num_row_groups):
                end = start + table.metadata.row_group(group).num_rows
                if wanted := part.select(start, end):
                    for number, batch in _count_starts(table.iter_batches(ROWS_PER_BATCH, row_groups=[group])):
                        yield start + number, batch
                        if start + number + batch.num_rows >= wanted[-1][1]:
                            break
                start = end

    return _read_batches(file, "Parquet", batches, part)


def _read_arrow(file: Path, _: TextForm, part: Part | None) -> Iterator[RawRecord]:
    """Read both forms of Arrow's IPC: the file, and the stream that `datasets.save_to_disk` writes."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with file.open("rb") as start:
            is_file = start.read(len(ARROW_FILE)) == ARROW_FILE
        with pyarrow.memory_map(str(file)) if part else pyarrow.OSFile(str(file)) as source:
            if is_file:
                table = pyarrow.ipc.open_file(source)
                for index in range(table.num_record_batches):
                    yield table.get_batch(index)
                return
            yield from pyarrow.ipc.open_stream(source)
            # A stream that is truncated between two batches reads like a shorter one.
            source.seek(max(0, source.size() - len(ARROW_STREAM_END)))
            if source.read() != ARROW_STREAM_END:
                raise pyarrow.ArrowInvalid("the end mark of the stream is missing")

    def checked() -> Iterator[Any]:
        for batch in batches():
            # Places of texts that lie would be read outside of the memory, and end the process.
            batch.validate(full=True)
            yield batch

    return _read_batches(file, "Arrow", lambda: _count_starts(checked()), part)


def _count_starts(batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Yield each batch after the number of its first row."""
    start = 0
    for batch in batches:
        yield start, batch
        start += batch.num_rows


def _read_batches(
    file: Path, form: str, batches: Callable[[], Iterator[tuple[int, Any]]], part: Part | None
) -> Iterator[RawRecord]:
    import pyarrow

    number = 0
    try:
        for first, batch in batches():
            number = first
            _check_header(batch.schema.names, file, None)
            labels, decoders = get_label_names(batch.schema), make_decoders(batch.schema)
            for start, stop in (
                part.select(first, first + batch.num_rows) if part else [(first, first + batch.num_rows)]
            ):
                number = start
                for begin in range(start, stop, ROWS_PER_BATCH):
                    for value in batch.slice(begin - first, min(ROWS_PER_BATCH, stop - begin)).to_pylist():
                        number += 1
                        for column, names in labels.items():
                            if isinstance(value[column], int):
                                value[column] = names[value[column]] if 0 <= value[column] < len(names) else None
                        for column, decode in decoders.items():
                            value[column] = decode(value[column])
                        yield RawRecord(f"{file.name} row {number}", value)
    except UnicodeDecodeError:
        raise _refuse_text(file, number) from None
    except (pyarrow.ArrowException, OSError) as error:
        if "UTF8" in str(error):
            raise _refuse_text(file, number) from None
        raise InputError(
            f"{file.name} after row {number}: not a complete {form} file: {summarize_error(error)}; is it truncated?",
            code="truncated-file",
        ) from None
    if part:
        part.left_out = part.total - sum(stop - start for start, stop in part.ranges)


def _refuse_text(file: Path, number: int) -> InputError:
    return InputError(f"{file.name} after row {number}: a text is not UTF-8; write the file again", code="not-utf-8")


_READERS: dict[str, Callable[[Path, TextForm, Part | None], Iterator[RawRecord]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".jsonl.gz": _read_jsonl,
    ".json.gz": _read_json,
    ".csv.gz": _read_csv,
    ".tsv.gz": _read_csv,
    ".txt": _read_text,
    ".txt.gz": _read_text,
}


def _require_object(value: Any) -> dict[str, Any] | Fault:
    if isinstance(value, dict | Fault):
        return value
    if isinstance(value, RepeatedKey):
        return Fault("duplicate_key", value.key, "occurs twice in one object; expected once")
    if column := name_messages(value):  # a row that is a bare conversation
        return {column: value}
    return Fault("not_an_object", None, f"is {describe_value(value)}; expected an object with named columns")


def _describe_csv_error(error: csv.Error) -> str:
    if "unexpected end of data" in str(error):
        return "the quote that this row opens is never closed; close it"
    return f"not CSV: {summarize_error(error)}; correct this row"


def _check_header(names: list[str], file: Path, line: int | None) -> list[str]:
    place = f"{file.name}:{line}" if line else file.name
    for name in names:
        if not name.strip():
            raise InputError(
                f"{place}: the header has no name for column {names.index(name) + 1}; name it", code="unnamed-column"
            )
        if names.count(name) > 1:
            raise InputError(f"{place}: the header names {name!r} twice; rename one of them", code="duplicate-column")
    return names
