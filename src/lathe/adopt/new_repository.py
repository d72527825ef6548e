"""New repository: `lathe init DIR` makes it of Lathe's files and the user's own, with Git and DVC set up."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from lathe.adopt.lathe_files import check_source, commit_files, describe_source
from lathe.adopt.own_files import Own, add_presets, edit_params, read_source, write_readme, write_recipe
from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.git import run_git, try_git
from lathe.config.load import load
from lathe.config.yaml_files import read_yaml
from lathe.experiments.recipes import read_overrides
from lathe.sources.model_files import select_files

# Remotes of Lathe's own that are nobody else's.
REMOTES_LEFT_OUT = r"\n\['remote \"ycloud\"'\][^\[]*"


def create(
    folder: Path,
    name: str | None,
    model: str | None,
    dataset: str | None,
    *,
    prompt: str | None = None,
    completion: str | None = None,
) -> None:
    """Make the repository in `folder`, and print what to do next; whatever fails leaves no folder behind.

    `name` is that of preset and recipe, by default the folder's; `model` and `dataset` are paths, or OWNER/NAME on the
    Hub. Raises InputError before anything is written, or if the user's files are not what they should be.
    """
    folder = folder.resolve()
    check_source()
    _check_folder(folder)
    own = _read_own(folder, name, model, dataset, prompt=prompt, completion=completion)
    with paths.replace_folder(folder) as partial:
        run_git("init", "--quiet", "--initial-branch=main", root=partial)
        run_git("reset", "--quiet", "--hard", commit_files(partial, None), root=partial)
        _write_own_files(partial, own)
        run_git("add", "--all", root=partial)
        run_git("commit", "--quiet", "--message", f"{own.name}: a repository of its own", root=partial)
    sys.stdout.write(f"{folder}: made, and committed; next: cd {folder}, make setup; README.md has the rest\n")


def _check_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is not an empty folder; name a new one", code="folder-not-empty")
    parent = next(path for path in folder.parents if path.is_dir())
    if top := try_git("rev-parse", "--show-toplevel", root=parent):
        raise InputError(
            f"{folder}: is in the Git repository {top.decode().strip()}; name a folder outside of it",
            code="inside-repository",
        )
    if try_git("var", "GIT_COMMITTER_IDENT") is None:
        raise InputError(
            "git: knows no name for a commit; run `git config --global user.name NAME` and user.email",
            code="no-git-identity",
        )


def _read_own(
    folder: Path,
    name: str | None,
    model: str | None,
    dataset: str | None,
    *,
    prompt: str | None,
    completion: str | None,
) -> Own:
    if bool(model) != bool(dataset):
        missing = "--dataset" if model else "--model"
        raise InputError(f"{missing}: is missing; give a model and a dataset, or neither", code="missing-option")
    if (prompt or completion) and not dataset:
        raise InputError("--prompt and --completion: go with --dataset; give it too", code="missing-option")
    own = Own(
        name or re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-"),
        read_source("--model", model) if model else None,
        read_source("--dataset", dataset) if dataset else None,
        prompt,
        completion,
    )
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", own.name):
        raise InputError(f"--name {own.name}: must be small letters, digits and hyphens; give another", code="own-name")
    presets = read_yaml(paths.PRESETS)
    recipes = {file.stem for file in (paths.ROOT / "experiments").glob("*.yaml")}
    if own.name in {*presets["models"], *presets["datasets"], *recipes}:
        raise InputError(f"--name {own.name}: Lathe has a preset or recipe of that name; give another", code="own-name")
    if own.model and own.model.local:
        if not own.model.local.is_dir():
            raise InputError(f"--model {model}: is no folder; give a Hugging Face model folder", code="missing-source")
        select_files([file.name for file in own.model.local.iterdir()], str(model))
    return own


def _write_own_files(repository: Path, own: Own) -> None:
    presets, params = repository / "presets.yaml", repository / "params.yaml"
    presets.write_text(add_presets(presets.read_text(encoding="utf-8"), own), encoding="utf-8")
    recipe = repository / f"experiments/{own.name}.yaml"
    recipe.write_text(write_recipe(own), encoding="utf-8")
    if own.model:
        text = edit_params(params.read_text(encoding="utf-8"), read_overrides(recipe))
        text = text.replace(
            "The values are for SmolLM2-135M and short answers, on a CPU of two cores.",
            f"The values are those of experiments/{own.name}.yaml.",
        )
        params.write_text(text, encoding="utf-8")
    (repository / "README.md").write_text(write_readme(own, describe_source()), encoding="utf-8")
    config = repository / ".dvc/config"
    config.write_text(re.sub(REMOTES_LEFT_OUT, "\n", config.read_text(encoding="utf-8")), encoding="utf-8")
    load(params, presets)
    if own.model and own.model.local:
        target = repository / own.model_path
        target.mkdir(parents=True)
        for name in select_files([file.name for file in own.model.local.iterdir()], str(own.model.local)):
            shutil.copyfile(own.model.local / name, target / name)
        _track(repository, own.model_path)
    if own.dataset and own.dataset.local:
        target = repository / own.dataset_path
        copy = shutil.copytree if own.dataset.local.is_dir() else shutil.copyfile
        copy(own.dataset.local, target)
        _track(repository, own.dataset_path)


def _track(repository: Path, path: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "add", "--quiet", path],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = " ".join(done.stderr.split())
        raise InputError(f"dvc add {path}: {reason}; see to this, and run the command again", code="dvc-failed")
