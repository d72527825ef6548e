"""Driver of a search: starts trials, waits for them, and records the scores of each."""

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common import dotted_keys, paths
from lathe.common.errors import InputError, Interrupted
from lathe.common.git import read_line
from lathe.common.progress import Progress
from lathe.config import overrides
from lathe.config.classifier_params import ClassifierParams
from lathe.config.export_params import list_gguf_types
from lathe.config.params import Params
from lathe.config.pipelines import MAIN, Pipeline
from lathe.experiments import preflight, separate_checkout
from lathe.experiments.search import environment, pruning, storage, trial
from lathe.experiments.search.search_file import Plan
from lathe.experiments.search.study import SECONDS_BETWEEN_BEATS, Study
from lathe.provenance.revisions import list_experiments

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

LOGS = paths.SCRATCH / "search"
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_SEARCHES_FOR_WORK = 5.0  # after none was found: another driver may be killed
KILLS = 3  # times that a trial may be killed under this driver before it counts as failed

Deliver = Callable[[trial.Order], None]  # hands on the experiment of a trial that is done

# What in the repository determines a trial's scores, besides the parameters.
DETERMINING = (
    *("dvc.yaml", "presets.yaml", "requirements-converter.txt", "stages", "src/lathe", "rewards", "data", "models"),
    *("classify/dvc.yaml", "classify/stages"),
    *("experiments/accelerate", "experiments/rubrics"),
)


@dataclass
class Running:
    """A running trial; `process` runs it, and `kills` counts how often it was killed before."""

    trial: "optuna.Trial"
    order: trial.Order
    gpu: str | None
    process: "subprocess.Popen[bytes]"
    kills: int = 0
    losses: pruning.Losses | None = None


