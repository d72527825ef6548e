"""Pruning: a trial whose evaluation loss falls behind is ended in its training, and recorded as pruned.

Which trials go on is decided by Optuna's successive halving. What a pruned trial leaves is a commit with its parameters
and its curves as far as they go: no scores, no outputs, and no stage from training on in dvc.lock.
"""

import csv
import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import yaml

from lathe.common.dvc_api import open_repository
from lathe.common.git import list_paths, run_git, try_git
from lathe.experiments.search import trial
from lathe.provenance.dvc_lock import read_locked_stages

if TYPE_CHECKING:
    import subprocess

CURVE = "metrics/train/plots/metrics/eval/loss.tsv"
KEPT_METRICS = "metrics/train/"
FIRST_STAGE = "train"  # of those that a pruned trial has not ended
MARK = "; pruned at "  # in the message of the experiment
SECONDS_TO_END = 60.0  # of a stage that saves after SIGTERM


@dataclass(frozen=True)
class Losses:
    """The evaluation losses of a trial that runs: the curve in its checkout, unless it is still that of the commit."""

    file: Path
    committed: bytes | None

    def read(self) -> list[tuple[int, float]]:
        """Return each optimizer step with its loss, in order; of a file that is being written the whole lines."""
        try:
            content = self.file.read_bytes()
        except OSError:
            return []
        if content == self.committed:
            return []
        whole = content[: content.rfind(b"\n") + 1].decode()
        rows = csv.DictReader(io.StringIO(whole), delimiter="\t")
        with suppress(KeyError, TypeError, ValueError):  # a line that is none of DVCLive's
            return [(int(row["step"]), float(row["loss"])) for row in rows]
        return []


def follow_losses(order: trial.Order, process: "subprocess.Popen[bytes]") -> Losses:
    """Return the losses of the trial that a process runs."""
    committed = try_git("show", f"{order.snapshot}:./{CURVE}")
    return Losses(trial.find_checkout(order, process.pid) / CURVE, committed)


def end_trial(process: "subprocess.Popen[bytes]") -> None:
    """End the process of a trial and the stage that it runs, which saves first."""
    below: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.wait()
    for left in psutil.wait_procs(below, timeout=SECONDS_TO_END)[1]:
        with suppress(psutil.NoSuchProcess):
            left.kill()


def record_pruned(order: trial.Order, checkout: Path, step: int, loss: float) -> str:
    """Make an experiment of what a pruned trial has left in its checkout; return its commit."""
    run_git("read-tree", order.snapshot, root=checkout)
    for path in list_paths("ls-files", "--", "metrics", root=checkout):
        if not path.startswith(KEPT_METRICS):
            (checkout / path).unlink(missing_ok=True)
    lock = checkout / "dvc.lock"
    if lock.exists():
        done = set(_list_stages_before(checkout))
        kept = {name: stage for name, stage in read_locked_stages(lock).items() if name in done}
        lock.write_text(yaml.safe_dump({"schema": "2.0", "stages": kept}, sort_keys=False), encoding="utf-8")
    run_git("add", "--all", "--", "metrics", "params.yaml", *(["dvc.lock"] if lock.exists() else []), root=checkout)
    tree = run_git("write-tree", root=checkout).decode().strip()
    message = f"{order.message}{MARK}step {step}, evaluation loss {loss:g}"
    commit = run_git("commit-tree", tree, "-p", order.head, "-m", message, root=checkout).decode().strip()
    run_git("push", "--quiet", "--force", "origin", f"{commit}:{trial.build_ref(order)}", root=checkout)
    return commit


def _list_stages_before(checkout: Path) -> Iterator[str]:
    """Yield the stages that come before training."""
    with open_repository(checkout) as repo:
        for command in repo.list_commands():
            if command.name == FIRST_STAGE:
                return
            yield command.name
