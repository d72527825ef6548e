"""What a GGUF says of its own origin: names and commits, and digests of all that its bytes depend on.

A digest of a file or folder is DVC's own (md5; of a folder, of the list of its files, with `.dir` behind), so that it
can be looked up in any `dvc.lock`; it is computed from the files. The digest of the parameters is the SHA-256 of what
`dvc.lock` holds of them for the stage that writes the file, as JSON. None depends on folder, time or locale.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lathe
from lathe.common import paths
from lathe.common.errors import InputError
from lathe.config.yaml_files import read_yaml

_CHUNK_BYTES = 1 << 20


def metadata(item: str) -> dict[str, str]:
    """Return the `lathe.*` keys of `base`, `adapter` or `merged`: origin and digest of each thing it was made from."""
    facts = {"lathe.version": lathe.__version__, "lathe.artifact": item, "lathe.base.digest": digest(paths.MODEL_BASE)}
    facts |= _origin("base", "model")
    if item != "base":
        facts |= _origin("dataset", "dataset")
        facts["lathe.dataset.digest"] = digest(paths.DATA_PROCESSED)
        facts["lathe.adapter.digest"] = digest(paths.MODEL_ADAPTER)
    facts["lathe.parameters.digest"] = parameters_digest(parameters(item))
    return facts


def parameters(item: str) -> dict[str, dict[str, Any]]:
    """Return the parameters upstream of `base`, `adapter` or `merged`, those alone, by file and key as in `dvc.lock`.

    They are those of the stages `convert_base`, `convert_adapter` and `convert_merged` in dvc.yaml.
    """
    tree, presets = read_yaml(paths.PARAMS), read_yaml(paths.PRESETS)
    keys, tables = ["seed", "convert"], {"model": "models"}
    if item != "base":
        keys += ["preprocess", "training", "sft", tree["training"]["method"], "lora", "quantization"]
        tables["dataset"] = "datasets"
    if item == "merged":
        keys.append("merge")
    return {
        paths.PARAMS.name: {key: tree[key] for key in keys},
        paths.PRESETS.name: {f"{table}.{tree[key]}": presets[table][tree[key]] for key, table in tables.items()},
    }


def parameters_digest(tree: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the SHA-256 of parameters, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def digest(path: Path, advance: Callable[[int], object] | None = None) -> str:
    """Return DVC's hash of a file or folder, read anew; `advance` is told how many bytes have been read.

    Raises InputError where there is none.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; run the stage that writes it")
    if path.is_dir():
        return folder_digest({name: digest(file, advance) for name, file in files_in(path)})
    hashed = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            hashed.update(chunk)
            if advance:
                advance(len(chunk))
    return hashed.hexdigest()


def files_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield every file below a folder, with its path in it as DVC writes it."""
    for file in sorted(folder.rglob("*")):
        if not file.is_dir():
            yield file.relative_to(folder).as_posix(), file


def folder_digest(files: Mapping[str, str]) -> str:
    """Return DVC's hash of a folder from its files' hashes by path."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    tree = Tree()
    for name, md5 in files.items():
        tree.add(tuple(name.split("/")), None, HashInfo("md5", md5))
    tree.digest()
    return str(tree.oid)


def _origin(name: str, fetched: str) -> dict[str, str]:
    [facts] = json.loads((paths.METRICS / f"fetch/{fetched}.json").read_text(encoding="utf-8"))["origin"]
    return {
        f"lathe.{name}.{key}": facts[key] for key in ("name", "source", "id", "revision", "commit") if facts.get(key)
    }
