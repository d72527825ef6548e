"""Recipes as DVC's experiments: run one, queue a sweep of it, list what came of them."""

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence, Set
from typing import NoReturn

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.config import overrides
from lathe.config.artifacts import UNQUANTIZED
from lathe.experiments import preflight, recipes
from lathe.provenance import revisions
from lathe.provenance.revisions import Experiment, Revision

WIDTH = 100  # columns of the list of recipes


def run(recipe: str, further: Sequence[str], *, name: str | None, queue: bool, temp: bool, force: bool) -> NoReturn:
    """Become `dvc exp run -n NAME` with the overrides of a recipe and `further` ones, if all of them are right.

    `name` is the experiment's; None: the recipe's. Raises InputError where an override is wrong, in any run of a
    sweep, or where an experiment of that name exists.
    """
    if queue and temp:
        raise InputError("--queue and --temp: take one of them; queued experiments are temporary ones, started later")
    arguments = recipes.find(recipe).arguments(list(further))
    name = name or recipe
    runs = overrides.combinations(arguments)
    if len(runs) > 1 and not queue:
        raise InputError(f"-S {' '.join(further)}: that is a sweep of {len(runs)} runs; add --queue")
    for each in runs:
        overrides.applied(each)
    names = [name] if len(runs) == 1 else [f"{name}-{number}" for number in range(1, len(runs) + 1)]
    _make_room(names, queue=queue, force=force)
    for line in _notices({overrides.key_of(each) for each in arguments}, apart=queue or temp):
        sys.stderr.write(f"{line}\n")
    options = ["--queue"] * queue + ["--temp"] * temp
    command = ["exp", "run", "--name", name, *options, *(word for each in arguments for word in ("-S", each))]
    sys.stderr.write(f"dvc {shlex.join(command)}\n")
    sys.stderr.flush()
    os.chdir(paths.ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "dvc", *command])


def listing() -> Iterator[str]:
    """Yield each recipe with its description, and below it its experiments: validation score, interval, commit."""
    known = revisions.experiments()
    width = max((len(name) for name in recipes.names()), default=0)
    for name in recipes.names():
        try:
            said = recipes.find(name).recipe.description
        except InputError as error:
            said = str(error).splitlines()[0]
        heading, margin = f"{name:<{width}}  ", " " * (width + 2)
        yield from textwrap.wrap(said, WIDTH, initial_indent=heading, subsequent_indent=margin, break_long_words=False)
        for experiment in _of(name, known):
            yield f"{'':<{width}}    {experiment.name} ({experiment.commit[:10]}): {_result(experiment)}"


def _of(name: str, known: Sequence[Experiment]) -> list[Experiment]:
    """The newest experiment of a recipe's name, and of each run of a sweep."""
    newest: dict[str, Experiment] = {}
    for experiment in known:
        if re.fullmatch(rf"{re.escape(name)}(-\d+)?", experiment.name):
            newest.setdefault(experiment.name, experiment)
    return sorted(newest.values(), key=lambda experiment: (len(experiment.name), experiment.name))


def _result(experiment: Experiment) -> str:
    from lathe.evaluation.best_artifact import choose_best_artifact

    revision = Revision(experiment.name, experiment.commit)
    metric = revision.parameters["evaluate"]["primary_metric"]
    report = revision.json("metrics/evaluate/validation.json") or {}
    candidates = [name for name in report if name not in UNQUANTIZED and metric in report[name]]
    if not candidates:
        return f"has no {metric}"
    chosen = choose_best_artifact(report, candidates, metric)
    ends = [(each["low"], each["high"]) for each in report[chosen]["intervals"] if each["metric"] == metric]
    interval = f" [{ends[0][0]:.4g}, {ends[0][1]:.4g}]" if ends else ""
    value = report[chosen][metric]
    return f"{metric} {'none' if value is None else f'{value:.4g}'}{interval} on validation, {chosen}"


def _make_room(names: Sequence[str], *, queue: bool, force: bool) -> None:
    """Refuse names that are taken, or with `force` take them: DVC would find out after the run."""
    head = revisions.head()
    taken = [each for each in revisions.experiments() if each.name in names and each.baseline == head]
    if waiting := sorted(set(names) & set(_queued())) if queue else []:
        raise InputError(
            f"{', '.join(waiting)}: already in the queue; `dvc queue remove {' '.join(waiting)}` takes it out"
        )
    if taken and not force:
        shown = ", ".join(f"{each.name} ({each.commit[:10]})" for each in taken)
        raise InputError(
            f"{shown}: has been run from this commit; --name NAME for another beside it, --force in its place"
        )
    for each in taken:
        revisions.git("update-ref", "-d", each.ref)
        sys.stderr.write(f"{each.name} was {each.commit}; `git update-ref {each.ref} {each.commit}` brings it back\n")


def _queued() -> list[str]:
    from dvc.repo import Repo

    with Repo(str(paths.ROOT)) as repo:
        queue = repo.experiments.celery_queue
        return [entry.name for entry in (*queue.iter_queued(), *queue.iter_active()) if entry.name]


def _notices(taken: Set[str], *, apart: bool) -> Iterator[str]:
    """What of the workspace goes into the run beside the keys that are `taken`."""
    if apart:
        yield from preflight.look().lines()
        return
    # A preset's own keys are those of the name that is taken.
    tables = {table for key, table in (("model", "models"), ("dataset", "datasets")) if key in taken}
    changes = {
        key: values
        for key, values in preflight.changed_parameters().items()
        if key not in taken and key.split(".")[0] not in tables
    }
    if changes:
        shown = ", ".join(f"{key} {then} -> {now}" for key, (then, now) in changes.items())
        yield f"params.yaml is not as committed in what the recipe leaves to it: {shown}"
