"""Command `python -m lathe search`: options, environment and search file to a search, and its results printed."""

import argparse
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.workspace_lock import hold_workspace
from lathe.config import overrides
from lathe.config.pipelines import CLASSIFIER, MAIN, Pipeline
from lathe.config.yaml_files import read_yaml
from lathe.experiments.interrupted import wait_for_stash
from lathe.experiments.search import environment, results, run_search, search_file, storage
from lathe.experiments.search.study import PRUNED, REASON, Study
from lathe.provenance.damaged_cache import remove_damaged_objects

if TYPE_CHECKING:
    from lathe.experiments.search.run_search import Deliver

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A search file, validated with what fixes parameters beside it: environment and command line."""

    plan: search_file.Plan
    params: Any
    fixed: list[str]
    pipeline: Pipeline
    given: environment.Environment


def run(args: argparse.Namespace, deliver: "Deliver | None" = None) -> None:
    """Run a search, or apply its best experiment; `deliver` gets each trial's experiment once its scores are stored.

    Raises InputError for a file, an option or a variable of the environment that cannot be used.
    """
    # Optuna's warnings to developers.
    for message in (".* is experimental", "PedAnovaImportanceEvaluator computes"):
        warnings.filterwarnings("ignore", message=message)
    for option, number in (("--n-trials", args.n_trials), ("--timeout", args.timeout), ("--jobs", args.jobs)):
        if number is not None and not number > 0:
            raise InputError(f"{option} {number:g}: must be above 0", code="option-out-of-range")
    wait_for_stash()  # its parameters are those of the workspace
    prepared = prepare(args.file, args.overrides)
    chosen, params, fixed, given = prepared.plan, prepared.params, prepared.fixed, prepared.given
    pipeline = prepared.pipeline
    url = args.storage or os.environ.get(storage.VARIABLE) or None

    with storage.translate_connection_errors(url):
        if args.apply is not None:
            study = run_search.open_study(chosen, params, url)
            with hold_workspace("lathe search --apply"):
                applied = results.apply_best(study, args.apply or None)
            logger.info("%s is in the workspace; `git diff` shows what it changed", applied)
            return
        remove_damaged_objects(paths.ROOT / pipeline.folder)
        study = run_search.search(
            chosen,
            params,
            fixed=fixed,
            pipeline=pipeline,
            environment_variables=given.variables,
            n_trials=args.n_trials or given.n_trials or chosen.n_trials,
            jobs=args.jobs,
            timeout_seconds=args.timeout or chosen.timeout_seconds,
            url=url,
            deliver=deliver,
        )
        folder = results.FOLDER / chosen.study
        results.write_results(study, folder)
        logger.info("pictures and study.json are in %s", folder.relative_to(paths.ROOT))
        _print_best(study)


def prepare(given_file: Path, given_overrides: list[str]) -> Prepared:
    """Read a search file, and validate it with the overrides and the environment. Raises InputError."""
    if not given_file.is_file():
        raise InputError(f"{given_file}: no such file; name one of experiments/search", code="no-such-file")
    file = given_file.resolve()
    pipeline = CLASSIFIER if file.is_relative_to(paths.CLASSIFIER) else MAIN
    models = list(read_yaml(paths.PRESETS)["models"])
    # The variables are those of the set-up for language models.
    variables = os.environ if pipeline is MAIN else {}
    given = environment.read_environment(variables, pipeline.read(pipeline.params).params.model_dump(), models)
    # The command line wins over the environment.
    overridden = set(map(overrides.read_key, given_overrides))
    fixed = [*(text for text in given.overrides if overrides.read_key(text) not in overridden), *given_overrides]
    params = overrides.apply_overrides(fixed, pipeline).params
    name = str(file.relative_to(paths.ROOT) if file.is_relative_to(paths.ROOT) else file)
    chosen = search_file.read_plan(file, params.model_dump(), name, pipeline.section)
    unsearched = [key for key in map(overrides.read_key, fixed) if key in chosen.space]
    if fixed:
        added = f" (not searched: {', '.join(unsearched)})" if unsearched else ""
        logger.info("every trial runs with %s%s", " ".join(f"-S {text}" for text in fixed), added)
    if unsearched:
        chosen = chosen.fix_parameters(unsearched)
    chosen.check(params, name)
    return Prepared(chosen, params, fixed, pipeline, given)


def _print_best(study: Study) -> None:
    reasons = [one.user_attrs[REASON] for one in study.trials() if REASON in one.user_attrs]
    pruned = sum(PRUNED in one.user_attrs for one in study.trials())
    also = f", {pruned} pruned" if pruned else ""
    sys.stdout.write(f"{study.count_finished()} trials ended, {len(reasons)} of them failed{also}\n")
    for one in results.find_best(study):
        scores = ", ".join(
            f"{metric} {score:g}" for metric, score in zip(study.plan.directions, one.values, strict=True)
        )
        values = " ".join(f"{key}={value}" for key, value in one.params.items())
        sys.stdout.write(f"best: {results.name_experiment(study, one)}  {scores}  {values}\n")
    if reasons and len(reasons) == study.count_finished():
        raise InputError(
            f"study {study.plan.study}: no trial has scores; the last one failed: {reasons[-1]}; mend that, and give "
            "the search file another study name",
            code="all-trials-failed",
        )
