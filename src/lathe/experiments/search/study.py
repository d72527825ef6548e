"""The trials of a study, shared out among drivers: each is run by one of them, and none is lost when one is killed.

A trial that was begun carries its owner, who renews it. One whose owner is gone is taken over with its number and its
parameters. Optuna's own heartbeats would end it as failed and begin another, and its journal has none.

Drivers of one checkout exclude one another by a lock. Between machines there is none: who takes a trial over writes its
name, waits, and lets go if another wrote later. Should a machine be slower than that wait, or come back from the dead,
two run the trial until the next beat, when the one whose name is gone stops; the storage takes the scores of one alone.
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
SECONDS_UNTIL_GONE = 150.0  # without a beat, of an owner on another machine
SECONDS_TO_CLAIM = 2.0  # in which another machine's claim to the same trial would show

OWNER, SETTING, ENVIRONMENT = "owner", "setting", "environment"
EXPERIMENT, REASON, SURPLUS = "experiment", "reason", "surplus"


class Study:
    """A study of Optuna, seen by one driver; it is begun where the storage has none of that name.

    `is_local`: drivers of this checkout alone can take part. `params` are the parameters that the trials begin from.
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
        )
        self._lock = paths.SCRATCH / "search" / f"{plan.study}.lock"
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        self._me = _process(os.getpid())
        self._beats = 0
        self._mine: dict[int, optuna.Trial] = {}
        self._seen: dict[int, tuple[Any, float]] = {}  # of another's trial: its owner, and since when unchanged

    @property
    def optuna_study(self) -> "optuna.Study":
        """The study itself, to be read."""
        return self._study

    def agree(self, setting: dict[str, Any]) -> None:
        """Settle what all trials have in common; raises InputError where they were begun with something else."""
        known = self._study.user_attrs.get(SETTING)
        if known is None:
            self._study.set_user_attr(SETTING, setting)
            known = self._study.user_attrs[SETTING]  # another driver's, where it was faster
        for name, now in setting.items():
            if (then := known.get(name)) != now:
                raise InputError(
                    f"study {self.plan.study}: its trials were run with other {name}: {_difference(then, now)}; "
                    "go back to that, or give the search file another study name"
                )

    def trials(self) -> list["optuna.trial.FrozenTrial"]:
        """Return every trial, those left out that were begun beyond the number."""
        return [trial for trial in self._study.get_trials(deepcopy=False) if SURPLUS not in trial.user_attrs]

    def finished(self) -> int:
        """Return how many trials have ended, well or not."""
        return sum(trial.state.is_finished() for trial in self.trials())

    def next(self, n_trials: int, *, may_begin: bool) -> "optuna.Trial | None":
        """Return a trial to run: one whose owner is gone, else a new one where fewer than `n_trials` were begun."""
        with self._locked():
            for frozen in self.trials():
                free = not frozen.state.is_finished() and frozen.number not in self._mine
                if free and self._is_abandoned(frozen) and (trial := self._taken_over(frozen)) is not None:
                    return trial
            if not may_begin or len(self.trials()) >= n_trials:
                return None
            return self._begun(n_trials)

    def values(self, trial: "optuna.Trial") -> dict[str, Any]:
        """Return the parameters of a trial, the same ones however often it is begun."""
        place = sum(other.number < trial.number for other in self.trials())
        self._study.sampler = samplers.sampler(self.plan, place, self.params)
        return samplers.suggested(self.plan, trial)

    def finish(self, trial: "optuna.Trial", scores: Sequence[float], commit: str) -> None:
        """Record a trial's scores, and the commit of its experiment."""
        self._end(trial, EXPERIMENT, commit, scores)

    def fail(self, trial: "optuna.Trial", reason: str) -> None:
        """Record why a trial has no scores."""
        self._end(trial, REASON, reason, None)

    def beat(self) -> list[int]:
        """Say that this driver still runs its trials; return the numbers of those that another has taken over."""
        self._beats += 1
        by_number = {trial.number: trial for trial in self.trials()}
        lost = [number for number in self._mine if not self._is_mine(by_number[number])]
        for number in lost:
            del self._mine[number]
        for trial in self._mine.values():
            self._claim(trial)
        return lost

    def record_environment(self, variables: dict[str, str]) -> None:
        """Keep with the study what the environment said."""
        if variables:
            self._study.set_user_attr(ENVIRONMENT, variables)

    def _end(self, trial: "optuna.Trial", attribute: str, content: str, scores: Sequence[float] | None) -> None:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            trial.set_user_attr(attribute, content)
            self._study.tell(trial, scores, TrialState.FAIL if scores is None else None, skip_if_finished=True)
        except UpdateFinishedTrialError:
            logger.warning("trial %d has been ended by another driver; what that one recorded stands", trial.number)
        self._mine.pop(trial.number, None)

    def _begun(self, n_trials: int) -> "optuna.Trial | None":
        from optuna.trial import TrialState

        trial = self._study.ask()
        trial.set_user_attr(OWNER, self._me)
        if sum(other.number < trial.number for other in self.trials()) >= n_trials:
            # A driver on another machine began the last one at the same moment.
            trial.set_user_attr(SURPLUS, True)
            self._study.tell(trial, state=TrialState.FAIL)
            return None
        self._mine[trial.number] = trial
        return trial

    def _is_abandoned(self, trial: "optuna.trial.FrozenTrial") -> bool:
        owner = trial.user_attrs.get(OWNER)
        if owner is None and self.is_local:
            return True  # its driver was killed between two lines of `_begun`, or the lock would not be ours
        if owner is not None and owner["machine"] == self._me["machine"]:
            return _process(owner["pid"]) != {key: value for key, value in owner.items() if key != "beat"}
        before, since = self._seen.setdefault(trial.number, (owner, time.monotonic()))
        if before != owner:
            self._seen[trial.number] = (owner, time.monotonic())
            return False
        return time.monotonic() - since > SECONDS_UNTIL_GONE

    def _taken_over(self, frozen: "optuna.trial.FrozenTrial") -> "optuna.Trial | None":
        import optuna

        study = self._storage.get_study_id_from_name(self.plan.study)
        known = self._storage.get_trial_id_from_study_id_trial_number(study, frozen.number)
        trial = optuna.trial.Trial(self._study, known)
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

    def _claim(self, trial: "optuna.Trial") -> bool:
        """Write this driver's name, and that it lives; return False where the trial has been ended meanwhile."""
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
    def _locked(self) -> Iterator[None]:
        held = operating_system.open_locked(self._lock, wait=True)
        assert held is not None
        with held:
            yield


def _process(pid: int) -> dict[str, Any]:
    """Name a process of this machine so that no later one has the same name; its start is None where it is gone."""
    return {
        "machine": operating_system.identify_machine(),
        "pid": pid,
        "started": operating_system.get_start_time(pid),
    }


def _difference(then: Any, now: Any) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        key = next(key for key in {**then, **now} if then.get(key) != now.get(key))
        return f"{key} {_shown(then.get(key))}, now {_shown(now.get(key))}"
    return f"{_shown(then)}, now {_shown(now)}"


def _shown(value: Any) -> str:
    return "none" if value is None or value == "" else json.dumps(value, ensure_ascii=False)
