"""Benchmark: tasks of lm-evaluation-harness for one model, what they ask, and what becomes of the answers.

The harness makes the prompts, extracts the answers, and computes scores and standard errors. Kept of every document are
its own scores, so that the difference of two models can be computed on the same documents.
"""

import functools
import importlib.util
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lathe.common import paths
from lathe.common.errors import InputError, missing_extra
from lathe.common.text import did_you_mean, make_one_line, summarize_error
from lathe.config.gates import parse_gate
from lathe.config.params import Benchmark, Params

if TYPE_CHECKING:
    from lathe.inference.harness_model import HarnessModel

logger = logging.getLogger(__name__)

# Resamples for the harness's standard errors of scores that are no means; `evaluate` computes intervals of its own.
BOOTSTRAP_ITERATIONS = 1000

# Scores that are functions of sums over documents, by how the harness aggregates them.
MEANS, PERPLEXITIES = ("mean", "nanmean"), ("perplexity", "weighted_perplexity")
AGGREGATIONS = (*MEANS, *PERPLEXITIES, "bits_per_byte")


@dataclass(frozen=True)
class BenchmarkResults:
    """What a model has on record: `tasks` and `groups` by their names, `rows` of each task, and what was asked for.

    A task or group has `scores`, by name: `value`, `stderr` (None if it is not known), `lower_is_better`, and the
    `aggregation` of documents; a group `tasks` and `weight_by_size`.
    """

    asked: list[str]
    tasks: dict[str, dict[str, Any]]
    groups: dict[str, dict[str, Any]]
    rows: dict[str, list[dict[str, Any]]]

    def summarize(self, *, cut: int) -> dict[str, Any]:
        """Return the content of `metrics/benchmark/<artifact>.json`: columns for what was asked, lists for the rest."""
        found = {**self.tasks, **self.groups}
        columns = {}
        for name in self.asked:
            scores = found[name]["scores"]
            columns[name] = {key: score["value"] for key, score in scores.items()} | {
                f"{key}_stderr": score["stderr"] for key, score in scores.items() if score["stderr"] is not None
            }
        return {**columns, "tasks": [{"task": name, **entry} for name, entry in found.items()], "cut": [cut]}


def check_benchmark(params: Params) -> None:
    """Raise InputError if benchmark.tasks cannot be run, or a gate names a task or a metric that is not among them.

    The folder benchmark.include_path must be there in any case: DVC knows it as a dependency.

    It takes seconds where there are tasks, and is done before the hours of training; no data are loaded.
    """
    settings = params.benchmark
    _check_folder(settings)
    if not settings.tasks:
        return
    found = _find_tasks(settings)
    known = found.names
    for gate in params.evaluate.gates or []:
        for _, score in parse_gate(gate).scores:
            task, _, metric = score.rpartition(".")
            if metric and task and task not in known:
                raise InputError(
                    f"evaluate.gates: {gate!r} names the task {task}, which benchmark.tasks does not measure; "
                    f"{did_you_mean(task, sorted(known))}",
                    code="unknown-task",
                )
            metrics = _list_metrics(found.manager.task_index, task) if metric and task else None
            if metrics and not any(metric == known_one or metric.startswith(f"{known_one}_") for known_one in metrics):
                raise InputError(
                    f"evaluate.gates: {gate!r} names {score}, which no task of benchmark.tasks has; "
                    f"{did_you_mean(metric, sorted(metrics))}",
                    code="unknown-score",
                )


def _list_metrics(index: Mapping[str, Any], task: str) -> set[str] | None:
    """Return the metrics of a task by its name in gates, of a group those of its members.

    None where a task file leaves them to the harness.
    """
    name = next((name for name in index if make_name(name) == task), None)
    if name is None:
        return None
    members, listed = _list_members(index[name]), (index[name].cfg or {}).get("metric_list")
    if members:
        of_members = [_list_metrics(index, make_name(member)) for member in members if member != name]
        return None if None in of_members else set().union(*filter(None, of_members))
    if not isinstance(listed, list):
        return None
    return {make_name(str(one.get("metric"))) for one in listed if isinstance(one, dict)}


