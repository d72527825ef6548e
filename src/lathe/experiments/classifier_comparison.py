"""Comparison of the classifier's experiments: as that of the main pipeline, from the predictions in DVC's cache."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lathe.common import dotted_keys, paths
from lathe.common.dvc_api import DvcRepository, open_repository
from lathe.common.errors import InputError
from lathe.common.git import read_line
from lathe.common.jsonl import read_jsonl
from lathe.config.pipelines import CLASSIFIER as PIPELINE
from lathe.experiments.comparison import ComparedRun, Comparison, ScoreDifference, conclude, group_seeds
from lathe.experiments.factors import group_factors, list_changes, warn_of_factors
from lathe.experiments.paired_answers import pair_answers
from lathe.provenance.revisions import ClassifierRevision, Revision

CLASSIFIER = "classifier"
METRICS = "classify/metrics"

# Keys that change together and are one factor: what is trained, and the rate at which that part is.
TOGETHER = ({"training.tuning", "training.freeze_backbone", "training.encoder_learning_rate"},)
PRESETS = {"models": "model.backbone", "datasets": "dataset"}
STAGES = ("features", "train", "evaluate")  # whose seconds are shown


def concerns_classifier(revisions: Sequence[Revision]) -> bool:
    """Tell whether revisions differ in the classifier's pipeline, and in nothing of the main one."""
    if any(revision.read_text(f"{METRICS}/metrics.json") is None for revision in revisions):
        return False
    main = {(revision.read_text("params.yaml"), revision.read_text("dvc.lock")) for revision in revisions}
    own = {
        (revision.read_text("classify/params.yaml"), revision.read_text("classify/dvc.lock")) for revision in revisions
    }
    return len(main) == 1 and len(own) > 1


def compare_classifiers(revisions: Sequence[Revision], *, split: str) -> Comparison:
    """Compare revisions of the classifier's pipeline, each with the first one, on the texts that both answered."""
    found = [ClassifierRevision(revision.name, revision.commit) for revision in revisions]
    metric = _read_metric(found[0])
    sides = [_read_side(revision, split) for revision in found]
    result = Comparison(split, metric, sides, _list_changed_parameters(found))
    result.warnings += _warn(found, result.parameters)
    with open_repository(paths.CLASSIFIER) as repo:
        for other in found[1:]:
            differences, warning = _test_differences(repo, found[0], other, split)
            result.differences += differences
            result.warnings += warning
    result.settings = group_seeds(found, sides)
    result.verdict = conclude(result)
    return result


def _read_metric(revision: ClassifierRevision) -> str:
    metric: str = revision.parameters["training"]["metric_for_best_model"]
    return "accuracy" if metric == "loss" else metric


def _read_side(revision: ClassifierRevision, split: str) -> ComparedRun:
    report = revision.read_json(f"{METRICS}/evaluate/{split}.json")
    if not report:
        raise InputError(
            f"{revision.name}: has no {METRICS}/evaluate/{split}.json; run the pipeline there: `make classify`",
            code="not-evaluated",
        )
    own = report[CLASSIFIER]
    scores: dict[str, float | None] = {name: value for name, value in own.items() if isinstance(value, int | float)}
    intervals = {
        one["metric"]: (one["low"], one["high"])
        for one in own["intervals"]
        if one["low"] is not None and one["high"] is not None
    }
    return ComparedRun(
        name=revision.name,
        commit=revision.commit,
        artifact=CLASSIFIER,
        seed=revision.parameters["seed"],
        scores=scores,
        intervals=intervals,
        cost=_read_cost(revision),
    )


def _read_cost(revision: ClassifierRevision) -> dict[str, float | None]:
    cost: dict[str, float | None] = {}
    for stage in STAGES:
        timing = None if _is_stale(revision, stage) else revision.read_json(f"{METRICS}/timings/{stage}.json")
        cost[f"{stage}_seconds"] = timing["seconds"] if timing else None
        if stage == "train":
            cost["train_peak_memory_bytes"] = timing["peak_memory_bytes"] if timing else None
    trained = revision.read_json(f"{METRICS}/trained.json") or {}
    cost["trained_weights"] = trained.get("trained_weights")
    return cost


