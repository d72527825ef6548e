"""Comparison of experiments: what was changed, scores on the same rows with significance, cost, a conclusion."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lathe.common import dotted_keys, paths
from lathe.common.dvc_api import DvcRepository, open_repository
from lathe.common.errors import InputError
from lathe.common.jsonl import read_jsonl
from lathe.common.text import did_you_mean
from lathe.config.artifacts import UNQUANTIZED
from lathe.evaluation.metrics import LOWER_IS_BETTER, goodness
from lathe.experiments.changed_code import has_stale_timings, list_changed_code, list_scripts
from lathe.provenance.revisions import Revision, find_revision, list_experiments

if TYPE_CHECKING:
    from lathe.evaluation.evaluate import Row

SIGNIFICANT = 0.05

# Keys that change only together: 4-bit weights cannot be trained.
TOGETHER = ({"training.tuning", "quantization.load_in_4bit"},)


@dataclass
class Side:
    """One revision: the file of it that is compared, its recorded scores, and what it took to make."""

    name: str
    commit: str | None
    artifact: str
    seed: int
    scores: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    cost: dict[str, float | None]


@dataclass
class Difference:
    """One score of a side less the first one's, on the rows that both answered; `p` is of the two of them alone.

    Of these rows `same_answers` have the same answer, to the letter.
    """

    name: str
    metric: str
    delta: float
    low: float | None
    high: float | None
    p: float
    rows: int
    same_answers: int


@dataclass
class Setting:
    """What differs in nothing but the seed: mean and standard deviation of each score over the seeds."""

    names: list[str]
    seeds: list[int]
    mean: dict[str, float]
    spread: dict[str, float | None]


@dataclass
class Comparison:
    """All that is said of the sides, the first of which the others are held against."""

    split: str
    metric: str
    sides: list[Side]
    parameters: dict[str, list[Any]]
    differences: list[Difference] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    verdict: str = ""


def compare(names: Sequence[str], *, split: str, artifact: str | None) -> Comparison:
    """Compare revisions by name; `artifact` is a file of each, by default the one with the best validation score.

    Raises InputError where a name means nothing, or what it means has not been evaluated.
    """
    if len(names) < 2:
        raise InputError(f"compare {' '.join(names)}: takes at least two; name experiments, commits or `workspace`")
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise InputError(f"compare: {twice} is named twice; name each experiment once")
    found = [find_revision(name) for name in names]
    metric = found[0].parameters["evaluate"]["primary_metric"]
    sides = [_side(revision, split, artifact, metric) for revision in found]
    for side in sides:
        if metric not in side.scores:
            raise InputError(f"{side.name}: has no {metric}, the evaluate.primary_metric of {names[0]}; evaluate it so")
    result = Comparison(split, metric, sides, _parameters(found))
    result.warnings += [*_warnings_of_settings(found, result.parameters), *_warnings_of_files(sides)]
    with open_repository(paths.ROOT) as repo:
        for revision, side in zip(found[1:], sides[1:], strict=True):
            differences, warning = _differences(repo, found[0], sides[0], revision, side, split)
            result.differences += differences
            result.warnings += warning
    result.settings = _settings(found, sides)
    result.verdict = _verdict(result)
    return result


# What each one is


def _side(revision: Revision, split: str, artifact: str | None, metric: str) -> Side:
    from lathe.evaluation.best_artifact import best

    steering, report = (revision.read_json(f"metrics/evaluate/{name}.json") for name in ("validation", split))
    if not steering or not report:
        raise InputError(f"{revision.name}: has no metrics/evaluate/{split}.json; run the pipeline there")
    if artifact is None:
        candidates = [name for name in steering if name not in UNQUANTIZED]
        if any(metric not in steering[name] for name in candidates):
            raise InputError(f"{revision.name}: has no {metric}, to choose its best file by; name one: --artifact")
        chosen = best(steering, candidates, metric)
    elif artifact in report:
        chosen = artifact
    else:
        raise InputError(f"--artifact {artifact}: {revision.name} has none; {did_you_mean(artifact, list(report))}")
    scores = report[chosen]
    return Side(
        name=revision.name,
        commit=revision.commit,
        artifact=chosen,
        seed=revision.parameters["seed"],
        scores={key: value for key, value in scores.items() if key not in ("bytes", "intervals", "deltas")},
        intervals={each["metric"]: (each["low"], each["high"]) for each in scores["intervals"]},
        cost={**_cost(revision), "bytes": scores["bytes"]},
    )


def _cost(revision: Revision) -> dict[str, float | None]:
    """Seconds of all stages and of training, and the most memory one took (bytes).

    None where a stage of it was not run for this revision: DVC took its outputs from the run cache, and the timings
    beside them are those of another run.
    """
    timings = {stem: revision.read_json(f"metrics/timings/{stem}.json") for stem in sorted(list_scripts(revision))}
    earlier = [revision.parent] if revision.parent else []
    earlier += [Revision(each.name, each.commit) for each in reversed(list_experiments())]
    known = {stem: each for stem, each in timings.items() if each and not has_stale_timings(revision, stem, earlier)}
    whole = len(known) == len(timings)
    training = known.get("train")
    memory = [each["peak_memory_bytes"] for each in known.values()]
    on_gpu = [each["peak_gpu_memory_bytes"] for each in known.values() if "peak_gpu_memory_bytes" in each]
    return {
        "seconds": round(sum(each["seconds"] for each in known.values()), 2) if whole else None,
        "training_seconds": training["seconds"] if training else None,
        "peak_memory_bytes": max(memory) if whole else None,
        **({"peak_gpu_memory_bytes": max(on_gpu)} if on_gpu else {}),
    }


# What was changed


def _parameters(found: Sequence[Revision]) -> dict[str, list[Any]]:
    """The keys that have not the same value everywhere, with each one's; of methods that none of them uses, none."""
    used = {revision.parameters["training"]["method"] for revision in found}
    trees = [dotted_keys.flatten(revision.parameters) for revision in found]
    keys = list(dict.fromkeys(key for tree in trees for key in tree))
    unused = tuple(f"{method}." for method in ("dpo", "grpo") if method not in used)
    return {
        key: [tree.get(key) for tree in trees]
        for key in keys
        if any(tree.get(key) != trees[0].get(key) for tree in trees) and not key.startswith(unused)
    }


