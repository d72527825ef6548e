"""Copies of a run's files, from the workspace or a commit, so that it can be sent later."""

import io
import logging
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

from lathe.common import dotted_keys, paths
from lathe.common.dvc_api import open_repository
from lathe.common.errors import InputError
from lathe.common.git import find_head, list_paths, run_git
from lathe.config.yaml_files import read_yaml
from lathe.experiments.tracking.run_files import CONFIGURATION, MODEL_FILES, Context, MirroredRun
from lathe.provenance.dvc_lock import read_current_stages, read_listing, read_locked_stages
from lathe.provenance.lineage import hash_path

logger = logging.getLogger(__name__)

IN_GIT = (*CONFIGURATION, "metrics/train", "metrics/speed", "metrics/evaluate", "metrics/timings")


def copy_workspace(root: Path, folder: Path, context: Context) -> MirroredRun:
    """Copy the current files of the checkout `root` into the empty `folder`."""
    for name in IN_GIT:
        source, target = root / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        elif source.exists():
            shutil.copy2(source, target)
    return _add_outputs(folder, replace(context, commit=find_head()))


def copy_commit(commit: str, folder: Path, context: Context) -> MirroredRun:
    """Copy the files of a commit, an experiment's for one, into the empty `folder`."""
    # In the main checkout, because that of an experiment is removed at its end.
    listed = list_paths("ls-tree", "-r", "--name-only", commit, "--", *IN_GIT, root=paths.MAIN)
    for name in CONFIGURATION:
        if name not in listed:
            raise InputError(
                f"{commit[:10]} has no {name}; name a commit with a pipeline that has run", code="no-pipeline"
            )
    archived = run_git("archive", commit, "--", *listed, root=paths.MAIN)
    with tarfile.open(fileobj=io.BytesIO(archived)) as archive:
        archive.extractall(folder, filter="data")
    return _add_outputs(folder, replace(context, commit=commit))


def find_mismatch(root: Path) -> str | None:
    """Return a parameter or file of the checkout `root` that differs from its dvc.lock, as after an interrupted run.

    Of the files only answers and metrics are hashed. `dvc status` would hold DVC's lock, which the user's next command
    needs.
    """
    with open_repository(root) as repo:
        stages = read_current_stages(repo).values()
    parameters = read_yaml(root / "params.yaml")
    for stage in stages:
        for key, value in stage.get("params", {}).get("params.yaml", {}).items():
            if dotted_keys.get_value(parameters, key) != value:
                return str(key)
    outputs = {out["path"]: out["md5"] for stage in stages for out in stage.get("outs", [])}
    for path, md5 in [
        *outputs.items(),
        *((dep["path"], dep["md5"]) for stage in stages for dep in stage.get("deps", [])),
    ]:
        if outputs.get(path, md5) != md5:
            return str(path)
        is_hashed = path.startswith("metrics/") or path == "data/generated"
        if is_hashed and not ((root / path).exists() and hash_path(root / path) == md5):
            return str(path)
    return None


def _add_outputs(folder: Path, context: Context) -> MirroredRun:
    """Link the outputs from DVC's cache, by the hashes of the lock, so that they are those of this run."""
    tuning = read_yaml(folder / "params.yaml")["training"].get("tuning")
    outs = {
        out["path"]: out["md5"]
        for stage in read_locked_stages(folder / "dvc.lock").values()
        for out in stage.get("outs", [])
        if out["path"] in MODEL_FILES and (out["path"] != "models/adapter" or tuning == "lora")
    }
    with open_repository(paths.MAIN) as repo:
        for path, md5 in outs.items():
            files = read_listing(repo, md5) if md5.endswith(".dir") else {"": md5}
            for name, file_md5 in (files or {}).items():
                source, target = repo.cached_file(file_md5), folder / path / name
                if source.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    paths.link(source, target)
            if not (folder / path).exists():
                logger.warning("%s of this run is not in DVC's cache, and is left out; `dvc fetch` brings it", path)
    context.write(folder)
    return MirroredRun(folder, context)
