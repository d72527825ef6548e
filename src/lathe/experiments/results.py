"""Results of the runs: one row for each experiment, the last commit and the workspace, read without a checkout."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from lathe.common import dotted_keys, git, paths
from lathe.common.errors import InputError
from lathe.common.metric_files import list_timing_stems, unwrap_list
from lathe.common.text import summarize_error
from lathe.config.export_params import list_gguf_types
from lathe.config.yaml_files import check_depth, check_values
from lathe.evaluation.best_artifact import choose_best_artifact
from lathe.provenance.revisions import WORKSPACE, list_experiments

PARAMS, REPORT, GATES = "params.yaml", "metrics/evaluate/validation.json", "metrics/evaluate/gates.json"
TIMINGS = "metrics/timings"

Run = tuple[str, str | None, str | None]  # name, commit (None: the workspace), and the commit that it started from


@dataclass(frozen=True)
class RunResult:
    """What a run scored on validation and what it took; what it has not measured is None.

    `changed` has the keys that are not as in the commit it started from, each with both values. `artifact` is the file
    with the best score of `metric`, `bytes` its size. `seconds` are those of the stages that ran for an experiment,
    without those whose outputs DVC had; for a commit and the workspace those of all stages when they last ran.
    """

    name: str
    commit: str | None
    date: str
    changed: dict[str, tuple[Any, Any]]
    metric: str | None
    artifact: str | None
    score: float | None
    low: float | None
    high: float | None
    gates_passed: bool | None
    bytes: int | None
    seconds: float | None


def read_experiments() -> list[RunResult]:
    """Return the experiments, the newest first."""
    return _read_runs([(experiment.name, experiment.commit, experiment.baseline) for experiment in list_experiments()])


def read_results() -> list[RunResult]:
    """Return the workspace if it differs from the last commit, that commit, and the experiments, the newest first."""
    return [*read_present(), *read_experiments()]


def read_present() -> list[RunResult]:
    """Return the workspace if it differs from the last commit, and that commit."""
    head = git.find_head()
    runs: list[Run] = [(_name_head(), head, None)] if head else []
    if head and git.run_git("status", "--porcelain", "--", PARAMS, "metrics/evaluate").strip():
        runs.insert(0, (WORKSPACE, None, head))
    return _read_runs(runs)


def _read_runs(runs: Sequence[Run]) -> list[RunResult]:
    files = _RunFiles([commit for run in runs for commit in run[1:] if commit])
    return [_read_checked(files, *run) for run in runs]


def _read_checked(files: "_RunFiles", name: str, commit: str | None, baseline: str | None) -> RunResult:
    """Read a run, whose files may come from someone else. Raises InputError that names it."""
    try:
        return _read_result(files, name, commit, baseline)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise InputError(
            f"{name} ({(commit or 'the workspace')[:10]}): {PARAMS} or metrics there are not what the pipeline writes "
            f"({summarize_error(error)}); remove the experiment with `dvc exp remove`, or restore the files",
            code="damaged-results",
        ) from None


def _name_head() -> str:
    return git.read_line("symbolic-ref", "--quiet", "--short", "HEAD") or "HEAD"


def _read_result(files: "_RunFiles", name: str, commit: str | None, baseline: str | None) -> RunResult:
    now, then = files.read_parameters(commit), files.read_parameters(baseline) if baseline else {}
    metric = now.get("evaluate.primary_metric")
    report = files.read_json(commit, REPORT) or {}
    candidates = [artifact for artifact in list_gguf_types(report) if metric in report[artifact]]
    best = choose_best_artifact(report, candidates, metric) if candidates and metric else None
    scores = report[best] if best else {}
    ends: dict[str, Any] = next((entry for entry in scores.get("intervals", ()) if entry["metric"] == metric), {})
    gates = files.read_json(commit, GATES)
    return RunResult(
        name=name,
        commit=commit,
        date=files.dates.get(commit or "", ""),
        changed=dotted_keys.compare(then, now) if then else {},
        metric=metric,
        artifact=best,
        score=scores.get(metric) if metric else None,
        low=ends.get("low"),
        high=ends.get("high"),
        gates_passed=None if gates is None else gates["passed"],
        bytes=scores.get("bytes"),
        seconds=_sum_seconds(files.read_timings(commit), files.read_timings(baseline) if baseline and commit else []),
    )


def _sum_seconds(timings: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]]) -> float | None:
    """Return the seconds of the timings that are not as they were before the run."""
    measured = [timing["seconds"] for timing in timings if timing not in earlier]
    return round(sum(measured), 1) if measured else None


class _RunFiles:
    """The files of many commits, read by one process of Git, and those of the workspace (commit None)."""

    def __init__(self, commits: Iterable[str]) -> None:
        commits = list(dict.fromkeys(commits))
        self._timings = [f"{TIMINGS}/{stem}.json" for stem in list_timing_stems()]
        names = [PARAMS, REPORT, GATES, *self._timings]
        wanted = [(commit, name) for commit in commits for name in names]
        self._contents = dict(
            zip(wanted, git.read_blobs([f"{commit}:./{name}" for commit, name in wanted]), strict=True)
        )
        lines = git.try_git(
            "log", "--no-walk=unsorted", "--format=%H %cI", "--ignore-missing", "--stdin", stdin="\n".join(commits)
        )
        self.dates = dict(line.split(" ") for line in (lines or b"").decode().splitlines())

    def read_parameters(self, commit: str | None) -> dict[str, Any]:
        """Return params.yaml by dotted keys; empty if there is none."""
        text = self._read(commit, PARAMS)
        return _parse_parameters(text) if text else {}

    def read_json(self, commit: str | None, name: str) -> Any:
        """Return a report; None if there is none."""
        text = self._read(commit, name)
        return None if text is None else unwrap_list(json.loads(text))

    def read_timings(self, commit: str | None) -> list[dict[str, Any]]:
        """Return the timing of each stage, or of each of its items."""
        timings = [(name, self.read_json(commit, name)) for name in self._timings]
        return [
            {"file": name, **entry} for name, timing in timings if timing for entry in timing.get("items") or [timing]
        ]

    def _read(self, commit: str | None, name: str) -> bytes | None:
        if commit is not None:
            return self._contents.get((commit, name))
        file = paths.ROOT / name
        return file.read_bytes() if file.is_file() else None


@cache
def _parse_parameters(text: bytes) -> dict[str, Any]:
    # libyaml's loader: that of ruamel, which reads the pipeline's parameters, takes a minute for 500 files.
    check_depth(text.decode(), PARAMS)
    tree = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    check_values(tree, PARAMS)
    return dotted_keys.flatten(tree)
