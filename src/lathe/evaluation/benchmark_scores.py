"""Scores of benchmark tasks: intervals, and differences of artifacts on the same documents.

A score is a function of sums over documents, as those of held-out rows are, so that both are resampled by the same
code. Scores that are no such function, such as an F1 over all documents, have a value alone.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.common.json_files import read_json_object
from lathe.common.jsonl import read_jsonl
from lathe.common.paths import remove_unless
from lathe.common.text import did_you_mean
from lathe.config.gates import Gate
from lathe.config.scores import NOT_SCORES
from lathe.evaluation.clusters import CLUSTER
from lathe.evaluation.evaluate import AnswerRow, Resampling, ScoreDefinition, evaluate
from lathe.evaluation.metrics import compute_metric
from lathe.evaluation.text_metrics import Statistics

# By task and artifact: the scores, `documents`, `bytes`, `lower_is_better` (names), `intervals` and `deltas`.
BenchmarkReport = dict[str, dict[str, dict[str, Any]]]

_FORMULAS = {"perplexity": "perplexity", "weighted_perplexity": "perplexity"}  # all others are ratios of sums
TASKS_FILE = "tasks.json"

# Gives a file of an artifact's folder by its name, such as one in DVC's cache; None if it is not there.
FindFile = Callable[[str], Path | None]


def remove_unlisted_tasks(folder: Path, artifacts: Sequence[str], tasks: Sequence[str]) -> None:
    """Remove what is kept in `folder/ARTIFACT/TASK`, folders or JSON files, of artifacts and tasks that are not listed.

    DVC keeps the files of a task that was taken off the list, and `evaluate` depends on the folder.
    """
    for path in [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else ():
        remove_unless(path, partial(_is_of_task, tasks if path.name in artifacts else ()))
        if not any(path.iterdir()):
            path.rmdir()


def _is_of_task(tasks: Sequence[str], entry: Path) -> bool:
    return entry.name.removesuffix(".json") in tasks


def find_in(folder: Path) -> FindFile:
    """Return what finds the files of a folder of data/benchmark."""
    return lambda name: file if (file := folder / name).exists() else None


def read_tasks(find: FindFile) -> dict[str, dict[str, Any]]:
    """Return the tasks and groups of an artifact by name, as the stage benchmark describes them; {} without any."""
    file = find(TASKS_FILE)
    if file is None:
        return {}
    content = read_json_object(file)
    return {**content["groups"], **content["tasks"]}


def read_documents(
    find: FindFile, task: Mapping[str, Any], name: str, *, cluster_by: str | None
) -> list[AnswerRow] | None:
    """Return the documents of a task, or of all tasks of a group, with `key`, `statistics`, and `cluster` if known.

    In a group that weights its tasks alike, documents of small tasks weigh more. None if a file is not there.
    """
    rows: list[AnswerRow] = []
    for part in task.get("tasks", [name]):
        file = find(f"{part}.jsonl")
        if file is None:
            return None
        own = read_jsonl(file)
        rows += [_make_row(part, row, task, len(own), cluster_by) for row in own]
    return rows


def _make_row(
    part: str, row: Mapping[str, Any], task: Mapping[str, Any], documents: int, cluster_by: str | None
) -> AnswerRow:
    statistics = {}
    for score, (total, weight) in row["statistics"].items():
        described = task["scores"].get(score, {})
        scale = 1.0 if described.get("weight_by_size", True) else 1 / documents
        statistics[score] = (scale * total, scale * weight)
    made: AnswerRow = {"key": f"{part} {row['doc_id']} {row['doc_hash']}", "statistics": statistics}
    doc = row["doc"]
    if cluster_by is not None and isinstance(doc, dict) and doc.get(cluster_by) is not None:
        made[CLUSTER] = str(doc[cluster_by])
    return made


def evaluate_benchmark(
    folder: Path,
    bytes_of: Mapping[str, int],
    artifacts: Sequence[str],
    tasks: Sequence[str],
    *,
    cluster_by: str | None,
    resampling: Resampling,
) -> BenchmarkReport:
    """Return the report of tasks and groups in `folder/ARTIFACT/TASK`, and of the tasks that they consist of.

    Raises InputError if the artifacts were not asked the same documents.
    """
    report: BenchmarkReport = {}
    for asked in tasks:
        folders = {artifact: folder / artifact / asked for artifact in artifacts}
        for name, entry in _evaluate_task(folders, bytes_of, cluster_by, resampling).items():
            report.setdefault(name, entry)  # a task may belong to several that were asked for
    return report


def _evaluate_task(
    folders: Mapping[str, Path], bytes_of: Mapping[str, int], cluster_by: str | None, resampling: Resampling
) -> BenchmarkReport:
    artifacts = list(folders)
    tasks_of = {artifact: read_tasks(find_in(folder)) for artifact, folder in folders.items()}
    if not tasks_of[artifacts[0]]:
        raise InputError(f"{folders[artifacts[0]] / TASKS_FILE}: no such file; run `dvc repro`", code="missing-file")
    report: BenchmarkReport = {}
    for name, task in tasks_of[artifacts[0]].items():
        rows: dict[str, list[AnswerRow]] = {}
        for artifact, folder in folders.items():
            find = find_in(folder)
            own = read_documents(find, task, name, cluster_by=cluster_by) if name in tasks_of[artifact] else None
            if own is None or [row["key"] for row in own] != [row["key"] for row in rows.get(artifacts[0], own)]:
                raise InputError(
                    f"{folder}: has other documents of {name} than {artifacts[0]} has; run `dvc repro` again",
                    code="different-rows",
                )
            rows[artifact] = own
        compared = evaluate(rows, {}, bytes_of, define_task_scores(task), resampling)
        report[name] = {
            artifact: {
                "documents": described["documents"],
                **{key: score["value"] for key, score in described["scores"].items()},
                "bytes": bytes_of[artifact],
                "lower_is_better": [key for key, score in described["scores"].items() if score["lower_is_better"]],
                "intervals": compared[artifact]["intervals"],
                "deltas": compared[artifact]["deltas"],
            }
            for artifact, described in ((artifact, tasks[name]) for artifact, tasks in tasks_of.items())
        }
    return report


def define_task_scores(task: Mapping[str, Any]) -> list[ScoreDefinition]:
    """Return the scores of a task, or of a group of tasks, that are functions of sums over its documents."""
    return [
        ScoreDefinition(
            key, partial(_get_statistics, key), partial(compute_metric, _FORMULAS.get(score["aggregation"], "ratio"))
        )
        for key, score in task["scores"].items()
        if score["aggregation"] is not None
    ]


def _get_statistics(score: str, row: AnswerRow) -> Statistics:
    found: Statistics = row["statistics"].get(score, (0.0, 0.0))
    return found


def list_task_scores(report: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, float | None]]:
    """Return the scores of every artifact as gates name them, `TASK.SCORE`."""
    scores: dict[str, dict[str, float | None]] = {}
    for name, artifacts in report.items():
        for artifact, task in artifacts.items():
            own = {f"{name}.{key}": value for key, value in task.items() if key not in NOT_SCORES}
            scores.setdefault(artifact, {}).update(own)
    return scores


def add_task_scores(
    report: Mapping[str, Mapping[str, Any]], benchmark: BenchmarkReport, gates: Sequence[Gate]
) -> dict[str, dict[str, Any]]:
    """Return the report on a split with the scores of tasks, for gates that name them.

    Raises InputError for a gate with a score that no task has.
    """
    scores = list_task_scores(benchmark)
    known = list(next(iter(scores.values()), {}))
    for gate in gates:
        for _, score in gate.scores:
            if "." in score and score not in known:
                raise InputError(
                    f"evaluate.gates: {gate.expression!r} names {score}, which no task of benchmark.tasks has; "
                    f"{did_you_mean(score, known)}",
                    code="unknown-score",
                )
    return {artifact: {**own, **scores.get(artifact, {})} for artifact, own in report.items()}
