"""Changed code: which stage scripts and library files differ between two revisions."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from lathe.common.git import read_line, run_git
from lathe.provenance.revisions import Revision


def list_scripts(revision: Revision) -> set[str]:
    """Return the stems of the scripts that the stages of a revision run."""
    return {_find_script(stage) for stage in revision.stages.values()} - {""}


def _find_script(stage: Mapping[str, Any]) -> str:
    """Return the stem of the script that a stage runs, which names its timings; empty if it runs none."""
    return next((PurePosixPath(word).stem for word in stage["cmd"].split() if word.startswith("stages/")), "")


def has_stale_timings(revision: Revision, stem: str, earlier: Sequence[Revision]) -> bool:
    """Tell whether the timings of a script are of another run: the oldest revision with the same made other outputs."""
    path = f"metrics/timings/{stem}.json"
    blob = find_blob(revision, path)
    first = next(
        (other for other in earlier if find_blob(other, path) == blob and other.read_text("dvc.lock")), revision
    )
    ours, theirs = (
        {name: stage for name, stage in state.stages.items() if _find_script(stage) == stem}
        for state in (revision, first)
    )
    return ours != theirs


def find_blob(revision: Revision, path: str) -> str | None:
    """Return Git's hash of a file; None if there is none."""
    if revision.commit:
        return _list_blobs(revision.commit).get(path)
    return read_line("hash-object", "--", path)


@cache
def _list_blobs(commit: str) -> dict[str, str]:
    listed = run_git("ls-tree", "-r", commit, "--", "metrics/timings").decode()
    rows = (line.split("\t") for line in listed.splitlines())  # mode, type and hash; path
    return {path: kind.split()[2] for kind, path in rows}


def list_changed_code(one: Revision, other: Revision) -> list[str]:
    """Return the files of code that both revisions' stages depend on and that differ between them."""

    def collect_code(revision: Revision) -> dict[str, str]:
        deps = [dep for stage in revision.stages.values() for dep in stage.get("deps", [])]
        return {dep["path"]: dep["md5"] for dep in deps if dep["path"].startswith(("src/", "stages/", "rewards/"))}

    ours, theirs = collect_code(one), collect_code(other)
    return sorted(path for path in ours.keys() & theirs.keys() if ours[path] != theirs[path])
