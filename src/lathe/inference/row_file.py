"""Rendered rows on disk: written once, read back in every pass over them, so that no row is rendered twice."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Self

from lathe.common.jsonl import line


class RowFile:
    """Rows as lines of JSON in an open file; they are read one by one, and memory holds none of them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    @classmethod
    def write(cls, rows: Iterable[Any], file: BinaryIO) -> Self:
        """Write rows to an empty file that is open for reading too."""
        for row in rows:
            file.write(line(row))
        return cls(file)

    def __iter__(self) -> Iterator[Any]:
        """Yield the rows from the first; several passes may be under way at once."""
        place = 0
        while True:
            self._file.seek(place)
            written = self._file.readline()
            if not written:
                return
            place += len(written)
            yield json.loads(written)
