"""Verdicts that were paid for, by the hash of everything that decides them.

An SQLite file in the scratch folder: it outlives the stage, however that ends, and several processes may share it.
"""

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from lathe.common.errors import InputError

_TABLE = """
CREATE TABLE IF NOT EXISTS verdicts (
    key TEXT PRIMARY KEY,
    score NUMERIC NOT NULL,
    reason TEXT NOT NULL,
    model TEXT NOT NULL,
    input_tokens INTEGER,
    output_tokens INTEGER
) WITHOUT ROWID
"""
_KEYS_AT_ONCE = 500
_SECONDS_FOR_OTHERS = 60.0  # while another process writes


@dataclass(frozen=True)
class Kept:
    """A verdict as it was bought: `model` is what the server calls itself; tokens are None where it did not count."""

    score: float
    reason: str
    model: str
    input_tokens: int | None
    output_tokens: int | None


class Cache:
    """The file; a context manager. Every verdict is on disk when `add` returns."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(file, timeout=_SECONDS_FOR_OTHERS, isolation_level=None)
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute(_TABLE)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise InputError(
                f"{file}: the kept verdicts cannot be read ({error}); remove the file, and verdicts in data/judged are "
                "used again"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def find(self, keys: Iterable[str]) -> dict[str, Kept]:
        """Return the verdicts that are there."""
        wanted, found = list(dict.fromkeys(keys)), {}
        for start in range(0, len(wanted), _KEYS_AT_ONCE):
            some = wanted[start : start + _KEYS_AT_ONCE]
            marks = ",".join("?" * len(some))
            with closing(self._connection.execute(f"SELECT * FROM verdicts WHERE key IN ({marks})", some)) as rows:
                found.update({key: Kept(*rest) for key, *rest in rows})
        return found

    def add(self, key: str, kept: Kept) -> None:
        """Keep a verdict that was bought; where another process was quicker, its verdict stays."""
        self._write("INSERT OR IGNORE", [(key, kept)])

    def adopt(self, verdicts: Iterable[tuple[str, Kept]]) -> None:
        """Take verdicts over from an output that DVC tracks; there and here shall be the same."""
        self._write("INSERT OR REPLACE", verdicts)

    def _write(self, how: str, verdicts: Iterable[tuple[str, Kept]]) -> None:
        rows = [
            (key, kept.score, kept.reason, kept.model, kept.input_tokens, kept.output_tokens) for key, kept in verdicts
        ]
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.executemany(f"{how} INTO verdicts VALUES (?, ?, ?, ?, ?, ?)", rows)
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")
