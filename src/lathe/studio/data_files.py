"""Files of data: those under data/local, uploads, how one is read, its preset, and rows as the model sees them."""

import io
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from starlette.concurrency import run_in_threadpool

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.scratch import temporary_folder
from lathe.config.base import SPLITS
from lathe.config.load import load, refuse_problems, validate_tree
from lathe.config.presets import Presets
from lathe.config.yaml_files import read_yaml
from lathe.data.inspect import TERMINAL_MARKS, show_examples
from lathe.data.split_files import SUFFIXES
from lathe.provenance.trace import Trace, trace
from lathe.studio.actions import resolve_inside
from lathe.studio.child_process import run_for_json

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,120}")
MOST_FILES = 500
MOST_ROWS = 20


@dataclass(frozen=True)
class LocalFile:
    """A file or folder of data by its path from the top, with the presets that name it."""

    path: str
    bytes: int
    presets: list[str]
    is_versioned: bool


def list_files() -> list[LocalFile]:
    """Return what is under data/local."""
    named: dict[str, list[str]] = {}
    for name, entry in (read_yaml(paths.PRESETS).get("datasets") or {}).items():
        if isinstance(entry, Mapping) and isinstance(entry.get("path"), str):
            named.setdefault(entry["path"].rstrip("/"), []).append(name)
    found = []
    if paths.DATA_LOCAL.is_dir():
        for file in sorted(paths.DATA_LOCAL.iterdir()):
            if file.name.startswith(".") or not (file.is_dir() or file.name.lower().endswith(SUFFIXES)):
                continue
            path = file.relative_to(paths.ROOT).as_posix()
            size = (
                file.stat().st_size if file.is_file() else sum(f.stat().st_size for f in file.rglob("*") if f.is_file())
            )
            versioned = file.with_name(f"{file.name}.dvc").is_file()
            found.append(LocalFile(path, size, named.get(path, []), versioned))
    return found[:MOST_FILES]


async def save_upload(name: str, pieces: AsyncIterator[bytes], *, replace: bool = False) -> str:
    """Write an upload to data/local, completely or not at all; return its path. Raises InputError for its name.

    With `replace` it takes the place of a file of this name.
    """
    if not FILE_NAME.fullmatch(name) or not name.lower().endswith(SUFFIXES):
        raise InputError(
            f"{name[:120]!r}: the name has letters, digits, dots, hyphens and underscores, and ends with one of "
            f"{', '.join(SUFFIXES)}; rename the file",
            code="file-name",
        )
    target = paths.DATA_LOCAL / name
    if target.is_dir() or ((target.exists() or target.is_symlink()) and not replace):
        raise InputError(f"data/local/{name}: is there already; rename yours, or replace it", code="file-exists")
    with paths.replace_file(target) as partial:
        with partial.open("wb") as file:
            async for piece in pieces:
                file.write(piece)
        if not partial.stat().st_size:
            raise InputError(f"{name}: is empty; choose a file with rows", code="empty-file")
    return target.relative_to(paths.ROOT).as_posix()


def check_file(path: str, prompt: str = "", completion: str = "") -> dict[str, Any]:
    """Return what `lathe data` says of a file or folder of data. Raises InputError where it cannot be read."""
    resolve_inside(path, paths.DATA_LOCAL)
    found = run_for_json(build_check(path, prompt, completion), codes=(0, 1))
    assert isinstance(found, dict)
    return found


def build_check(path: str, prompt: str = "", completion: str = "") -> list[str]:
    """Return the words of `lathe data`."""
    columns = ["--prompt", prompt] * bool(prompt) + ["--completion", completion] * bool(completion)
    # A value that begins with a hyphen would be taken for an option.
    return ["lathe", "data", path, *(f"{o}={v}" for o, v in zip(columns[::2], columns[1::2], strict=True)), "--json"]


