"""Where base models and datasets come from: built by the pipeline, or a user's own files."""

import os
import shutil
from pathlib import Path

from lathe import paths, templates
from lathe.data.files import data_files, suffixes
from lathe.errors import InputError
from lathe.params import BuiltinDataset, BuiltinModel, DatasetPreset, LocalDataset, LocalModel, ModelPreset, Templated

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
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def fetch_model(preset: ModelPreset, folder: Path, *, seed: int) -> None:
    """Fill the empty `folder` with a Hugging Face model: config, safetensors, tokenizer, chat template.

    Raises InputError where a local folder is missing, lies elsewhere than under models/local, or is no such model, and
    where the preset's template does not fit it.
    """
    match preset:
        case BuiltinModel():
            from lathe.builtin import tiny

            tiny.build(folder, seed)
        case LocalModel():
            source = _local(preset.path, paths.MODELS_LOCAL)
            for file in _model_files(source, preset.path):
                _link(file, folder / file.name)
    if isinstance(preset, Templated) and preset.template:
        templates.install(preset.template, folder)


def fetch_dataset(preset: DatasetPreset, folder: Path, *, seed: int) -> None:
    """Fill the empty `folder` with the dataset's files, unchanged; those of a folder `train/` are named `train-*`.

    Raises InputError where a local path is missing, lies elsewhere than under data/local, or holds no data file.
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


def _local(path: str, home: Path) -> Path:
    source = Path(os.path.normpath(paths.ROOT / path))
    if home not in source.parents:
        raise InputError(
            f"presets.yaml: path {path!r} is not under {home.relative_to(paths.ROOT)}/, which is what DVC watches; "
            "put or link the files there"
        )
    if not source.exists():
        raise InputError(f"{path}: no such file or folder; put it there and run `dvc add {path}`")
    return source


def _model_files(source: Path, shown: str) -> list[Path]:
    if not source.is_dir():
        raise InputError(f"{shown}: is a file; give the folder that holds config.json and the safetensors")
    for name in ("config.json", "tokenizer_config.json"):
        if not (source / name).is_file():
            raise InputError(f"{shown}: holds no {name}; give a complete Hugging Face model folder")
    if not any(source.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in PICKLES for file in source.glob(pattern))
        if pickles:
            raise InputError(
                f"{shown}/{pickles[0]}: pickled weights are never loaded; save the model with safe_serialization=True"
            )
        raise InputError(f"{shown}: holds no *.safetensors; put the model's weights there")
    return sorted({file for pattern in MODEL_PATTERNS for file in source.glob(pattern) if file.is_file()})


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
