"""Unsent runs: a folder each, with a copy of the run's files and the targets that have not got it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lathe.common.json_files import read_json
from lathe.common.scratch import acquire_lock
from lathe.experiments.tracking import targets
from lathe.experiments.tracking.start_mirror import SCRATCH
from lathe.experiments.tracking.targets import Target

PENDING = SCRATCH / "pending"
RUN = "run"  # the copy, below its folder
_TARGETS = "targets.json"


def write_targets(folder: Path, left: Sequence[Target]) -> None:
    """Write the targets that the run in `folder` must still be sent to."""
    partial = folder / f".{_TARGETS}"
    partial.write_text(json.dumps([targets.to_json(target) for target in left]), encoding="utf-8")
    partial.rename(folder / _TARGETS)


def read_targets(folder: Path) -> list[Target]:
    """Return the targets of `write_targets`; none for a run that did not finish."""
    file = folder / _TARGETS
    return [targets.from_json(tree) for tree in read_json(file)] if file.exists() else []


@contextmanager
def lock_run(folder: Path) -> Iterator[bool]:
    """Lock the folder of a run; yields False if another process holds the lock."""
    lock = folder.with_name(f"{folder.name}.lock")
    held = acquire_lock(lock)
    if held is None:
        yield False
        return
    with held:
        yield True
        if not folder.exists():
            lock.unlink()