def _is_stale(revision: ClassifierRevision, stage: str) -> bool:
    """Tell whether a stage's timings are of another run: those of the commit before, though its outputs are others."""
    before = revision.parent
    if before is None or revision.commit is None:
        return False
    path = f"{METRICS}/timings/{stage}.json"
    ours, theirs = (
        read_line("rev-parse", "--quiet", "--verify", f"{commit}:./{path}")
        for commit in (revision.commit, before.commit)
    )
    earlier = ClassifierRevision(before.name, before.commit)
    return ours == theirs and revision.stages.get(stage) != earlier.stages.get(stage)


def _list_changed_parameters(revisions: Sequence[ClassifierRevision]) -> dict[str, list[Any]]:
    trees = [dotted_keys.flatten(revision.parameters) for revision in revisions]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    without_adapter = all(revision.parameters["training"]["tuning"] != "lora" for revision in revisions)
    return {
        key: [tree.get(key) for tree in trees]
        for key in keys
        if any(tree.get(key) != trees[0].get(key) for tree in trees)
        and not (without_adapter and key.startswith("lora."))
    }


def _warn(revisions: Sequence[ClassifierRevision], parameters: Mapping[str, list[Any]]) -> Iterator[str]:
    first = revisions[0]
    for number, revision in enumerate(revisions[1:], start=1):
        own = list_changes(parameters, number)
        both = f"{revision.name} and {first.name}"
        yield from warn_of_factors(both, own, group_factors(own, TOGETHER, PRESETS))
        if code := sorted(_list_changed_code(first, revision)):
            yield f"the code of {both} differs: {', '.join(code)}"


def _list_changed_code(one: ClassifierRevision, other: ClassifierRevision) -> set[str]:
    def collect(revision: ClassifierRevision) -> dict[str, str]:
        deps = [dep for stage in revision.stages.values() for dep in stage.get("deps", [])]
        return {dep["path"]: dep["md5"] for dep in deps if dep["path"].startswith(("../src/", "stages/"))}

    ours, theirs = collect(one), collect(other)
    return {path for path in ours.keys() & theirs.keys() if ours[path] != theirs[path]}


def _test_differences(
    repo: DvcRepository, first: ClassifierRevision, other: ClassifierRevision, split: str
) -> tuple[list[ScoreDifference], list[str]]:
    from lathe.classify.scores import compare_answers

    answers = [_read_answers(repo, revision, split) for revision in (first, other)]
    dvc = " ".join(["dvc", *PIPELINE.dvc_options])
    pairs = pair_answers((first, other), answers, called="predictions", rows=f"{split} texts", dvc=dvc)
    if not pairs.ours:
        return [], pairs.warnings
    both = pairs.ours + pairs.theirs
    classes = sorted({name for row in both for key in ("labels", "predicted") for name in row[key]})
    settings = first.parameters["evaluate"]
    differences = compare_answers(
        pairs.ours,
        pairs.theirs,
        classes,
        bins=settings["calibration_bins"],
        samples=settings["bootstrap_samples"],
        seed=first.parameters["seed"],
    )
    same = sum(our["predicted"] == their["predicted"] for our, their in zip(pairs.ours, pairs.theirs, strict=True))
    return [
        ScoreDifference(
            other.name,
            name,
            one["value"] or 0.0,
            one["low"],
            one["high"],
            one["p"] or 0.0,
            len(pairs.ours),
            same,
            one["detectable"],
        )
        for name, one in differences.items()
    ], pairs.warnings


def _read_answers(repo: DvcRepository, revision: ClassifierRevision, split: str) -> dict[str, Any] | None:
    """Return a revision's predictions by their texts; None if the cache has not got them."""
    file = revision.find_cached_file(repo, "data/predictions", f"{split}.jsonl")
    if file is None:
        return None
    rows: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    for row in read_jsonl(file):
        counts[row["text"]] += 1
        rows[f"{counts[row['text']]} {row['text']}"] = row
    return rows
