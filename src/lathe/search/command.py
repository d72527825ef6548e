"""`python -m lathe search`: from the command line, the environment and a file to a search and what it found."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable

from lathe import paths
from lathe.errors import InputError
from lathe.params import Config
from lathe.search import plan as plans
from lathe.search import results, storage, trial
from lathe.search import run as runs
from lathe.search.study import Study

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace, overridden: Callable[[list[str]], Config]) -> None:
    """Search, or apply what was found; `overridden` returns the parameters after overrides as of `-S`.

    Raises InputError for whatever of file, options and environment cannot be used.
    """
    for told in (".* is experimental", "PedAnovaImportanceEvaluator computes"):  # Optuna's to whoever writes the code
        warnings.filterwarnings("ignore", message=told)
    if not args.file.is_file():
        raise InputError(f"{args.file}: no such file; name one of experiments/search")
    for option, number in (("--n-trials", args.n_trials), ("--timeout", args.timeout), ("--jobs", args.jobs)):
        if number is not None and number <= 0:
            raise InputError(f"{option} {number:g}: must be above 0")
    environment = plans.environment(os.environ)
    # Of one key on the command line and in the environment the former counts.
    named = [text.partition("=")[0] for text in args.overrides]
    taken = [text for text in environment.overrides if text.partition("=")[0] not in named]
    overrides = [*taken, *args.overrides]
    params = overridden(overrides).params
    file = args.file.resolve()
    shown = file.relative_to(paths.ROOT) if file.is_relative_to(paths.ROOT) else file
    plan = plans.read(file, params.model_dump(), str(shown))
    fixed = [key for text in overrides if (key := text.partition("=")[0]) in plan.space]
    if overrides:
        searched = f" (not searched: {', '.join(fixed)})" if fixed else ""
        logger.info("every trial runs with %s%s", " ".join(f"-S {text}" for text in overrides), searched)
    if fixed:
        plan = plan.without(fixed)
    plan.check(params, str(shown))
    url = args.storage or os.environ.get(storage.VARIABLE) or None

    if args.apply is not None:
        _, snapshot = trial.snapshot()
        study = runs.open_study(plan, params, overrides=overrides, snapshot=snapshot, url=url)
        name = results.apply(study, args.apply or None)
        logger.info("%s is in the workspace; `git diff` shows what it changed", name)
        return
    study = runs.search(
        plan,
        params,
        overrides=overrides,
        environment=environment,
        n_trials=args.n_trials or environment.n_trials or plan.n_trials,
        jobs=args.jobs,
        timeout_seconds=args.timeout or plan.timeout_seconds,
        url=url,
    )
    folder = results.FOLDER / plan.study
    results.write(study, folder)
    _tell(study)
    logger.info("pictures and study.json are in %s", folder.relative_to(paths.ROOT))


def _tell(study: Study) -> None:
    failed = sum(results.REASON in one.user_attrs for one in study.trials())
    print(f"{study.finished()} trials ended, {failed} of them failed")  # noqa: T201
    for one in results.best(study):
        scores = ", ".join(
            f"{objective.metric} {score:g}" for objective, score in zip(study.plan.objectives, one.values, strict=True)
        )
        values = " ".join(f"{key}={value}" for key, value in one.params.items())
        sys.stdout.write(f"best: {results.name_of(study, one)}  {scores}  {values}\n")