def _factors(keys: Sequence[str], value: Callable[[str], tuple[Any, Any]]) -> list[str]:
    """The keys that were changed apart from one another; what cannot be changed alone goes by the first of them."""
    together = [*TOGETHER]
    # The update is scaled by lora_alpha / r: where that is kept, it is the rank alone that was changed.
    if {"lora.r", "lora.lora_alpha"} <= set(keys):
        (r, other_r), (alpha, other_alpha) = value("lora.r"), value("lora.lora_alpha")
        if alpha * other_r == other_alpha * r:
            together.append({"lora.r", "lora.lora_alpha"})
    # A preset's own keys change with its name.
    for key, table in (("model", "models"), ("dataset", "datasets")):
        if key in keys:
            together.append({key, *(name for name in keys if name.startswith(f"{table}."))})
    factors: list[str] = []
    for key in keys:
        group = next((group for group in together if key in group), {key})
        if key != "seed" and not group & set(factors):
            factors.append(key)
    return factors


def _warnings_of_settings(found: Sequence[Revision], parameters: Mapping[str, list[Any]]) -> Iterator[str]:
    for number, revision in enumerate(found[1:], start=1):
        own = [key for key, values in parameters.items() if values[number] != values[0]]
        factors = _factors(own, lambda key, number=number: (parameters[key][0], parameters[key][number]))  # type: ignore[misc]
        both = f"{revision.name} and {found[0].name}"
        if len(factors) > 1:
            yield f"{len(factors)} factors differ between {both} ({', '.join(factors)}): any of them may be why"
        if "seed" in own:
            seeds = f"{parameters['seed'][0]} and {parameters['seed'][number]}"
            yield f"the seeds of {both} differ ({seeds}): what chance does is in the difference"
        if scoring := [key for key in own if key.startswith(("evaluate.", "bert_score.", "judge."))]:
            yield f"{both} were not scored alike ({', '.join(scoring)}); differences are by the first one's settings"
        if code := list_changed_code(found[0], revision):
            yield f"the code of {both} differs: {', '.join(code)}"
        if (
            "dataset" not in own
            and found[0].find_output_hash("data/raw") != revision.find_output_hash("data/raw")
            and "seed" not in own
        ):
            yield f"the data of {both} differ, under the same name"


def _warnings_of_files(sides: Sequence[Side]) -> Iterator[str]:
    if len({side.artifact for side in sides}) > 1:
        best = ", ".join(f"{side.artifact} of {side.name}" for side in sides)
        yield f"not the same file of each is compared ({best}): --artifact NAME holds one kind against its own"
    unknown = [side.name for side in sides if side.cost["seconds"] is None]
    if unknown:
        yield (
            f"what {', '.join(unknown)} took is not known: stages of it came from DVC's run cache, "
            "beside timings of another run"
        )


