"""`python -m lathe mirror`: runs that have ended, sent to where they lack; what is there is not sent again."""

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.progress import Progress
from lathe.config.load import load
from lathe.experiments.tracking import run_copies, targets, unsent_runs
from lathe.experiments.tracking.run_files import Context, Record
from lathe.experiments.tracking.start_mirror import SCRATCH
from lathe.experiments.tracking.targets import Target
from lathe.experiments.tracking.tracker import UnreachableError
from lathe.experiments.tracking.trackers import mirror_of
from lathe.provenance.revisions import find_revision, list_experiments

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
    for folder in sorted(path for path in unsent_runs.PENDING.glob("*") if path.is_dir()):
        with unsent_runs.claimed(folder) as mine:
            if not mine:
                yield folder.name, "another process is sending it"
                continue
            left = unsent_runs.remembered(folder)
            for target in [target for target in left if not asked or target.name in asked]:
                record = Record(folder / unsent_runs.RUN, Context.read(folder / unsent_runs.RUN))
                said, failure = _sent(record, target)
                if failure is None:
                    left.remove(target)
                    unsent_runs.remember(folder, left)
                yield f"{record.name}: {said}", failure
            if not left:
                shutil.rmtree(folder)


@contextmanager
def _copied(rev: str) -> Iterator[Record]:
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as name:  # beside DVC's cache, for links
        folder = Path(name)
        if commit := find_revision(rev).commit:
            names = {each.commit: each.name for each in list_experiments()}
            yield run_copies.of_commit(commit, folder, Context(experiment=names.get(commit)))
            return
        record = run_copies.of_workspace(paths.ROOT, folder, Context())
        if what := run_copies.out_of_place(paths.ROOT):
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
