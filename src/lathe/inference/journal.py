"""Rows that are finished, kept on disk while the others are worked on: what was killed goes on where it stopped.

A journal lies in the scratch folder under a fingerprint of all that decides its rows. A row is a line, written at once;
one that a kill cut short is done again. It is removed when the output that is made of it is in its place.
"""

import json
import logging
import tempfile
from collections.abc import Iterator, KeysView
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from lathe.common.jsonl import line
from lathe.common.scratch import acquire_lock

logger = logging.getLogger(__name__)

KEPT = 8  # journals of interrupted work that was not gone on with, beside the one that is in use


class Journal:
    """Finished rows, each with the part of the work that it belongs to and its number there; held by one process.

    In memory are their places in the file alone.
    """

    def __init__(self, file: BinaryIO, path: Path | None) -> None:
        self._file, self._path = file, path
        self._places: dict[str, dict[int, int]] = {}
        self._end = 0
        file.seek(0)
        for written in file:
            try:
                part, number, _ = json.loads(written)
            except ValueError:
                break
            if not written.endswith(b"\n"):
                break
            self._places.setdefault(part, {})[number] = self._end
            self._end += len(written)
        file.truncate(self._end)

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))

    def done(self, part: str) -> KeysView[int]:
        """Return the numbers of the part's finished rows; what is added later is among them too."""
        return self._places.setdefault(part, {}).keys()

    def add(self, part: str, number: int, row: dict[str, Any]) -> None:
        """Keep a finished row, whatever happens to this process next."""
        written = line([part, number, row])
        self._file.seek(self._end)
        self._file.write(written)
        self._file.flush()
        self._places.setdefault(part, {})[number] = self._end
        self._end += len(written)

    def row(self, part: str, number: int) -> dict[str, Any]:
        """Read a finished row."""
        self._file.seek(self._places[part][number])
        row: dict[str, Any] = json.loads(self._file.readline())[2]
        return row

    def remove(self) -> None:
        """Remove it from the disk: what it was for is done."""
        if self._path:
            self._path.unlink()


@contextmanager
def opened(scratch: Path, fingerprint: str) -> Iterator[Journal]:
    """Yield the journal with that fingerprint, with the rows that an interrupted run left in it.

    Where another process is at the same work, it is a journal that nobody will find again: neither waits, and both come
    to the same rows. Of journals with other fingerprints the newest `KEPT` stay.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / f"{fingerprint}.jsonl"
    file = acquire_lock(path)
    if file is None:
        logger.info("the same answers are being made elsewhere; these are made again")
        with tempfile.TemporaryFile(dir=scratch) as unnamed:
            yield Journal(cast(BinaryIO, unnamed), None)
        return
    with file:
        _forget_old(scratch, besides=path)
        journal = Journal(file, path)
        if len(journal):
            logger.info("going on behind %d finished steps of an interrupted run", len(journal))
        yield journal


def _forget_old(scratch: Path, *, besides: Path) -> None:
    others = sorted(
        (path for path in scratch.glob("*.jsonl") if path != besides), key=lambda path: path.stat().st_mtime
    )
    for path in others[:-KEPT]:
        if file := acquire_lock(path):
            with file:
                path.unlink()
