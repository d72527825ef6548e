"""dvc.lock and DVC's cache: locked stages and listings of folders."""

import json
from pathlib import Path
from typing import Any

from lathe.common.dvc_api import DvcRepository
from lathe.common.errors import InputError
from lathe.config.yaml_files import parse_yaml, read_yaml
from lathe.provenance.lineage import hash_path


def read_locked_stages(lock: Path | str) -> dict[str, Any]:
    """Return the stages of a dvc.lock: a file, or its text."""
    if isinstance(lock, Path):
        if not lock.exists():
            raise InputError(
                f"{lock.name}: no such file; `make repro` makes one, `git checkout {lock.name}` restores it",
                code="no-lock",
            )
        tree = read_yaml(lock)
    else:
        tree = parse_yaml(lock, "dvc.lock")
    if not isinstance(tree, dict) or not isinstance(tree.get("stages"), dict):
        raise InputError(
            "dvc.lock: holds no stages; run `python -m lathe check`, which restores one cut short", code="damaged-lock"
        )
    return tree["stages"]


def read_current_stages(repo: DvcRepository) -> dict[str, Any]:
    """Return the stages in the workspace's dvc.lock that dvc.yaml has; others, of former types, stay in the lock."""
    stages = read_locked_stages(repo.root / "dvc.lock")
    current = repo.stage_names()
    return {name: stage for name, stage in stages.items() if name in current}


def read_listing(repo: DvcRepository, md5: str) -> dict[str, str] | None:
    """Return the files of a folder by DVC's hash of it, each with its hash; None if the cache lacks or damaged it."""
    file = repo.cached_file(md5)
    if not file.is_file() or hash_path(file) != md5.removesuffix(".dir"):
        return None
    return {entry["relpath"]: entry["md5"] for entry in json.loads(file.read_text(encoding="utf-8"))}