# What came of it


def _differences(
    repo: DvcRepository, first: Revision, first_side: Side, other: Revision, other_side: Side, split: str
) -> tuple[list[Difference], list[str]]:
    from lathe.evaluation.evaluate import Sampling, evaluate, row_scores

    answered = [
        _answers(repo, revision, side.artifact, split) for revision, side in ((first, first_side), (other, other_side))
    ]
    for revision, rows in zip((first, other), answered, strict=True):
        if rows is None:
            problem = (
                f"the answers of {revision.name} are not in DVC's cache; `dvc fetch` or `dvc exp pull` brings them"
            )
            return [], [f"{problem}; without them nothing is tested"]
    ours, theirs = (rows or {} for rows in answered)
    common = [key for key in ours if key in theirs]
    warnings = []
    if len(common) < max(len(ours), len(theirs)):
        counts = f"{first.name} answered {len(ours)} {split} rows and {other.name} {len(theirs)}"
        outcome = "differences are of these" if common else "nothing can be tested"
        warnings.append(f"{counts}, {len(common)} of them the same; {outcome}")
    if not common:
        return [], warnings
    settings, judge = first.parameters["evaluate"], first.parameters["judge"]
    scores = row_scores(
        [name for name in settings["metrics"] if name in other_side.scores],
        normalize=settings["normalize"],
        answer_pattern=settings["answer_pattern"],
        bert_score_weight=settings["bert_score_weight"],
        judge_weight=settings["judge_weight"] if judge["enabled"] and "judge" in other_side.scores else None,
    )
    # Every artifact of a report is compared with the one that is called base.
    answers = {"base": [ours[key] for key in common], "other": [theirs[key] for key in common]}
    report = evaluate(
        answers, {}, {"base": 0, "other": 0}, scores, Sampling(settings["bootstrap_samples"], first.parameters["seed"])
    )
    same = sum(ours[key]["completion"] == theirs[key]["completion"] for key in common)
    return [
        Difference(other.name, each["metric"], each["delta"], each["low"], each["high"], each["p"], len(common), same)
        for each in report["other"]["deltas"]
    ], warnings


def _answers(repo: DvcRepository, revision: Revision, artifact: str, split: str) -> dict[str, "Row"] | None:
    """A revision's answers by what was asked, with the scores that are not made from texts; None where any is gone."""
    files = [
        revision.find_cached_file(repo, "data/processed", f"{split}.jsonl"),
        revision.find_cached_file(repo, f"data/generated/{artifact}", f"{split}.jsonl"),
        revision.find_cached_file(repo, "data/scored", f"{artifact}/{split}.jsonl"),
    ]
    if any(file is None for file in files):
        return None
    asked, answers, scored = (read_jsonl(file) for file in files if file)
    bought = {row["row"]: row["scores"] for row in scored}
    found: dict[str, Row] = {}
    seen: Counter[str] = Counter()
    for number, row in enumerate(answers):
        conversation = json.dumps(asked[number]["messages"], sort_keys=True)
        seen[conversation] += 1
        scores = {name: bought[number][name] for name in ("bert_score", "judge") if name in bought[number]}
        found[f"{seen[conversation]} {conversation}"] = row | scores
    return found


# Several seeds of one setting


def _settings(found: Sequence[Revision], sides: Sequence[Side]) -> list[Setting]:
    """The settings, where one has several seeds; none where one has the same seed twice, which is no spread."""
    groups: dict[str, list[Side]] = {}
    for revision, side in zip(found, sides, strict=True):
        rest = {key: value for key, value in revision.parameters.items() if key != "seed"}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(side)
    if len(groups) == len(sides) or any(len({side.seed for side in group}) < len(group) for group in groups.values()):
        return []
    return [_setting(group) for group in groups.values()]


def _setting(group: Sequence[Side]) -> Setting:
    by_metric = {name: [side.scores.get(name) for side in group] for name in group[0].scores}
    whole = {name: [value for value in values if value is not None] for name, values in by_metric.items()}
    whole = {name: values for name, values in whole.items() if len(values) == len(group)}
    return Setting(
        names=[side.name for side in group],
        seeds=[side.seed for side in group],
        mean={name: round(statistics.fmean(values), 6) for name, values in whole.items()},
        spread={
            name: round(statistics.stdev(values), 6) if len(values) > 1 else None for name, values in whole.items()
        },
    )


# What is to be thought of it


