"""`python -m lathe mirror`: runs that have ended, sent to where they lack; what is there is not sent again."""

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lathe import paths, revisions
from lathe.errors import InputError
from lathe.params import load
from lathe.progress import Progress
from lathe.tracking import copies, pending, targets
from lathe.tracking.mirror import UnreachableError, mirror_of
from lathe.tracking.record import Context, Record
from lathe.tracking.start import SCRATCH
from lathe.tracking.targets import Target

logger = logging.getLogger(__name__)


def run(revs: Sequence[str], asked: Collection[str]) -> int:
    """Send the named runs, or without a name those that were missed; print a line each. Returns the exit code."""
    failed = 0
    with Progress("mirror", len(revs) or None, unit="run") as progress:
        for name, outcome in _named(revs, asked) if revs else _missed(asked):
            failed += outcome is not None
            sys.stdout.write(f"{name}{f': {outcome}' if outcome else ''}\n")
            progress.add()
    if not revs and not progress.done:
        sys.stdout.write("nothing was missed; `python -m lathe mirror REV` sends a run that was never mirrored\n")
    return 1 if failed else 0


def _named(revs: Sequence[str], asked: Collection[str]) -> Iterator[tuple[str, str | None]]:
    chosen, overrides = targets.targets(load().params.tracking, os.environ, asked=asked)
    for line in overrides:
        logger.info("%s", line)
    if not chosen:
        raise InputError("tracking is enabled for nothing; give --mlflow or --wandb, or enable one in params.yaml")
    for rev in revs:
        with _copied(rev) as record:
            for target in chosen:
                said, failure = _sent(record, target)
                yield f"{rev}: {said}", failure


def _missed(asked: Collection[str]) -> Iterator[tuple[str, str | None]]:
    for folder in sorted(path for path in pending.PENDING.glob("*") if path.is_dir()):
        with pending.claimed(folder) as mine:
            if not mine:
                yield folder.name, "another process is sending it"
                continue
            left = pending.remembered(folder)
            for target in [target for target in left if not asked or target.name in asked]:
                record = Record(folder / pending.RUN, Context.read(folder / pending.RUN))
                said, failure = _sent(record, target)
                if failure is None:
                    left.remove(target)
                    pending.remember(folder, left)
                yield f"{record.name}: {said}", failure
            if not left:
                shutil.rmtree(folder)


@contextmanager
def _copied(rev: str) -> Iterator[Record]:
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as name:  # beside DVC's cache, for links
        folder = Path(name)
        if commit := revisions.find(rev).commit:
            names = {each.commit: each.name for each in revisions.experiments()}
            yield copies.of_commit(commit, folder, Context(experiment=names.get(commit)))
            return
        record = copies.of_workspace(paths.ROOT, folder, Context())
        if what := copies.out_of_place(paths.ROOT):
            raise InputError(f"workspace: {what} is not as dvc.lock has it; run `dvc repro`, or name a commit")
        yield record


def _sent(record: Record, target: Target) -> tuple[str, str | None]:
    if not record.curves:
        return f"{target}", "no curves; has its training run?"
    mirror = mirror_of(target, record)
    try:
        with mirror.alone():
            sent = mirror.finish(record)
    except UnreachableError as error:
        return f"{target}", f"{error}; the same command again goes on"
    return f"{target}: {sent} points sent: {mirror.address}", None
