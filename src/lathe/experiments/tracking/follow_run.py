"""The process beside the pipeline: it mirrors the curves while they are written, and the whole run when DVC has ended.

It runs at the lowest priority, in a session of its own, with nothing of the stages' open: whatever becomes of a server,
or of this process, no stage waits for it. What could not be sent stays in .scratch/mirror/pending, from where
`python -m lathe mirror` sends it.
"""

import logging
import os
import shutil
import threading
import time
from pathlib import Path

from lathe.common import operating_system, paths
from lathe.config.load import load
from lathe.experiments.tracking import run_copies, targets, unsent_runs
from lathe.experiments.tracking.run_files import Context, Curves, Record, read_curves
from lathe.experiments.tracking.start_mirror import is_running
from lathe.experiments.tracking.tracker import Mirror, UnreachableError
from lathe.experiments.tracking.trackers import mirror_of
from lathe.provenance.revisions import list_experiments

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.5  # between two looks at whether DVC is there
SEND_SECONDS = 2.0  # between two looks at the curves
LONGEST_PAUSE_SECONDS = 30.0  # before a tracker that is away is asked again
PATIENCE_SECONDS = 60.0  # that a tracker has when the pipeline has ended
QUEUE_SECONDS = 30.0  # that DVC's queue has to make a commit of an experiment, when its process has ended


def follow(mark: Path) -> None:
    """Mirror the run of the DVC process that the folder `mark` names (`start_mirror`), and end this process."""
    operating_system.lower_priority()
    context = Context.of_search(os.environ)
    chosen, _ = targets.targets(load().params.tracking, os.environ)
    folder = unsent_runs.PENDING / f"{mark.name}-{int(time.time())}"
    folder.mkdir(parents=True)
    with unsent_runs.claimed(folder):
        live = _as_begun(folder / "begun", context)
        senders = [_Sender(mirror_of(target, live)) for target in chosen]
        for sender in senders:
            sender.start()
        _watch(mark, senders)
        record = _collected(live, folder / unsent_runs.RUN)
        if record:
            unsent_runs.remember(folder, chosen)  # should this process be killed
        for sender in senders:
            sender.end(record)
        deadline = time.monotonic() + PATIENCE_SECONDS
        for sender in senders:
            sender.join(max(0.0, deadline - time.monotonic()))
        left = [sender.mirror.target for sender in senders if not sender.done]
        if record and left:
            unsent_runs.remember(folder, left)
            logger.warning("%s: not all was sent; `python -m lathe mirror` does", " and ".join(map(str, left)))
        else:
            shutil.rmtree(folder)
    logging.shutdown()
    os._exit(0)  # a client that waits for its server would keep this process


def _as_begun(folder: Path, context: Context) -> Record:
    """Keep the parameters that the run began with: an experiment's folder goes, and users edit theirs."""
    folder.mkdir()
    for name in ("params.yaml", "presets.yaml"):
        shutil.copy2(paths.ROOT / name, folder / name)
    return Record(folder, context)


def _watch(mark: Path, senders: "list[_Sender]") -> None:
    """Hand over the curves of the training as they grow, until DVC is gone."""
    training, read = mark / "training", 0.0
    while is_running(mark):
        time.sleep(WATCH_SECONDS)
        if training.exists() and time.monotonic() > read + SEND_SECONDS:
            read = time.monotonic()
            try:
                curves = read_curves(paths.ROOT, since=training.stat().st_mtime)
            except FileNotFoundError:  # dvclive begins its folder anew
                continue
            for sender in senders:
                sender.curves = curves


def _collected(live: Record, folder: Path) -> Record | None:
    """Copy what the run left to `folder`, from its commit if it is an experiment; None where it did not end well."""
    folder.mkdir()
    until = time.monotonic() + (QUEUE_SECONDS if paths.ROOT != paths.MAIN else 0.0)
    while (commit := _experiment(live.context.experiment)) is None and time.monotonic() < until:
        time.sleep(WATCH_SECONDS)
    if commit:
        record = run_copies.of_commit(commit, folder, live.context)
        if record.digest == live.digest:
            return record
        shutil.rmtree(folder)  # an earlier one of the same name
        folder.mkdir()
    if paths.ROOT != paths.MAIN:
        return None
    record = run_copies.of_workspace(paths.ROOT, folder, live.context)
    return record if record.digest == live.digest and not run_copies.out_of_place(paths.ROOT) else None


def _experiment(name: str | None) -> str | None:
    """Return the commit of the experiment of that name that began where this one did."""
    baseline = os.environ.get("DVC_EXP_BASELINE_REV")
    for each in list_experiments(paths.MAIN):
        if each.name == name and each.baseline == baseline:
            return each.commit
    return None


class _Sender(threading.Thread):
    """Sends to one tracker, so that a slow one holds up no other. `curves` are the last that were read."""

    def __init__(self, mirror: Mirror) -> None:
        super().__init__(daemon=True)
        self.mirror = mirror
        self.curves: Curves = {}
        self.done = False
        self._ended = threading.Event()
        self._record: Record | None = None

    def end(self, record: Record | None) -> None:
        """Let it send the whole run, or say of it that it was cut short."""
        self._record = record
        self._ended.set()

    def run(self) -> None:
        """Send until all is sent, however often that fails."""
        pause, said = SEND_SECONDS, ""
        while not self.done:
            try:
                with self.mirror.alone():
                    while not self.done:
                        self._send_once()
                        pause, said = SEND_SECONDS, ""
                        self._ended.wait(SEND_SECONDS)
            except UnreachableError as error:
                if str(error) != said:
                    said = str(error)
                    logger.warning("%s: %s", self.mirror.target, said)
                if self._ended.is_set():
                    time.sleep(SEND_SECONDS)
                else:
                    self._ended.wait(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _send_once(self) -> None:
        if not self._ended.is_set():
            if self.curves:
                self.mirror.update(self.curves)
            return
        if self._record:
            sent = self.mirror.finish(self._record)
            logger.info("%s: complete, %d points at the end: %s", self.mirror.target, sent, self.mirror.address)
        else:
            self.mirror.interrupted()
            logger.info("%s: the run did not come to its end", self.mirror.target)
        self.done = True
