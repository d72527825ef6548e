"""What runs in this checkout now, whoever started it: found by the processes of the stages, the lock, and the logs.

Nothing is remembered between two looks, so that two studios, or one that was killed and started again, show the same.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lathe.common import paths
from lathe.common.metric_files import unwrap_list
from lathe.common.workspace_lock import find_holder
from lathe.experiments.tracking.run_files import read_curves
from lathe.studio.started_commands import StartedCommand, list_commands, read_tail

STAGE_SCRIPT = re.compile(r"stages/([a-z_]+)\.py$")
LINES_OF_PROGRESS = 40
FIGURES = {
    "train/loss": "loss",
    "speed/train/tokens_per_second": "tokens_per_second",
    "speed/train/peak_memory_bytes": "memory_bytes",
}


@dataclass(frozen=True)
class StageProcess:
    """A stage that runs: the process of its script, and the checkout that it works in."""

    pid: int
    stage: str
    item: str | None
    root: Path
    since: float
    experiment: str | None
    ancestors: frozenset[int]


@dataclass(frozen=True)
class RunningWork:
    """A command that runs, with the stage that it is at; `identifier` is None if the studio did not start it.

    `step`, `steps`, `seconds_left`, `loss`, `tokens_per_second` and `memory_bytes` are of a training, None elsewhere.
    """

    title: str
    pid: int
    since: str
    identifier: str | None
    experiment: str | None
    stage: str | None = None
    item: str | None = None
    root: str | None = None
    progress: str | None = None
    step: int | None = None
    steps: int | None = None
    seconds_left: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    memory_bytes: float | None = None


def find_running() -> list[RunningWork]:
    """Return what runs here, the newest first."""
    stages = list(_find_stages())
    commands = [command for command in list_commands() if command.state == "running" and command.pid is not None]
    found = [_describe(command, next(iter(_below(command.pid or 0, stages)), None)) for command in commands]
    known = {command.pid for command in commands}
    holder = find_holder()
    if holder and holder.pid not in known:
        known.add(holder.pid)
        stage = next(iter(_below(holder.pid, stages)), None)
        found.append(_join(RunningWork(holder.command, holder.pid, holder.since, None, None), stage, []))
    for stage in stages:
        if not known & {*stage.ancestors, stage.pid}:
            since = datetime.fromtimestamp(stage.since).astimezone().isoformat(timespec="seconds")
            title = stage.experiment or f"stages/{stage.stage}.py"
            found.append(_join(RunningWork(title, stage.pid, since, None, stage.experiment), stage, []))
    return found


def read_live_curves(root: Path, since: float) -> dict[str, list[tuple[int, float]]]:
    """Return the curves that have been written in a checkout since a time."""
    try:
        return read_curves(root, since=since)
    except (OSError, ValueError):  # dvclive writes the files anew; the next look has them
        return {}


def find_stage_of(pid: int) -> StageProcess | None:
    """Return the stage that a running command is at; None between two stages."""
    return next(iter(_below(pid, list(_find_stages()))), None)


def _below(pid: int, stages: list[StageProcess]) -> list[StageProcess]:
    return [stage for stage in stages if pid in stage.ancestors or pid == stage.pid]


def _find_stages() -> Iterator[StageProcess]:
    import psutil

    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            place = next((place for place, word in enumerate(words[:4]) if STAGE_SCRIPT.search(word)), None)
            if place is None:
                continue
            root = Path(process.cwd())
            if not root.is_relative_to(paths.ROOT) and not root.is_relative_to(paths.MAIN):
                continue
            ancestors = frozenset(parent.pid for parent in process.parents())
            match = STAGE_SCRIPT.search(words[place])
            assert match
            yield StageProcess(
                pid=process.pid,
                stage=match[1],
                item=words[place + 1] if len(words) > place + 1 else None,
                root=root,
                since=process.create_time(),
                experiment=_read_experiment(process),
                ancestors=ancestors,
            )
        except (psutil.Error, OSError):  # it has ended, or is another user's
            continue


def _read_experiment(process: Any) -> str | None:
    import psutil

    try:
        return process.environ().get("DVC_EXP_NAME") or None
    except (psutil.Error, OSError):
        return None


def _describe(command: StartedCommand, stage: StageProcess | None) -> RunningWork:
    work = RunningWork(command.text, command.pid or 0, command.started, command.identifier, command.experiment)
    return _join(work, stage, read_tail(command.log, lines=LINES_OF_PROGRESS))


def _join(work: RunningWork, stage: StageProcess | None, log: list[str]) -> RunningWork:
    progress = next((line for line in reversed(log) if line.strip()), None)
    if stage is None:
        return RunningWork(**{**asdict(work), "progress": progress})
    figures = read_training(stage, log) if stage.stage == "train" else {}
    return RunningWork(
        **{
            **asdict(work),
            "stage": stage.stage,
            "item": stage.item,
            "root": str(stage.root),
            "experiment": work.experiment or stage.experiment,
            "progress": progress,
            **figures,
        }
    )


def read_training(stage: StageProcess, log: list[str]) -> dict[str, Any]:
    """Return step, loss, speed and memory of a training by its curves, and the time left by its log."""
    curves = read_live_curves(stage.root, stage.since)
    figures: dict[str, Any] = {name: curves[curve][-1][1] for curve, name in FIGURES.items() if curves.get(curve)}
    figures["step"] = max((points[-1][0] for points in curves.values() if points), default=None)
    figures["steps"] = read_steps(stage.root)
    logged = _read_line(next((line for line in reversed(log) if '"seconds_left"' in line), ""))
    if logged.get("step"):
        figures["seconds_left"] = logged.get("seconds_left")
        figures["steps"] = logged.get("of", figures["steps"])
    return figures


def read_steps(root: Path) -> int | None:
    """Return the steps of the training as the stage estimate has counted them; None if it has not."""
    for file in sorted((root / "metrics/estimate").glob("*.json")):
        try:
            content = unwrap_list(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
        if isinstance(content, Mapping) and isinstance(content.get("steps"), int):
            return int(content["steps"])
    return None


def _read_line(line: str) -> dict[str, Any]:
    start = line.find("{")
    try:
        content = json.loads(line[start:]) if start >= 0 else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
