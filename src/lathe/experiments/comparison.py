"""Comparison of experiments: changed parameters, scores on the same rows with significance, cost, a conclusion."""

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lathe.common import dotted_keys, paths
from lathe.common.dvc_api import DvcRepository, open_repository
from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.config.engine_marks import LLAMA_CPP, read_mark
from lathe.config.export_params import list_gguf_types
from lathe.config.scores import NOT_SCORES
from lathe.evaluation.metric_order import LOWER_IS_BETTER, orient_score
from lathe.evaluation.mixed_engines import check_engines
from lathe.experiments.changed_code import has_stale_timings, list_changed_code, list_scripts
from lathe.experiments.factors import group_factors, list_changes, warn_of_factors
from lathe.experiments.p_values import adjust_p_values
from lathe.experiments.paired_answers import pair_answers, read_answers
from lathe.experiments.task_differences import compare_tasks
from lathe.provenance.revisions import Revision, find_revision, list_experiments

SIGNIFICANT = 0.05
TESTED = ("metric", "delta", "low", "high", "p", "detectable")  # keys of a delta in a report

# What to do where different engines answered.
ASKED_FOR = (
    "let one engine answer in both (generate.engine); `lathe compare --mixed-engines`, or evaluate.allow_mixed_engines "
    "in the first of them, asks for it"
)

# Keys that must change together: 4-bit weights cannot be trained.
CHANGED_TOGETHER = ({"training.tuning", "quantization.load_in_4bit"},)
PRESETS = {"models": "model", "datasets": "dataset"}


@dataclass
class ComparedRun:
    """One revision in a comparison: the artifact that is compared, what answered, its recorded scores, and its cost."""

    name: str
    commit: str | None
    artifact: str
    seed: int
    scores: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    cost: dict[str, float | None]
    engine: str = LLAMA_CPP


@dataclass
class ScoreDifference:
    """The difference of one score to the first revision's, on the rows that both answered; `p` is not adjusted.

    Of these rows `same_answers` have an identical answer in both. `detectable` is the smallest true difference that
    they would have shown with a power of 80 %; None if it is not known.
    """

    name: str
    metric: str
    delta: float
    low: float | None
    high: float | None
    p: float
    rows: int
    same_answers: int
    detectable: float | None = None


@dataclass
class SeedGroup:
    """Revisions that differ in the seed alone: mean and standard deviation of each score over the seeds."""

    names: list[str]
    seeds: list[int]
    mean: dict[str, float]
    spread: dict[str, float | None]


@dataclass
class Comparison:
    """The result: every revision, the first of which the others are compared with."""

    split: str
    metric: str
    sides: list[ComparedRun]
    parameters: dict[str, list[Any]]
    differences: list[ScoreDifference] = field(default_factory=list)
    settings: list[SeedGroup] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    verdict: str = ""


def compare(names: Sequence[str], *, split: str, artifact: str | None, mixed_engines: bool = False) -> Comparison:
    """Compare revisions by name; `artifact` is one of each, by default the one with the best validation score.

    Raises InputError if a name is unknown, if its revision has not been evaluated, and if different engines answered,
    unless `mixed_engines` or the first revision's evaluate.allow_mixed_engines asks for that.
    """
    if len(names) < 2:
        raise InputError(
            f"compare {' '.join(names)}: takes at least two; name experiments, commits or `workspace`",
            code="too-few-names",
        )
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise InputError(f"compare: {twice} is named twice; name each experiment once", code="named-twice")
    revisions = [find_revision(name) for name in names]
    metric = revisions[0].parameters["evaluate"]["primary_metric"]
    sides = [_read_side(revision, split, artifact, metric) for revision in revisions]
    for side in sides:
        if metric not in side.scores:
            raise InputError(
                f"{side.name}: has no {metric}, the evaluate.primary_metric of {names[0]}; evaluate it so",
                code="score-missing",
            )
    allowed = mixed_engines or revisions[0].parameters["evaluate"].get("allow_mixed_engines", False)
    mixture = check_engines({side.name: side.engine for side in sides}, allowed=allowed, remedy=ASKED_FOR)
    result = Comparison(split, metric, sides, _list_changed_parameters(revisions))
    result.warnings += [*filter(None, [mixture]), *_warn_of_settings(revisions, result.parameters)]
    result.warnings += _warn_of_files(sides)
    with open_repository(paths.ROOT) as repo:
        for revision, side in zip(revisions[1:], sides[1:], strict=True):
            differences, warning = _test_differences(repo, revisions[0], sides[0], revision, side, split)
            result.differences += differences
            result.warnings += warning
            tested, warning = compare_tasks(repo, (revisions[0], revision), (sides[0].artifact, side.artifact))
            result.differences += [
                ScoreDifference(revision.name, **{key: one[key] for key in (*TESTED, "rows", "same_answers")})
                for one in tested
            ]
            result.warnings += warning
    result.settings = group_seeds(revisions, sides)
    result.verdict = conclude(result)
    return result


