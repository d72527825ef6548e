"""State of a checkout: what its pipeline has made, compared byte by byte, and what a fault has left lying about."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lathe.common.errors import InputError
from lathe.common.workspace_lock import find_holder
from lathe.provenance.lineage import hash_path

VARYING = ("metrics/timings/", "metrics/speed/")  # no output of any stage
OBJECT = re.compile(r"[0-9a-f]{30}(\.dir)?")
# Bookkeeping of DVC, of Git and of the lock over the workspace, which a run leaves in any case.
BOOKKEEPING = re.compile(
    r"\.git/(?!.*\.lock$)|\.dvc/(cache/runs|tmp/(exps|btime|lock|rwlock|rwlock\.lock|lathe-workspace\.lock|site|dag"
    r"|build\.log|zips))|(\.dvc/tmp|\.dvc/cache|\.dvc/cache/files|\.dvc/cache/files/md5|\.scratch|\.ruff_cache)$"
    r"|wandb|\.storage|.*__pycache__|\.gitattributes$"
)


@dataclass(frozen=True)
class State:
    """`stages` of dvc.lock, hash of each output as it lies there, and the paths of all files and folders."""

    stages: dict[str, Any]
    outputs: dict[str, str]
    paths: frozenset[str] = field(repr=False)


def read_state(root: Path) -> State:
    """Read the state of a checkout. Outputs that are missing have the hash `missing`."""
    text = (root / "dvc.lock").read_text(encoding="utf-8") if (root / "dvc.lock").exists() else "{}"
    stages = (yaml.load(text, Loader=yaml.CSafeLoader) or {}).get("stages", {})
    outputs = {}
    for stage in stages.values():
        for out in stage.get("outs", []):
            try:
                outputs[out["path"]] = hash_path(root / out["path"])
            except InputError:
                outputs[out["path"]] = "missing"
    return State(stages, outputs, frozenset(_list_paths(root)))


def describe_differences(state: State, expected: State) -> Iterator[str]:
    """Yield what differs from an undisturbed run: a stage of dvc.lock, or an output."""
    for name in sorted(state.stages.keys() | expected.stages.keys()):
        here, there = state.stages.get(name), expected.stages.get(name)
        if here is None or there is None:
            yield f"dvc.lock: {name} is {'missing' if here is None else 'new'}"
        elif here != there:
            parts = [part for part in ("cmd", "deps", "params", "outs") if here.get(part) != there.get(part)]
            yield f"dvc.lock: {name} has other {' and '.join(parts)}"
    for path in sorted(state.outputs.keys() | expected.outputs.keys()):
        if state.outputs.get(path) != expected.outputs.get(path):
            yield f"{path}: is not as an undisturbed run makes it ({state.outputs.get(path)})"


def describe_half_written(root: Path, expected: State) -> Iterator[str]:
    """Yield what dvc.lock takes for a whole output and is not, between a fault and the rerun."""
    try:
        state = read_state(root)
    except yaml.YAMLError:  # cut short: no claim at all
        return
    for name, stage in state.stages.items():
        theirs = {out["path"]: out.get("md5") for out in expected.stages.get(name, {}).get("outs", [])}
        for out in stage.get("outs", []) if stage.get("deps") == expected.stages.get(name, {}).get("deps") else []:
            if out["path"] in theirs and out.get("md5") != theirs[out["path"]]:
                yield f"dvc.lock: {name}: {out['path']} has another hash"


def describe_leftovers(root: Path, state: State, expected: State) -> Iterator[str]:
    """Yield files and folders that no undisturbed run leaves, and locks that are held or lie about."""
    for path in sorted(state.paths - expected.paths):
        yield f"{path}: left lying about"
    cache = root / ".dvc/cache/files/md5"
    for folder in sorted(cache.iterdir()) if cache.is_dir() else []:
        if not re.fullmatch("[0-9a-f]{2}", folder.name):
            yield f"{folder.relative_to(root)}: left lying about"
            continue
        for file in folder.iterdir():
            if not OBJECT.fullmatch(file.name):
                yield f"{file.relative_to(root)}: left lying about"
            elif not file.name.endswith(".dir") and _md5(file) != folder.name + file.name:
                yield f"{file.relative_to(root)}: an object of the cache that is not what its name says"
    if holder := find_holder(root):
        yield f"the workspace's lock is held: {holder}"


def _md5(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _list_paths(root: Path) -> Iterator[str]:
    for folder, names, files in root.walk() if hasattr(root, "walk") else _walk(root):
        within = folder.relative_to(root).as_posix()
        prefix = "" if within == "." else f"{within}/"
        names[:] = [name for name in names if f"{prefix}{name}" not in (".git/objects", ".dvc/cache/files")]
        for name in (*names, *files):
            path = f"{prefix}{name}"
            if not BOOKKEEPING.match(path) and not path.startswith(VARYING):
                yield path


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    import os

    for folder, names, files in os.walk(root):
        yield Path(folder), names, files
