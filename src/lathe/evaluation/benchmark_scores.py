"""Scores of benchmark tasks: intervals, and differences of artifacts on the same documents.

A score is a function of sums over documents, as those of held-out rows are, so that both are resampled by the same
code. Scores that are no such function, such as an F1 over all documents, have a value alone.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.common.json_files import read_json_object
from lathe.common.jsonl import read_jsonl
from lathe.common.text import did_you_mean
from lathe.config.gates import Gate
from lathe.evaluation.clusters import CLUSTER
from lathe.evaluation.evaluate import AnswerRow, Resampling, ScoreDefinition, evaluate
from lathe.evaluation.metrics import compute_metric
from lathe.evaluation.text_metrics import Statistics

# By artifact and task: `documents`, the scores, `lower_is_better` (names of scores), `intervals` and `deltas`.
BenchmarkReport = dict[str, dict[str, dict[str, Any]]]

_FORMULAS = {"perplexity": "perplexity", "weighted_perplexity": "perplexity"}  # all others are ratios of sums
TASKS_FILE = "tasks.json"


def read_tasks(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the tasks and groups of an artifact by name, as the stage benchmark describes them; {} without any."""
    file = folder / TASKS_FILE
    if not file.exists():
        return {}
    content = read_json_object(file)
    return {**content["groups"], **content["tasks"]}


def read_documents(folder: Path, task: Mapping[str, Any], name: str, *, cluster_by: str | None) -> list[AnswerRow]:
    """Return the documents of a task, or of all tasks of a group, each with its `statistics`, and its `cluster`.

    In a group that weights its tasks alike, documents of small tasks weigh more.
    """
    rows: list[AnswerRow] = []
    for part in task.get("tasks", [name]):
        own = read_jsonl(folder / f"{part}.jsonl")
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
    folder: Path, artifacts: Sequence[str], *, cluster_by: str | None, resampling: Resampling
) -> BenchmarkReport:
    """Return the report of all tasks and groups; {} if none were measured.

    Raises InputError if the artifacts were not asked the same documents.
    """
    tasks_of = {artifact: read_tasks(folder / artifact) for artifact in artifacts}
    report: BenchmarkReport = {artifact: {} for artifact in artifacts}
    for name, task in tasks_of[artifacts[0]].items():
        for artifact in artifacts:
            if name not in tasks_of[artifact]:
                raise _make_difference_error(folder / artifact, name, artifacts[0])
        rows = {
            artifact: read_documents(folder / artifact, task, name, cluster_by=cluster_by) for artifact in artifacts
        }
        for artifact, own in rows.items():
            if [row["key"] for row in own] != [row["key"] for row in rows[artifacts[0]]]:
                raise _make_difference_error(folder / artifact, name, artifacts[0])
        definitions = define_task_scores(task)
        compared = evaluate(rows, {}, dict.fromkeys(artifacts, 0), definitions, resampling)
        for artifact in artifacts:
            described = tasks_of[artifact][name]
            report[artifact][name] = {
                "documents": described["documents"],
                **{key: score["value"] for key, score in described["scores"].items()},
                "lower_is_better": [key for key, score in described["scores"].items() if score["lower_is_better"]],
                "intervals": compared[artifact]["intervals"],
                "deltas": compared[artifact]["deltas"],
            }
    return report if tasks_of[artifacts[0]] else {}


def _make_difference_error(folder: Path, name: str, first: str) -> InputError:
    return InputError(
        f"{folder}: has other documents of {name} than {first} has; run `dvc repro` again", code="different-rows"
    )


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


def list_task_scores(report: BenchmarkReport) -> dict[str, dict[str, float | None]]:
    """Return the scores of every artifact as gates name them, `TASK.SCORE`."""
    not_scores = ("documents", "lower_is_better", "intervals", "deltas")
    return {
        artifact: {
            f"{name}.{key}": value
            for name, task in tasks.items()
            for key, value in task.items()
            if key not in not_scores
        }
        for artifact, tasks in report.items()
    }


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
