"""Verdict cache: verdicts that were paid for, by the hash of everything that determines them.

It is an SQLite file in the scratch folder, which survives however the stage ends; several processes may share it.
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
_KEYS_PER_QUERY = 500
_LOCK_TIMEOUT_SECONDS = 60.0  # to wait while another process writes


@dataclass(frozen=True)
class StoredVerdict:
    """A verdict as it was received: `model` is the server's name for itself; tokens are None if not reported."""

    score: float
    reason: str
    model: str
    input_tokens: int | None
    output_tokens: int | None


class VerdictCache:
    """The cache file, as a context manager. A verdict is on disk when `add` returns."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(file, timeout=_LOCK_TIMEOUT_SECONDS, isolation_level=None)
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute(_TABLE)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise InputError(
                f"{file}: the verdict cache cannot be read ({error}); remove the file: the verdicts in data/judged are "
                "still reused",
                code="broken-cache",
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def find(self, keys: Iterable[str]) -> dict[str, StoredVerdict]:
        """Return the verdicts that are in the cache, by key."""
        distinct, verdicts = list(dict.fromkeys(keys)), {}
        for start in range(0, len(distinct), _KEYS_PER_QUERY):
            batch = distinct[start : start + _KEYS_PER_QUERY]
            marks = ",".join("?" * len(batch))
            with closing(self._connection.execute(f"SELECT * FROM verdicts WHERE key IN ({marks})", batch)) as rows:
                verdicts.update({key: StoredVerdict(*columns) for key, *columns in rows})
        return verdicts

    def add(self, key: str, verdict: StoredVerdict) -> None:
        """Add a verdict that was received; if another process has added one by this key, that one stays."""
        self._write("INSERT OR IGNORE", [(key, verdict)])

    def add_tracked(self, verdicts: Iterable[tuple[str, StoredVerdict]]) -> None:
        """Add the verdicts of an output that DVC tracks; they replace those by the same keys."""
        self._write("INSERT OR REPLACE", verdicts)

    def _write(self, how: str, verdicts: Iterable[tuple[str, StoredVerdict]]) -> None:
        rows = [
            (key, verdict.score, verdict.reason, verdict.model, verdict.input_tokens, verdict.output_tokens)
            for key, verdict in verdicts
        ]
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.executemany(f"{how} INTO verdicts VALUES (?, ?, ?, ?, ?, ?)", rows)
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")
