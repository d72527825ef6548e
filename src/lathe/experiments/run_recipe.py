"""Recipes as DVC experiments: one is run, or a sweep of it queued; all are listed with their results."""

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lathe.common import paths
from lathe.common.dvc_api import open_repository
from lathe.common.errors import InputError
from lathe.common.git import find_head, run_git
from lathe.common.text import summarize_error
from lathe.common.workspace_lock import hold_workspace, refuse_beside_holder
from lathe.config.overrides import apply_overrides, check_keys, compare_with_params, expand_sweep, read_key
from lathe.config.pipelines import CLASSIFIER, MAIN, Pipeline
from lathe.experiments import preflight
from lathe.experiments.dvc_command import run_dvc
from lathe.experiments.interrupted import refuse_detached_head
from lathe.experiments.recipes import list_recipes, load_recipe
from lathe.provenance.damaged_cache import remove_damaged_objects
from lathe.provenance.revisions import list_experiments

if TYPE_CHECKING:
    from lathe.experiments.results import RunResult

WIDTH = 100  # columns of the list of recipes


@dataclass(frozen=True)
class Options:
    """Options of `lathe run`; `name` is that of the experiment, None: the recipe's."""

    name: str | None = None
    queue: bool = False
    temp: bool = False
    force: bool = False
    keep: bool = False
    print_command: bool = False

    @property
    def in_workspace(self) -> bool:
        """Tell whether the run works in the workspace, and not in a checkout of its own."""
        return not (self.queue or self.temp)


def run(recipe: str, further: Sequence[str], options: Options) -> int:
    """Run a recipe by `dvc exp run -n NAME` with its overrides and `further` ones, if all are valid; return its code.

    Raises InputError if an override is invalid in any run of a sweep, if an experiment of that name exists, if
    params.yaml has changes that the recipe would leave in it, and if another command works in the workspace.
    """
    if options.queue and options.temp:
        raise InputError(
            "--queue and --temp: take one of them; queued experiments are temporary ones, started later",
            code="exclusive-options",
        )
    loaded = load_recipe(recipe)
    pipeline = loaded.pipeline
    if pipeline is not MAIN and (options.temp or options.queue):
        # DVC copies the Git repository for these, and would check out the classifier's outputs alone in the copy.
        raise InputError(
            f"{recipe}: a run of the classifier cannot be made in a copy, which would lack data/local and "
            "models/local; leave --temp and --queue out",
            code="classifier-in-a-copy",
        )
    check_keys(further, pipeline)
    overrides = loaded.build_overrides(further)
    name = options.name or recipe
    runs = expand_sweep(overrides, pipeline)
    if len(runs) > 1 and not options.queue:
        raise InputError(
            f"-S {' '.join(further)}: that is a sweep of {len(runs)} runs; add --queue", code="sweep-without-queue"
        )
    configs = [apply_overrides(run_overrides, pipeline) for run_overrides in runs]
    separate = ["--queue"] * options.queue + ["--temp"] * options.temp
    sets = [word for override in overrides for word in ("-S", override)]
    command = [*pipeline.dvc_options, "exp", "run", "--name", name, *separate, *sets]
    if options.print_command:
        sys.stdout.write(f"dvc {shlex.join(command)}\n")
        return 0
    with _keep_others_out(f"lathe run {recipe}", options):
        refuse_detached_head()
        remove_damaged_objects()
        if not options.keep:
            _refuse_left_over(recipe, {read_key(override) for override in overrides}, pipeline)
        names = [name] if len(runs) == 1 else [f"{name}-{number}" for number in range(1, len(runs) + 1)]
        _free_names(names, queue=options.queue, force=options.force)
        lines = list(describe_changes(configs, pipeline))
        if not options.in_workspace:
            lines += preflight.find_changes().describe(parameters=options.keep)
        sys.stderr.write(f"{name}: {'; '.join(lines[:1])}\n" + "".join(f"{line}\n" for line in lines[1:]))
        os.chdir(paths.ROOT)
        return run_dvc(command)


def is_of_classifier(recipe: str) -> bool:
    """Tell whether a recipe is one of the classifier's pipeline."""
    return load_recipe(recipe).pipeline is not MAIN


@contextmanager
def _keep_others_out(command: str, options: Options) -> Iterator[None]:
    """Hold the workspace for as long as the command needs it. Raises InputError where another command holds it."""
    if options.temp:
        # DVC puts the workspace into Git's stash to make the temporary checkout, so that a stage that starts there in
        # that moment would read other parameters. From then on the workspace is free.
        refuse_beside_holder(f"{command} --temp")
        yield
    else:
        with hold_workspace(command):
            yield


