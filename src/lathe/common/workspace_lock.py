"""Lock over the workspace of a checkout: one command at a time writes its parameters, metrics, dvc.lock and outputs.

It is held as long as its process lives, and is gone when that is killed. Temporary and queued experiments run in
checkouts of their own, each with a workspace and a lock of its own; but they are made from this one, which DVC puts
into Git's stash for a moment.
"""

import getpass
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from lathe.common import operating_system, paths
from lathe.common.errors import InputError

FILE = ".dvc/tmp/lathe-workspace.lock"

# Tells the processes below the holder, the stages, that they are its own.
TOKEN = "LATHE_WORKSPACE_TOKEN"

# Whoever only looks who holds the lock takes it for a moment.
ATTEMPTS, SECONDS_BETWEEN_ATTEMPTS = 10, 0.05


@dataclass(frozen=True)
class Holder:
    """A command that holds the lock, and since when."""

    command: str
    pid: int
    host: str
    user: str
    since: str
    token: str

    def __str__(self) -> str:
        return (
            f"{self.command} has been working here since {self.since} "
            f"(process {self.pid} of {self.user} on {self.host})"
        )


@contextmanager
def hold_workspace(command: str, root: Path = paths.ROOT) -> Iterator[None]:
    """Hold the lock during the block. Raises InputError, which names the holder, where another process has it."""
    file = root / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = _open_free(file)
    if handle is None:
        holder = _read_holder(file)
        shown = str(holder) if holder else "another command is working here"
        stop = f", or `kill {holder.pid}` stops it in good order" if holder else ""
        raise InputError(
            f"{command}: {shown}; wait for its end{stop}",
            code="workspace-busy",
        )
    token = uuid.uuid4().hex
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    holder = Holder(command, os.getpid(), socket.gethostname(), _find_user(), since, token)
    before = os.environ.get(TOKEN)
    with handle:
        handle.truncate(0)
        handle.write(json.dumps(asdict(holder)).encode())
        handle.flush()
        os.environ[TOKEN] = token
        try:
            yield
        finally:
            handle.truncate(0)
            operating_system.unlock(handle)  # DVC forks processes that look for updates
            if before is None:
                del os.environ[TOKEN]
            else:
                os.environ[TOKEN] = before


def find_holder(root: Path = paths.ROOT) -> Holder | None:
    """Return who holds the lock; None if nobody does."""
    file = root / FILE
    holder = _read_holder(file)
    if holder is None:  # the file of a killed holder still names it
        return None
    handle = operating_system.open_locked(file, wait=False)
    if handle is not None:
        handle.close()
        return None
    return holder


def refuse_beside_holder(name: str, root: Path = paths.ROOT) -> None:
    """Raise InputError if another command than the one that this process belongs to holds the lock.

    Nothing stops a `dvc repro` that is typed beside it from starting a stage, which would write what the other reads.
    """
    holder = find_holder(root)
    if holder and holder.token != os.environ.get(TOKEN):
        raise InputError(f"{name}: {holder}; run this when it has ended", code="workspace-busy")


def _open_free(file: Path) -> BinaryIO | None:
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(SECONDS_BETWEEN_ATTEMPTS)
        if handle := operating_system.open_locked(file, wait=False):
            return handle
    return None


def _read_holder(file: Path) -> Holder | None:
    try:
        return Holder(**json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):  # none, or one that is being written
        return None


def _find_user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may run as a number that has no name
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"
