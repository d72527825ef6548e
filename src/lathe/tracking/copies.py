"""A copy of what a run left, from the workspace or from a commit: what was missed can be sent when all has moved on."""

import io
import logging
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lathe import artifacts, paths, revisions
from lathe.errors import InputError
from lathe.lineage import digest
from lathe.params import did_you_mean, read_yaml
from lathe.tracking.record import CONFIGURATION, MODEL_FILES, Context, Record
from lathe.verify import cached_file, cached_listing, locked_stages

logger = logging.getLogger(__name__)

WORKSPACE = "workspace"

IN_GIT = (*CONFIGURATION, "metrics/train", "metrics/speed", "metrics/evaluate", "metrics/timings")


def of_workspace(root: Path, folder: Path, context: Context) -> Record:
    """Copy the files of the checkout `root` as they are now into the empty `folder`."""
    for name in IN_GIT:
        source, target = root / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        elif source.exists():
            shutil.copy2(source, target)
    return _completed(folder, replace(context, commit=resolve("HEAD")[0]))


def of_commit(commit: str, folder: Path, context: Context) -> Record:
    """Copy the files of a commit, an experiment's for one, into the empty `folder`."""
    listed = _git("ls-tree", "-r", "-z", "--name-only", commit, "--", *IN_GIT).decode().split("\0")[:-1]
    for name in CONFIGURATION:
        if name not in listed:
            raise InputError(f"{commit[:10]} has no {name}; name a commit with a pipeline that has run")
    with tarfile.open(fileobj=io.BytesIO(_git("archive", commit, "--", *listed))) as archive:
        archive.extractall(folder, filter="data")
    return _completed(folder, replace(context, commit=commit))


def resolve(rev: str) -> tuple[str, str | None]:
    """Return the commit that a revision of Git or the name of an experiment means, and that name where it has one.

    Raises InputError.
    """
    names = {each.commit: each.name for each in revisions.experiments(paths.MAIN)}
    if rev in names.values():
        return experiment(rev), rev
    done = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}"],
        cwd=paths.MAIN,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        known = [WORKSPACE, "HEAD", *names.values()]
        raise InputError(f"{rev}: neither a revision of Git nor an experiment; {did_you_mean(rev, known)}")
    commit = done.stdout.strip()
    return commit, names.get(commit)


def experiment(name: str) -> str:
    """Return the commit of the experiment of that name. Raises InputError where there is none, or several."""
    commits = [each.commit for each in revisions.experiments(paths.MAIN) if each.name == name]
    if len(commits) != 1:
        raise InputError(f"{name}: names {len(commits) or 'no'} experiments; give the commit (`dvc exp list --sha`)")
    return commits[0]


def out_of_place(root: Path) -> str | None:
    """Return a parameter or file of the checkout `root` that is not as its dvc.lock has it: after a run cut short.

    Models are not read again. DVC is not asked: it would hold its own lock, which the user's next command wants.
    """
    current = _current_stages(root)
    now = read_yaml(root / "params.yaml")
    for key, value in _items(stage.get("params", {}).get("params.yaml", {}) for stage in current):
        there: Any = now
        for step in key.split("."):
            there = there.get(step) if isinstance(there, Mapping) else None
        if there != value:
            return key
    made = {out["path"]: out["md5"] for stage in current for out in stage.get("outs", [])}
    used = {dep["path"]: dep["md5"] for stage in current for dep in stage.get("deps", [])}
    for path, md5 in [*used.items(), *made.items()]:
        if made.get(path, md5) != md5:
            return path
        read_again = path.startswith("metrics/") or path == "data/generated"
        if read_again and not ((root / path).exists() and digest(root / path) == md5):
            return path
    return None


def _items(trees: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for tree in trees:
        yield from tree.items()


def _current_stages(folder: Path) -> list[dict[str, Any]]:
    """Return what dvc.lock says of each stage; of a type that is no longer on the list it keeps what it held."""
    types = read_yaml(folder / "params.yaml")["quantize"]["types"]
    items = {"model", "dataset", *types, *artifacts.names(types)}
    stages = locked_stages(folder / "dvc.lock")
    return [stage for name, stage in stages.items() if "@" not in name or name.split("@")[1] in items]


def _completed(folder: Path, context: Context) -> Record:
    """Link in what DVC keeps: by the hashes of the lock, so that it is of this very run."""
    from dvc.repo import Repo

    tuning = read_yaml(folder / "params.yaml")["training"].get("tuning")
    outs = {
        out["path"]: out["md5"]
        for stage in locked_stages(folder / "dvc.lock").values()
        for out in stage.get("outs", [])
        if out["path"] in MODEL_FILES and (out["path"] != "models/adapter" or tuning == "lora")
    }
    with Repo(str(paths.MAIN)) as repo:
        for path, md5 in outs.items():
            files = cached_listing(repo, md5) if md5.endswith(".dir") else {"": md5}
            for name, file_md5 in (files or {}).items():
                source, target = cached_file(repo, file_md5), folder / path / name
                if source.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    paths.link(source, target)
            if not (folder / path).exists():
                logger.warning("%s of this run is not in DVC's cache, and is left out; `dvc fetch` brings it", path)
    context.write(folder)
    return Record(folder, context)


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=paths.MAIN, capture_output=True, check=True).stdout