@dataclass
class Driver:
    """One process of `python -m lathe search` on a study.

    `fixed` are the overrides that every trial has; `start` starts the process of a trial.
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
    pipeline: Pipeline = MAIN
    deliver: Deliver | None = None
    running: list[Running] = field(default_factory=list)

    def run(self) -> None:
        """Run until every trial has ended, or the time is up and the running ones have ended."""
        started, last_heartbeat, last_look = time.monotonic(), time.monotonic(), -SECONDS_BETWEEN_SEARCHES_FOR_WORK
        done = self.study.count_finished()
        with Progress("search", self.n_trials, done=done, unit="trial") as progress:
            while True:
                now = time.monotonic()
                exited = [running for running in self.running if running.process.poll() is not None]
                ended = [self._finish_process(running) for running in exited]
                ended += [self._prune_if_hopeless(running) for running in list(self.running)]
                if now >= last_heartbeat + SECONDS_BETWEEN_BEATS:
                    last_heartbeat = now
                    self._send_heartbeat()
                has_time = self.timeout_seconds is None or now < started + self.timeout_seconds
                if any(ended) or now >= last_look + SECONDS_BETWEEN_SEARCHES_FOR_WORK:
                    while len(self.running) < self.jobs and self._start_next(may_begin=has_time):
                        pass
                    last_look = now
                    if (finished := self.study.count_finished()) > done:
                        progress.add(finished - done)
                        done = finished
                    if not self.running and (done >= self.n_trials or not has_time):
                        return
                time.sleep(SECONDS_BETWEEN_LOOKS)

    def stop(self) -> None:
        """End the running trials; they continue when the search does."""
        for running in self.running:
            running.process.terminate()
        for running in self.running:
            running.process.wait()
        self.running.clear()

    def _start_next(self, *, may_begin: bool) -> bool:
        taken = self.study.take_trial(self.n_trials, may_begin=may_begin)
        if taken is None:
            return False
        values = self.study.choose_values(taken)
        plan = self.study.plan
        order = trial.Order(
            study=plan.study,
            number=taken.number,
            sampler=plan.sampler,
            message=trial.build_message(plan.study, taken),
            overrides=self._list_overrides(values),
            head=self.head,
            snapshot=self.snapshot,
            driver=os.getpid(),
            folder=self.pipeline.folder,
        )
        if self._record_scores(taken, order):  # finished before the driver that started it was killed
            return True
        free = [gpu for gpu in self.gpus if gpu not in {running.gpu for running in self.running}]
        gpu = free[0] if free else None
        logger.info("trial %d: %s", taken.number, ", ".join(f"{key}={value}" for key, value in values.items()))
        self.running.append(self._begin(Running(taken, order, gpu, self.start(order, gpu))))
        return True

    def _begin(self, running: Running) -> Running:
        if self.study.plan.pruner:
            running.losses = pruning.follow_losses(running.order, running.process)
        return running

    def _prune_if_hopeless(self, running: Running) -> bool:
        """End a trial whose evaluation loss falls behind; return whether it was."""
        if running.losses is None or running.process.poll() is not None:
            return False
        found = self.study.find_hopeless_step(running.trial, running.losses.read())
        if found is None:
            return False
        step, loss = found
        checkout = trial.find_checkout(running.order, running.process.pid)
        pruning.end_trial(running.process)
        self.running.remove(running)
        commit = pruning.record_pruned(running.order, checkout, step, loss)
        if self.study.prune(running.trial, step, loss, commit) and self.deliver:
            self.deliver(running.order)
        separate_checkout.remove(checkout)
        (LOGS / f"{running.order.name}.log").unlink(missing_ok=True)
        logger.info("trial %d: pruned at step %d, evaluation loss %g", running.trial.number, step, loss)
        return True

    def _list_overrides(self, values: dict[str, Any]) -> list[str]:
        return [*self.fixed, *(overrides.format_override(key, value) for key, value in values.items())]

    def _finish_process(self, running: Running) -> bool:
        """Record the result of a process that has ended; return whether its trial has ended too."""
        code, name = running.process.wait(), running.order.name
        if self._record_scores(running.trial, running.order):
            self.running.remove(running)
            (LOGS / f"{name}.log").unlink(missing_ok=True)
            return True
        log = trial.read_log(LOGS, name)
        if trial.was_killed(log, code) and running.kills + 1 < KILLS:
            logger.warning("trial %d was killed: it is run again", running.trial.number)
            trial.remove_stale_checkouts()
            running.process, running.kills = self.start(running.order, running.gpu), running.kills + 1
            self._begin(running)
            return False
        self.running.remove(running)
        reason = trial.explain_failure(log, code)
        logger.warning("trial %d failed: %s (%s)", running.trial.number, reason, LOGS / f"{name}.log")
        self.study.fail(running.trial, reason)
        return True

    def _record_scores(self, taken: "optuna.Trial", order: trial.Order) -> bool:
        """Record the scores of the trial's experiment; return whether there is one."""
        revision = trial.find_experiment(order)
        if revision is None:
            return False
        try:
            report = revision.read_json(str(Path(self.pipeline.folder) / "metrics/evaluate/validation.json")) or {}
            types = list_gguf_types(report)
            scores = [objective.read_score(report, types) for objective in self.study.plan.objectives]
        except ValueError as error:
            self.study.fail(taken, str(error))
            return True
        # Of a trial that two drivers have run, the study has one experiment, and the other is handed to nobody.
        if self.study.finish(taken, scores, str(revision.commit)) and self.deliver:
            self.deliver(order)
        shown = ", ".join(f"{o.metric} {score:g}" for o, score in zip(self.study.plan.objectives, scores, strict=True))
        logger.info("trial %d: %s", taken.number, shown)
        return True

    def _send_heartbeat(self) -> None:
        for number in self.study.send_heartbeat():
            logger.warning("trial %d has been taken over or ended by another driver", number)
            for running in [running for running in self.running if running.trial.number == number]:
                running.process.terminate()
                running.process.wait()
                self.running.remove(running)


