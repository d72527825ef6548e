"""Journal of finished rows on disk: an interrupted run is continued from it.

A journal is a file in the scratch folder, named by a fingerprint of everything that determines its rows. A row is a
line, written at once; a line that a kill cut short is dropped, and its row done again. Rendered prompts are kept in
files with the same name. All are removed when the output that is made of them is in its place.
"""

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, KeysView
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from lathe.common import paths
from lathe.common.jsonl import line
from lathe.common.scratch import acquire_lock
from lathe.inference.row_file import RowFile

logger = logging.getLogger(__name__)

MAX_INTERRUPTED = 8  # journals of interrupted runs that are kept besides the one in use


class Journal:
    """Finished rows, each with the part of the work that it belongs to and its number in it; one process writes it.

    Memory holds only the places of the rows in the file. `path` is None for a file without a name.
    """

    def __init__(self, file: BinaryIO, folder: Path, path: Path | None) -> None:
        self._file, self._folder, self._path = file, folder, path
        self._row_files = ExitStack()
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

    def list_finished(self, part: str) -> KeysView[int]:
        """Return the numbers of a part's finished rows; rows that are added later appear in it too."""
        return self._places.setdefault(part, {}).keys()

    def add(self, part: str, number: int, row: dict[str, Any]) -> None:
        """Keep a finished row, whatever happens to this process next."""
        written = line([part, number, row])
        self._file.seek(self._end)
        self._file.write(written)
        self._file.flush()
        self._places.setdefault(part, {})[number] = self._end
        self._end += len(written)

    def read_row(self, part: str, number: int) -> dict[str, Any]:
        """Read a finished row."""
        self._file.seek(self._places[part][number])
        row: dict[str, Any] = json.loads(self._file.readline())[2]
        return row

    def store_rows(self, name: str, rows: Iterable[Any]) -> RowFile:
        """Write rows to a file of this name beside the journal, to be read as often as needed.

        If an interrupted run has written the file, it is used, and `rows` is not read.
        """
        if self._path is None:
            unnamed = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed with the journal
            return RowFile.write(rows, cast(BinaryIO, self._row_files.enter_context(unnamed)))
        path = self._path.with_suffix(f".{name}.rows")
        if not path.exists():
            with paths.replace_file(path) as partial, partial.open("wb") as file:
                RowFile.write(rows, file)
        return RowFile(self._row_files.enter_context(path.open("rb")))

    def close(self) -> None:
        """Close the files of `store_rows`."""
        self._row_files.close()

    def remove(self) -> None:
        """Remove the journal from the disk, with the files of `store_rows`."""
        if self._path:
            _remove_files(self._path)


@contextmanager
def open_journal(scratch: Path, fingerprint: str) -> Iterator[Journal]:
    """Yield the journal with that fingerprint, with the rows that an interrupted run left in it.

    If another process has it open, yield an empty one in files without a name: neither waits, and both compute the same
    rows. Of journals with other fingerprints, the newest `MAX_INTERRUPTED` are kept.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / f"{fingerprint}.jsonl"
    with ExitStack() as stack:
        file = acquire_lock(path)
        if file is None:
            logger.info("another process generates the same answers; this one computes them too")
            unnamed = stack.enter_context(tempfile.TemporaryFile(dir=scratch))
            journal = Journal(cast(BinaryIO, unnamed), scratch, None)
        else:
            stack.enter_context(file)
            _remove_old(scratch, besides=path)
            journal = Journal(file, scratch, path)
            if len(journal):
                logger.info("resuming an interrupted run: %d steps are finished", len(journal))
        stack.callback(journal.close)
        yield journal


def _remove_old(scratch: Path, *, besides: Path) -> None:
    others = sorted(
        (path for path in scratch.glob("*.jsonl") if path != besides), key=lambda path: path.stat().st_mtime
    )
    for path in others[:-MAX_INTERRUPTED]:
        if file := acquire_lock(path):
            with file:
                _remove_files(path)


def _remove_files(journal: Path) -> None:
    for path in list(journal.parent.iterdir()):
        if path != journal and path.name.removeprefix(".").startswith(f"{journal.stem}."):
            path.unlink()  # rows, or part of them if a kill cut them short
    journal.unlink()
