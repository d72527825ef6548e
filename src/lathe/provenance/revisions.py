"""Revisions: what a commit, a branch, an experiment or the workspace holds, read without a checkout."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lathe.common import paths
from lathe.common.dvc_api import DvcRepository
from lathe.common.errors import InputError
from lathe.common.git import find_head, read_line, run_git, try_git
from lathe.common.json_files import parse_json
from lathe.common.metric_files import unwrap_list
from lathe.common.text import did_you_mean
from lathe.config.yaml_files import parse_yaml
from lathe.provenance.dvc_lock import read_listing, read_locked_stages

WORKSPACE = "workspace"
REMEDY = "name another experiment or commit, or remove it with `dvc exp remove`"


@dataclass(frozen=True)
class Experiment:
    """A DVC experiment that has run: its name, its commit, the commit it started from, and its commit's subject."""

    name: str
    commit: str
    baseline: str
    message: str

    @property
    def ref(self) -> str:
        """The Git reference of the experiment."""
        return f"refs/exps/{self.baseline[:2]}/{self.baseline[2:]}/{self.name}"


@dataclass(frozen=True)
class Revision:
    """A state of the repository, by the name that the user gave; `commit` is None for the workspace."""

    name: str
    commit: str | None

    def read_text(self, path: str) -> str | None:
        """Return a file that Git keeps; None if there is none."""
        if self.commit is None:
            file = paths.ROOT / path
            return file.read_text(encoding="utf-8") if file.is_file() else None
        content = try_git("show", f"{self.commit}:./{path}")
        return None if content is None else content.decode(errors="replace")

    def read_json(self, path: str) -> Any:
        """Return the content of a JSON file, without the list around a report; None if there is none."""
        text = self.read_text(path)
        return None if text is None else unwrap_list(parse_json(text, f"{self.name}: {path}", remedy=REMEDY))

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """params.yaml, and the two presets that it selects as `models` and `datasets`."""
        tree = self._read_yaml(paths.PARAMS.name)
        return self.select_presets(tree, tree["model"])

    @cached_property
    def stages(self) -> dict[str, Any]:
        """The stages of dvc.lock by their names."""
        return read_locked_stages(self._require_text("dvc.lock"))

    def find_output_hash(self, path: str) -> str | None:
        """Return DVC's hash of an output; None if dvc.lock has none."""
        # The last one: dvc.lock keeps entries of stages that dvc.yaml no longer has.
        hashes = [out["md5"] for stage in self.stages.values() for out in stage.get("outs", []) if out["path"] == path]
        return hashes[-1] if hashes else None

    def find_cached_file(self, repo: DvcRepository, folder: str, name: str) -> Path | None:
        """Return a file of an output folder in DVC's cache; None if the cache has not got it."""
        md5 = self.find_output_hash(folder)
        listing = read_listing(repo, md5) if md5 else None
        if not listing or name not in listing:
            return None
        file = repo.cached_file(listing[name])
        return file if file.is_file() else None

    @cached_property
    def parent(self) -> "Revision | None":
        """The commit before this one; for the workspace the last commit."""
        name = "HEAD" if self.commit is None else f"{self.commit}^"
        commit = read_line("rev-parse", "--verify", "--quiet", name)
        return Revision(name, commit) if commit else None

    def select_presets(self, tree: dict[str, Any], model: str) -> dict[str, Any]:
        """Return parameters with the presets that they select; `model` is the name of one under models."""
        presets = self._read_yaml(paths.PRESETS.name)
        selected = {
            table: presets[table].get(name) for name, table in ((model, "models"), (tree["dataset"], "datasets"))
        }
        return {**tree, **selected}

    def _read_yaml(self, path: str) -> dict[str, Any]:
        tree = parse_yaml(self._require_text(path), f"{self.name}: {path}")
        if not isinstance(tree, dict):
            raise InputError(f"{self.name}: {path}: holds no keys; {REMEDY}", code="no-pipeline")
        return tree

    def _require_text(self, path: str) -> str:
        text = self.read_text(path)
        if text is None:
            raise InputError(
                f"{self.name}: holds no {path}; name a commit or an experiment of this pipeline", code="no-pipeline"
            )
        return text


class ClassifierRevision(Revision):
    """The same of the classifier's pipeline, which has a params.yaml and a dvc.lock of its own."""

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """classify/params.yaml, and the two presets that it selects as `models` and `datasets`."""
        tree = self._read_yaml("classify/params.yaml")
        return self.select_presets(tree, tree["model"]["backbone"])

    @cached_property
    def stages(self) -> dict[str, Any]:
        """The stages of classify/dvc.lock by their names; none where it has not been run."""
        text = self.read_text("classify/dvc.lock")
        return read_locked_stages(text) if text else {}


def find_revision(name: str) -> Revision:
    """Return the revision of a name: `workspace`, whatever Git takes for a commit, or an experiment.

    Of several experiments with one name, that of the last commit is taken. Raises InputError if there is none, or if
    the name is ambiguous.
    """
    if name == WORKSPACE:
        return Revision(name, None)
    if commit := read_line("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"):
        return Revision(name, commit)
    experiments = list_experiments()
    matching = [experiment for experiment in experiments if experiment.name == name]
    head = find_head()
    of_head = [experiment for experiment in matching if experiment.baseline == head]
    if chosen := of_head or matching[:1] * (len(matching) == 1):
        return Revision(name, chosen[0].commit)
    if matching:
        commits = ", ".join(f"{experiment.commit[:10]} on {experiment.baseline[:10]}" for experiment in matching)
        raise InputError(
            f"{name}: several experiments have this name ({commits}); name one by its commit",
            code="ambiguous-experiment",
        )
    branches = run_git("for-each-ref", "--format=%(refname:short)", "refs/heads").decode().split()
    near = did_you_mean(name, [WORKSPACE, *branches, *dict.fromkeys(experiment.name for experiment in experiments)])
    raise InputError(f"{name}: no such experiment, commit or branch; {near}", code="no-such-revision")


def list_experiments(root: Path | None = None) -> list[Experiment]:
    """Return DVC's experiments of a checkout (by default this one) that have run, the newest first."""
    form = "--format=%(objectname) %(refname) %(contents:subject)"
    listed = try_git("for-each-ref", "--sort=-committerdate", form, "refs/exps", root=root) or b""
    experiments = []
    for line in filter(None, listed.decode(errors="replace").split("\n")):  # a subject may hold any other separator
        commit, ref, message = line.split(" ", 2)
        parts = ref.split("/")  # refs/exps/<first two of the baseline>/<the rest>/<name>
        if len(parts) == 5 and len(parts[2]) == 2 and len(parts[3]) > 30:
            experiments.append(Experiment(parts[4], commit, parts[2] + parts[3], message))
    return experiments
