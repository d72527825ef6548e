"""Where base models and datasets come from: built by the pipeline, a user's own files, or the Hugging Face Hub."""

import fnmatch
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lathe import model_folder, paths, templates
from lathe.data.files import data_files, suffixes
from lathe.errors import InputError
from lathe.params import (
    BuiltinDataset,
    BuiltinModel,
    DatasetPreset,
    HubDataset,
    HubModel,
    LocalDataset,
    LocalModel,
    ModelPreset,
    Templated,
)

if TYPE_CHECKING:
    from lathe.hub import Repository

# What a model folder may give: safetensors, and the texts that describe them. Nothing that is unpickled or run.
MODEL_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "README*",
)

# What is known of a source beside its files: for the hub its repository, the revision asked for, and the commit it was.
Origin = dict[str, str | None]


def fetch_model(preset: ModelPreset, folder: Path, *, seed: int) -> Origin:
    """Fill the empty `folder` with a Hugging Face model: config, safetensors, tokenizer, chat template.

    Raises InputError where a local folder is missing, lies elsewhere than under models/local, or is no such model,
    where the hub cannot or will not give it, and where the preset's template does not fit it.
    """
    origin: Origin = {}
    match preset:
        case BuiltinModel():
            from lathe.builtin import tiny

            tiny.build(folder, seed)
        case LocalModel():
            _bring(_local_model(preset.path), folder)
        case HubModel():
            from lathe.hub import Repository

            repository = Repository("model", preset.id, preset.revision)
            _bring(_hub_model(repository), folder)
            origin = {"id": preset.id, "revision": preset.revision, "commit": repository.commit}
    if isinstance(preset, Templated) and preset.template:
        templates.install(preset.template, folder)
    return origin


def fetch_dataset(preset: DatasetPreset, folder: Path, *, seed: int) -> Origin:
    """Fill the empty `folder` with the dataset's files, unchanged; those of a folder `train/` are named `train-*`.

    Files of the hub are named for the splits they are used as; a slice of a split, or a format that `preprocess` does
    not read, becomes Parquet. Raises InputError where a local path is missing, lies elsewhere than under data/local, or
    holds no data file, and where the hub cannot or will not give it.
    """
    match preset:
        case BuiltinDataset():
            from lathe.builtin import commands
            from lathe.jsonl import write_jsonl

            for split, rows in commands.rows(seed).items():
                write_jsonl(rows, folder / f"{split}.jsonl")
        case LocalDataset():
            source = _local(preset.path, paths.DATA_LOCAL)
            files = data_files(source)
            if not files:
                raise InputError(
                    f"{preset.path}: holds no data file; expected one of {suffixes()}, or folders train, validation, "
                    "test of them"
                )
            for name, file in files.items():
                # Copied, not linked: DVC makes a stage's outputs read-only, and these are the user's own files.
                shutil.copyfile(file, folder / name)
        case HubDataset():
            from lathe.hub import Repository
            from lathe.hub_dataset import Layout

            repository = Repository("dataset", preset.id, preset.revision)
            layout = Layout(repository, preset.config)
            for split, wanted in (
                ("train", preset.train_split),
                ("validation", preset.validation_split),
                ("test", preset.test_split),
            ):
                if wanted:
                    layout.place(split, wanted, folder)
            return {"id": preset.id, "revision": preset.revision, "commit": repository.commit}
    return {}


def _local(path: str, home: Path) -> Path:
    source = Path(os.path.normpath(paths.ROOT / path))
    if home not in source.parents:
        raise InputError(
            f"presets.yaml: path {path!r} is not under {home.relative_to(paths.ROOT)}/, which is what DVC watches; "
            "put or link the files there"
        )
    for part in (source, *source.parents[: len(source.relative_to(home).parts) - 1]):
        if part.is_symlink() and part.is_dir():
            shown = part.relative_to(paths.ROOT)
            raise InputError(
                f"{shown}: is a link to a folder, behind which DVC sees no change; link the files in it: "
                f"`rm {shown} && cp -rs {part.resolve()} {shown}`"
            )
    if not source.exists():
        raise InputError(f"{path}: no such file or folder; put it there and run `dvc add {path}`")
    return source


def _local_model(path: str) -> dict[str, Path]:
    """Return the files to take of a model folder, by name."""
    source = _local(path, paths.MODELS_LOCAL)
    if not source.is_dir():
        raise InputError(f"{path}: is a file; give the folder that holds config.json and the safetensors")
    names = _model_files([file.name for file in source.iterdir() if file.is_file()], path)
    # What would fail an hour later, in `train` or `merge`, is seen in the headers.
    model_folder.read_config(source)
    model_folder.open_model(source)
    return {name: source / name for name in names}


def _hub_model(repository: "Repository") -> dict[str, Path]:
    """Return the files to take of a repository, by name, where they lie in the hub's cache."""
    names = _model_files([path for path in repository.paths if "/" not in path], repository.name)
    model_folder.read_config(repository.files(["config.json"])["config.json"].parent)
    if model_folder.INDEX_FILE in names:
        names = _indexed(names, repository.files([model_folder.INDEX_FILE])[model_folder.INDEX_FILE], repository.name)
    elif model_folder.SINGLE_FILE in names:
        names = [name for name in names if not name.endswith(".safetensors") or name == model_folder.SINGLE_FILE]
    files = repository.files(names)
    model_folder.open_model(files["config.json"].parent)
    return files


def _bring(files: dict[str, Path], folder: Path) -> None:
    """Link the weights, copy the texts beside them."""
    for name, file in files.items():
        # DVC makes a stage's outputs read-only, and what is linked with them too: right for gigabytes of weights, a
        # nuisance for texts, which people edit, and a template of the preset's changes.
        bring = paths.link if name.endswith(".safetensors") else shutil.copyfile
        bring(file, folder / name)


def _model_files(names: list[str], shown: str) -> list[str]:
    for name in ("config.json", "tokenizer_config.json"):
        if name not in names:
            raise InputError(f"{shown}: holds no {name}; give a complete Hugging Face model folder")
    if not fnmatch.filter(names, "*.safetensors"):
        pickles = sorted(name for name in names if name.endswith(model_folder.PICKLES))
        if pickles:
            raise InputError(
                f"{shown}/{pickles[0]}: pickled weights are never loaded; save the model with safe_serialization=True"
            )
        raise InputError(f"{shown}: holds no *.safetensors; put the model's weights there")
    wanted = {name for pattern in MODEL_PATTERNS for name in fnmatch.filter(names, pattern)}
    return sorted(name for name in wanted if not name.endswith((*model_folder.PICKLES, ".py")))


def _indexed(names: list[str], index: Path, shown: str) -> list[str]:
    # Some repositories hold the weights a second time, in their maker's own layout (`consolidated.safetensors`).
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if lacking := sorted(shards - set(names)):
        raise InputError(
            f"{shown}: holds no {lacking[0]}, which {model_folder.INDEX_FILE} names; give a complete model"
        )
    return [name for name in names if not name.endswith(".safetensors") or name in shards]
