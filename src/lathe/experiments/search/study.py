"""Study: its trials distributed among drivers, each run by one driver, none lost if a driver is killed.

A running trial has an owner, which renews its claim by heartbeats. A trial whose owner is gone is taken over with its
number and its parameters. Optuna's own heartbeats would end it as failed and start another, and its journal has none.

Drivers of one checkout exclude one another by a lock. Between machines there is none: a driver that takes a trial over
writes its name, waits, and gives up if another wrote later. If a machine is slower than that, or comes back, two
drivers run the trial until the next heartbeat, when the one that is not the owner stops; only one's scores are stored.
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lathe.common import operating_system, paths
from lathe.common.errors import InputError
from lathe.experiments.search import samplers
from lathe.experiments.search.search_file import Plan

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_BEATS = 20.0
SECONDS_UNTIL_GONE = 150.0  # without a heartbeat of an owner on another machine
SECONDS_TO_CLAIM = 2.0  # until another machine's claim to the same trial is visible

OWNER, SETTING, ENVIRONMENT = "owner", "setting", "environment"
EXPERIMENT, REASON, SURPLUS, PRUNED = "experiment", "reason", "surplus", "pruned"


class Study:
    """A study of Optuna as one driver uses it; it is created if the storage has none of that name.

    `is_local`: only drivers of this checkout can take part. `params` are the parameters before a trial's own.
    """

    def __init__(self, plan: Plan, storage: "BaseStorage", params: dict[str, Any], *, is_local: bool) -> None:
        import optuna

        self.plan, self.params, self.is_local = plan, params, is_local
        self._storage = storage
        self._study = optuna.create_study(
            study_name=plan.study,
            storage=storage,
            directions=[objective.direction for objective in plan.objectives],
            load_if_exists=True,
            pruner=_create_pruner(plan),
        )
        self._lock = paths.SCRATCH / "search" / f"{plan.study}.lock"
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        self._me = _identify_process(os.getpid())
        self._beats = 0
        self._mine: dict[int, optuna.Trial] = {}
        self._reported: dict[int, int] = {}  # the last step of each trial whose loss the study has
        self._seen: dict[int, tuple[Any, float]] = {}  # of other drivers: owner, and since when

    @property
    def optuna_study(self) -> "optuna.Study":
        """Optuna's object, to be read."""
        return self._study

    def check_setting(self, setting: dict[str, Any]) -> None:
        """Record what all trials have in common; raises InputError if they were started with something else."""
        known = self._study.user_attrs.get(SETTING)
        if known is None:
            self._study.set_user_attr(SETTING, setting)
            known = self._study.user_attrs[SETTING]  # another driver's, if it was faster
        for name, now in setting.items():
            if (then := known.get(name)) != now:
                raise InputError(
                    f"study {self.plan.study}: its trials were run with other {name}: "
                    f"{_describe_difference(then, now)}; go back to that, or give the search file another study name",
                    code="other-setting",
                )

    def trials(self) -> list["optuna.trial.FrozenTrial"]:
        """Return every trial but those that were started beyond the wanted number."""
        return [trial for trial in self._study.get_trials(deepcopy=False) if SURPLUS not in trial.user_attrs]

    def count_finished(self) -> int:
        """Return how many trials have ended, well or not."""
        return sum(trial.state.is_finished() for trial in self.trials())

    def take_trial(self, n_trials: int, *, may_begin: bool) -> "optuna.Trial | None":
        """Return a trial to run: one whose owner is gone, or a new one if fewer than `n_trials` were started."""
        with self._lock_study():
            for frozen in self.trials():
                free = not frozen.state.is_finished() and frozen.number not in self._mine
                if free and self._is_abandoned(frozen) and (trial := self._take_over(frozen)) is not None:
                    return trial
            if not may_begin or len(self.trials()) >= n_trials:
                return None
            return self._start_trial(n_trials)

    def choose_values(self, trial: "optuna.Trial") -> dict[str, Any]:
        """Return the parameters of a trial, the same ones however often it is started."""
        place = sum(other.number < trial.number for other in self.trials())
        self._study.sampler = samplers.create_sampler(self.plan, place, self.params)
        return samplers.suggest_values(self.plan, trial)

    def finish(self, trial: "optuna.Trial", scores: Sequence[float], commit: str) -> bool:
        """Record a trial's scores, and the commit of its experiment; return False if another driver has before."""
        self._end_trial(trial, EXPERIMENT, commit, scores)
        return commit in self.list_experiments()

    def list_experiments(self) -> list[str]:
        """Return the commit of the experiment of each trial that has ended and has one."""
        ended = [trial for trial in self.trials() if trial.state.is_finished()]
        return [trial.user_attrs[EXPERIMENT] for trial in ended if EXPERIMENT in trial.user_attrs]

    def fail(self, trial: "optuna.Trial", reason: str) -> None:
        """Record why a trial has no scores."""
        self._end_trial(trial, REASON, reason, None)

    def find_hopeless_step(
        self, trial: "optuna.Trial", losses: Sequence[tuple[int, float]]
    ) -> tuple[int, float] | None:
        """Report a trial's evaluation losses by optimizer steps; return step and loss where it is to be pruned."""
        sign = -1.0 if self.plan.objectives[0].direction == "maximize" else 1.0  # which way the study is better
        for step, loss in losses:
            if step > self._reported.get(trial.number, -1):
                self._reported[trial.number] = step
                trial.report(sign * loss, step)
                if trial.should_prune():
                    return step, loss
        return None

    def prune(self, trial: "optuna.Trial", step: int, loss: float, commit: str) -> bool:
        """Record that a trial was pruned, where, and the commit of what it left; return as `finish` does.

        It has no scores.
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            trial.set_user_attr(EXPERIMENT, commit)
            trial.set_user_attr(PRUNED, {"step": step, "evaluation_loss": loss})
            # `Study.tell` would store the last reported loss as the trial's score.
            self._storage.set_trial_state_values(self._find_id(trial.number), TrialState.PRUNED)
        except UpdateFinishedTrialError:
            logger.warning("trial %d was ended by another driver; its record is kept", trial.number)
        self._mine.pop(trial.number, None)
        return commit in self.list_experiments()

    def send_heartbeat(self) -> list[int]:
        """Renew this driver's claim to its trials; return the numbers of those that another has taken over or ended."""
        self._beats += 1
        by_number = {trial.number: trial for trial in self.trials()}
        lost = [
            number
            for number in self._mine
            if by_number[number].state.is_finished() or not self._is_mine(by_number[number])
        ]
        for number in lost:
            del self._mine[number]
        for trial in self._mine.values():
            self._claim(trial)
        return lost

    def record_environment(self, variables: dict[str, str]) -> None:
        """Store the variables of the environment with the study."""
        if variables:
            self._study.set_user_attr(ENVIRONMENT, variables)

    def _end_trial(self, trial: "optuna.Trial", attribute: str, content: str, scores: Sequence[float] | None) -> None:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            trial.set_user_attr(attribute, content)
            self._study.tell(trial, scores, TrialState.FAIL if scores is None else None, skip_if_finished=True)
        except UpdateFinishedTrialError:
            logger.warning("trial %d was ended by another driver; its record is kept", trial.number)
        self._mine.pop(trial.number, None)

    def _start_trial(self, n_trials: int) -> "optuna.Trial | None":
        from optuna.trial import TrialState

        trial = self._study.ask()
        trial.set_user_attr(OWNER, self._me)
        if sum(other.number < trial.number for other in self.trials()) >= n_trials:
            # A driver on another machine started the last one at the same moment.
            trial.set_user_attr(SURPLUS, True)
            self._study.tell(trial, state=TrialState.FAIL)
            return None
        self._mine[trial.number] = trial
        return trial

    def _is_abandoned(self, trial: "optuna.trial.FrozenTrial") -> bool:
        owner = trial.user_attrs.get(OWNER)
        if owner is None and self.is_local:
            return True  # its driver was killed within `_start_trial`, or it would hold the lock
        if owner is not None and owner["machine"] == self._me["machine"]:
            return _identify_process(owner["pid"]) != {key: value for key, value in owner.items() if key != "beat"}
        before, since = self._seen.setdefault(trial.number, (owner, time.monotonic()))
        if before != owner:
            self._seen[trial.number] = (owner, time.monotonic())
            return False
        return time.monotonic() - since > SECONDS_UNTIL_GONE

    def _take_over(self, frozen: "optuna.trial.FrozenTrial") -> "optuna.Trial | None":
        import optuna

        trial = optuna.trial.Trial(self._study, self._find_id(frozen.number))
        if not self._claim(trial):
            return None
        if not self.is_local:
            time.sleep(SECONDS_TO_CLAIM)
            [frozen] = [other for other in self.trials() if other.number == frozen.number]
            if frozen.state.is_finished() or not self._is_mine(frozen):
                return None
        logger.info("trial %d was interrupted: it goes on with the same parameters", trial.number)
        self._mine[trial.number] = trial
        return trial

    def _find_id(self, number: int) -> int:
        """Return the storage's number of a trial."""
        study = self._storage.get_study_id_from_name(self.plan.study)
        return self._storage.get_trial_id_from_study_id_trial_number(study, number)

    def _claim(self, trial: "optuna.Trial") -> bool:
        """Write this driver's name and heartbeat to a trial; return False if the trial has ended meanwhile."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            trial.set_user_attr(OWNER, {**self._me, "beat": self._beats})
        except UpdateFinishedTrialError:
            return False
        return True

    def _is_mine(self, trial: "optuna.trial.FrozenTrial") -> bool:
        owner = trial.user_attrs.get(OWNER) or {}
        return {key: value for key, value in owner.items() if key != "beat"} == self._me

    @contextmanager
    def _lock_study(self) -> Iterator[None]:
        held = operating_system.open_locked(self._lock, wait=True)
        assert held is not None
        with held:
            yield


def _create_pruner(plan: Plan) -> "optuna.pruners.BasePruner":
    from optuna.pruners import NopPruner, SuccessiveHalvingPruner

    if plan.pruner is None:
        return NopPruner()
    return SuccessiveHalvingPruner(min_resource=plan.pruner.min_steps, reduction_factor=plan.pruner.reduction)


def _identify_process(pid: int) -> dict[str, Any]:
    """Return a unique description of a process on this machine; `started` is None if it has ended."""
    return {
        "machine": operating_system.identify_machine(),
        "pid": pid,
        "started": operating_system.get_start_time(pid),
    }


def _describe_difference(then: Any, now: Any) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        key = next(key for key in {**then, **now} if then.get(key) != now.get(key))
        return f"{key} {_format_value(then.get(key))}, now {_format_value(now.get(key))}"
    return f"{_format_value(then)}, now {_format_value(now)}"


def _format_value(value: Any) -> str:
    return "none" if value is None or value == "" else json.dumps(value, ensure_ascii=False)
