"""Scratch folder: unfinished work, named by a fingerprint of what determines its result, and locked by one process."""

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


def compute_fingerprint(
    values: Mapping[str, Any], *, files: Mapping[str, Path], packages: Collection[str], code: Collection[Path]
) -> str:
    """Return a digest of values, contents of files, versions of packages, and code.

    Where the files are makes no difference. Raises InputError where one is missing.
    """
    everything = {
        "values": dict(values),
        "files": {name: hash_file(file) for name, file in files.items()},
        "packages": {name: version(name) for name in packages},
        "code": {file.relative_to(paths.ROOT).as_posix(): hash_file(file) for file in code},
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file. Raises InputError where it is missing."""
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; run the stage that writes it", code="no-such-file") from None


def acquire_lock(file: Path) -> BinaryIO | None:
    """Open a file at its end, made where there is none, under a lock; None where another process holds the lock.

    The lock ends with the file object, and with the process. Its holder may remove the file.
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
        handle.close()  # removed before this process had the lock
