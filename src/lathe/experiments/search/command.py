"""`python -m lathe search`: from the command line, the environment and a file to a search and what it found."""

import argparse
import logging
import os
import sys
import warnings

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.config import overrides
from lathe.config.load import load
from lathe.config.yaml_files import read_yaml
from lathe.experiments.search import environment, results, run_search, search_file, storage
from lathe.experiments.search.study import REASON, Study

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> None:
    """Search, or apply what was found.

    Raises InputError for whatever of file, options and environment cannot be used.
    """
    # Optuna's, to whoever writes the code.
    for message in (".* is experimental", "PedAnovaImportanceEvaluator computes"):
        warnings.filterwarnings("ignore", message=message)
    if not args.file.is_file():
        raise InputError(f"{args.file}: no such file; name one of experiments/search")
    for option, number in (("--n-trials", args.n_trials), ("--timeout", args.timeout), ("--jobs", args.jobs)):
        if number is not None and not number > 0:
            raise InputError(f"{option} {number:g}: must be above 0")
    models = list(read_yaml(paths.PRESETS)["models"])
    told = environment.read(os.environ, load().params.model_dump(), models)
    # Of one key on the command line and in the environment the former counts.
    named = set(map(overrides.read_key, args.overrides))
    fixed = [*(text for text in told.overrides if overrides.read_key(text) not in named), *args.overrides]
    params = overrides.apply_overrides(fixed).params
    file = args.file.resolve()
    name = str(file.relative_to(paths.ROOT) if file.is_relative_to(paths.ROOT) else file)
    chosen = search_file.read(file, params.model_dump(), name)
    unsearched = [key for key in map(overrides.read_key, fixed) if key in chosen.space]
    if fixed:
        added = f" (not searched: {', '.join(unsearched)})" if unsearched else ""
        logger.info("every trial runs with %s%s", " ".join(f"-S {text}" for text in fixed), added)
    if unsearched:
        chosen = chosen.without(unsearched)
    chosen.check(params, name)
    url = args.storage or os.environ.get(storage.VARIABLE) or None

    with storage.told_when_away(url):
        if args.apply is not None:
            study = run_search.opened(chosen, params, url)
            applied = results.apply(study, args.apply or None)
            logger.info("%s is in the workspace; `git diff` shows what it changed", applied)
            return
        study = run_search.search(
            chosen,
            params,
            fixed=fixed,
            told=told,
            n_trials=args.n_trials or told.n_trials or chosen.n_trials,
            jobs=args.jobs,
            timeout_seconds=args.timeout or chosen.timeout_seconds,
            url=url,
        )
        folder = results.FOLDER / chosen.study
        results.write(study, folder)
        logger.info("pictures and study.json are in %s", folder.relative_to(paths.ROOT))
        _tell(study)


def _tell(study: Study) -> None:
    reasons = [one.user_attrs[REASON] for one in study.trials() if REASON in one.user_attrs]
    sys.stdout.write(f"{study.finished()} trials ended, {len(reasons)} of them failed\n")
    for one in results.best(study):
        scores = ", ".join(
            f"{metric} {score:g}" for metric, score in zip(study.plan.directions, one.values, strict=True)
        )
        values = " ".join(f"{key}={value}" for key, value in one.params.items())
        sys.stdout.write(f"best: {results.name_of(study, one)}  {scores}  {values}\n")
    if reasons and len(reasons) == study.finished():
        raise InputError(
            f"study {study.plan.study}: no trial has scores; the last one failed: {reasons[-1]}; mend that, and give "
            "the search file another study name"
        )
