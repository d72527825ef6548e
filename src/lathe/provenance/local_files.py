"""Local files: which of data/local and models/local a run reads, whether they are the same, and what has no copy.

The fetch stages depend on the whole of both folders, as dvc.yaml can name no path that stands in presets.yaml. Whether
a file there matters is told by the selected preset, and by the copy of it that `fetch` made.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lathe.common import dotted_keys, paths
from lathe.common.dvc_api import DvcRepository
from lathe.common.git import list_paths
from lathe.config.load import Config
from lathe.data.split_files import find_data_files
from lathe.provenance.dvc_lock import read_listing

FOLDERS = {"data/local": "datasets", "models/local": "models"}  # with the table of presets.yaml

# What of a model's folder could be fetched beside what was.
PARTS_OF_MODELS = {".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken"}


def is_unrelated_change(repo: DvcRepository, stage: Mapping[str, Any], dep: str) -> bool:
    """Tell whether `dep`, a folder of local files that is not as in the lock, has changed in other files alone.

    `stage` is the entry in dvc.lock of a stage that depends on it. Where that cannot be told, it is false.
    """
    folder = dep.rstrip("/")
    if folder not in FOLDERS:
        return False
    presets = _find_presets(stage, FOLDERS[folder])
    if presets is None:
        return False
    outs = [out for out in stage.get("outs", []) if out["path"].partition("/")[0] in ("data", "models")]
    return all(preset.get("source") != "local" or _is_as_copied(repo, preset, outs) for preset in presets)


def find_untracked(config: Config, items: Mapping[str, Any] | None = None) -> list[str]:
    """Return the local paths of the selected presets that neither DVC nor Git tracks: no cache can restore them."""
    chosen = items or {"model": config.model, "dataset": config.dataset, "encoder": config.encoder}
    local = [preset.path for preset in chosen.values() if preset is not None and preset.source == "local"]
    return [path for path in dict.fromkeys(local) if (paths.ROOT / path).exists() and not _is_tracked(path)]


def _find_presets(stage: Mapping[str, Any], table: str) -> list[Mapping[str, Any]] | None:
    """Return the presets that a fetch stage reads of its local folder; None if the stage is no fetch stage."""
    params = stage.get("params", {})
    selected: Mapping[str, Any] = params.get(paths.PRESETS.name, {})
    if "encoders" in selected:
        own = params.get(paths.PARAMS.name, {})
        name = own.get("bert_score.model")
        wanted = name if "bert_score" in own.get("evaluate.metrics", []) else None
        preset = dotted_keys.get_value(selected["encoders"], wanted) if wanted else None
        return [preset] if isinstance(preset, Mapping) else []
    chosen = [value for key, value in selected.items() if key.startswith(f"{table}.") and isinstance(value, Mapping)]
    return chosen or None


def _is_as_copied(repo: DvcRepository, preset: Mapping[str, Any], outs: list[Any]) -> bool:
    """Tell whether the files of a local preset are those that the stage has copied."""
    source = paths.ROOT / str(preset.get("path", ""))
    listing = read_listing(repo, outs[0]["md5"]) if len(outs) == 1 else None
    if listing is None or not source.exists() or preset.get("template"):
        return False
    if outs[0]["path"] == "data/raw":
        files = find_data_files(source)
    elif source.is_dir():
        files = {file.name: file for file in source.iterdir() if file.name in listing or file.suffix in PARTS_OF_MODELS}
    else:
        return False  # a GGUF file is not copied
    if files.keys() != listing.keys():
        return False
    hashed = ((name, repo.hash_path(file.relative_to(paths.ROOT).as_posix())) for name, file in files.items())
    return all(found is not None and found[0] == listing[name] for name, found in hashed)


def _is_tracked(path: str) -> bool:
    return all(map(_is_kept, _list_files(path)))


def _list_files(path: str) -> Iterator[PurePosixPath]:
    """Yield the files of a local path, from the root; a folder that DVC tracks as a whole stands for its files."""
    here = PurePosixPath(path)
    if _is_kept(here) or (paths.ROOT / path).is_file():
        yield here
        return
    for file in sorted((paths.ROOT / path).rglob("*")):
        if file.is_file() and file.suffix != ".dvc" and file.name != ".gitignore":
            yield PurePosixPath(file.relative_to(paths.ROOT).as_posix())


def _is_kept(path: PurePosixPath) -> bool:
    """Tell whether `dvc add` tracks a path, alone or with a folder that it is in, or Git does."""
    above = [path, *path.parents]
    if any(Path(paths.ROOT, part).with_name(f"{part.name}.dvc").exists() for part in above if part.name):
        return True
    return (paths.ROOT / path).is_file() and bool(list_paths("ls-files", "--", str(path)))