def make_name(name: str) -> str:
    """Return the name of a task or a score as gates and files have it: letters, digits and underscores."""
    return re.sub(r"\W+", "_", name)


def _suggest(name: str, known: list[str]) -> str:
    near = did_you_mean(name, known)
    return near if near.startswith("did you mean") else "`lm_eval ls tasks` lists them"


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks and groups with their data, in the order of benchmark.tasks, and the harness's manager of them."""

    manager: Any
    asked: list[Any]


@dataclass(frozen=True)
class _KnownTasks:
    """The harness's manager, and the names of all tasks and groups that are measured, as gates have them."""

    manager: Any
    names: set[str]


def _find_tasks(settings: Benchmark) -> _KnownTasks:
    """Find the tasks by their names.

    Raises InputError for unknown ones, if there is no such folder, or if the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        missing = missing_extra(ModuleNotFoundError(name="lm_eval"))
        raise InputError(f"benchmark.tasks: {missing}", code="missing-extra")
    from lm_eval.tasks import TaskManager

    folder = _check_folder(settings)
    # The harness's own tasks, thousands of files, are read if the folder does not have all that is named.
    for include_defaults in (False, True):
        manager = TaskManager(include_path=str(folder), include_defaults=include_defaults)
        names, unknown = _resolve(manager.task_index, settings.tasks)
        if not unknown:
            return _KnownTasks(manager, names)
    if wrong := [name for name in settings.tasks if name in unknown]:
        _check_files(folder)
        raise InputError(
            f"benchmark.tasks: {wrong[0]!r} is no task, group or tag of lm-evaluation-harness, nor in "
            f"{settings.include_path}; {_suggest(wrong[0], list(manager.task_index))}",
            code="unknown-task",
        )
    return _KnownTasks(manager, names)


def _check_folder(settings: Benchmark) -> Path:
    folder = paths.ROOT / settings.include_path
    if not folder.is_dir():
        raise InputError(
            f"benchmark.include_path: {settings.include_path}: no such folder; name one with task files, such as "
            "experiments/benchmark",
            code="missing-folder",
        )
    return folder


def _check_files(folder: Path) -> None:
    """Raise InputError for a task file that is not valid YAML, which the harness leaves out in silence."""
    for file in sorted(folder.rglob("*.yaml")):
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise InputError(
                f"benchmark.include_path: {file}:{line}: not valid YAML: {error.problem}; mend it: no task in it is "
                "known",
                code="task-file",
            ) from None
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(
                f"benchmark.include_path: {file}: not valid YAML: {make_one_line(summarize_error(error))}; mend it: no "
                "task in it is known",
                code="task-file",
            ) from None


def _resolve(index: Mapping[str, Any], tasks: Sequence[str]) -> tuple[set[str], set[str]]:
    """Return the names of tasks and of those that belong to them, as gates have them; and those that are unknown."""
    names: set[str] = set()
    unknown: set[str] = set()
    waiting = list(tasks)
    while waiting:
        name = waiting.pop()
        entry = index.get(name)
        if entry is None:
            unknown.add(name)
            continue
        if make_name(name) in names:
            continue
        names.add(make_name(name))
        waiting += _list_members(entry)
    return names, unknown


def _list_members(entry: Any) -> list[str]:
    """Return the names of the tasks and groups in a group or tag."""
    members = (entry.cfg or {}).get("task")
    of_tag = list(entry.tags) if entry.kind.name == "TAG" else []
    return of_tag + [
        member if isinstance(member, str) else str(member.get("group") or member.get("task"))
        for member in (members if isinstance(members, list) else [])
    ]


def load_tasks(settings: Benchmark) -> LoadedTasks:
    """Load the tasks and groups with their data, from the Hub or from local files.

    Raises InputError for one that is unknown, cannot be loaded, runs code that a model wrote, or needs images or sound,
    and if the harness is not installed.
    """
    import datasets

    manager = _find_tasks(settings).manager
    datasets.disable_progress_bars()
    loaded: list[Any] = []
    for name in settings.tasks:
        try:
            found = manager.load([name])
        except Exception as error:  # a task is a program with data from anywhere: it may fail in any way
            logger.debug("benchmark.tasks: %s", name, exc_info=error)
            raise InputError(
                f"benchmark.tasks: {name}: cannot be loaded ({make_one_line(summarize_error(error))}); its data must "
                "be on this machine or on a Hub that can be reached, and its file right",
                code="task-not-loaded",
            ) from error
        for task, loaded_task in found["tasks"].items():
            if getattr(loaded_task, "UNSAFE_CODE", False) or getattr(loaded_task, "MULTIMODAL", False):
                why = (
                    "runs code that the model writes" if getattr(loaded_task, "UNSAFE_CODE", False) else "needs images"
                )
                raise InputError(
                    f"benchmark.tasks: {name}: {task} {why}, which is not done here; take it off the list",
                    code="task-not-supported",
                )
        loaded += [found["groups"][name]] if name in found["groups"] else found["tasks"].values()
    return LoadedTasks(manager, loaded)


def run_tasks(model: "HarnessModel", tasks: LoadedTasks, settings: Benchmark) -> BenchmarkResults:
    """Put the tasks to a model. Raises InputError if they do not fit together, or have no document."""
    import lm_eval
    import lm_eval.api.task
    from tqdm import tqdm

    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)  # a bar per task, of the making of its prompts
    try:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks.asked),
            task_manager=tasks.manager,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            system_instruction=settings.system_instruction,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.fewshot_as_multiturn,
        )
    except (ValueError, KeyError, AssertionError) as error:
        logger.debug("benchmark.tasks", exc_info=error)
        raise InputError(
            f"benchmark.tasks: lm-evaluation-harness refuses them ({make_one_line(summarize_error(error))}); look at "
            "the tasks' files, or take them off the list (LATHE_LOG_LEVEL=DEBUG shows where)",
            code="task-refused",
        ) from error
    return collect_results(results, tasks.asked)


def collect_results(results: Mapping[str, Any], tasks: Sequence[Any]) -> BenchmarkResults:
    """Return what is kept of the harness's results; `tasks` are those that were asked for, as they were loaded."""
    groups = {group.name: group for group in _iterate_groups(tasks)}
    leaves = {task.task_name: task for task in _iterate_leaves(tasks)}
    entries = {name: _describe_task(task, results) for name, task in leaves.items()}
    return BenchmarkResults(
        asked=[make_name(_get_name(task)) for task in tasks],
        tasks={make_name(name): entry for name, entry in entries.items()},
        groups={
            make_name(name): described
            for name, group in groups.items()
            if (described := _describe_group(group, results["results"].get(name, {}), entries))["scores"]
        },
        rows={make_name(name): _make_rows(results["samples"][name], entries[name]["scores"]) for name in leaves},
    )