def describe_changes(configs: Sequence[Any], pipeline: Pipeline = MAIN) -> Iterator[str]:
    """Yield how many keys of params.yaml the runs change, and a line for each with its value there and in the runs."""
    changes: dict[str, list[Any]] = {}
    for config in configs:
        for key, (then, now) in compare_with_params(config, pipeline).items():
            values = changes.setdefault(key, [then])
            if now not in values[1:]:
                values.append(now)
    if not changes:
        yield f"every value is as in {pipeline.params_name}"
        return
    yield f"{len(changes)} {'value is' if len(changes) == 1 else 'values are'} not as in {pipeline.params_name}:"
    yield from preflight.format_changes(changes)


def list_results() -> Iterator[str]:
    """Yield each recipe with its description, and below it its experiments: validation score, interval, commit.

    Of the classifier's recipes the description alone: `lathe compare` shows their scores.
    """
    from lathe.experiments.results import read_experiments

    known = read_experiments()
    names = [*list_recipes(), *list_recipes(CLASSIFIER)]
    width = max(map(len, names), default=0)
    for name in names:
        try:
            text = load_recipe(name).recipe.description
        except InputError as error:
            text = summarize_error(error)
        heading, margin = f"{name:<{width}}  ", " " * (width + 2)
        yield from textwrap.wrap(text, WIDTH, initial_indent=heading, subsequent_indent=margin, break_long_words=False)
        for result in _select_newest(name, known):
            yield f"{'':<{width}}    {result.name} ({str(result.commit)[:10]}): {_format_score(result)}"


def _select_newest(name: str, known: Sequence["RunResult"]) -> list["RunResult"]:
    """Return the newest experiment of a recipe's name, and of each run of a sweep."""
    newest: dict[str, RunResult] = {}
    for result in known:
        if re.fullmatch(rf"{re.escape(name)}(-\d+)?", result.name):
            newest.setdefault(result.name, result)
    return sorted(newest.values(), key=lambda result: (len(result.name), result.name))


def _format_score(result: "RunResult") -> str:
    if result.artifact is None:
        return f"has no {result.metric}"
    interval = "" if result.low is None else f" [{result.low:.4g}, {result.high:.4g}]"
    score = "none" if result.score is None else f"{result.score:.4g}"
    return f"{result.metric} {score}{interval} on validation, {result.artifact}"


def _free_names(names: Sequence[str], *, queue: bool, force: bool) -> None:
    """Refuse names that are taken, or free them with `force`: DVC would refuse them only after the run."""
    head = find_head()
    taken = [
        experiment for experiment in list_experiments() if experiment.name in names and experiment.baseline == head
    ]
    if waiting := sorted(set(names) & set(_list_queue())) if queue else []:
        raise InputError(
            f"{', '.join(waiting)}: already in the queue; `dvc queue remove {' '.join(waiting)}` takes it out",
            code="experiment-queued",
        )
    if taken and not force:
        shown = ", ".join(f"{experiment.name} ({experiment.commit[:10]})" for experiment in taken)
        raise InputError(
            f"{shown}: has been run from this commit; --name NAME for another beside it, --force in its place",
            code="experiment-exists",
        )
    for experiment in taken:
        run_git("update-ref", "-d", experiment.ref)
        sys.stderr.write(
            f"{experiment.name} was {experiment.commit}; "
            f"`git update-ref {experiment.ref} {experiment.commit}` brings it back\n"
        )


def _list_queue() -> list[str]:
    with open_repository(paths.ROOT) as repo:
        return repo.queued_experiments()


def _refuse_left_over(recipe: str, overridden: Set[str], pipeline: Pipeline) -> None:
    """Raise InputError if params.yaml is not as committed in keys that the run does not set."""
    changes = {key: values for key, values in preflight.changed_parameters(pipeline).items() if key not in overridden}
    if changes:
        keys = "1 key" if len(changes) == 1 else f"{len(changes)} keys"
        lines = "\n".join(preflight.format_changes(changes, shown=len(changes)))
        raise InputError(
            f"{recipe}: {pipeline.params_name} is not as committed in {keys} that the recipe does not set; run with "
            f"--keep to keep that, or `lathe reset` first, which brings the committed values and outputs back:\n"
            f"{lines}",
            code="left-over-parameters",
        )
