"""Mirror process: sends the curves to the trackers during the training, and the whole run after DVC has ended.

It runs at the lowest priority, in a session of its own, with no open files of the stages, so that no stage waits for a
server or for this process. Runs that could not be sent stay in .scratch/mirror/pending, and `python -m lathe mirror`
sends them.
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
from lathe.experiments.tracking.run_files import Context, CurvePoints, MirroredRun, read_curves
from lathe.experiments.tracking.start_mirror import is_running
from lathe.experiments.tracking.tracker import Mirror, TrackerUnreachableError
from lathe.experiments.tracking.trackers import create_mirror
from lathe.provenance.revisions import list_experiments

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.5  # between two checks of whether DVC is running
SEND_SECONDS = 2.0  # between two readings of the curves
LONGEST_PAUSE_SECONDS = 30.0  # before another attempt to reach a tracker
PATIENCE_SECONDS = 60.0  # for a tracker after the pipeline has ended
QUEUE_SECONDS = 30.0  # for DVC's queue to commit an experiment after its process has ended


def follow_run(mark: Path) -> None:
    """Mirror the run of the DVC process that the folder `mark` names (`start_mirror`), and end this process."""
    operating_system.lower_priority()
    context = Context.from_environment(os.environ)
    chosen, _ = targets.choose_targets(load().params.tracking, os.environ)
    folder = unsent_runs.PENDING / f"{mark.name}-{int(time.time())}"
    folder.mkdir(parents=True)
    with unsent_runs.lock_run(folder):
        live = _copy_parameters(folder / "begun", context)
        senders = [_Sender(create_mirror(target, live)) for target in chosen]
        for sender in senders:
            sender.start()
        _watch(mark, senders)
        record = _collect_run(live, folder / unsent_runs.RUN)
        if record:
            unsent_runs.write_targets(folder, chosen)  # in case this process is killed
        for sender in senders:
            sender.end(record)
        deadline = time.monotonic() + PATIENCE_SECONDS
        for sender in senders:
            sender.join(max(0.0, deadline - time.monotonic()))
        unsent = [sender.mirror.target for sender in senders if not sender.done]
        if record and unsent:
            unsent_runs.write_targets(folder, unsent)
            logger.warning("%s: not all was sent; `python -m lathe mirror` does", " and ".join(map(str, unsent)))
        else:
            shutil.rmtree(folder)
    logging.shutdown()
    os._exit(0)  # a client that waits for its server would keep this process


def _copy_parameters(folder: Path, context: Context) -> MirroredRun:
    """Copy the parameters at the start of the run: an experiment's folder is removed, and users edit theirs."""
    folder.mkdir()
    for name in ("params.yaml", "presets.yaml"):
        shutil.copy2(paths.ROOT / name, folder / name)
    return MirroredRun(folder, context)


def _watch(mark: Path, senders: "list[_Sender]") -> None:
    """Pass the growing curves of the training to the senders until DVC has ended."""
    training, read = mark / "training", 0.0
    while is_running(mark):
        time.sleep(WATCH_SECONDS)
        if training.exists() and time.monotonic() > read + SEND_SECONDS:
            read = time.monotonic()
            try:
                curves = read_curves(paths.ROOT, since=training.stat().st_mtime)
            except FileNotFoundError:  # dvclive is replacing its folder
                continue
            for sender in senders:
                sender.curves = curves


def _collect_run(live: MirroredRun, folder: Path) -> MirroredRun | None:
    """Copy the files of the run to `folder`, from its commit if it is an experiment; None if it did not finish."""
    folder.mkdir()
    until = time.monotonic() + (QUEUE_SECONDS if paths.ROOT != paths.MAIN else 0.0)
    while (commit := _find_experiment(live.context.experiment)) is None and time.monotonic() < until:
        time.sleep(WATCH_SECONDS)
    if commit:
        record = run_copies.copy_commit(commit, folder, live.context)
        if record.digest == live.digest:
            return record
        shutil.rmtree(folder)  # an earlier one of the same name
        folder.mkdir()
    if paths.ROOT != paths.MAIN:
        return None
    record = run_copies.copy_workspace(paths.ROOT, folder, live.context)
    return record if record.digest == live.digest and not run_copies.find_mismatch(paths.ROOT) else None


def _find_experiment(name: str | None) -> str | None:
    """Return the commit of the experiment of that name with the same baseline as this run."""
    baseline = os.environ.get("DVC_EXP_BASELINE_REV")
    for experiment in list_experiments(paths.MAIN):
        if experiment.name == name and experiment.baseline == baseline:
            return experiment.commit
    return None


class _Sender(threading.Thread):
    """Thread that sends to one tracker, so that a slow one delays no other. `curves` are the last that were read."""

    def __init__(self, mirror: Mirror) -> None:
        super().__init__(daemon=True)
        self.mirror = mirror
        self.curves: CurvePoints = {}
        self.done = False
        self._ended = threading.Event()
        self._record: MirroredRun | None = None

    def end(self, record: MirroredRun | None) -> None:
        """Let it send the whole run, or mark it as interrupted."""
        self._record = record
        self._ended.set()

    def run(self) -> None:
        """Send until everything is sent, however often that fails."""
        pause, reported = SEND_SECONDS, ""
        while not self.done:
            try:
                with self.mirror.lock():
                    while not self.done:
                        self._send_once()
                        pause, reported = SEND_SECONDS, ""
                        self._ended.wait(SEND_SECONDS)
            except TrackerUnreachableError as error:
                if str(error) != reported:
                    reported = str(error)
                    logger.warning("%s: %s", self.mirror.target, reported)
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
            self.mirror.mark_interrupted()
            logger.info("%s: the run did not come to its end", self.mirror.target)
        self.done = True
