"""Datasets that are on this machine: the files of a preset, and of each dataset of a mixture, before a run."""

from collections.abc import Mapping
from pathlib import Path

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.json_files import read_json_object
from lathe.config.presets import BuiltinDataset, DatasetPreset, HubDataset, LocalDataset, SingleDataset, list_datasets

# The file or folder of each dataset, and its preset, by its name in a mixture ("" of a single one).
DatasetFiles = dict[str, tuple[Path, SingleDataset]]


def find_dataset_files(name: str, preset: DatasetPreset, folder: Path, *, seed: int) -> DatasetFiles | None:
    """Return the files of a preset's datasets; None if one of them is of the Hub, and `fetch` has not brought it.

    Those of the built-in dataset are made in the empty `folder`. Raises InputError for a local file that is missing.
    """
    files: DatasetFiles = {}
    for part, dataset in list_datasets(preset).items():
        if isinstance(dataset, BuiltinDataset):
            from lathe.sources.fetch import fetch_dataset

            source = folder / (part or name)
            source.mkdir()
            fetch_dataset(dataset, source, seed=seed)
        elif isinstance(dataset, HubDataset):
            if not is_fetched("dataset", name, paths.DATA_RAW):
                return None
            source = paths.DATA_RAW / part
        elif not (source := paths.ROOT / dataset.path).exists():
            shown = f"{name}, {part}" if part else name
            raise InputError(
                f"{dataset.path}: no such file or folder, which presets.yaml names as {shown}; put it there",
                code="no-such-file",
            )
        files[part] = source, dataset
    return files


def find_preset_of_path(path: Path, datasets: Mapping[str, DatasetPreset]) -> tuple[str, SingleDataset | None]:
    """Return the first preset, or dataset of a mixture, that has this path, and its name; ("", None) without one."""
    named = [
        (f"{name}, {part}" if part else name, dataset)
        for name, preset in datasets.items()
        for part, dataset in list_datasets(preset).items()
    ]
    # An entry of its own comes before a mixture's.
    for name, dataset in sorted(named, key=lambda each: "," in each[0]):
        if isinstance(dataset, LocalDataset) and paths.ROOT / dataset.path == path:
            return name, dataset
    return "", None


def is_fetched(kind: str, name: str, folder: Path) -> bool:
    """Tell whether the folder holds what the preset of that name names."""
    file = paths.METRICS / f"fetch/{kind}.json"
    if not folder.is_dir() or not file.is_file():
        return False
    origin = read_json_object(file).get("origin")
    return bool(origin) and bool(origin[0].get("name") == name)
