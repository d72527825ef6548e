"""Local files: which of data/local and models/local a run reads, whether they are the same, and what has no copy.

The stages `local_files` depend on the whole of the folders, as dvc.yaml can name no path that stands in presets.yaml.
Whether a file there matters is told by their outputs: the digests of the files that the selected presets name.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lathe.common import json_files, paths
from lathe.common.errors import InputError
from lathe.common.git import list_paths
from lathe.config.load import Config, load
from lathe.config.local_paths import ITEMS, list_local_files
from lathe.config.presets import list_datasets

FOLDERS = ("data/local", "models/local")
LISTS = Path("metrics/local_files")  # that the stages write, one for each of ITEMS


def is_unrelated_change(stage: Mapping[str, Any], dep: str) -> bool:
    """Tell whether `dep`, which is not as in the lock, has changed in what this run does not read.

    It may be a folder of local files, or presets.yaml, whose selected entries are parameters of other stages. `stage`
    is the entry in dvc.lock of the stage that depends on it. Where that cannot be told, it is false.
    """
    if dep == paths.PRESETS.name:
        return is_look(stage)
    if dep.rstrip("/") not in FOLDERS:
        return False
    try:
        config = load(paths.PARAMS, paths.PRESETS)
    except InputError:
        return False
    recorded = {Path(out["path"]): out["md5"] for out in stage.get("outs", [])}
    return bool(recorded) and all(
        file.parent == LISTS and file.stem in ITEMS and md5 == _compute_md5(list_local_files(config, file.stem))
        for file, md5 in recorded.items()
    )


def is_look(stage: Mapping[str, Any]) -> bool:
    """Tell whether an entry of dvc.lock is of a stage that only looks for local files.

    Its parameters are which presets are selected; those that read a preset track its entry.
    """
    outs = [Path(out["path"]) for out in stage.get("outs", [])]
    return bool(outs) and all(out.parent == LISTS for out in outs)


def find_untracked(config: Config, items: Mapping[str, Any] | None = None) -> list[str]:
    """Return the local paths of the selected presets that neither DVC nor Git tracks: no cache can restore them."""
    chosen = items or {"model": config.model, "dataset": config.dataset, "encoder": config.encoder}
    given = [preset for preset in chosen.values() if preset is not None]
    single = [each for preset in given for each in list_datasets(preset).values()]
    named = [(preset.path if preset.source == "local" else None, getattr(preset, "adapter", None)) for preset in single]
    local = [path for paths_of_preset in named for path in paths_of_preset if path]
    return [path for path in dict.fromkeys(local) if (paths.ROOT / path).exists() and not _is_tracked(path)]


def _compute_md5(content: dict[str, Any]) -> str:
    """Return DVC's hash of the file that a stage would write."""
    return hashlib.md5(json_files.encode_json(content).encode(), usedforsecurity=False).hexdigest()


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