def start_trial(order: trial.Order, gpu: str | None) -> "subprocess.Popen[bytes]":
    """Start the process of a trial, in a session of its own: Ctrl-C reaches the driver alone, which ends it."""
    hidden = (storage.VARIABLE, environment.NUMBER_OF_TRIALS, *environment.VARIABLES)
    with (LOGS / f"{order.name}.log").open("wb") as log:
        return subprocess.Popen(
            order.build_command(),
            cwd=paths.ROOT,
            env=order.build_environment(hidden, gpu),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def describe_setting(plan: Plan, params: Params | ClassifierParams, fixed: list[str], snapshot: str) -> dict[str, Any]:
    """Return what all trials of a study have in common, so that their scores can be compared."""
    leaves = dotted_keys.flatten(params.model_dump())
    return {
        "space": {key: dimension.model_dump() for key, dimension in plan.space.items()},
        "objectives": plan.directions,
        "overrides": {overrides.read_key(text): text.partition("=")[2] for text in fixed},
        "parameters": {key: value for key, value in leaves.items() if key not in plan.space},
        "files": {name: _hash_in_commit(snapshot, name) for name in DETERMINING},
    }


def _hash_in_commit(commit: str, name: str) -> str | None:
    """Return Git's hash of a file or folder in a commit; None if there is none."""
    return read_line("rev-parse", "--quiet", "--verify", f"{commit}:./{name}")


def list_gpus() -> list[str]:
    """Return the GPUs for trials, by the names that CUDA_VISIBLE_DEVICES takes."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return [str(index) for index, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


def search(
    plan: Plan,
    params: Params | ClassifierParams,
    *,
    fixed: list[str],
    pipeline: Pipeline,
    environment_variables: dict[str, str],
    n_trials: int,
    jobs: int,
    timeout_seconds: float | None,
    url: str | None,
    deliver: Deliver | None = None,
) -> Study:
    """Run a search to its end and return its study; every trial has the overrides `fixed`.

    `deliver` hands on the experiment of each trial once its scores are stored.

    Raises InputError if it cannot start, and Interrupted if a signal stopped it.
    """
    devices = list_gpus()
    if devices and jobs > len(devices):
        raise InputError(
            f"--jobs {jobs}: there are {len(devices)} GPUs, and each takes one trial; ask for fewer",
            code="too-many-jobs",
        )
    if plan.sampler == "grid":
        n_trials = min(n_trials, plan.grid_size)
    head, snapshot = trial.create_snapshot()
    for line in preflight.find_changes().describe():
        logger.info("%s", line)
    study = open_study(plan, params, url)
    study.check_setting(describe_setting(plan, params, fixed, snapshot))
    _refuse_foreign_experiments(study)
    study.record_environment(environment_variables)
    logger.info(
        "study %s in %s: %d of %d trials done", plan.study, storage.hide_password(url), study.count_finished(), n_trials
    )
    trial.remove_stale_checkouts()
    driver = Driver(
        study, n_trials, jobs, timeout_seconds, devices, fixed, head, snapshot, start_trial, pipeline, deliver
    )
    with _handle_signals(plan.study):
        try:
            driver.run()
        finally:
            driver.stop()
    return study


def open_study(plan: Plan, params: Params | ClassifierParams, url: str | None) -> Study:
    """Open the study of a search file, or create it."""
    return Study(plan, storage.open_storage(url, plan.study), params.model_dump(), is_local=url is None)


def _refuse_foreign_experiments(study: Study) -> None:
    """Refuse experiments of an earlier study of the same name, whose names a trial would need after its run."""
    name = study.plan.study
    own = {trial.build_message(name, frozen) for frozen in study.trials()}
    taken = [
        experiment.name
        for experiment in list_experiments()
        if re.fullmatch(rf"{re.escape(name)}-\d+", experiment.name)
        and experiment.message.partition(pruning.MARK)[0] not in own
    ]
    if taken:
        raise InputError(
            f"study {name}: there is an experiment {taken[0]} that is none of its trials; give the search file "
            f"another study name, or remove it with `dvc exp remove {' '.join(taken)}`",
            code="foreign-experiments",
        )


@contextmanager
def _handle_signals(name: str) -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into one line that says how to continue."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted(f"study {name} is interrupted; the same command goes on with it", number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