def _get_name(task: Any) -> str:
    return str(task.name if hasattr(task, "get_all_tasks") else task.task_name)


def _iterate_groups(tasks: Sequence[Any]) -> Iterator[Any]:
    for task in tasks:
        if hasattr(task, "get_all_tasks"):
            yield task
            yield from task.get_all_groups()


def _iterate_leaves(tasks: Sequence[Any]) -> Iterator[Any]:
    for task in tasks:
        yield from task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]


def _describe_task(task: Any, results: Mapping[str, Any]) -> dict[str, Any]:
    name = task.task_name
    samples, found = results["samples"][name], results["results"][name]
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    higher = task.higher_is_better()
    scores = {}
    for metric, filter_name in dict.fromkeys((m, sample["filter"]) for sample in samples for m in sample["metrics"]):
        scores[_name_score(metric, filter_name, filters)] = {
            **_read_value(found, metric, filter_name),
            "lower_is_better": higher.get(metric) is False,
            "aggregation": _name_aggregation(task.aggregation().get(metric)),
            "metric": metric,
            "filter": filter_name,
        }
    counts = results["n-samples"][name]
    return {
        "version": str(results["versions"].get(name)),
        "num_fewshot": results["n-shot"].get(name),
        "documents": counts["effective"],
        "of_documents": counts["original"],
        "scores": scores,
    }


