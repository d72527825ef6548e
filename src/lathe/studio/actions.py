"""Commands behind the buttons: each function checks its input and returns the words that a person would type.

The page shows those words, and the same words are started.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.git import run_git, try_git
from lathe.common.workspace_lock import refuse_beside_holder
from lathe.config.overrides import apply_overrides, format_override
from lathe.experiments.recipes import load_main_recipe
from lathe.provenance.revisions import find_revision, list_experiments
from lathe.studio.child_process import run_for_lines

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
LONGEST_LISTING_SECONDS = 60.0  # of a remote's experiments
FEWEST_TRIALS, MOST_TRIALS, MOST_JOBS = 5, 100, 16

Mode = Literal["now", "queue", "temp"]


def check_name(name: str, what: str) -> str:
    """Return a name that can stand in a command. Raises InputError."""
    if not NAME.fullmatch(name):
        raise InputError(
            f"{what} {name[:100]!r}: must be letters, digits, dots, hyphens and underscores, and begin with a letter "
            "or digit; choose another",
            code="invalid-name",
        )
    return name


def build_run(recipe: str, name: str | None, overrides: Sequence[str], mode: Mode, *, force: bool = False) -> list[str]:
    """Return the command that runs a recipe. Raises InputError if recipe, name or an override cannot be used."""
    loaded = load_main_recipe(recipe)
    apply_overrides(loaded.build_overrides(overrides))
    words = ["lathe", "run", recipe]
    if name and name != recipe:
        words += ["--name", check_name(name, "name")]
    words += [word for override in overrides for word in ("-S", override)]
    return words + {"now": [], "queue": ["--queue"], "temp": ["--temp"]}[mode] + ["--force"] * force


def write_overrides(values: Mapping[str, Any]) -> list[str]:
    """Return the overrides that set keys to values."""
    return [format_override(key, value) for key, value in values.items()]


def build_search(file: str, n_trials: int, jobs: int, overrides: Sequence[str]) -> list[str]:
    """Return the command that runs a search. Raises InputError for a file or a number that cannot be used."""
    if not FEWEST_TRIALS <= n_trials <= MOST_TRIALS:
        raise InputError(
            f"n_trials {n_trials}: must be from {FEWEST_TRIALS} to {MOST_TRIALS}; give another", code="n-trials"
        )
    if not 1 <= jobs <= MOST_JOBS:
        raise InputError(f"jobs {jobs}: must be from 1 to {MOST_JOBS}; give another", code="jobs")
    apply_overrides(overrides)
    words = ["lathe", "search", file, "--n-trials", str(n_trials), *(["--jobs", str(jobs)] if jobs > 1 else [])]
    return words + [word for override in overrides for word in ("-S", override)]


def build_experiment_action(action: str, name: str, target: str = "") -> list[str]:
    """Return DVC's command for an experiment: apply, branch (`target`: its name), push or pull (a remote).

    Raises InputError if there is no such experiment, or if `apply` would lose changes.
    """
    check_name(name, "experiment")
    if action == "pull":
        return ["dvc", "exp", "pull", check_remote(target), name]
    if name not in {experiment.name for experiment in list_experiments()}:
        raise InputError(f"{name}: no such experiment here; see `lathe results`", code="no-such-experiment")
    if action == "apply":
        refuse_beside_holder(f"dvc exp apply {name}")
        commit = find_revision(name).commit
        # What is in the workspace as the experiment has it, because it has just run there, is not lost.
        changed = [_list_changes("HEAD"), _list_changes(commit or "HEAD")]
        if lost := sorted(changed[0] & changed[1]):
            raise InputError(
                f"{name}: DVC would put the whole of it over what is not committed, which is {', '.join(lost[:8])}; "
                "commit it, or `git stash`",
                code="uncommitted-changes",
            )
        return ["dvc", "exp", "apply", name if commit is None else commit[:12]]
    if action == "branch":
        return ["dvc", "exp", "branch", name, check_name(target or f"{name}-branch", "branch")]
    if action == "push":
        return ["dvc", "exp", "push", check_remote(target), name]
    raise InputError(f"{action[:40]!r}: no such action; known: apply, branch, push, pull", code="no-such-action")


def list_remotes() -> list[str]:
    """Return the names of the repository's Git remotes."""
    return (try_git("remote") or b"").decode().split()


def check_remote(name: str) -> str:
    """Return the name of a Git remote. Raises InputError if there is none of this name."""
    if name not in list_remotes():
        raise InputError(
            f"remote {name[:100]!r}: the repository has none of this name; `git remote add` makes one",
            code="no-such-remote",
        )
    return name


def list_remote_experiments(remote: str) -> list[str]:
    """Return the names of the experiments that a Git remote has. Raises InputError if it cannot be reached."""
    words = ["dvc", "exp", "list", check_remote(remote), "--all-commits", "--name-only"]
    return sorted(
        {line.strip() for line in run_for_lines(words, LONGEST_LISTING_SECONDS) if NAME.fullmatch(line.strip())}
    )


def _list_changes(commit: str) -> set[str]:
    """Return the files that are not as in a commit."""
    return set(run_git("diff", "--name-only", "--no-renames", commit).decode().splitlines())


def resolve_inside(text: str, folder: Path = paths.ROOT, *, suffixes: tuple[str, ...] = ()) -> Path:
    """Return a file of the checkout by its path from the top. Raises InputError if it is not there, or elsewhere."""
    if "\0" in text or not text:
        raise InputError("the path is empty or has a NUL; name a file of the checkout", code="no-such-file")
    file = (paths.ROOT / text).absolute()
    inside = Path(file.parent.resolve()) / file.name
    # Files of DVC may be links into its cache; a folder on the way may lead nowhere else.
    if ".." in Path(text).parts or not inside.is_relative_to(folder.resolve()):
        raise InputError(f"{text[:200]!r}: is not in {_show(folder)}; name a file there", code="outside-checkout")
    if suffixes and not text.lower().endswith(suffixes):
        raise InputError(f"{text[:200]!r}: must end with {' or '.join(suffixes)}; name another", code="other-suffix")
    if not file.exists():
        raise InputError(f"{text[:200]!r}: no such file; see the list", code="no-such-file")
    if file.is_symlink() and not _is_kept_inside(file):
        raise InputError(f"{text[:200]!r}: is a link out of the checkout; copy the file", code="outside-checkout")
    return file


def _is_kept_inside(file: Path) -> bool:
    """Tell whether a link leads into the checkout, or into DVC's cache, wherever that is."""
    from lathe.common.dvc_api import read_config

    target = file.resolve()
    cache = Path(read_config(paths.ROOT).get("cache", {}).get("dir") or paths.MAIN / ".dvc/cache")
    return target.is_relative_to(paths.ROOT.resolve()) or target.is_relative_to((paths.ROOT / ".dvc" / cache).resolve())


def _show(folder: Path) -> str:
    return "the checkout" if folder == paths.ROOT else f"{folder.relative_to(paths.ROOT)}/"
