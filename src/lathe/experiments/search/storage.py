"""Where a study is kept: a journal file beside the checkout, or a database that several machines share."""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.operating_system import open_locked

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

VARIABLE = "LATHE_SEARCH_STORAGE"
JOURNALS = paths.MAIN / ".optuna"

ATTEMPTS = 5  # to make the tables of an empty database
SECONDS_BETWEEN_ATTEMPTS = 1.0


class JournalLock:
    """Lets one process at a time write to a journal; the kernel frees it when that process is gone, however it went.

    A line that a killed process left half written is cut away before the next is written behind it.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._file: BinaryIO | None = None

    def acquire(self) -> bool:
        """Wait for the lock and take it."""
        file = self._file = open_locked(self._journal, wait=True)
        assert file is not None
        end = file.seek(0, os.SEEK_END)
        whole = end
        while whole:
            file.seek(whole - 1)
            if file.read(1) == b"\n":
                break
            whole -= 1
        if whole < end:
            file.truncate(whole)
        return True

    def release(self) -> None:
        """Let the next one write."""
        assert self._file is not None
        self._file.close()
        self._file = None


def opened(url: str | None, study: str) -> "BaseStorage":
    """Open the database at `url`, or the study's journal.

    Raises InputError, which never shows a password, where the database cannot be reached or the journal read.
    """
    import optuna
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it warns of errors that it then raises
    if url is None:
        journal = JOURNALS / f"{study}.journal"
        journal.parent.mkdir(exist_ok=True)
        _check(journal)
        return JournalStorage(JournalFileBackend(str(journal), lock_obj=JournalLock(journal)))

    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError, SQLAlchemyError

    try:
        address = make_url(url)
    except ArgumentError:
        raise InputError(
            f"{VARIABLE} or --storage is no database URL; write postgresql://USER:PASSWORD@HOST/DATABASE or "
            "sqlite:///FILE"
        ) from None
    if address.drivername == "postgresql":
        address = address.set(drivername="postgresql+psycopg")
    options = {} if address.drivername.startswith("sqlite") else {"pool_pre_ping": True}
    for attempts_left in reversed(range(ATTEMPTS)):
        try:
            return RDBStorage(address.render_as_string(hide_password=False), engine_kwargs=options)
        except (IntegrityError, ProgrammingError) as error:
            # Another driver makes the same tables at this moment.
            if not attempts_left:
                raise _away(url, error) from None
            time.sleep(SECONDS_BETWEEN_ATTEMPTS)
        except (SQLAlchemyError, ImportError) as error:
            raise _away(url, error) from None
    raise AssertionError("the last attempt returns or raises")


def _check(journal: Path) -> None:
    """Refuse a journal that was damaged: Optuna would read it up to there, and might write on behind it."""
    if not journal.exists():
        return
    with journal.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\n") and not _is_operation(line):
                raise InputError(
                    f"{journal}:{number}: no line of Optuna's journal; put back a copy, or remove the file"
                )


def _is_operation(line: bytes) -> bool:
    try:
        found = json.loads(line)
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("op_code") in range(11)


@contextmanager
def told_when_away(url: str | None) -> Iterator[None]:
    """Turn the loss of a database into one line that says how to go on."""
    from sqlalchemy.exc import InterfaceError, OperationalError

    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InterfaceError | OperationalError):
            cause = cause.__cause__ or cause.__context__  # Optuna asks once more in the same, broken transaction
        if cause is None:
            raise
        raise InputError(f"{shown(url)}: {why(cause)}; when the database is back, the same command goes on") from None


def _away(url: str, error: BaseException) -> InputError:
    return InputError(f"{shown(url)}: {why(error)}; is it running, and are user and password right?")


def shown(url: str | None) -> str:
    """Return the address without what must not be shown: password, and the options, which may hold one."""
    if url is None:
        return str(JOURNALS.relative_to(paths.MAIN))
    return re.sub(r"//([^/@:]*)(:[^/]*)?@", r"//\1@", url.partition("?")[0])


def why(error: BaseException) -> str:
    """Return the first line of what a database said."""
    said = str(getattr(error, "orig", None) or error).strip().splitlines()
    return said[0] if said else type(error).__name__