def _describe_group(group: Any, found: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the scores of a group that are means of those of its tasks; it has none where it says no such thing."""
    names = [task.task_name for task in group.get_all_tasks()]
    scores = {}
    for rule in group.aggregate_metric_list or []:
        for of_task in [score for name in names for score in entries[name]["scores"].items()]:
            key, score = of_task
            value = _read_value(found, score["metric"], score["filter"])
            if score["metric"] == rule.metric and value["value"] is not None and key not in scores:
                aggregation = score["aggregation"] if score["aggregation"] in MEANS else None
                weights = {"aggregation": aggregation, "weight_by_size": bool(rule.weight_by_size)}
                scores[key] = {**score, **value, **weights}
    documents = sum(entries[name]["documents"] for name in names)
    return {"tasks": [make_name(name) for name in names], "documents": documents, "scores": scores}


def _read_value(found: Mapping[str, Any], metric: str, filter_name: str) -> dict[str, float | None]:
    value, error = found.get(f"{metric},{filter_name}"), found.get(f"{metric}_stderr,{filter_name}")
    return {"value": _make_number(value), "stderr": _make_number(error)}


def _make_number(value: Any) -> float | None:
    """Return a number rounded to 6 digits; None for what is none, such as the harness's `N/A`."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return float(f"{number:.6g}") if math.isfinite(number) else None


def _name_score(metric: str, filter_name: str, filters: Sequence[str]) -> str:
    """Return the name of a score: the metric, with the filter that extracts the answer if the task has several."""
    return make_name(metric if len(filters) == 1 else f"{metric}_{filter_name}")


def _name_aggregation(function: Any) -> str | None:
    """Return how documents are aggregated, if that is a function of sums; None otherwise."""
    from lm_eval.api.registry import get_aggregation

    return next((name for name in AGGREGATIONS if get_aggregation(name) is function), None)


def _make_rows(samples: Sequence[Mapping[str, Any]], scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each document: {doc_id, doc_hash, doc, target, responses, statistics}.

    `statistics` are (sum, weight) by score: the score of many documents is a function of their sums.
    """
    rows: dict[int, dict[str, Any]] = {}
    for sample in samples:
        row = rows.setdefault(
            sample["doc_id"],
            {
                "doc_id": sample["doc_id"],
                "doc_hash": sample["doc_hash"],
                "doc": _make_plain(sample["doc"]),
                "target": _make_plain(sample["target"]),
                "responses": {},
                "statistics": {},
            },
        )
        row["responses"][sample["filter"]] = _make_plain(sample["filtered_resps"])
        for key, score in scores.items():
            if score["filter"] == sample["filter"] and score["metric"] in sample:
                statistics = _make_statistics(sample[score["metric"]], score["aggregation"])
                if statistics:
                    row["statistics"][key] = statistics
    return [rows[number] for number in sorted(rows)]


def _make_statistics(value: Any, aggregation: str | None) -> tuple[float, float] | None:
    if aggregation is None:
        return None
    if aggregation in MEANS:
        number = _make_number(value)
        return None if number is None else (number, 1.0)
    if aggregation == "perplexity":
        return -float(value), 1.0
    log_likelihood, weight = value
    return -float(log_likelihood) / (math.log(2) if aggregation == "bits_per_byte" else 1), float(weight)


def _make_plain(value: Any) -> Any:
    """Return a value of a document as JSON has it; what JSON cannot hold, such as an image, as text."""
    if isinstance(value, Mapping):
        return {str(key): _make_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_make_plain(item) for item in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int | float):
        return value if math.isfinite(value) else str(value)
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else str(value)
