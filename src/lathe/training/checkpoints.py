"""Checkpoints on disk: complete or ignored, and only for the training that they belong to.

A training has a folder in the scratch folder, named by a fingerprint of everything that determines its result: with
`checkpoint-<step>` folders as transformers writes them, each with the SHA-256 of its files, and `result` if it is a
finished phase that another one continues.
"""

import errno
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from lathe.common import launch
from lathe.common.errors import InputError
from lathe.common.scratch import acquire_lock, hash_file
from lathe.training import distributed

logger = logging.getLogger(__name__)

DIGESTS = "sha256.json"  # written last: a checkpoint without it is incomplete
KEPT_CHECKPOINTS = 2  # of one training: the newest, and the one before in case it is damaged
KEPT_TRAININGS = 8  # interrupted ones, beside the one that runs
STOPPING = b"stopping"
RESULT = "result"


class Checkpoints:
    """The checkpoints of one training, locked by this process, or by rank 0 of several.

    Each method must be called by all processes.
    """

    def __init__(self, folder: Path, lock: BinaryIO | None) -> None:
        self.folder = folder
        self.lock = lock

    def find_newest(self) -> Path | None:
        """Return the newest complete checkpoint; None where there is none."""
        newest: Path | None = distributed.broadcast_from_main(self._find_newest() if launch.is_main() else None)
        return newest

    def _find_newest(self) -> Path | None:
        for checkpoint in reversed(self._list()):
            if _is_complete(checkpoint):
                return checkpoint
            logger.warning("%s is damaged; going on from the one before", checkpoint)
        return None

    def find_result(self) -> Path | None:
        """Return the folder with the result of this training; None where it has not ended."""
        result = self.folder / RESULT
        return result if distributed.broadcast_from_main(launch.is_main() and _is_complete(result)) else None

    @contextmanager
    def open_partial(self) -> Iterator[Path]:
        """Yield a folder to write `checkpoint-<step>` or RESULT into; it is moved to its place when complete."""
        partial = self.folder / ".partial"
        if launch.is_main():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        distributed.wait()
        try:
            with raise_disk_errors():
                yield partial
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)  # or a full disk stays full
            raise
        distributed.wait()
        if launch.is_main():
            self._commit(partial)
        distributed.wait()

    def _commit(self, partial: Path) -> None:
        for written in partial.iterdir():
            digests = {file.name: hash_file(file) for file in sorted(written.iterdir())}
            (written / DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
            target = self.folder / written.name
            shutil.rmtree(target, ignore_errors=True)  # a damaged one
            written.rename(target)
        for old in self._list()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def announce_stop(self) -> None:
        """Note in the lock file that the lock will be free in a moment."""
        if self.lock:
            self.lock.write(STOPPING)
            self.lock.flush()

    def remove(self) -> None:
        """Remove all checkpoints of this training, which has finished."""
        if self.lock:
            shutil.rmtree(self.folder, ignore_errors=True)
            Path(self.lock.name).unlink()

    def _list(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"), key=get_step)


@contextmanager
def acquire_checkpoints(scratch: Path, fingerprint: str) -> Iterator[Checkpoints | None]:
    """Yield the checkpoints of the training with that fingerprint; None where another process runs the same training.

    It does not wait for the other process, which removes the checkpoints when it finishes, so that nothing could be
    resumed; unless that is stopping and about to save. Of other trainings the newest `KEPT_TRAININGS` are kept.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    lock = _wait_for_lock(scratch / f"{fingerprint}.lock", wait=True)
    if lock is None:
        logger.warning("the same training is running elsewhere; this one keeps no checkpoints")
        yield None
        return
    with lock:
        _remove_old(scratch, besides=fingerprint)
        yield Checkpoints(scratch / fingerprint, lock)


@contextmanager
def raise_disk_errors() -> Iterator[None]:
    """Turn the errors of torch and safetensors for a disk that cannot be written to into OSError."""
    try:
        yield
    except SafetensorError as error:
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(match[1]), os.strerror(int(match[1]))) from None
        raise
    except RuntimeError as error:
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):  # without an error number
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        raise


def get_step(checkpoint: Path) -> int:
    """Return the optimizer step after which a checkpoint was taken."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_complete(checkpoint: Path) -> bool:
    try:
        digests = json.loads((checkpoint / DIGESTS).read_text(encoding="utf-8"))
        return all(hash_file(checkpoint / name) == expected for name, expected in digests.items())
    except (FileNotFoundError, InputError, ValueError):
        return False


def _wait_for_lock(file: Path, *, wait: bool) -> BinaryIO | None:
    is_logged = False
    while (lock := acquire_lock(file)) is None:
        if not (wait and _is_about_to_be_free(file)):
            return None
        if not is_logged:
            logger.info("waiting for an interrupted run of the same training to save its checkpoint")
            is_logged = True
        time.sleep(0.1)
    lock.truncate(0)
    return lock


def _is_about_to_be_free(lock: Path) -> bool:
    try:
        return lock.read_bytes() == STOPPING
    except FileNotFoundError:
        return True  # its holder has just removed it


def _remove_old(scratch: Path, *, besides: str) -> None:
    others = [folder for folder in scratch.iterdir() if folder.is_dir() and folder.name != besides]
    for folder in sorted(others, key=lambda folder: folder.stat().st_mtime)[:-KEPT_TRAININGS]:
        if lock := _wait_for_lock(scratch / f"{folder.name}.lock", wait=False):
            with lock:
                Checkpoints(folder, lock).remove()
