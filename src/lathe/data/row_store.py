"""Validated rows on disk, so that memory holds some forty bytes of each and none of its text."""

import json
import os
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy
from numpy.typing import NDArray

from lathe.common.jsonl import line

DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Digests:
    """Seeded digests of all that a row says, and of all but its answer, 16 bytes each."""

    content: bytes
    prompt: bytes


class Spool:
    """A file of rows that is written once, row after row, and then read anywhere.

    A record is where the row stood in the user's file, a NUL, and the row as one line of JSON: what the output will
    hold if the row is kept.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines = file.open("wb")
        self.position = 0
        self.places = array("q")
        self.starts = array("q")
        self.lengths = array("q")
        self.digests = bytearray()
        self.splits = bytearray()

    def add(self, at: str, row: dict[str, Any], digests: Digests, split: int) -> None:
        """Append one row of the split with this number."""
        place, text = at.encode("utf-8", "surrogateescape") + b"\0", line(row)
        self.lines.write(place)
        self.lines.write(text)
        self.places.append(self.position)
        self.starts.append(self.position + len(place))
        self.lengths.append(len(text))
        self.digests += digests.content
        self.digests += digests.prompt
        self.splits.append(split)
        self.position += len(place) + len(text)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.lines.close()

    def rows(self) -> "Rows":
        """Return what is in the file, which must be closed."""
        count = len(self.starts)
        digests = numpy.frombuffer(self.digests, dtype=">u8").astype(numpy.uint64).reshape(count, 4)
        return Rows(
            file=self.file,
            places=numpy.frombuffer(self.places, dtype=numpy.int64),
            starts=numpy.frombuffer(self.starts, dtype=numpy.int64),
            lengths=numpy.frombuffer(self.lengths, dtype=numpy.int64),
            content=digests[:, :2],
            prompt=digests[:, 2:],
            splits=numpy.frombuffer(self.splits, dtype=numpy.uint8),
        )


@dataclass(frozen=True, eq=False)
class Rows:
    """All rows of a spool, by number: where each lies, its digests as two big-endian words each, its split's number."""

    file: Path
    places: NDArray[numpy.int64]
    starts: NDArray[numpy.int64]
    lengths: NDArray[numpy.int64]
    content: NDArray[numpy.uint64]
    prompt: NDArray[numpy.uint64]
    splits: NDArray[numpy.uint8]

    def reader(self) -> "Reader":
        """Open the file."""
        return Reader(self)


class Reader:
    """Reads single rows, in any order."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.file = rows.file.open("rb")

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.file.close()

    def line(self, row: int) -> bytes:
        """Return the row as one line of JSON."""
        return os.pread(self.file.fileno(), self.rows.lengths[row], self.rows.starts[row])

    def value(self, row: int) -> dict[str, Any]:
        """Return the row."""
        value: dict[str, Any] = json.loads(self.line(row))
        return value

    def at(self, row: int) -> str:
        """Return where the row stood in the user's file."""
        start, end = self.rows.places[row], self.rows.starts[row] - 1
        place = os.pread(self.file.fileno(), end - start, start)
        return place.decode("utf-8", "surrogateescape")