def save_preset(name: str, path: str, prompt: str = "", completion: str = "") -> str:
    """Add a dataset to presets.yaml as its first, all other lines as they are; return the lines added.

    Raises InputError for a name that is taken or not allowed, and if presets.yaml would not be valid.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,60}", name):
        raise InputError(f"{name[:80]!r}: a preset's name has small letters, digits and hyphens", code="preset-name")
    resolve_inside(path, paths.DATA_LOCAL)
    tree = read_yaml(paths.PRESETS)
    if name in tree["datasets"]:
        raise InputError(f"{name}: presets.yaml has a dataset of this name; choose another", code="preset-exists")
    entry = {"source": "local", "path": path}
    entry |= {key: value for key, value in (("prompt", prompt), ("completion", completion)) if value}
    tree["datasets"][name] = entry
    refuse_problems(validate_tree(Presets, tree, paths.PRESETS.name))
    lines = yaml.safe_dump({name: entry}, sort_keys=False, allow_unicode=True, width=1_000_000)
    added = "".join(f"  {line}\n" for line in lines.splitlines())
    text = paths.PRESETS.read_text(encoding="utf-8")
    if text.count("\ndatasets:\n") != 1:
        raise InputError("presets.yaml: has no line `datasets:`; add the entry by hand", code="preset-place")
    with paths.replace_file(paths.PRESETS) as partial:
        partial.write_text(text.replace("\ndatasets:\n", f"\ndatasets:\n{added}\n", 1), encoding="utf-8")
    return added


def build_keeping(path: str) -> list[str]:
    """Return the commands that let DVC keep a file, and Git know of it: a run in a copy leaves out what is untracked.

    Raises InputError for a file that is not in data/local.
    """
    resolve_inside(path, paths.DATA_LOCAL)
    ignored = (Path(path).parent / ".gitignore").as_posix()
    return ["dvc", "add", path, "&&", "git", "add", f"{path}.dvc", ignored]


def read_marked_rows(split: str, rows: int) -> list[list[tuple[str, bool]]]:
    """Return the first processed rows of a split as `lathe inspect` prints them: texts, and whether each is learnt.

    Raises InputError if the rows or the model are not there.
    """
    if split not in SPLITS:
        raise InputError(f"split {split[:40]!r}: must be one of {', '.join(SPLITS)}", code="no-such-split")
    out, settings = io.StringIO(), load().params.preprocess
    rows = min(rows, MOST_ROWS)
    show_examples(split, rows=rows, row=None, ids=False, settings=settings, out=out, marks=TERMINAL_MARKS)
    return [_split_marks(block) for block in out.getvalue().split("\n\n") if block.strip()]


def _split_marks(text: str) -> list[tuple[str, bool]]:
    """Return the pieces of a text. The marks cannot be in a row: it is printed with escapes for what controls."""
    begin, end = TERMINAL_MARKS
    pieces = []
    for part in text.split(begin):
        learnt, found, rest = part.partition(end)
        pieces += [(learnt, True), (rest, False)] if found else [(part, False)]
    return [(piece, is_learnt) for piece, is_learnt in pieces if piece]


def list_ggufs() -> list[str]:
    """Return the GGUF files of the checkout's models, by their paths from the top."""
    folders = (paths.GGUF, paths.MODELS_LOCAL)
    files = (file for folder in folders if folder.is_dir() for file in folder.rglob("*.gguf"))
    return sorted(file.relative_to(paths.ROOT).as_posix() for file in files if file.is_file())[:MOST_FILES]


def list_models() -> list[str]:
    """Return the GGUF files that answer: no adapter, and no part that reads images."""
    parts = tuple(f"{(paths.GGUF / name).relative_to(paths.ROOT).as_posix()}/" for name in ("adapter", "mmproj"))
    return [name for name in list_ggufs() if not name.startswith(parts)]


def resolve_gguf(path: str) -> Path:
    """Return a GGUF file of the checkout's models. Raises InputError."""
    return resolve_inside(path, paths.ROOT / "models", suffixes=(".gguf",))


async def trace_upload(pieces: AsyncIterator[bytes]) -> Trace:
    """Return the origin of a GGUF that is sent, which is not kept. Raises InputError if it is none of Lathe's."""
    with temporary_folder(paths.SCRATCH / "studio", "dropped") as folder:
        file = folder / "dropped.gguf"
        with file.open("wb") as out:
            async for piece in pieces:
                out.write(piece)
        return await run_in_threadpool(trace, file)
