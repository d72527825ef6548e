"""Changed code: which stage scripts and library files differ between two revisions."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from lathe.provenance import revisions
from lathe.provenance.revisions import Revision


def scripts_of(revision: Revision) -> set[str]:
    """Return the stems of the scripts that the stages of a revision run."""
    return {_script(stage) for stage in revision.stages.values()} - {""}


def _script(stage: Mapping[str, Any]) -> str:
    """The stem of the script that a stage runs, by which its timings are called; nothing where it runs none."""
    return next((PurePosixPath(word).stem for word in stage["cmd"].split() if word.startswith("stages/")), "")


def is_left_over(revision: Revision, stem: str, earlier: Sequence[Revision]) -> bool:
    """Whether the timings of a script are of another run: the oldest state that has just these made other things."""
    path = f"metrics/timings/{stem}.json"
    written = blob_at(revision, path)
    first = next((each for each in earlier if blob_at(each, path) == written and each.text("dvc.lock")), revision)
    ours, theirs = (
        {name: stage for name, stage in each.stages.items() if _script(stage) == stem} for each in (revision, first)
    )
    return ours != theirs


def blob_at(revision: Revision, path: str) -> str | None:
    """Git's hash of a file; None where there is none."""
    if revision.commit:
        return _blobs(revision.commit).get(path)
    found = revisions.git("hash-object", "--", path, unless_it_fails=True)
    return found.decode().strip() if found else None


@cache
def _blobs(commit: str) -> dict[str, str]:
    listed = revisions.git("ls-tree", "-r", commit, "--", "metrics/timings").decode()
    rows = (line.split("\t") for line in listed.splitlines())  # mode, type and hash; path
    return {path: kind.split()[2] for kind, path in rows}


def changed_code(one: Revision, other: Revision) -> list[str]:
    """Return the files of code that both revisions' stages depend on and that differ between them."""

    def code(revision: Revision) -> dict[str, str]:
        deps = [dep for stage in revision.stages.values() for dep in stage.get("deps", [])]
        return {dep["path"]: dep["md5"] for dep in deps if dep["path"].startswith(("src/", "stages/", "rewards/"))}

    ours, theirs = code(one), code(other)
    return sorted(path for path in ours.keys() & theirs.keys() if ours[path] != theirs[path])
