"""Scratch folder: unfinished work, named by a fingerprint of what determines its result, and locked by one process."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def temporary_folder(parent: Path, kind: str) -> Iterator[Path]:
    """Yield an empty folder in `parent`, which is removed after the block; Git ignores its name.

    Those of this kind that killed processes have left there are removed first: a folder is in use for as long as a
    process holds the lock beside it.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for file in parent.glob(f".{kind}.*.lock.partial"):
        if (left := acquire_lock(file)) is not None:
            with left:
                _remove_with_lock(file.with_name(file.name.replace(".lock.", ".")), file)
    name = f".{kind}.{uuid.uuid4().hex[:12]}"
    folder, lock = parent / f"{name}.partial", parent / f"{name}.lock.partial"
    held = acquire_lock(lock)
    assert held is not None
    with held:
        folder.mkdir()
        try:
            yield folder
        finally:
            _remove_with_lock(folder, lock)


def _remove_with_lock(folder: Path, lock: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.unlink(missing_ok=True)