# Scores and cost of one revision


def _read_side(revision: Revision, split: str, artifact: str | None, metric: str) -> ComparedRun:
    from lathe.evaluation.benchmark_scores import list_task_scores
    from lathe.evaluation.best_artifact import choose_best_artifact

    steering, report = (revision.read_json(f"metrics/evaluate/{name}.json") for name in ("validation", split))
    if not steering or not report:
        raise InputError(
            f"{revision.name}: has no metrics/evaluate/{split}.json; run the pipeline there", code="not-evaluated"
        )
    if artifact is None:
        candidates = list_gguf_types(steering)
        if any(metric not in steering[name] for name in candidates):
            raise InputError(
                f"{revision.name}: has no {metric}, to choose its best file by; name one: --artifact",
                code="score-missing",
            )
        chosen = choose_best_artifact(steering, candidates, metric)
    elif artifact in report:
        chosen = artifact
    else:
        raise InputError(
            f"--artifact {artifact}: {revision.name} has none; {did_you_mean(artifact, list(report))}",
            code="no-such-artifact",
        )
    scores = report[chosen]
    tasks = revision.read_json("metrics/evaluate/benchmark.json") or {}
    of_tasks = list_task_scores(tasks).get(chosen, {})
    intervals = [
        (f"{name}.{entry['metric']}", entry)
        for name in tasks
        for entry in tasks[name].get(chosen, {}).get("intervals", [])
    ]
    return ComparedRun(
        name=revision.name,
        commit=revision.commit,
        artifact=chosen,
        seed=revision.parameters["seed"],
        scores={key: value for key, value in scores.items() if key not in NOT_SCORES} | of_tasks,
        intervals={entry["metric"]: (entry["low"], entry["high"]) for entry in scores["intervals"]}
        | {name: (entry["low"], entry["high"]) for name, entry in intervals},
        cost={**_measure_cost(revision), "bytes": scores["bytes"]},
        engine=read_mark(scores),
    )


def _measure_cost(revision: Revision) -> dict[str, float | None]:
    """Return the seconds of all stages and of training, and the largest peak memory of a stage (bytes).

    None if a stage was not run for this revision: DVC took its outputs from the run cache, and the timings next to them
    are of another run.
    """
    timings = {stem: revision.read_json(f"metrics/timings/{stem}.json") for stem in sorted(list_scripts(revision))}
    earlier = [revision.parent] if revision.parent else []
    earlier += [Revision(experiment.name, experiment.commit) for experiment in reversed(list_experiments())]
    known = {
        stem: timing for stem, timing in timings.items() if timing and not has_stale_timings(revision, stem, earlier)
    }
    is_complete = bool(timings) and len(known) == len(timings)
    training = known.get("train")
    memory = [timing["peak_memory_bytes"] for timing in known.values()]
    on_gpu = [timing["peak_gpu_memory_bytes"] for timing in known.values() if "peak_gpu_memory_bytes" in timing]
    return {
        "seconds": round(sum(timing["seconds"] for timing in known.values()), 2) if is_complete else None,
        "training_seconds": training["seconds"] if training else None,
        "peak_memory_bytes": max(memory) if is_complete else None,
        **({"peak_gpu_memory_bytes": max(on_gpu)} if on_gpu else {}),
    }


# Changed parameters


def _list_changed_parameters(revisions: Sequence[Revision]) -> dict[str, list[Any]]:
    """Return the keys whose values differ, with each revision's value, without those of methods that none uses."""
    used = {revision.parameters["training"]["method"] for revision in revisions}
    trees = [dotted_keys.flatten(revision.parameters) for revision in revisions]
    keys = list(dict.fromkeys(key for tree in trees for key in tree))
    unused = tuple(f"{method}." for method in ("dpo", "grpo") if method not in used)
    return {
        key: [tree.get(key) for tree in trees]
        for key in keys
        if any(tree.get(key) != trees[0].get(key) for tree in trees) and not key.startswith(unused)
    }


