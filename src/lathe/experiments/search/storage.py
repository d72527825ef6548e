"""Where a study is kept: a journal file beside the checkout, or a database that several machines share."""

import json
import os
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
    """Lock for one process at a time to write to a journal; the kernel releases it when that process ends.

    An incomplete line of a killed process is removed before the next is appended.
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
        """Release the lock."""
        assert self._file is not None
        self._file.close()
        self._file = None


def open_storage(url: str | None, study: str) -> "BaseStorage":
    """Open the database at `url`, or the study's journal.

    Raises InputError, which never shows a password, if the database cannot be reached or the journal is damaged.
    """
    import optuna
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it logs errors that it then raises
    if url is None:
        journal = JOURNALS / f"{study}.journal"
        journal.parent.mkdir(exist_ok=True)
        _check_journal(journal)
        return JournalStorage(JournalFileBackend(str(journal), lock_obj=JournalLock(journal)))

    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError, SQLAlchemyError

    _refuse_ambiguous(url)
    try:
        address = make_url(url)
    except ArgumentError:
        raise InputError(
            f"{VARIABLE} or --storage is no database URL; write postgresql://USER:PASSWORD@HOST/DATABASE or "
            "sqlite:///FILE",
            code="invalid-database-url",
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
                raise _build_error(url, error) from None
            time.sleep(SECONDS_BETWEEN_ATTEMPTS)
        except (SQLAlchemyError, ImportError) as error:
            raise _build_error(url, error) from None
    raise AssertionError("the last attempt returns or raises")


def _refuse_ambiguous(url: str) -> None:
    """Refuse a password with signs that end it: a part of it would be taken for the host, and shown in messages."""
    scheme, _, rest = url.partition("://")
    before, at, _ = rest.rpartition("@")
    if at and not scheme.startswith("sqlite") and {"@", "/", "?", "#"} & set(before):
        raise InputError(
            f"{VARIABLE} or --storage: its password or another part holds one of @ / ? #, which end a password; write "
            "them as %40 %2F %3F %23",
            code="invalid-database-url",
        )


def _check_journal(journal: Path) -> None:
    """Refuse a damaged journal: Optuna would read it up to the damage, and might append to it."""
    if not journal.exists():
        return
    with journal.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\n") and not _is_operation(line):
                raise InputError(
                    f"{journal}:{number}: no line of Optuna's journal; put back a copy, or remove the file",
                    code="damaged-journal",
                )


def _is_operation(line: bytes) -> bool:
    try:
        operation = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(operation, dict) and operation.get("op_code") in range(11)


@contextmanager
def translate_connection_errors(url: str | None) -> Iterator[None]:
    """Turn a lost connection to the database into an InputError that says how to continue."""
    from sqlalchemy.exc import InterfaceError, OperationalError

    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, InterfaceError | OperationalError):
            cause = cause.__cause__ or cause.__context__  # Optuna repeats the query in the broken transaction
        if cause is None:
            raise
        raise InputError(
            f"{hide_password(url)}: {format_database_error(cause)}; when the database is back, "
            "the same command goes on",
            code="database-lost",
        ) from None


def _build_error(url: str, error: BaseException) -> InputError:
    return InputError(
        f"{hide_password(url)}: {format_database_error(error)}; is it running, and are user and password right?",
        code="no-database",
    )


def hide_password(url: str | None) -> str:
    """Return the address without the password, and without the options, which may contain one."""
    if url is None:
        return str(JOURNALS.relative_to(paths.MAIN))
    scheme, separator, rest = url.partition("://")
    user, at, place = rest.rpartition("@")  # the last one: a password may hold each of these signs
    return f"{scheme}{separator}{user.partition(':')[0]}{at}{place.partition('?')[0]}"


def format_database_error(error: BaseException) -> str:
    """Return the first line of a database's message."""
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
