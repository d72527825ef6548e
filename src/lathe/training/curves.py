"""Loss curves in dvclive at the optimizer step, and the progress the user sees."""

import logging
import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from dvclive import Live
from tqdm import tqdm
from transformers import TrainerCallback

from lathe.errors import InputError

logger = logging.getLogger(__name__)

# What Trainer calls it -> what dvclive shows.
CURVES = {
    "loss": "train/loss",
    "eval_loss": "eval/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
}
SECONDS_BETWEEN_LINES = 5.0  # where there is no terminal to draw a bar on


class Curves:
    """A dvclive folder for one training; as a context manager it writes the last state on success."""

    def __init__(self, folder: Path) -> None:
        # Its constructor deletes the files of an earlier run.
        self.live = Live(str(folder), dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False)

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if kind is None:
            self.live.end()

    def callback(self) -> TrainerCallback:
        """Return what records a Trainer's logs here."""
        return _Recorder(self.live)


class _Recorder(TrainerCallback):
    """The stock callback counts log calls as steps; this one logs at `state.global_step`."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.bar: Any = None
        self.said = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # On a terminal a bar with an ETA; elsewhere the log lines of on_log tell how far it is.
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=not sys.stderr.isatty(),
        )
        for entry in state.log_history:  # of the run that this one goes on from
            self._record(entry["step"], entry)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        known = self._record(state.global_step, logs)
        if not known:
            return
        now = time.monotonic()
        if self.bar.disable and (now > self.said + SECONDS_BETWEEN_LINES or state.global_step == state.max_steps):
            self.said = now
            shown = ", ".join(f"{name} {value:.4g}" for name, value in known.items())
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, shown)

    def _record(self, step: int, logs: dict[str, float]) -> dict[str, float]:
        known = {CURVES[name]: value for name, value in logs.items() if name in CURVES}
        if not known:
            return known
        self.live.step = step
        for name, value in known.items():
            if "loss" in name and not math.isfinite(value):
                raise InputError(f"{name} is {value} at step {step}, not a number; lower training.learning_rate")
            self.live.log_metric(name, value)
        for name in ("grad_norm", "learning_rate"):  # their last values say nothing; the curves stay
            self.live.summary.get("train", {}).pop(name, None)
        self.live.make_summary()
        return known

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
