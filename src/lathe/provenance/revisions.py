"""What a commit, a branch, an experiment of DVC or the workspace holds, read without checking anything out."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.text import did_you_mean
from lathe.provenance.dvc_lock import cached_file, cached_listing, locked_stages

if TYPE_CHECKING:
    from dvc.repo import Repo

WORKSPACE = "workspace"


@dataclass(frozen=True)
class Experiment:
    """One of DVC's experiments that has run: its name, its commit, and the commit that it started from.

    `message` is the first line that its commit says of it.
    """

    name: str
    commit: str
    baseline: str
    message: str

    @property
    def ref(self) -> str:
        """The name by which Git keeps it."""
        return f"refs/exps/{self.baseline[:2]}/{self.baseline[2:]}/{self.name}"


@dataclass(frozen=True)
class Revision:
    """A state of the repository by the name it was asked for; `commit` is None for the workspace."""

    name: str
    commit: str | None

    def text(self, path: str) -> str | None:
        """Return a file that Git keeps; None where there is none."""
        if self.commit is None:
            file = paths.ROOT / path
            return file.read_text(encoding="utf-8") if file.is_file() else None
        found = git("show", f"{self.commit}:./{path}", unless_it_fails=True)
        return None if found is None else found.decode()

    def json(self, path: str) -> Any:
        """Return what a JSON file holds; None where there is none."""
        text = self.text(path)
        return None if text is None else json.loads(text)

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """params.yaml, and the two presets that it selects as `models` and `datasets`."""
        tree, presets = (YAML(typ="safe").load(self._kept(file.name)) for file in (paths.PARAMS, paths.PRESETS))
        selected = {
            table: presets[table].get(tree[key]) for key, table in (("model", "models"), ("dataset", "datasets"))
        }
        return {**tree, **selected}

    @cached_property
    def stages(self) -> dict[str, Any]:
        """The stages of dvc.lock by their names."""
        return locked_stages(self._kept("dvc.lock"))

    def out(self, path: str) -> str | None:
        """Return DVC's hash of an output; None where dvc.lock has none."""
        # The last one: of stages that dvc.yaml no longer has, dvc.lock keeps what it held.
        found = [out["md5"] for stage in self.stages.values() for out in stage.get("outs", []) if out["path"] == path]
        return found[-1] if found else None

    def cached(self, repo: "Repo", folder: str, name: str) -> Path | None:
        """Return a file of an output folder in DVC's cache; None where it is not there."""
        md5 = self.out(folder)
        listing = cached_listing(repo, md5) if md5 else None
        if not listing or name not in listing:
            return None
        file = cached_file(repo, listing[name])
        return file if file.is_file() else None

    @cached_property
    def parent(self) -> "Revision | None":
        """What this state was made from: the commit before it, or for the workspace the last one."""
        asked = "HEAD" if self.commit is None else f"{self.commit}^"
        found = git("rev-parse", "--verify", "--quiet", asked, unless_it_fails=True)
        return Revision(asked, found.decode().strip()) if found else None

    def _kept(self, path: str) -> str:
        text = self.text(path)
        if text is None:
            raise InputError(f"{self.name}: holds no {path}; name a commit or an experiment of this pipeline")
        return text


def find(name: str) -> Revision:
    """Return the state of that name: `workspace`, whatever Git takes for a commit, or an experiment.

    Of experiments with one name that of the last commit counts. Raises InputError where there is none, or several.
    """
    if name == WORKSPACE:
        return Revision(name, None)
    if found := git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}", unless_it_fails=True):
        return Revision(name, found.decode().strip())
    known = experiments()
    named = [experiment for experiment in known if experiment.name == name]
    last = head()
    of_head = [experiment for experiment in named if experiment.baseline == last]
    if chosen := of_head or named[:1] * (len(named) == 1):
        return Revision(name, chosen[0].commit)
    if named:
        commits = ", ".join(f"{each.commit[:10]} on {each.baseline[:10]}" for each in named)
        raise InputError(f"{name}: several experiments have this name ({commits}); name one by its commit")
    branches = git("for-each-ref", "--format=%(refname:short)", "refs/heads").decode().split()
    near = did_you_mean(name, [WORKSPACE, *branches, *dict.fromkeys(each.name for each in known)])
    raise InputError(f"{name}: no such experiment, commit or branch; {near}")


def experiments(root: Path | None = None) -> list[Experiment]:
    """Return DVC's experiments of a checkout (by default this one) that have run, the newest first."""
    found = []
    form = "--format=%(objectname) %(refname) %(contents:subject)"
    command = ("for-each-ref", "--sort=-committerdate", form, "refs/exps")
    listed = git(*command, root=root, unless_it_fails=True) or b""  # without a repository there are none
    for line in listed.decode().splitlines():
        commit, ref, message = line.split(" ", 2)
        parts = ref.split("/")  # refs/exps/<first two of the baseline>/<the rest>/<name>
        if len(parts) == 5 and len(parts[2]) == 2 and len(parts[3]) > 30:
            found.append(Experiment(parts[4], commit, parts[2] + parts[3], message))
    return found


def head() -> str | None:
    """Return the last commit; None where there is none."""
    found = git("rev-parse", "--verify", "--quiet", "HEAD", unless_it_fails=True)
    return found.decode().strip() if found else None


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every value by its dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def git(*arguments: str, root: Path | None = None, unless_it_fails: bool = False) -> Any:
    """Return what Git prints; with `unless_it_fails`, None where it fails. Raises InputError where it must not."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root or paths.ROOT, capture_output=True, check=False)
    except FileNotFoundError:
        raise InputError("git is not installed; install it: the pipeline lives in a Git repository") from None
    if done.returncode == 0:
        return done.stdout
    if unless_it_fails:
        return None
    reason = (done.stderr.decode(errors="replace").strip() or "it failed").splitlines()[0]
    remedy = "run this in a clone of the repository" if "not a git repository" in reason else "see `git status`"
    raise InputError(f"git {arguments[0]}: {reason}; {remedy}")
