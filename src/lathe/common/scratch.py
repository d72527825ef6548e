"""Unfinished work in the scratch folder: named by all that decides its result, and held by one process at a time."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.operating_system import open_locked


def fingerprint(
    decides: Mapping[str, Any], *, files: Mapping[str, Path], packages: Collection[str], code: Collection[Path]
) -> str:
    """Return the name of some work: a digest of what decides it, what is in its files, its packages and its code.

    Where the files lie makes no difference. Raises InputError where one is missing.
    """
    everything = {
        "decides": dict(decides),
        "files": {name: digest(file) for name, file in files.items()},
        "packages": {name: version(name) for name in packages},
        "code": {file.relative_to(paths.ROOT).as_posix(): digest(file) for file in code},
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]


def digest(file: Path) -> str:
    """Return the SHA-256 of a file. Raises InputError where it is missing."""
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; run the stage that writes it") from None


def locked(file: Path) -> BinaryIO | None:
    """Open a file, made where there is none, at its end and under its lock; None where another process holds that.

    The lock goes with the file object, and with the process. Whoever holds it may remove the file.
    """
    while True:
        handle = open_locked(file, wait=False)
        if handle is None:
            return None
        try:
            if os.path.samestat(file.stat(), os.fstat(handle.fileno())):
                return handle
        except FileNotFoundError:
            pass
        handle.close()  # it was removed before the lock was ours
