"""The experiments that DVC knows: what each changed, and what came of it."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lathe.common import dotted_keys
from lathe.reports.values import Value

COMMITS = 10  # experiments of so many last commits

# The address of these values: the command that prints them.
COMMAND = ["exp", "show", "--json", "--num", str(COMMITS)]
SOURCE = "dvc exp show --json"


@dataclass(frozen=True)
class Row:
    """A commit with experiments, or one of them: parameters and metrics by column, absent ones left out."""

    name: str
    rev: str
    is_experiment: bool
    state: str | None  # what is wrong or not yet done, in a word or a sentence
    parameters: dict[str, Value]
    metrics: dict[str, Value]


@dataclass(frozen=True)
class Experiments:
    """The rows, each commit before its experiments, and the columns in which they differ; or why there are none."""

    rows: list[Row]
    parameters: list[str]
    metrics: list[str]
    problem: str | None = None


def read(root: Path, wanted: dict[str, tuple[str, ...]]) -> Experiments:
    """Ask DVC; `wanted` says for each column of metrics its file and the keys there."""
    command = [sys.executable, "-m", "dvc", *COMMAND]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or "it failed").splitlines()[-1]
        return Experiments([], [], [], f"`dvc exp show` gave none: {reason.removeprefix('ERROR: ')}")
    return table(Value(json.loads(done.stdout), SOURCE), wanted)


def table(listed: Value, wanted: dict[str, tuple[str, ...]]) -> Experiments:
    """Make rows and columns of what `dvc exp show --json` printed."""
    rows: list[Row] = []
    for baseline in listed:
        if not baseline.content["experiments"]:
            continue
        rows.append(_row(baseline, wanted, is_experiment=False))
        for group in baseline.get("experiments") or ():
            queued = group.get("executor", "state")
            for experiment in group.get("revs") or ():
                rows.append(_row(experiment, wanted, is_experiment=True, executor=queued))
    names = list(dict.fromkeys(name for row in rows for name in row.parameters))
    parameters = [name for name in names if len({_comparable(row, name) for row in rows}) > 1]
    metrics = [name for name in wanted if any(name in row.metrics for row in rows)]
    return Experiments(rows, parameters, metrics)


def _row(
    state: Value, wanted: dict[str, tuple[str, ...]], *, is_experiment: bool, executor: Value | None = None
) -> Row:
    metrics = {name: state.get("data", "metrics", file, "data", *keys) for name, (file, *keys) in wanted.items()}
    return Row(
        name=state.content["name"] or state.content["rev"][:7],
        rev=state.content["rev"],
        is_experiment=is_experiment,
        state=_state(state, executor),
        parameters=_flatten(state.get("data", "params", "params.yaml", "data")),
        metrics={name: value for name, value in metrics.items() if value is not None},
    )


def _state(state: Value, executor: Value | None) -> str | None:
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


def _comparable(row: Row, name: str) -> str | None:
    return json.dumps(row.parameters[name].content) if name in row.parameters else None