def _warn_of_settings(revisions: Sequence[Revision], parameters: Mapping[str, list[Any]]) -> Iterator[str]:
    for number, revision in enumerate(revisions[1:], start=1):
        own = list_changes(parameters, number)
        both = f"{revision.name} and {revisions[0].name}"
        yield from warn_of_factors(both, own, group_factors(own, CHANGED_TOGETHER, PRESETS))
        if scoring := [key for key in own if key.startswith(("evaluate.", "bert_score.", "judge."))]:
            yield f"{both} were not scored alike ({', '.join(scoring)}); differences are by the first one's settings"
        if code := list_changed_code(revisions[0], revision):
            yield f"the code of {both} differs: {', '.join(code)}"
        if (
            "dataset" not in own
            and revisions[0].find_output_hash("data/raw") != revision.find_output_hash("data/raw")
            and "seed" not in own
        ):
            yield f"the data of {both} differ, under the same name"


def _warn_of_files(sides: Sequence[ComparedRun]) -> Iterator[str]:
    if len({side.artifact for side in sides}) > 1:
        best = ", ".join(f"{side.artifact} of {side.name}" for side in sides)
        yield f"not the same file of each is compared ({best}): --artifact NAME holds one kind against its own"
    unknown = [side.name for side in sides if side.cost["seconds"] is None]
    if unknown:
        yield (
            f"what {', '.join(unknown)} took is not known: stages of it came from DVC's run cache, "
            "beside timings of another run"
        )


# Differences of scores


def _test_differences(
    repo: DvcRepository, first: Revision, first_side: ComparedRun, other: Revision, other_side: ComparedRun, split: str
) -> tuple[list[ScoreDifference], list[str]]:
    from lathe.evaluation.evaluate import Resampling, define_scores, evaluate

    clustered = first.parameters["evaluate"].get("cluster_by") is not None
    answers_of = [
        read_answers(repo, revision, side.artifact, split, clustered=clustered)
        for revision, side in ((first, first_side), (other, other_side))
    ]
    pairs = pair_answers((first, other), answers_of, called="answers", rows=f"{split} rows", dvc="dvc")
    if not pairs.ours:
        return [], pairs.warnings
    settings, judge = first.parameters["evaluate"], first.parameters["judge"]
    judge_score = "win_rate" if judge.get("mode") == "pairwise" else "judge"
    scores = define_scores(
        [name for name in settings["metrics"] if name in other_side.scores],
        normalize=settings["normalize"],
        answer_pattern=settings["answer_pattern"],
        bert_score_weight=settings["bert_score_weight"],
        judge_weight=settings["judge_weight"] if judge["enabled"] and judge_score in other_side.scores else None,
        judge_score=judge_score,
    )
    # `evaluate` compares every artifact of a report with the one named base.
    answers = {"base": pairs.ours, "other": pairs.theirs}
    report = evaluate(
        answers,
        {},
        {"base": 0, "other": 0},
        scores,
        Resampling(settings["bootstrap_samples"], first.parameters["seed"]),
    )
    same = sum(our["completion"] == their["completion"] for our, their in zip(pairs.ours, pairs.theirs, strict=True))
    rows = len(pairs.ours)
    return [
        ScoreDifference(other.name, rows=rows, same_answers=same, **{key: delta[key] for key in TESTED})
        for delta in report["other"]["deltas"]
    ], pairs.warnings


# Several seeds of the same parameters


def group_seeds(revisions: Sequence[Revision], sides: Sequence[ComparedRun]) -> list[SeedGroup]:
    """Return the revisions grouped by all but the seed; no group if none has several seeds, or one a seed twice."""
    groups: dict[str, list[ComparedRun]] = {}
    for revision, side in zip(revisions, sides, strict=True):
        rest = {key: value for key, value in revision.parameters.items() if key != "seed"}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(side)
    if len(groups) == len(sides) or any(len({side.seed for side in group}) < len(group) for group in groups.values()):
        return []
    return [_summarize_seeds(group) for group in groups.values()]


def _summarize_seeds(group: Sequence[ComparedRun]) -> SeedGroup:
    by_metric = {name: [side.scores.get(name) for side in group] for name in group[0].scores}
    known = {name: [value for value in values if value is not None] for name, values in by_metric.items()}
    complete = {name: values for name, values in known.items() if len(values) == len(group)}
    return SeedGroup(
        names=[side.name for side in group],
        seeds=[side.seed for side in group],
        mean={name: round(statistics.fmean(values), 6) for name, values in complete.items()},
        spread={
            name: round(statistics.stdev(values), 6) if len(values) > 1 else None for name, values in complete.items()
        },
    )


# Conclusion


