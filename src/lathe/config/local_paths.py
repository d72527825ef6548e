"""Local paths: what of data/local and models/local a preset names, and the digests of those files."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lathe.common import paths
from lathe.common.progress import Progress
from lathe.config.load import Config
from lathe.config.presets import LocalDataset, LocalEncoder, LocalModel, MixtureDataset

# What `fetch` brings, by its names for them.
ITEMS = ("model", "dataset", "encoder")


def list_local_paths(config: Config, item: str) -> list[str]:
    """Return the local files and folders that the preset of an item names, from the root of the checkout."""
    preset = getattr(config, item)
    if item == "encoder" and "bert_score" not in config.params.evaluate.metrics:
        return []
    presets = list(preset.datasets.values()) if isinstance(preset, MixtureDataset) else [preset]
    named = [each.path for each in presets if isinstance(each, LocalModel | LocalDataset | LocalEncoder)]
    if adapter := getattr(preset, "adapter", None):
        named.append(adapter)
    template = getattr(preset, "template", None)
    if template and (paths.ROOT / template).is_file():  # and not the name of a built-in one
        named.append(template)
    return named


def list_local_files(config: Config, item: str) -> dict[str, Any]:
    """Return the local files that the preset of an item names, as the stage `local_files` writes them."""
    return {"files": describe_files(list_local_paths(config, item))}


def describe_files(named: list[str]) -> list[dict[str, Any]]:
    """Return the path, size (bytes) and SHA-256 of each file, and of those in folders; nothing of what is missing."""
    files = [file for path in named for file in _list_files(paths.ROOT / path)]
    with Progress("reading local files", sum(file.stat().st_size for file in files), unit="B") as progress:
        return [
            {
                "path": file.relative_to(paths.ROOT).as_posix(),
                "bytes": file.stat().st_size,
                "sha256": _compute_digest(file, progress),
            }
            for file in files
        ]


def _list_files(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
    elif place.is_dir():
        yield from sorted(file for file in place.rglob("*") if file.is_file())


def _compute_digest(file: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as source:
        while part := source.read(1 << 20):
            digest.update(part)
            progress.add(len(part))
    return digest.hexdigest()
