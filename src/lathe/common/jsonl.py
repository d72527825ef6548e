"""JSON Lines: the form of every file of rows."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def write_jsonl(rows: Iterable[Any], file: Path) -> None:
    """Write one compact JSON value per line, UTF-8, equal bytes for equal rows on every machine."""
    with file.open("wb") as lines:
        for row in rows:
            lines.write(line(row))


def line(row: Any) -> bytes:
    """Return the line that `write_jsonl` writes of a row."""
    return _encode(row).encode() + b"\n"


def read_jsonl(file: Path) -> list[Any]:
    """Read what `write_jsonl` wrote; raises InputError if the file is missing or damaged."""
    return list(iterate_jsonl(file))


def iterate_jsonl(file: Path) -> Iterator[Any]:
    """Yield the rows of `read_jsonl` one by one."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; run the stage that writes it", code="no-such-file")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(
                    f"{file}:{number}: not a JSON line; run the stage that writes it again", code="not-json"
                ) from None
