"""Curves in dvclive at the optimizer step, and the progress the user sees."""

import json
import logging
import math
import re
import time
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback

from lathe.common import launch
from lathe.common.errors import InputError
from lathe.common.progress import Progress
from lathe.training.throughput import Speed

logger = logging.getLogger(__name__)

# What Trainer calls it -> what dvclive shows.
CURVES = {
    "loss": "train/loss",
    "eval_loss": "eval/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "num_tokens": "train/tokens",
    "rewards/margins": "train/reward_margin",
    "rewards/accuracies": "train/reward_accuracy",
    "rewards/chosen": "train/reward_chosen",
    "rewards/rejected": "train/reward_rejected",
    "eval_rewards/margins": "eval/reward_margin",
    "eval_rewards/accuracies": "eval/reward_accuracy",
    "eval_rewards/chosen": "eval/reward_chosen",
    "eval_rewards/rejected": "eval/reward_rejected",
    "reward": "train/reward",
    "reward_std": "train/reward_std",
    "frac_reward_zero_std": "train/groups_without_difference",
    "completions/mean_length": "train/completion_length",
    "completions/clipped_ratio": "train/unfinished",
    "clip_ratio/region_mean": "train/clipped",
    "entropy": "train/entropy",
    "kl": "train/kl",
    "eval_reward": "eval/reward",
    "eval_completion_length": "eval/completion_length",
    "eval_unfinished": "eval/unfinished",
}
# Each reward of GRPO has a name of its own.
REWARD_CURVES = re.compile(r"(eval_)?rewards/(\w+?)(/mean)?")
# Their last values say nothing beside the curves.
NOT_SUMMED_UP = ("grad_norm", "learning_rate")


class Curves:
    """The dvclive folders of one training; as a context manager it writes the last state on success.

    `folder`, and `speed` for what varies from run to run, are begun anew with the first value. Of several processes
    rank 0 alone writes; the others see the same values, and refuse the same.
    """

    def __init__(self, folder: Path, speed: Path | None = None) -> None:
        self.folder = folder if launch.is_main() else None
        self.speed_folder = speed if launch.is_main() else None

    @cached_property
    def live(self) -> Any:
        """What the curves go to; None where this process does not write."""
        return _live(self.folder) if self.folder else None

    @cached_property
    def speed(self) -> Any:
        """What the speeds go to; None where nothing writes them."""
        return _live(self.speed_folder) if self.speed_folder else None

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if kind is None:
            for live in filter(None, (self.live, self.speed)):
                live.end()

    def callback(self, prefix: str, speed: Speed) -> TrainerCallback:
        """Return what records a Trainer's logs here, under names that begin with `prefix`."""
        return _Recorder(self, prefix, speed)

    def note(self, values: dict[str, dict[str, float]]) -> None:
        """Put single values beside the last ones of the curves."""
        if self.live:
            self.live.summary.update(values)
            self.live.make_summary()


class _Recorder(TrainerCallback):
    """The stock callback counts log calls as steps; this one logs at `state.global_step`.

    On a terminal there is a bar with an ETA, and everywhere one line of JSON per `logging_steps`.
    """

    def __init__(self, curves: Curves, prefix: str, speed: Speed) -> None:
        self.curves, self.prefix, self.speed = curves, prefix, speed
        self.bar: Any = None
        self.started = (0, 0.0)  # step and time

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = Progress(
            "training", state.max_steps, done=state.global_step, unit="step", log=False, draw=launch.is_main()
        )
        self.started = (state.global_step, time.monotonic())
        for entry in state.log_history:  # of the run that this one goes on from
            self._record(entry["step"], self._known(entry))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.add()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        known = self._known(logs)
        if not known:
            return
        rates = self.speed.since_last() if "loss" in logs else {}
        self._say(state, known, rates)
        self._record(state.global_step, known)
        if rates and self.curves.speed:
            self.curves.speed.step = state.global_step
            for name, value in rates.items():
                self.curves.speed.log_metric(f"{self.prefix}train/{name}", value)
            self.curves.speed.make_summary()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()

    def _known(self, logs: dict[str, float]) -> dict[str, float]:
        # In order: what is read back from a checkpoint has been sorted, and must leave the same files.
        return {self.prefix + curve: value for name, value in sorted(logs.items()) if (curve := _curve(name))}

    def _say(self, state: Any, known: dict[str, float], rates: dict[str, float]) -> None:
        line = {"step": state.global_step, "of": state.max_steps, **known, **rates}
        if rates:
            line["seconds_left"] = self._seconds_left(state)
        with logging_redirect_tqdm() if self.bar.is_drawn else nullcontext():
            logger.info(json.dumps({name: _short(value) for name, value in line.items()}))

    def _record(self, step: int, known: dict[str, float]) -> None:
        for name, value in known.items():
            if "loss" in name and not math.isfinite(value):
                raise InputError(f"{name} is {value} at step {step}, not a number; lower training.learning_rate")
        live = self.curves.live
        if live is None or not known:
            return
        live.step = step
        for name, value in known.items():
            live.log_metric(name, value)
        summary = live.summary
        for part in f"{self.prefix}train".split("/"):
            summary = summary.get(part, {})
        for name in NOT_SUMMED_UP:
            summary.pop(name, None)
        live.make_summary()

    def _seconds_left(self, state: Any) -> int:
        step, moment = self.started
        return round((time.monotonic() - moment) / (state.global_step - step) * (state.max_steps - state.global_step))


def _curve(name: str) -> str | None:
    if name not in CURVES and (match := REWARD_CURVES.fullmatch(name)):
        return f"{'eval' if match[1] else 'train'}/rewards/{match[2]}"
    return CURVES.get(name)


def _live(folder: Path) -> Any:
    from dvclive import Live  # with DVC behind it: most of a second, which the first step need not wait for

    # Its constructor deletes the files of an earlier run.
    return Live(str(folder), dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False)


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")
