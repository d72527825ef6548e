"""Differences of two revisions on the tasks of lm-evaluation-harness, of the documents that both were asked."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from lathe.common.dvc_api import DvcRepository
from lathe.experiments.paired_answers import pair_answers
from lathe.provenance.revisions import Revision


def compare_tasks(
    repo: DvcRepository, revisions: Sequence[Revision], artifacts: Sequence[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the deltas of the second revision to the first, as `evaluate` gives them, and warnings.

    Each has in addition `rows`, the number of documents, and `same_answers`, how many of them score the same. A metric
    is named `TASK.SCORE`. Tasks that one of the two was not asked are left out.
    """
    from lathe.evaluation.benchmark_scores import define_task_scores, read_documents, read_tasks
    from lathe.evaluation.evaluate import Resampling, evaluate

    parameters = revisions[0].parameters
    cluster_by = parameters.get("benchmark", {}).get("cluster_by")
    resampling = Resampling(parameters["evaluate"]["bootstrap_samples"], parameters["seed"])
    asked = [revision.parameters.get("benchmark", {}).get("tasks", []) for revision in revisions]
    deltas: list[dict[str, Any]] = []
    warnings: list[str] = []
    compared: set[str] = set()
    for task in [task for task in asked[0] if task in asked[1]]:
        finders = [
            partial(revision.find_cached_file, repo, f"data/benchmark/{artifact}/{task}")
            for revision, artifact in zip(revisions, artifacts, strict=True)
        ]
        tasks, others = (read_tasks(find) for find in finders)
        for name in (name for name in tasks if name in others and name not in compared):
            compared.add(name)  # a task may belong to several that were asked for
            read = [read_documents(find, tasks[name], name, cluster_by=cluster_by) for find in finders]
            documents = [rows if rows is None else {row["key"]: row for row in rows} for rows in read]
            pairs = pair_answers(
                revisions, documents, called=f"documents of {name}", rows=f"documents of {name}", dvc="dvc"
            )
            warnings += pairs.warnings
            if not pairs.ours:
                continue
            answers = {"base": pairs.ours, "other": pairs.theirs}
            report = evaluate(answers, {}, {"base": 0, "other": 0}, define_task_scores(tasks[name]), resampling)
            both = zip(pairs.ours, pairs.theirs, strict=True)
            counts = {
                "rows": len(pairs.ours),
                "same_answers": sum(our["statistics"] == their["statistics"] for our, their in both),
            }
            deltas += [
                {**delta, **counts, "metric": f"{name}.{delta['metric']}"} for delta in report["other"]["deltas"]
            ]
    return deltas, warnings
