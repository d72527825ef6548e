"""Checkpoints on disk: whole or passed over, for one training alone, and never for another one than theirs.

A training's folder below the scratch folder is named by a fingerprint of all that decides its result. It holds
`checkpoint-<step>` folders as transformers writes them, each with the digests of its files, and `result` where it is
done and another training goes on from it.
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
from lathe.common.scratch import digest, locked
from lathe.training import distributed

logger = logging.getLogger(__name__)

DIGESTS = "sha256.json"  # written last: a checkpoint without it was never finished
KEPT_CHECKPOINTS = 2  # of one training: the newest, and the one before should that prove damaged
KEPT_TRAININGS = 8  # that were interrupted and not gone on with, beside the one that runs
STOPPING = b"stopping"
RESULT = "result"


class Checkpoints:
    """The checkpoints of one training, which this process, or rank 0 of several, holds the lock of.

    Of several processes all call the same methods.
    """

    def __init__(self, folder: Path, lock: BinaryIO | None) -> None:
        self.folder = folder
        self.lock = lock

    def newest(self) -> Path | None:
        """Return the newest checkpoint that is whole; None where there is none."""
        found: Path | None = distributed.from_main(self._newest() if launch.is_main() else None)
        return found

    def _newest(self) -> Path | None:
        for checkpoint in reversed(self._listed()):
            if _is_whole(checkpoint):
                return checkpoint
            logger.warning("%s is damaged; going on from the one before", checkpoint)
        return None

    def result(self) -> Path | None:
        """Return what this training ended with; None where it has not ended."""
        result = self.folder / RESULT
        return result if distributed.from_main(launch.is_main() and _is_whole(result)) else None

    @contextmanager
    def saving(self) -> Iterator[Path]:
        """Yield a folder to write a `checkpoint-<step>` or the RESULT into; it is kept once it is whole."""
        partial = self.folder / ".partial"
        if launch.is_main():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        distributed.wait()
        try:
            with disk_errors():
                yield partial
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)  # or a full disk stays full
            raise
        distributed.wait()
        if launch.is_main():
            self._keep(partial)
        distributed.wait()

    def _keep(self, partial: Path) -> None:
        for written in partial.iterdir():
            digests = {file.name: digest(file) for file in sorted(written.iterdir())}
            (written / DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
            target = self.folder / written.name
            shutil.rmtree(target, ignore_errors=True)  # a damaged one that was passed over
            written.rename(target)
        for old in self._listed()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def announce_stop(self) -> None:
        """Tell who asks for the lock that it is free in a moment."""
        if self.lock:
            self.lock.write(STOPPING)
            self.lock.flush()

    def remove(self) -> None:
        """Remove them all: the training has ended well."""
        if self.lock:
            shutil.rmtree(self.folder, ignore_errors=True)
            Path(self.lock.name).unlink()

    def _listed(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"), key=step_of)


@contextmanager
def claimed(scratch: Path, fingerprint: str) -> Iterator[Checkpoints | None]:
    """Yield the checkpoints of the training with that fingerprint; None where another process is training the same.

    The second does not wait: the first removes the checkpoints when it is done, so there would be nothing to go on
    from. It waits for one that has been told to stop and is about to save. Of other trainings' checkpoints the newest
    `KEPT_TRAININGS` stay.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    lock = _lock(scratch / f"{fingerprint}.lock", wait=True)
    if lock is None:
        logger.warning("the same training is running elsewhere; this one keeps no checkpoints")
        yield None
        return
    with lock:
        _forget_old(scratch, besides=fingerprint)
        yield Checkpoints(scratch / fingerprint, lock)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise what torch and safetensors say of a disk that takes no more as the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(match[1]), os.strerror(int(match[1]))) from None
        raise
    except RuntimeError as error:
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):  # it keeps no error number
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        raise


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step after which a checkpoint was taken."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    try:
        digests = json.loads((checkpoint / DIGESTS).read_text(encoding="utf-8"))
        return all(digest(checkpoint / name) == expected for name, expected in digests.items())
    except (FileNotFoundError, InputError, ValueError):
        return False


def _lock(file: Path, *, wait: bool) -> BinaryIO | None:
    said = False
    while (lock := locked(file)) is None:
        if not (wait and _is_about_to_be_free(file)):
            return None
        if not said:
            logger.info("waiting for an interrupted run of the same training to save its checkpoint")
            said = True
        time.sleep(0.1)
    lock.truncate(0)
    return lock


def _is_about_to_be_free(lock: Path) -> bool:
    try:
        return lock.read_bytes() == STOPPING
    except FileNotFoundError:
        return True  # whoever held it has just removed it


def _forget_old(scratch: Path, *, besides: str) -> None:
    others = [folder for folder in scratch.iterdir() if folder.is_dir() and folder.name != besides]
    for folder in sorted(others, key=lambda folder: folder.stat().st_mtime)[:-KEPT_TRAININGS]:
        if lock := _lock(scratch / f"{folder.name}.lock", wait=False):
            with lock:
                Checkpoints(folder, lock).remove()
