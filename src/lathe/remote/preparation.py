"""Before a run is sent to another machine: its jobs by a recipe and overrides, and whether the commit has it all."""

import re
from collections.abc import Iterator, Sequence

from lathe.common import paths
from lathe.common.dvc_api import open_repository
from lathe.common.errors import InputError
from lathe.common.git import find_head
from lathe.config.overrides import apply_overrides, check_keys, expand_sweep
from lathe.experiments import preflight
from lathe.experiments.recipes import load_main_recipe
from lathe.provenance.revisions import list_experiments
from lathe.remote.job import Job, find_experiment

SHOWN = 10  # files


def build_jobs(recipe: str, further: Sequence[str], name: str, price_per_hour: float | None) -> list[Job]:
    """Return the jobs of a recipe with further overrides from HEAD: one, or one for each run of a sweep.

    Jobs of a sweep that have been done before are among them. Raises InputError if an override is invalid in any of
    them, if another experiment has the name of one, or if the commit has not got what the workspace has.
    """
    loaded = load_main_recipe(recipe)
    check_keys(further)
    check_name(name)
    runs = expand_sweep(loaded.build_overrides(further))
    for run in runs:
        apply_overrides(run)
    commit = require_committed()
    names = [name] if len(runs) == 1 else [f"{name}-{number}" for number in range(1, len(runs) + 1)]
    jobs = [Job(one, commit, run, price_per_hour=price_per_hour) for one, run in zip(names, runs, strict=True)]
    _refuse_taken(jobs)
    return jobs


def _refuse_taken(jobs: Sequence[Job]) -> None:
    """Raise InputError if there are experiments of these names that other jobs made, or if all jobs are done."""
    done = [job.name for job in jobs if find_experiment(job)]
    known = {one.name for one in list_experiments() if one.baseline == jobs[0].commit}
    taken = [job.name for job in jobs if job.name in known and job.name not in done]
    if taken or len(done) == len(jobs):
        shown = taken or done
        raise InputError(
            f"{', '.join(shown)}: has been run from this commit; --name NAME for another beside it, or "
            f"`dvc exp remove {' '.join(shown)}` first",
            code="experiment-exists",
        )


def check_name(name: str) -> None:
    """Raise InputError if something cannot have that name on every machine."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise InputError(
            f"--name {name!r}: letters, digits, - and _ alone, and a letter or digit first; take another",
            code="invalid-name",
        )


def require_committed() -> str:
    """Return HEAD. Raises InputError with a line for each reason why a run of it would lack what is here."""
    if (head := find_head()) is None:
        raise InputError("the repository has no commit; `git commit` first", code="no-commit")
    if problems := list(_find_uncommitted()):
        raise InputError("\n".join(problems), code="not-committed")
    return head


def _find_uncommitted() -> Iterator[str]:
    changes = preflight.find_changes()
    if changes.changed:
        yield (
            f"not committed: {_join(changes.changed)}; another machine gets the last commit alone: `git commit` them, "
            "or `lathe reset` puts parameters, metrics and outputs back"
        )
    if changes.missed:
        yield (
            f"not in Git, though a stage may read it: {_join(changes.missed)}; `dvc add` data and models, `git add` "
            "all else, and commit"
        )
    with open_repository(paths.ROOT) as repo:
        if changed := repo.changed_sources():
            yield f"not as DVC keeps it: {_join(changed)}; `dvc add` it, and commit"


def _join(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
