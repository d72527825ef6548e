"""The driver of a search: it begins trials, waits for them, and records what came of each."""

import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lathe.common import dotted_keys, paths
from lathe.common.errors import InputError, Interrupted
from lathe.common.git import read_line
from lathe.common.progress import Progress
from lathe.config import overrides
from lathe.config.artifacts import UNQUANTIZED
from lathe.config.params import Params
from lathe.experiments import preflight
from lathe.experiments.search import environment, storage, trial
from lathe.experiments.search.environment import Environment
from lathe.experiments.search.search_file import Plan
from lathe.experiments.search.study import SECONDS_BETWEEN_BEATS, Study
from lathe.provenance.revisions import list_experiments

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

LOGS = paths.SCRATCH / "search"
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_SEARCHES_FOR_WORK = 5.0  # where none was found: another driver may be killed
KILLS = 3  # so often a trial may be killed under this driver; then it has failed

# What of the repository decides a trial's scores, besides the parameters.
DECIDES = (
    *("dvc.yaml", "presets.yaml", "requirements-converter.txt", "stages", "src/lathe", "rewards", "data", "models"),
    *("experiments/accelerate", "experiments/rubrics"),
)


@dataclass
class Running:
    """A trial under way; `process` runs it, and `kills` counts how often it was killed before."""

    trial: "optuna.Trial"
    order: trial.Order
    gpu: str | None
    process: "subprocess.Popen[bytes]"
    kills: int = 0


@dataclass
class Driver:
    """What one `python -m lathe search` does to a study.

    `fixed` are the overrides that every trial has; `start` begins the process of one.
    """

    study: Study
    n_trials: int
    jobs: int
    timeout_seconds: float | None
    gpus: list[str]
    fixed: list[str]
    head: str
    snapshot: str
    start: "Callable[[trial.Order, str | None], subprocess.Popen[bytes]]"
    running: list[Running] = field(default_factory=list)

    def run(self) -> None:
        """Go on until every trial has ended, or the time is up and those under way have."""
        started, beaten, looked = time.monotonic(), time.monotonic(), -SECONDS_BETWEEN_SEARCHES_FOR_WORK
        done = self.study.finished()
        with Progress("search", self.n_trials, done=done, unit="trial") as progress:
            while True:
                now = time.monotonic()
                ended = [self._reap(running) for running in list(self.running) if running.process.poll() is not None]
                if now >= beaten + SECONDS_BETWEEN_BEATS:
                    beaten = now
                    self._beat()
                is_time = self.timeout_seconds is None or now < started + self.timeout_seconds
                if any(ended) or now >= looked + SECONDS_BETWEEN_SEARCHES_FOR_WORK:
                    while len(self.running) < self.jobs and self._begin(may_begin=is_time):
                        pass
                    looked = now
                    if (finished := self.study.finished()) > done:
                        progress.add(finished - done)
                        done = finished
                    if not self.running and (done >= self.n_trials or not is_time):
                        return
                time.sleep(SECONDS_BETWEEN_LOOKS)

    def stop(self) -> None:
        """End what is under way; it goes on when the search does."""
        for running in self.running:
            running.process.terminate()
        for running in self.running:
            running.process.wait()
        self.running.clear()

    def _begin(self, *, may_begin: bool) -> bool:
        begun = self.study.next(self.n_trials, may_begin=may_begin)
        if begun is None:
            return False
        values = self.study.values(begun)
        plan = self.study.plan
        order = trial.Order(
            study=plan.study,
            number=begun.number,
            sampler=plan.sampler,
            message=trial.message(plan.study, begun),
            overrides=[*self.fixed, *(overrides.format_override(key, value) for key, value in values.items())],
            head=self.head,
            snapshot=self.snapshot,
            driver=os.getpid(),
        )
        if self._read(begun, order):  # made before the driver that began it was killed
            return True
        free = [gpu for gpu in self.gpus if gpu not in {running.gpu for running in self.running}]
        gpu = free[0] if free else None
        logger.info("trial %d: %s", begun.number, ", ".join(f"{key}={value}" for key, value in values.items()))
        self.running.append(Running(begun, order, gpu, self.start(order, gpu)))
        return True

    def _reap(self, running: Running) -> bool:
        """Record what came of a process that has ended; return whether its trial has."""
        code, name = running.process.wait(), running.order.name
        if self._read(running.trial, running.order):
            self.running.remove(running)
            (LOGS / f"{name}.log").unlink(missing_ok=True)
            return True
        log = trial.log_of(LOGS, name)
        if trial.was_killed(log, code) and running.kills + 1 < KILLS:
            logger.warning("trial %d was killed: it is run again", running.trial.number)
            trial.sweep()
            running.process, running.kills = self.start(running.order, running.gpu), running.kills + 1
            return False
        self.running.remove(running)
        reason = trial.reason(log, code)
        logger.warning("trial %d failed: %s (%s)", running.trial.number, reason, LOGS / f"{name}.log")
        self.study.fail(running.trial, reason)
        return True

    def _read(self, begun: "optuna.Trial", order: trial.Order) -> bool:
        """Record the scores of the trial's experiment; return whether there is one."""
        found = trial.experiment(order)
        if found is None:
            return False
        try:
            report = found.read_json("metrics/evaluate/validation.json") or {}
            types = [name for name in report if name not in UNQUANTIZED]
            scores = [objective.value(report, types) for objective in self.study.plan.objectives]
        except ValueError as error:
            self.study.fail(begun, str(error))
            return True
        self.study.finish(begun, scores, str(found.commit))
        told = ", ".join(f"{o.metric} {score:g}" for o, score in zip(self.study.plan.objectives, scores, strict=True))
        logger.info("trial %d: %s", begun.number, told)
        return True

    def _beat(self) -> None:
        for number in self.study.beat():
            logger.warning("trial %d has been taken over by another driver", number)
            for running in [running for running in self.running if running.trial.number == number]:
                running.process.terminate()
                running.process.wait()
                self.running.remove(running)


