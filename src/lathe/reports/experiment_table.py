"""Experiment table: DVC's experiments with the parameters they changed and their metrics."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lathe.common import dotted_keys
from lathe.reports.values import Value

COMMITS = 10  # number of commits, from the last, whose experiments are shown

# The source of these values is the command that prints them.
COMMAND = ["exp", "show", "--json", "--num", str(COMMITS)]
SOURCE = "dvc exp show --json"


@dataclass(frozen=True)
class ExperimentRow:
    """A commit with experiments, or one of them: parameters and metrics by column, without absent ones."""

    name: str
    rev: str
    is_experiment: bool
    state: str | None  # an error, or queued, running or failed
    parameters: dict[str, Value]
    metrics: dict[str, Value]


@dataclass(frozen=True)
class Experiments:
    """The rows, each commit before its experiments, and the columns that differ; or the reason why there are none."""

    rows: list[ExperimentRow]
    parameters: list[str]
    metrics: list[str]
    problem: str | None = None


def read_experiments(root: Path, wanted: dict[str, tuple[str, ...]]) -> Experiments:
    """Run `dvc exp show`; `wanted` gives for each column of metrics its file and the keys in it."""
    command = [sys.executable, "-m", "dvc", *COMMAND]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or "it failed").splitlines()[-1]
        return Experiments([], [], [], f"`dvc exp show` gave none: {reason.removeprefix('ERROR: ')}")
    return build_table(Value(json.loads(done.stdout), SOURCE), wanted)


def build_table(listed: Value, wanted: dict[str, tuple[str, ...]]) -> Experiments:
    """Return the table of what `dvc exp show --json` printed."""
    rows: list[ExperimentRow] = []
    for baseline in listed:
        if not baseline.content["experiments"]:
            continue
        rows.append(_build_row(baseline, wanted, is_experiment=False))
        for group in baseline.get("experiments") or ():
            queued = group.get("executor", "state")
            for experiment in group.get("revs") or ():
                rows.append(_build_row(experiment, wanted, is_experiment=True, executor=queued))
    names = list(dict.fromkeys(name for row in rows for name in row.parameters))
    parameters = [name for name in names if len({_encode_value(row, name) for row in rows}) > 1]
    metrics = [name for name in wanted if any(name in row.metrics for row in rows)]
    return Experiments(rows, parameters, metrics)


def _build_row(
    state: Value, wanted: dict[str, tuple[str, ...]], *, is_experiment: bool, executor: Value | None = None
) -> ExperimentRow:
    metrics = {name: state.get("data", "metrics", file, "data", *keys) for name, (file, *keys) in wanted.items()}
    return ExperimentRow(
        name=state.content["name"] or state.content["rev"][:7],
        rev=state.content["rev"],
        is_experiment=is_experiment,
        state=_read_state(state, executor),
        parameters=_flatten(state.get("data", "params", "params.yaml", "data")),
        metrics={name: value for name, value in metrics.items() if value is not None},
    )


def _read_state(state: Value, executor: Value | None) -> str | None:
    if error := state.get("error", "msg"):
        return str(error.content)
    return executor.content if executor and executor.content in {"queued", "running", "failed"} else None


def _flatten(tree: Value | None) -> dict[str, Value]:
    if tree is None:
        return {}
    return {
        ".".join(keys): Value(content, tree.file, (*tree.steps, *keys))
        for keys, content in dotted_keys.walk(tree.content)
    }


def _encode_value(row: ExperimentRow, name: str) -> str | None:
    return json.dumps(row.parameters[name].content) if name in row.parameters else None
