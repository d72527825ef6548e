"""Lineage of a GGUF: the `lathe.*` keys of its metadata, names, commits and digests of all that its bytes depend on.

The digest of a file or folder is DVC's own, computed from the files (md5; for a folder that of the list of its files,
with `.dir` at the end), so that it can be looked up in any `dvc.lock`. The digest of the parameters is the SHA-256 of
what `dvc.lock` has of them for the stage that writes the file, as JSON. None depends on folder, time or locale.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lathe
from lathe.common import paths
from lathe.common.dotted_keys import get_value
from lathe.common.errors import InputError
from lathe.common.json_files import read_json
from lathe.config.yaml_files import read_yaml

_CHUNK_BYTES = 1 << 20


def build_metadata(item: str) -> dict[str, str]:
    """Return the `lathe.*` keys of `base`, `adapter` or `merged`: origin and digest of each thing it was made from."""
    keys = {
        "lathe.version": lathe.__version__,
        "lathe.artifact": item,
        "lathe.base.digest": hash_path(paths.MODEL_BASE),
    }
    keys |= _read_origin("base", "model")
    if item != "base":
        keys |= _read_origin("dataset", "dataset")
        keys["lathe.dataset.digest"] = hash_path(paths.DATA_PROCESSED)
        keys["lathe.adapter.digest"] = hash_path(paths.MODEL_ADAPTER)
    keys["lathe.parameters.digest"] = digest_parameters(select_parameters(item))
    return keys


def select_parameters(item: str) -> dict[str, dict[str, Any]]:
    """Return the parameters upstream of `base`, `adapter` or `merged`, those alone, by file and key as in `dvc.lock`.

    They are those of the stages `convert_base`, `convert_adapter` and `convert_merged` in dvc.yaml.
    """
    tree, presets = read_yaml(paths.PARAMS), read_yaml(paths.PRESETS)
    keys, tables = ["seed", "convert"], {"model": "models"}
    if item == "base":
        keys += ["preprocess.added_tokens", "preprocess.chat_template_kwargs"]  # which change the base that is fetched
    else:
        keys += ["preprocess", "training", "sft", tree["training"]["method"], "lora", "quantization"]
        keys.append("evaluate.cluster_by")  # a column that preprocess keeps
        tables["dataset"] = "datasets"
    if item == "merged":
        keys.append("merge")
    return {
        paths.PARAMS.name: {key: get_value(tree, key) for key in keys},
        paths.PRESETS.name: {f"{table}.{tree[key]}": presets[table][tree[key]] for key, table in tables.items()},
    }


def digest_parameters(tree: Mapping[str, Any]) -> str:
    """Return the SHA-256 of parameters, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def hash_path(path: Path, advance: Callable[[int], object] | None = None) -> str:
    """Return DVC's hash of a file or folder, computed from its bytes; `advance` gets the number of bytes read.

    Raises InputError if there is no such file or folder.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; run the stage that writes it", code="no-such-file")
    if path.is_dir():
        return hash_folder({name: hash_path(file, advance) for name, file in list_files(path)})
    hashed = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            hashed.update(chunk)
            if advance:
                advance(len(chunk))
    return hashed.hexdigest()


def list_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield every file below a folder with its relative path as DVC writes it."""
    for file in sorted(folder.rglob("*")):
        if not file.is_dir():
            yield file.relative_to(folder).as_posix(), file


def hash_folder(files: Mapping[str, str]) -> str:
    """Return DVC's hash of a folder from its files' hashes by path; a test compares it with DVC's own."""
    listing = [{"md5": md5, "relpath": name} for name, md5 in sorted(files.items())]
    return hashlib.md5(json.dumps(listing).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _read_origin(name: str, item: str) -> dict[str, str]:
    [origin] = read_json(paths.METRICS / f"fetch/{item}.json")["origin"]
    keys = (
        *("name", "source", "id", "revision", "commit", "package", "version", "gguf", "sha256", "quantization"),
        *("adapter", "base", "base_revision", "base_commit"),  # what was merged into it, or what it was merged into
    )
    of_parts = {
        f"lathe.{name}.{part['name']}.{key}": part[key]
        for part in origin.get("datasets", [])  # of a mixture
        for key in keys[1:]
        if part.get(key)
    }
    return {f"lathe.{name}.{key}": origin[key] for key in keys if origin.get(key)} | of_parts