def conclude(result: Comparison) -> str:
    """Return the comparison in a sentence."""
    if len(result.settings) > 1:
        first, *others = result.settings
        p_values = {other.names[0]: _test_welch(result, first, other) for other in others}
        adjusted = adjust_p_values({name: p for name, p in p_values.items() if p is not None})
        outcomes = [_compare_seeds(result, first, other, adjusted.get(other.names[0])) for other in others]
        return f"{'; '.join(outcomes)}{_note_adjustment(adjusted)}."
    if result.settings:
        [first] = result.settings
        mean, spread = first.mean[result.metric], first.spread[result.metric]
        return (
            f"One group with {len(first.seeds)} seeds: {result.metric} on {result.split} is {mean:.4g} on average, "
            f"with a standard deviation of {spread:.2g} that is chance alone."
        )
    primary = {difference.name: difference for difference in result.differences if difference.metric == result.metric}
    adjusted = adjust_p_values({name: difference.p for name, difference in primary.items()})
    outcomes = [
        _describe_outcome(result, side, primary.get(side.name), adjusted.get(side.name)) for side in result.sides[1:]
    ]
    return f"By {result.metric} on {result.split}: {'; '.join(outcomes)}{_note_adjustment(adjusted)}."


def _note_adjustment(p_values: Mapping[str, float]) -> str:
    return f"; p adjusted for {len(p_values)} comparisons" if len(p_values) > 1 else ""


def _describe_outcome(
    result: Comparison, side: ComparedRun, difference: ScoreDifference | None, p: float | None
) -> str:
    first = result.sides[0]
    if difference is None or p is None:
        pair = f"{format_number(side.scores[result.metric])} against {format_number(first.scores[result.metric])}"
        return f"{side.name} cannot be held against {first.name} ({pair}): no answers of both to the same row are here"
    if difference.same_answers == difference.rows:
        return f"{side.name} gives the same answers as {first.name} (all {difference.rows} rows, to the letter)"
    alike = f"{difference.same_answers} of {difference.rows} answers the same"
    tested = f"{difference.delta:+.4g}, p {p:.2g}, {alike}"
    if difference.delta == 0 and difference.p == 1:
        return f"{side.name} scores the same as {first.name} ({tested})"
    if p >= SIGNIFICANT:
        told = "" if difference.detectable is None else f", a difference of {difference.detectable:.2g} would show"
        return f"{side.name} is not shown to differ from {first.name} ({tested}{told})"
    better = (difference.delta > 0) != (result.metric in LOWER_IS_BETTER)
    return f"{side.name} is {'better' if better else 'worse'} than {first.name} ({tested})"


def _compare_seeds(result: Comparison, first: SeedGroup, other: SeedGroup, p: float | None) -> str:
    ours, theirs = _list_scores(result, first), _list_scores(result, other)
    if result.metric not in first.mean or result.metric not in other.mean:
        return f"{result.metric} of {', '.join([*first.names, *other.names])} is not known everywhere"
    names = f"{_name_group(other)} against {_name_group(first)} by {result.metric} on {result.split}"
    means = f"{other.mean[result.metric]:.4g} against {first.mean[result.metric]:.4g}"
    if min(len(ours), len(theirs)) < 2:
        [single], several = (ours, theirs) if len(ours) < 2 else (theirs, ours)
        where = "within" if min(several) <= single <= max(several) else "outside"
        return f"{names}: {means}; the single seed is {where} the range of the {len(several)} seeds of the other"
    if p is None:
        return f"{names}: {means} with every seed; without any spread nothing is tested"
    after, before = (orient_score(result.metric, setting.mean[result.metric]) for setting in (other, first))
    gain = after - before
    outcome = "not shown to differ" if p >= SIGNIFICANT else "better" if gain > 0 else "worse"
    return f"{names}: {outcome}, {means} on average (p {p:.2g} by Welch's t test over the seeds)"


def _test_welch(result: Comparison, first: SeedGroup, other: SeedGroup) -> float | None:
    """Return the p value of the means of two groups; None if the scores of one are unknown, too few, or all equal."""
    ours, theirs = _list_scores(result, first), _list_scores(result, other)
    if min(len(ours), len(theirs)) < 2 or len({*ours}) == len({*theirs}) == 1:
        return None
    from scipy.stats import ttest_ind

    return float(ttest_ind(theirs, ours, equal_var=False).pvalue)


def _list_scores(result: Comparison, group: SeedGroup) -> list[float]:
    """Return the score of each seed; an empty list if one has none."""
    scores = [side.scores[result.metric] for side in result.sides if side.name in group.names]
    known = [score for score in scores if score is not None]
    return known if len(known) == len(scores) else []


def _name_group(group: SeedGroup) -> str:
    return f"{group.names[0]} ({len(group.seeds)} seed{'s' * (len(group.seeds) > 1)})"


def format_number(value: float | None) -> str:
    """Return four digits, or an integer from 1,000; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
