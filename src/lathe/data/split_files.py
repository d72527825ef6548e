"""Which files hold data, and of which split."""

import re
from pathlib import Path

from lathe.common.errors import InputError

SPLITS = ("train", "validation", "test")

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
_SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".jsonl.gz", ".json.gz", ".csv.gz")

# What `datasets.save_to_disk` puts beside its Arrow files: JSON, but no data.
_ARROW_COMPANIONS = ("dataset_info.json", "state.json", "dataset_dict.json")


def suffix_of(file: Path) -> str | None:
    """Return which of `SUFFIXES` the file's name ends with, whatever its case; None for another one."""
    name = file.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def suffixes() -> str:
    """Return the suffixes as a message lists them: `*.jsonl, *.json, ...`."""
    return ", ".join(f"*{suffix}" for suffix in SUFFIXES)


def data_files(source: Path) -> dict[str, Path]:
    """Return the data files of a file or folder by the name each has in a flat folder; other files are passed over.

    A folder may hold folders named for the splits: `train/rows.jsonl` becomes `train-rows.jsonl`. Raises InputError
    where two files would have one name.
    """
    if source.is_file():
        return {source.name: source} if suffix_of(source) else {}
    found = {file.name: file for file in _data_files_in(source)}
    for folder in sorted(path for path in source.iterdir() if path.is_dir() and path.name.lower() in _SPLIT_OF):
        for file in _data_files_in(folder):
            name = f"{folder.name}-{file.name}"
            if name in found:
                raise InputError(f"{folder.name}/{file.name}: {name} lies beside its folder; keep one of them")
            found[name] = file
    return found


def split_files(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of a folder by split, shards sorted by name; hidden files are passed over.

    Files are named for their split (`train.jsonl`, `val-00000-of-00002.parquet`); a folder of which no file is, is all
    train. Raises InputError for another extension, and where names do not say which file is which.
    """
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    if not files:
        raise InputError(f"{folder.name}: holds no data file; expected one of {suffixes()}")
    for file in files:
        if not suffix_of(file) or not file.is_file():
            raise InputError(f"{file.name}: not a data file; expected one of {suffixes()}; remove or convert it")

    names = {file: _split_name(file) for file in files}
    if not any(names.values()):
        return {"train": files}
    by_split: dict[str, list[Path]] = {}
    for file, name in names.items():
        if name is None:
            raise InputError(
                f"{file.name}: belongs to no split while other files do; begin its name with one of "
                f"{', '.join(SPLITS)}, or remove it"
            )
        others = by_split.setdefault(_SPLIT_OF[name], [])
        if others and (names[others[0]], suffix_of(others[0])) != (name, suffix_of(file)):
            raise InputError(
                f"{file.name}: {others[0].name} is the {_SPLIT_OF[name]} split too; keep one of them, "
                "or name shards alike (train-0.jsonl, train-1.jsonl)"
            )
        others.append(file)
    return {split: by_split[split] for split in SPLITS if split in by_split}


def _data_files_in(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and suffix_of(file))
    from_datasets = any(folder.glob("*.arrow")) or any(folder.glob("*/*.arrow"))
    return [file for file in files if not (from_datasets and file.name in _ARROW_COMPANIONS)]


def _split_name(file: Path) -> str | None:
    word = re.split(r"[-_.]", file.name.lower(), maxsplit=1)[0]
    return word if word in _SPLIT_OF else None
