"""Command `python -m lathe mirror`: finished runs sent to the trackers that have not got them yet."""

import logging
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.progress import Progress
from lathe.common.scratch import temporary_folder
from lathe.config.load import load
from lathe.experiments.tracking import run_copies, targets, unsent_runs
from lathe.experiments.tracking.run_files import Context, MirroredRun
from lathe.experiments.tracking.start_mirror import SCRATCH
from lathe.experiments.tracking.targets import Target
from lathe.experiments.tracking.tracker import TrackerUnreachableError
from lathe.experiments.tracking.trackers import create_mirror
from lathe.provenance.revisions import find_revision, list_experiments

logger = logging.getLogger(__name__)


def run(revs: Sequence[str], only: Collection[str]) -> int:
    """Send the named runs, or without a name the unsent ones; print a line each. Returns the exit code."""
    failed = 0
    with Progress("mirror", len(revs) or None, unit="run") as progress:
        for name, outcome in _send_named(revs, only) if revs else _send_unsent(only):
            failed += outcome is not None
            sys.stdout.write(f"{name}{f': {outcome}' if outcome else ''}\n")
            progress.add()
    if not revs and not progress.done:
        sys.stdout.write("nothing was missed; `python -m lathe mirror REV` sends a run that was never mirrored\n")
    return 1 if failed else 0


def _send_named(revs: Sequence[str], only: Collection[str]) -> Iterator[tuple[str, str | None]]:
    chosen, overrides = targets.choose_targets(load().params.tracking, os.environ, only=only)
    for line in overrides:
        logger.info("%s", line)
    if not chosen:
        raise InputError(
            "tracking is enabled for nothing; give --mlflow or --wandb, or enable one in params.yaml", code="no-tracker"
        )
    for rev in revs:
        with _copy_run(rev) as record:
            for target in chosen:
                outcome, failure = _send_run(record, target)
                yield f"{rev}: {outcome}", failure


def _send_unsent(only: Collection[str]) -> Iterator[tuple[str, str | None]]:
    for folder in sorted(path for path in unsent_runs.PENDING.glob("*") if path.is_dir()):
        with unsent_runs.lock_run(folder) as is_locked:
            if not is_locked:
                yield folder.name, "another process is sending it"
                continue
            left = unsent_runs.read_targets(folder)
            for target in [target for target in left if not only or target.name in only]:
                record = MirroredRun(folder / unsent_runs.RUN, Context.read(folder / unsent_runs.RUN))
                outcome, failure = _send_run(record, target)
                if failure is None:
                    left.remove(target)
                    unsent_runs.write_targets(folder, left)
                yield f"{record.name}: {outcome}", failure
            if not left:
                shutil.rmtree(folder)


@contextmanager
def _copy_run(rev: str) -> Iterator[MirroredRun]:
    with temporary_folder(SCRATCH, "copy") as folder:  # on the file system of DVC's cache, for links
        if commit := find_revision(rev).commit:
            names = {experiment.commit: experiment.name for experiment in list_experiments()}
            yield run_copies.copy_commit(commit, folder, Context(experiment=names.get(commit)))
            return
        record = run_copies.copy_workspace(paths.ROOT, folder, Context())
        if what := run_copies.find_mismatch(paths.ROOT):
            raise InputError(
                f"workspace: {what} is not as dvc.lock has it; run `dvc repro`, or name a commit",
                code="changed-workspace",
            )
        yield record


def _send_run(record: MirroredRun, target: Target) -> tuple[str, str | None]:
    if not record.curves:
        return f"{target}", "no curves; has its training run?"
    mirror = create_mirror(target, record)
    try:
        with mirror.lock():
            sent = mirror.finish(record)
    except TrackerUnreachableError as error:
        return f"{target}", f"{error}; the same command again goes on"
    return f"{target}: {sent} points sent: {mirror.address}", None