def start(order: trial.Order, gpu: str | None) -> "subprocess.Popen[bytes]":
    """Begin the process of a trial, in a session of its own: Ctrl-C reaches the driver alone, which ends it."""
    hidden = (storage.VARIABLE, environment.NUMBER_OF_TRIALS, *environment.VARIABLES)
    with (LOGS / f"{order.name}.log").open("wb") as log:
        return subprocess.Popen(
            order.command(),
            cwd=paths.ROOT,
            env=order.environment(hidden, gpu),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def setting(plan: Plan, params: Params, fixed: list[str], snapshot: str) -> dict[str, Any]:
    """Return what all trials of a study have in common, so that their scores can be compared."""
    leaves = dotted_keys.flatten(params.model_dump())
    return {
        "space": {key: dimension.model_dump() for key, dimension in plan.space.items()},
        "objectives": plan.directions,
        "overrides": {overrides.read_key(text): text.partition("=")[2] for text in fixed},
        "parameters": {key: value for key, value in leaves.items() if key not in plan.space},
        "files": {name: _digest(snapshot, name) for name in DECIDES},
    }


def _digest(commit: str, name: str) -> str | None:
    """Return Git's hash of a file or folder in a commit; None where there is none."""
    return read_line("rev-parse", "--quiet", "--verify", f"{commit}:./{name}")


def gpus() -> list[str]:
    """Return the GPUs that trials may be given, by the names that CUDA_VISIBLE_DEVICES takes."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return [str(index) for index, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


def search(
    plan: Plan,
    params: Params,
    *,
    fixed: list[str],
    told: Environment,
    n_trials: int,
    jobs: int,
    timeout_seconds: float | None,
    url: str | None,
) -> Study:
    """Run a search to its end and return its study; every trial has the overrides `fixed`.

    Raises InputError where it cannot begin, and Interrupted where a signal stopped it.
    """
    devices = gpus()
    if devices and jobs > len(devices):
        raise InputError(f"--jobs {jobs}: there are {len(devices)} GPUs, and each takes one trial; ask for fewer")
    if plan.sampler == "grid":
        n_trials = min(n_trials, plan.grid_size)
    head, snapshot = trial.snapshot()
    for line in preflight.find_changes().describe():
        logger.info("%s", line)
    study = opened(plan, params, url)
    study.agree(setting(plan, params, fixed, snapshot))
    _refuse_foreign_experiments(study)
    study.record_environment(told.variables)
    logger.info("study %s in %s: %d of %d trials done", plan.study, storage.shown(url), study.finished(), n_trials)
    trial.sweep()
    driver = Driver(study, n_trials, jobs, timeout_seconds, devices, fixed, head, snapshot, start)
    with _ended_by_signals(plan.study):
        try:
            driver.run()
        finally:
            driver.stop()
    return study


def opened(plan: Plan, params: Params, url: str | None) -> Study:
    """Open the study of a search file, or begin it."""
    return Study(plan, storage.opened(url, plan.study), params.model_dump(), is_local=url is None)


def _refuse_foreign_experiments(study: Study) -> None:
    """An experiment of an earlier study of the same name would be in the way of a trial's, when that has run."""
    name = study.plan.study
    own = {trial.message(name, each) for each in study.trials()}
    taken = [
        each.name
        for each in list_experiments()
        if re.fullmatch(rf"{re.escape(name)}-\d+", each.name) and each.message not in own
    ]
    if taken:
        raise InputError(
            f"study {name}: there is an experiment {taken[0]} that is none of its trials; give the search file "
            f"another study name, or remove it with `dvc exp remove {' '.join(taken)}`"
        )


@contextmanager
def _ended_by_signals(name: str) -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into one line that says how to go on."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted(f"study {name} is interrupted; the same command goes on with it", number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
