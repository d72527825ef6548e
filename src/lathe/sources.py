"""Where base models and datasets come from: built by the pipeline, or a user's own files."""

import os
import shutil
from pathlib import Path

from lathe import model_folder, paths
from lathe.errors import InputError
from lathe.params import BuiltinDataset, BuiltinModel, DatasetPreset, LocalDataset, LocalModel, ModelPreset

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

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


def fetch_model(preset: ModelPreset, folder: Path, *, seed: int) -> None:
    """Fill the empty `folder` with a Hugging Face model: config, safetensors, tokenizer, chat template.

    Raises InputError where a local folder is missing, lies elsewhere than under models/local, or is no such model: a
    file is missing or cut short, the weights are pickled or quantized.
    """
    match preset:
        case BuiltinModel():
            from lathe.builtin import tiny

            tiny.build(folder, seed)
        case LocalModel():
            source = _local(preset.path, paths.MODELS_LOCAL)
            for file in _model_files(source, preset.path):
                # DVC makes a stage's outputs read-only, and what is linked with them too: right for gigabytes of
                # weights, a nuisance for the texts beside them, which people edit.
                copy = _link if file.suffix == ".safetensors" else shutil.copyfile
                copy(file, folder / file.name)


def fetch_dataset(preset: DatasetPreset, folder: Path, *, seed: int) -> None:
    """Fill the empty `folder` with the dataset's files, unchanged.

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
            for file in _data_files(source, preset.path):
                # Copied, not linked: DVC makes a stage's outputs read-only, and these are the user's own files.
                shutil.copyfile(file, folder / file.name)


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


def _model_files(source: Path, shown: str) -> list[Path]:
    if not source.is_dir():
        raise InputError(f"{shown}: is a file; give the folder that holds config.json and the safetensors")
    for name in ("config.json", "tokenizer_config.json"):
        if not (source / name).is_file():
            raise InputError(f"{shown}: holds no {name}; give a complete Hugging Face model folder")
    # What would fail an hour later, in `train` or `merge`, is seen in the headers.
    model_folder.read_config(source)
    model_folder.open_model(source)
    return sorted({file for pattern in MODEL_PATTERNS for file in source.glob(pattern) if file.is_file()})


def _data_files(source: Path, shown: str) -> list[Path]:
    files = [source] if source.is_file() else sorted(source.iterdir())
    files = [file for file in files if file.suffix.lower() in DATA_SUFFIXES]
    if not files:
        raise InputError(f"{shown}: holds no data file; expected one of {', '.join('*' + s for s in DATA_SUFFIXES)}")
    return files


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
