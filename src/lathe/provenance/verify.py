"""Verification: every output of dvc.lock read and compared with its hash, byte by byte; no time stamp is trusted."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lathe.common import paths
from lathe.common.dvc_api import DvcRepository, open_repository
from lathe.common.progress import Progress
from lathe.common.text import write_lines
from lathe.provenance.dvc_lock import read_current_stages, read_listing
from lathe.provenance.lineage import hash_folder, hash_path, list_files


@dataclass(frozen=True)
class OutputProblem:
    """A file that differs from dvc.lock: what is wrong, and what helps."""

    path: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}; {self.remedy}"


def run() -> int:
    """Verify the workspace and print what differs, a line each. Returns the exit code: 1 if anything does."""
    problems, outputs, size = verify()
    write_lines(map(str, problems))
    count = f"{len(problems)} of them" if problems else "nothing"
    sys.stdout.write(f"{outputs} outputs, {size:,} bytes read: {count} differs from dvc.lock\n")
    sys.stdout.write("(whether dvc.lock is what params.yaml, data and code would now make: `dvc status`)\n")
    return 1 if problems else 0


def verify() -> tuple[list[OutputProblem], int, int]:
    """Read every output of the stages that dvc.yaml has; return what differs, the number of outputs, and bytes read.

    A cached file that is no link to its output is read too. Raises InputError if there is no complete dvc.lock.
    """
    with open_repository(paths.ROOT) as repo:
        outs = [out for stage in read_current_stages(repo).values() for out in stage.get("outs", [])]
        with Progress("verify", sum(out.get("size", 0) for out in outs), unit="B") as progress:
            problems = [problem for out in outs for problem in _compare_output(repo, out, progress.add)]
        return problems, len(outs), progress.done


def _compare_output(
    repo: DvcRepository, out: dict[str, Any], advance: Callable[[int], object]
) -> Iterator[OutputProblem]:
    path, expected = paths.ROOT / out["path"], out["md5"]
    if not path.exists():
        if repo.cached_file(expected).exists():
            yield OutputProblem(out["path"], "missing", f"`dvc checkout {shlex.quote(out['path'])}` puts it back")
        else:
            yield OutputProblem(
                out["path"], "missing", f"`dvc pull {shlex.quote(out['path'])}` or `dvc repro` brings it"
            )
        return
    if not expected.endswith(".dir"):
        yield from _compare_file(repo, out["path"], path, expected, advance)
        return
    listing = read_listing(repo, expected)
    if path.is_dir() and listing is not None:
        for name, md5 in sorted(listing.items()):
            yield from _compare_file(repo, f"{out['path']}/{name}", path / name, md5, advance)
        for name, _ in list_files(path):
            if name not in listing:
                yield OutputProblem(f"{out['path']}/{name}", "not in dvc.lock", "remove it")
        return
    # Without the listing only the folder as a whole can be compared.
    hashes = {name: hash_path(file, advance) for name, file in list_files(path)} if path.is_dir() else {}
    if hash_folder(hashes) != expected:
        yield OutputProblem(
            out["path"],
            "changed (which file: unknown, DVC's cache has no list of them)",
            f"`dvc fetch {shlex.quote(out['path'])}`, then verify again",
        )


def _compare_file(
    repo: DvcRepository, name: str, path: Path, expected: str, advance: Callable[[int], object]
) -> Iterator[OutputProblem]:
    cached = repo.cached_file(expected)
    if not path.exists():
        yield OutputProblem(name, "missing", f"`dvc checkout {shlex.quote(name)}` puts it back")
    elif (actual := hash_path(path, advance)) != expected:
        problem = f"changed ({actual}, in dvc.lock {expected})"
        if not cached.exists():
            yield OutputProblem(name, problem, "`dvc pull` or `dvc repro` makes it again")
        elif os.path.samefile(path, cached) or hash_path(cached, advance) != expected:
            yield OutputProblem(name, f"{problem}, in DVC's cache too", _suggest_removal(cached))
        else:
            yield OutputProblem(name, problem, f"`dvc checkout --force {shlex.quote(name)}` puts it back")
    elif cached.exists() and not os.path.samefile(path, cached) and hash_path(cached, advance) != expected:
        shown = str(cached.relative_to(paths.ROOT))
        yield OutputProblem(shown, f"damaged, DVC's copy of {name}", _suggest_removal(cached))


def _suggest_removal(cached: Path) -> str:
    return f"remove {os.path.relpath(cached, paths.ROOT)}, then `dvc pull`, or `dvc repro` where no remote has it"
