"""Runs that could not be sent, each a folder with a copy of what it left and the names of those who lack it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lathe.common.json_files import read_json
from lathe.common.scratch import locked
from lathe.experiments.tracking import targets
from lathe.experiments.tracking.start_mirror import SCRATCH
from lathe.experiments.tracking.targets import Target

PENDING = SCRATCH / "pending"
RUN = "run"  # the copy, below its folder
_TARGETS = "targets.json"


def remember(folder: Path, left: Sequence[Target]) -> None:
    """Write down where the run in `folder` is still to be sent."""
    partial = folder / f".{_TARGETS}"
    partial.write_text(json.dumps([targets.as_json(target) for target in left]), encoding="utf-8")
    partial.rename(folder / _TARGETS)


def remembered(folder: Path) -> list[Target]:
    """Return what `remember` wrote; nothing for a run that never came to its end."""
    file = folder / _TARGETS
    return [targets.from_json(tree) for tree in read_json(file)] if file.exists() else []


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Hold a folder of a run; yields False where another process does."""
    lock = folder.with_name(f"{folder.name}.lock")
    held = locked(lock)
    if held is None:
        yield False
        return
    with held:
        yield True
        if not folder.exists():
            lock.unlink()
