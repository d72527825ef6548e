"""Training curves in dvclive, by optimizer step, and the progress bar and log lines of a training."""

import json
import logging
import math
import re
import time
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import TrainerCallback

from lathe.common import launch
from lathe.common.errors import InputError
from lathe.common.progress import Progress
from lathe.common.text import readable_bytes
from lathe.training.throughput import ThroughputMeter

logger = logging.getLogger(__name__)

# Name in Trainer's log -> name in dvclive.
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
# Rewards of GRPO have names of their own.
REWARD_CURVES = re.compile(r"(eval_)?rewards/(\w+?)(/mean)?")
# Curve or speed -> its name behind the progress bar.
SHOWN = {
    "train/loss": "loss",
    "eval/loss": "validation loss",
    "train/reward": "reward",
    "eval/reward": "validation reward",
    "train/learning_rate": "rate",
    "tokens_per_second": "tokens/s",
    "peak_memory_bytes": "memory",
}
# Their last values mean nothing without the curve.
NOT_IN_SUMMARY = ("grad_norm", "learning_rate")


class Curves:
    """The dvclive folders of one training; as a context manager it writes the last state on success.

    `folder` and `throughput`, the folder for what varies from run to run, are emptied when the first value is written.
    Of several processes only rank 0 writes; all see the same values, and stop at the same non-finite loss.
    """

    def __init__(self, folder: Path, throughput: Path | None = None) -> None:
        self.folder = folder if launch.is_main() else None
        self.throughput_folder = throughput if launch.is_main() else None

    @cached_property
    def live(self) -> Any:
        """The dvclive object of the curves; None where this process does not write."""
        return _open_live(self.folder) if self.folder else None

    @cached_property
    def throughput(self) -> Any:
        """The dvclive object of the throughput; None where it is not written."""
        return _open_live(self.throughput_folder) if self.throughput_folder else None

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if kind is None:
            for live in filter(None, (self.live, self.throughput)):
                live.end()

    def make_callback(self, prefix: str, meter: ThroughputMeter) -> TrainerCallback:
        """Return a callback that writes a Trainer's logs here, under names that begin with `prefix`."""
        return _CurveCallback(self, prefix, meter)

    def add_to_summary(self, values: dict[str, dict[str, float]]) -> None:
        """Add single values to metrics.json, beside the last ones of the curves."""
        if self.live:
            self.live.summary.update(values)
            self.live.make_summary()


class _CurveCallback(TrainerCallback):
    """Logs at `state.global_step`, where dvclive's own callback counts log calls as steps.

    On a terminal there is a progress bar with the last values and an ETA, elsewhere a line of JSON per `logging_steps`.
    """

    def __init__(self, curves: Curves, prefix: str, meter: ThroughputMeter) -> None:
        self.curves, self.prefix, self.meter = curves, prefix, meter
        self.bar: Any = None
        self.started = (0, 0.0)  # step and time
        self.shown: dict[str, str] = {}  # behind the bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = Progress(
            "training", state.max_steps, done=state.global_step, unit="step", log=False, draw=launch.is_main()
        )
        self.started = (state.global_step, time.monotonic())
        for entry in state.log_history:  # from a resumed checkpoint
            self._log_curves(entry["step"], self._select_curves(entry))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.add()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        values = self._select_curves(logs)
        if not values:
            return
        rates = self.meter.measure_since_last() if "loss" in logs else {}
        self._log_line(state, values, rates)
        self._log_curves(state.global_step, values)
        if rates and self.curves.throughput:
            self.curves.throughput.step = state.global_step
            for name, value in rates.items():
                self.curves.throughput.log_metric(f"{self.prefix}train/{name}", value)
            self.curves.throughput.make_summary()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()

    def _select_curves(self, logs: dict[str, float]) -> dict[str, float]:
        # Sorted, as a log that is read back from a checkpoint is: both must write the same files.
        return {self.prefix + curve: value for name, value in sorted(logs.items()) if (curve := _get_curve_name(name))}

    def _log_line(self, state: Any, values: dict[str, float], rates: dict[str, float]) -> None:
        if self.bar.is_drawn:
            self._show_values({**values, **rates})
            return
        line = {"step": state.global_step, "of": state.max_steps, **values, **rates}
        if rates:
            line["seconds_left"] = self._estimate_seconds_left(state)
        logger.info(json.dumps({name: _round(value) for name, value in line.items()}))

    def _show_values(self, values: dict[str, float]) -> None:
        """Show the last values behind the bar; the validation loss stays until the next evaluation."""
        for name, value in values.items():
            if title := SHOWN.get(name.removeprefix(self.prefix)):
                self.shown[title] = readable_bytes(int(value)) if title.endswith("memory") else f"{value:.3g}"
        self.bar.show(", ".join(f"{title} {text}" for title, text in self.shown.items()))

    def _log_curves(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if "loss" in name and not math.isfinite(value):
                raise InputError(
                    f"{name} is {value} at step {step}, not a number; lower training.learning_rate",
                    code="loss-not-finite",
                )
        live = self.curves.live
        if live is None or not values:
            return
        live.step = step
        for name, value in values.items():
            live.log_metric(name, value)
        summary = live.summary
        for part in f"{self.prefix}train".split("/"):
            summary = summary.get(part, {})
        for name in NOT_IN_SUMMARY:
            summary.pop(name, None)
        live.make_summary()

    def _estimate_seconds_left(self, state: Any) -> int:
        step, moment = self.started
        return round((time.monotonic() - moment) / (state.global_step - step) * (state.max_steps - state.global_step))


def _get_curve_name(name: str) -> str | None:
    if name not in CURVES and (match := REWARD_CURVES.fullmatch(name)):
        return f"{'eval' if match[1] else 'train'}/rewards/{match[2]}"
    return CURVES.get(name)


def _open_live(folder: Path) -> Any:
    from dvclive import Live  # imports DVC, most of a second: only when there is something to write

    # Its constructor deletes the files of an earlier run.
    return Live(str(folder), dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False)


def _round(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")