def _verdict(found: Comparison) -> str:
    if len(found.settings) > 1:
        first, *others = found.settings
        p_values = {other.names[0]: _welch(found, first, other) for other in others}
        adjusted = _holm({name: p for name, p in p_values.items() if p is not None})
        said = [_against_seeds(found, first, other, adjusted.get(other.names[0])) for other in others]
        return f"{'; '.join(said)}{_adjustment(adjusted)}."
    if found.settings:
        [first] = found.settings
        mean, spread = first.mean[found.metric], first.spread[found.metric]
        return (
            f"One setting with {len(first.seeds)} seeds: {found.metric} on {found.split} is {mean:.4g} on average, "
            f"with a standard deviation of {spread:.2g} that is chance alone."
        )
    primary = {each.name: each for each in found.differences if each.metric == found.metric}
    adjusted = _holm({name: each.p for name, each in primary.items()})
    said = [_outcome(found, side, primary.get(side.name), adjusted.get(side.name)) for side in found.sides[1:]]
    return f"By {found.metric} on {found.split}: {'; '.join(said)}{_adjustment(adjusted)}."


def _adjustment(p_values: Mapping[str, float]) -> str:
    return f"; p adjusted for {len(p_values)} comparisons" if len(p_values) > 1 else ""


def _outcome(found: Comparison, side: Side, difference: Difference | None, p: float | None) -> str:
    first = found.sides[0]
    if difference is None or p is None:
        pair = f"{_number(side.scores[found.metric])} against {_number(first.scores[found.metric])}"
        return f"{side.name} cannot be held against {first.name} ({pair}): no answers of both to the same row are here"
    if difference.same_answers == difference.rows:
        return f"{side.name} gives the same answers as {first.name} (all {difference.rows} rows, to the letter)"
    alike = f"{difference.same_answers} of {difference.rows} answers the same"
    tested = f"{difference.delta:+.4g}, p {p:.2g}, {alike}"
    if difference.delta == 0 and difference.p == 1:
        return f"{side.name} scores the same as {first.name} ({tested})"
    if p >= SIGNIFICANT:
        return f"{side.name} is not shown to differ from {first.name} ({tested})"
    better = (difference.delta > 0) != (found.metric in LOWER_IS_BETTER)
    return f"{side.name} is {'better' if better else 'worse'} than {first.name} ({tested})"


def _against_seeds(found: Comparison, first: Setting, other: Setting, p: float | None) -> str:
    ours, theirs = _by_seed(found, first), _by_seed(found, other)
    if found.metric not in first.mean or found.metric not in other.mean:
        return f"{found.metric} of {', '.join([*first.names, *other.names])} is not known everywhere"
    names = f"{_together(other)} against {_together(first)} by {found.metric} on {found.split}"
    means = f"{other.mean[found.metric]:.4g} against {first.mean[found.metric]:.4g}"
    if min(len(ours), len(theirs)) < 2:
        [single], several = (ours, theirs) if len(ours) < 2 else (theirs, ours)
        where = "within" if min(several) <= single <= max(several) else "outside"
        return f"{names}: {means}; the single seed lies {where} the range of the {len(several)} seeds of the other"
    if p is None:
        return f"{names}: {means} with every seed; without any spread nothing is tested"
    gain = goodness(found.metric, other.mean[found.metric]) - goodness(found.metric, first.mean[found.metric])
    outcome = "not shown to differ" if p >= SIGNIFICANT else "better" if gain > 0 else "worse"
    return f"{names}: {outcome}, {means} on average (p {p:.2g} by Welch's t test over the seeds)"


def _welch(found: Comparison, first: Setting, other: Setting) -> float | None:
    """The p value of two settings' means; None where the scores of either are not known, too few, or all the same."""
    ours, theirs = _by_seed(found, first), _by_seed(found, other)
    if min(len(ours), len(theirs)) < 2 or len({*ours}) == len({*theirs}) == 1:
        return None
    from scipy.stats import ttest_ind

    return float(ttest_ind(theirs, ours, equal_var=False).pvalue)


def _by_seed(found: Comparison, setting: Setting) -> list[float]:
    """Each seed's score; nothing where one has none."""
    scores = [side.scores[found.metric] for side in found.sides if side.name in setting.names]
    known = [score for score in scores if score is not None]
    return known if len(known) == len(scores) else []


def _together(setting: Setting) -> str:
    return f"{setting.names[0]} ({len(setting.seeds)} seed{'s' * (len(setting.seeds) > 1)})"


def _holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p values for being several (Holm 1979): the chance that any of those called different is not."""
    adjusted, least = {}, 0.0
    for number, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(p_values) - number) * p))
        adjusted[name] = least
    return adjusted


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
