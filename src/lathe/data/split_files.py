"""Split files: which files of a dataset hold rows, and of which split."""

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

SUFFIXES = (
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".jsonl.gz",
    ".json.gz",
    ".csv.gz",
    ".tsv.gz",
    ".txt",
    ".txt.gz",
)
# Raw texts. Beside files of other forms they are notes, such as a licence, and no data.
TEXT_SUFFIXES = (".txt", ".txt.gz")

# What else rows are kept in, and how they get out of it.
_SPREADSHEET = "save the sheet as CSV in UTF-8, or `soffice --headless --convert-to csv {file}`"
_CONVERSIONS = {
    ".xlsx": _SPREADSHEET,
    ".xlsm": _SPREADSHEET,
    ".xls": _SPREADSHEET,
    ".ods": _SPREADSHEET,
    ".ndjson": "`mv {file} {stem}.jsonl`",
    ".feather": "`mv {file} {stem}.arrow`",
    ".orc": "`python -c \"import pandas; pandas.read_orc('{file}').to_parquet('{stem}.parquet')\"`",
    ".pkl": "`python -c \"import pandas; pandas.read_pickle('{file}').to_parquet('{stem}.parquet')\"`, if you trust it",
    ".sqlite": "`sqlite3 -json {file} 'SELECT * FROM TABLE' > {stem}.json`",
    ".db": "`sqlite3 -json {file} 'SELECT * FROM TABLE' > {stem}.json`",
    ".zip": "`unzip {file}`, and give its folder",
    ".tar": "`tar xf {file}`, and give its folder",
    ".tgz": "`tar xf {file}`, and give its folder",
    ".tar.gz": "`tar xf {file}`, and give its folder",
    ".zst": "`zstd -d {file}`",
    ".xz": "`xz -d {file}`",
    ".bz2": "`bzip2 -d {file}`",
}

# JSON files that `datasets.save_to_disk` writes beside its Arrow files; they hold no rows.
_ARROW_COMPANIONS = ("dataset_info.json", "state.json", "dataset_dict.json")


def get_suffix(file: Path) -> str | None:
    """Return which of `SUFFIXES` the file's name ends with, in any case; None for another suffix."""
    name = file.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def list_suffixes() -> str:
    """Return the suffixes for a message: `*.jsonl, *.json, ...`."""
    return ", ".join(f"*{suffix}" for suffix in SUFFIXES)


def find_data_files(source: Path) -> dict[str, Path]:
    """Return the data files of a file or folder by the name that each gets in a flat folder; skips other files.

    A folder may hold folders named for the splits: `train/rows.jsonl` becomes `train-rows.jsonl`. Raises InputError if
    two files would get the same name, and for a file of rows that must be converted first, such as a spreadsheet.
    """
    if source.is_file():
        _refuse_other_container(source)
        return {source.name: source} if get_suffix(source) else {}
    files = {file.name: file for file in _list_data_files(source)}
    for folder in sorted(path for path in source.iterdir() if path.is_dir() and path.name.lower() in _SPLIT_OF):
        for file in _list_data_files(folder):
            name = f"{folder.name}-{file.name}"
            if name in files:
                raise InputError(
                    f"{folder.name}/{file.name}: there is also {name} beside its folder; keep one of them",
                    code="ambiguous-file-names",
                )
            files[name] = file
    return files


def require_data_files(source: Path, shown: str) -> dict[str, Path]:
    """Return what `find_data_files` finds; raises InputError if that is nothing. `shown` names the source."""
    files = find_data_files(source)
    if not files:
        inner = sorted(source.glob("[!.]*/")) if source.is_dir() else []
        deeper = next((folder.name for folder in inner if find_data_files(folder)), None)
        found = f"; its folder {deeper} holds some: give {shown}/{deeper}" if deeper else ""
        what = "holds no data file" if source.is_dir() else "is no data file by its name"
        raise InputError(
            f"{shown}: {what}; expected one of {list_suffixes()}, or folders train, validation, test of them{found}",
            code="no-data-files",
        )
    return files


def find_split_files(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of a folder by split, shards sorted by name; skips hidden files.

    Files are named for their split (`train.jsonl`, `val-00000-of-00002.parquet`). If no file is, all of them are the
    train split. Raises InputError for another extension, and if the names do not tell which file is which split.
    """
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    if not files:
        raise InputError(f"{folder.name}: holds no data file; expected one of {list_suffixes()}", code="no-data-file")
    for file in files:
        if not get_suffix(file) or not file.is_file():
            raise InputError(
                f"{file.name}: not a data file; expected one of {list_suffixes()}; remove or convert it",
                code="not-a-data-file",
            )

    names = {file: _parse_split_name(file) for file in files}
    if not any(names.values()):
        return {"train": files}
    by_split: dict[str, list[Path]] = {}
    for file, name in names.items():
        if name is None:
            raise InputError(
                f"{file.name}: belongs to no split, but other files do; begin its name with one of "
                f"{', '.join(SPLITS)}, or remove it",
                code="ambiguous-file-names",
            )
        others = by_split.setdefault(_SPLIT_OF[name], [])
        if others and (names[others[0]], get_suffix(others[0])) != (name, get_suffix(file)):
            raise InputError(
                f"{file.name}: {others[0].name} is the {_SPLIT_OF[name]} split too; keep one of them, "
                "or give shards the same prefix and suffix (train-0.jsonl, train-1.jsonl)",
                code="ambiguous-file-names",
            )
        others.append(file)
    return {split: by_split[split] for split in SPLITS if split in by_split}


def _list_data_files(folder: Path) -> list[Path]:
    present = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    for file in present:
        _refuse_other_container(file)
    files = [file for file in present if get_suffix(file)]
    if any(get_suffix(file) not in TEXT_SUFFIXES for file in files):
        files = [file for file in files if get_suffix(file) not in TEXT_SUFFIXES]
    from_datasets = any(folder.glob("*.arrow")) or any(folder.glob("*/*.arrow"))
    return [file for file in files if not (from_datasets and file.name in _ARROW_COMPANIONS)]


def _parse_split_name(file: Path) -> str | None:
    word = re.split(r"[-_.]", file.name.lower(), maxsplit=1)[0]
    return word if word in _SPLIT_OF else None


def _refuse_other_container(file: Path) -> None:
    name = file.name.lower()
    for suffix, conversion in _CONVERSIONS.items():
        if name.endswith(suffix):
            # A name that a shell would not take as it is is not put into a command that people copy.
            plain = re.fullmatch(r"[\w.+@][\w.+@-]*", file.name) is not None
            command = conversion.format(
                file=file.name if plain else "FILE", stem=file.name[: -len(suffix)] if plain else "NAME"
            )
            raise InputError(
                f"{file.name}: rows are not read from {suffix} files; convert it: {command}; then remove it",
                code="convert-first",
            )
