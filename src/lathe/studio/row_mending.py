"""Faulty rows of a JSONL file, to be mended on the page: their lines as text, and a file with those lines replaced."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.studio.actions import resolve_inside

SUFFIX = ".jsonl"
MOST_LINES = 20
LONGEST_LINE_BYTES = 20_000  # a longer one is better mended in an editor
PLACE = re.compile(r":(\d+)$")


@dataclass(frozen=True)
class FaultyRow:
    """A line of a file that would be dropped: its number from 1, its text, and why."""

    line: int
    text: str
    problem: str


@dataclass(frozen=True)
class FaultyRows:
    """The first faulty rows of a file; `version` tells whether the file has changed since."""

    version: str
    rows: list[FaultyRow]


def read_faulty_rows(path: str, found: Mapping[str, Any]) -> FaultyRows | None:
    """Return the faulty rows that `lathe data` has found in a file; None for a file that is no JSONL in UTF-8.

    Lines that are too long to be shown are left out.
    """
    file = resolve_inside(path, paths.DATA_LOCAL)
    encodings = {each.get("encoding", "UTF-8") for each in found["files"]}
    if not file.is_file() or not path.lower().endswith(SUFFIX) or not encodings <= {"UTF-8"}:
        return None
    problems: dict[int, str] = {}
    for fault in found["faults"].values():
        for case in fault["first"]:
            if match := PLACE.search(case["at"]):
                problems.setdefault(int(match[1]), f"{case['field'] or ''} {case['problem']}".strip())
    wanted = sorted(problems)[:MOST_LINES]
    rows = []
    version = _read_version(file)
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number in wanted and len(line) <= LONGEST_LINE_BYTES:
                rows.append(FaultyRow(number, line.decode(errors="replace").rstrip("\r\n"), problems[number]))
            if not wanted or number >= wanted[-1]:
                break
    return FaultyRows(version, rows)


def replace_lines(path: str, version: str, texts: Mapping[int, str]) -> int:
    """Write a file anew with these lines replaced, an empty text removing its line; return how many were changed.

    Raises InputError for a text that is no JSON object, and if the file has changed since it was shown.
    """
    file = resolve_inside(path, paths.DATA_LOCAL, suffixes=(SUFFIX,))
    if version != _read_version(file):
        raise InputError(f"{path}: has changed since it was read; check it again", code="file-changed")
    written = {number: _compact(path, number, text) for number, text in texts.items()}
    changed = 0
    # A new file: the old one may be a link into DVC's cache.
    with paths.replace_file(file) as partial, partial.open("wb") as out, file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            mended = written.get(number)
            if mended is None or mended == line.rstrip(b"\r\n"):
                out.write(line)
                continue
            changed += 1
            out.write(mended + b"\n" if mended else b"")
    return changed


def _compact(path: str, number: int, text: str) -> bytes:
    """Return a row on one line. Raises InputError for a text that is no JSON object."""
    if not text.strip():
        return b""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:{number}: is no JSON: {error}; mend it", code="invalid-row") from None
    if not isinstance(row, dict):
        raise InputError(f'{path}:{number}: must be a JSON object, as {{"prompt": …}}', code="invalid-row")
    is_one_line = "\n" not in text.strip()  # which is kept as it is written
    return (text.strip() if is_one_line else json.dumps(row, ensure_ascii=False)).encode()


def _read_version(file: Path) -> str:
    facts = file.stat()
    return f"{facts.st_ino}-{facts.st_size}-{facts.st_mtime_ns}"
