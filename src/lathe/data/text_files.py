"""Text files as they come out of offices: their encoding, and the delimiter of a CSV file's columns."""

import codecs
import csv
import gzip
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from lathe.common.errors import InputError
from lathe.data.text_encodings import guess_encoding

UTF_8 = "utf-8"
# Read to tell the encoding and the delimiter.
SAMPLE_BYTES = 1 << 16
SAMPLE_ROWS = 50
CHUNK_BYTES = 1 << 16

COMMA, TAB = ",", "\t"
DELIMITERS = {COMMA: "commas", ";": "semicolons", TAB: "tabs", "|": "vertical bars"}
LINE_END = re.compile(rb"\r\n|\r|\n")
# Excel's own first line, which names the delimiter.
SEPARATOR_LINE = "sep="


@dataclass(frozen=True, slots=True)
class TextForm:
    """How a text file is read: encoding, by Python's name, delimiter of CSV, and key of a JSON object's rows.

    None: told by its content. A file of raw text is one document, or holds documents that blank lines separate.
    """

    encoding: str | None = None
    delimiter: str | None = None
    rows_key: str | None = None
    is_one_document: bool = False


BY_CONTENT = TextForm()


def open_file(file: Path) -> BinaryIO:
    """Open a file, gzipped or not, for its bytes."""
    return cast(BinaryIO, gzip.open(file)) if file.suffix.lower() == ".gz" else file.open("rb")


def find_encoding(file: Path, form: TextForm = BY_CONTENT) -> str:
    """Return the encoding of a text file: the named one, else what its beginning tells, else UTF-8.

    Raises InputError where the named one is none.
    """
    if form.encoding:
        try:
            return codecs.lookup(form.encoding).name
        except LookupError:
            raise InputError(
                f"presets.yaml: encoding {form.encoding!r} is not known; write it as Python does: utf-8, utf-16, "
                "cp1251, latin-1",
                code="unknown-encoding",
            ) from None
    with open_file(file) as source:
        sample = source.read(SAMPLE_BYTES)
    if b"\0" in sample and (wide := guess_encoding(sample)):  # UTF-16 of ASCII letters is UTF-8 with NUL characters
        return wide
    return UTF_8 if _is_utf_8(sample) else guess_encoding(sample) or UTF_8


def find_delimiter(file: Path, encoding: str, form: TextForm = BY_CONTENT) -> str:
    """Return the delimiter of a CSV file: the named one, else the one that gives its first rows the same columns.

    Where several do, it is the comma, else the one with most columns. Raises InputError where Excel's first line names
    none that is possible.
    """
    if form.delimiter:
        return form.delimiter
    lines = _read_sample(file, encoding)
    if lines and lines[0].startswith(SEPARATOR_LINE):
        named = lines[0][len(SEPARATOR_LINE) :].strip("\r\n") or COMMA
        if len(named) > 1 or named == '"':
            raise InputError(
                f"{file.name}:1: {lines[0].strip()!r} names no delimiter, which is one character and no quote; "
                "correct the line, or remove it",
                code="bad-delimiter",
            )
        return named
    if file.name.lower().removesuffix(".gz").endswith(".tsv"):
        return TAB
    columns = {delimiter: _count_columns(lines, delimiter) for delimiter in DELIMITERS}
    if columns[COMMA] > 1:
        return COMMA
    return max(columns, key=lambda delimiter: columns[delimiter])


def iterate_lines(file: Path, encoding: str) -> Iterator[str]:
    """Yield the lines of a text file, with their ends. Raises InputError with the line that is not in the encoding."""
    with open_file(file) as source:
        if encoding != UTF_8 or _ends_with_carriage_returns(source):
            yield from _iterate_encoded(source, file, encoding)
            return
        for number, line in enumerate(source, start=1):
            yield decode(line, file, number)


def iterate_chunks(file: Path, encoding: str) -> Iterator[str]:
    """Yield the text of a file in chunks. Raises InputError with the line that is not in the encoding."""
    # That of UTF-8 leaves the byte order mark out, as those of UTF-16 and UTF-32 do.
    decoder = codecs.getincrementaldecoder("utf-8-sig" if encoding == UTF_8 else encoding)()
    line, is_last = 1, False
    with open_file(file) as source:
        while not is_last:
            data = source.read(CHUNK_BYTES)
            is_last = not data
            state = decoder.getstate()
            try:
                text = decoder.decode(data, is_last)
            except UnicodeDecodeError:
                if encoding != UTF_8:
                    raise _refuse_encoding(file, line - 1, encoding) from None
                decode(state[0] + data, file, line)  # finds the byte
                raise _refuse_encoding(file, line - 1, encoding) from None  # the last character is cut
            line += text.count("\n")
            yield text


def decode(data: bytes, file: Path, line: int) -> str:
    """Return UTF-8 as text, without a byte order mark at the beginning of line 1; raises InputError with the line."""
    try:
        return data.decode("utf-8-sig" if line == 1 else UTF_8)
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise InputError(
            f"{file.name}:{line}: byte 0x{data[error.start]:02x} is not UTF-8, and the beginning of the file tells no "
            "other encoding; save the file as UTF-8, or name its encoding in the dataset's preset (encoding: cp1251)",
            code="not-utf-8",
        ) from None


def describe_form(encoding: str, delimiter: str | None) -> dict[str, str]:
    """Return what a report says of a file that is not plain UTF-8 with commas: its encoding and delimiter."""
    described = {} if encoding == UTF_8 else {"encoding": encoding}
    return described if delimiter in (None, COMMA) else {**described, "delimiter": str(delimiter)}


def _ends_with_carriage_returns(source: BinaryIO) -> bool:
    """Tell whether the first line of a file ends as on an old Mac, and in Excel's `CSV (Macintosh)`."""
    sample = source.read(SAMPLE_BYTES)
    source.seek(0)
    first = LINE_END.search(sample)
    return first is not None and first[0] == b"\r" and _is_utf_8(sample)


def _is_utf_8(sample: bytes) -> bool:
    """Tell whether the beginning of a file is UTF-8; its last character may be cut."""
    try:
        codecs.getincrementaldecoder(UTF_8)().decode(sample)
    except UnicodeDecodeError:
        return False
    return True


def _iterate_encoded(source: BinaryIO, file: Path, encoding: str) -> Iterator[str]:
    number = 0
    try:
        for line in io.TextIOWrapper(source, encoding=encoding, newline=""):
            number += 1
            yield line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeError:
        raise _refuse_encoding(file, number, encoding) from None


def _refuse_encoding(file: Path, line: int, encoding: str) -> InputError:
    return InputError(
        f"{file.name} after line {line}: is not {encoding}; save the file as UTF-8, or name its encoding in the "
        "dataset's preset (encoding: cp1251)",
        code="not-in-encoding",
    )


def _read_sample(file: Path, encoding: str) -> list[str]:
    lines: list[str] = []
    try:
        for line in iterate_lines(file, encoding):
            lines.append(line)
            if len(lines) == SAMPLE_ROWS:
                break
    except InputError:
        pass  # said again, with its line, when the rows are read
    return lines


def _count_columns(lines: list[str], delimiter: str) -> int:
    """Return the columns of a sample's header by a delimiter; 1 if most of its rows have another number of them."""
    try:
        rows = [fields for fields in csv.reader(lines, delimiter=delimiter) if fields]
    except csv.Error:
        return 1
    wanted = len(rows[0]) if rows else 1
    alike = sum(len(fields) == wanted for fields in rows)
    return wanted if 2 * alike > len(rows) else 1
