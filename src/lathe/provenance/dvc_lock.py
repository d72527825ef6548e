"""dvc.lock and DVC's cache: locked stages, cached files and folder listings."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common.errors import InputError
from lathe.config.yaml_files import read_yaml
from lathe.provenance.lineage import digest

if TYPE_CHECKING:
    from dvc.repo import Repo


def locked_stages(lock: Path | str) -> dict[str, Any]:
    """Return the stages of a dvc.lock: a file, or its text."""
    if isinstance(lock, Path):
        if not lock.exists():
            raise InputError(
                f"{lock.name}: no such file; `make repro` makes one, `git checkout {lock.name}` restores it"
            )
        tree = read_yaml(lock)
    else:
        from ruamel.yaml import YAML

        tree = YAML(typ="safe").load(lock)
    if not isinstance(tree, dict) or not isinstance(tree.get("stages"), dict):
        raise InputError("dvc.lock: holds no stages; run `python -m lathe check`, which restores one cut short")
    return tree["stages"]


def current_stages(repo: "Repo") -> dict[str, Any]:
    """Return what the workspace's dvc.lock says of the stages that dvc.yaml has; it keeps others, of former types."""
    from dvc.stage import PipelineStage

    stages = locked_stages(Path(repo.root_dir) / "dvc.lock")
    current = {stage.name for stage in repo.index.stages if isinstance(stage, PipelineStage)}
    return {name: stage for name, stage in stages.items() if name in current}


def cached_file(repo: "Repo", md5: str) -> Path:
    """Return where DVC's cache has the contents, or would have them."""
    return Path(repo.cache.local.oid_to_path(md5))


def cached_listing(repo: "Repo", md5: str) -> dict[str, str] | None:
    """Return the files of a folder by DVC's hash of it, each with its hash; None where the cache has no whole list."""
    file = cached_file(repo, md5)
    if not file.is_file() or digest(file) != md5.removesuffix(".dir"):
        return None
    return {entry["relpath"]: entry["md5"] for entry in json.loads(file.read_text(encoding="utf-8"))}


@contextmanager
def one_line_of_dvc() -> Iterator[None]:
    """Turn DVC's refusals, of a damaged dvc.yaml for one, into InputError."""
    from dvc.exceptions import DvcException

    try:
        yield
    except DvcException as error:
        raise InputError(f"dvc: {' '.join(str(error).split())}; mend it and run again") from None
