"""Every output of dvc.lock read again, byte by byte, and held against it: no time stamp is trusted."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe.common import paths
from lathe.common.progress import Progress
from lathe.provenance.dvc_lock import cached_file, cached_listing, current_stages, one_line_of_dvc
from lathe.provenance.lineage import digest, files_in, folder_digest

if TYPE_CHECKING:
    from dvc.repo import Repo


@dataclass(frozen=True)
class Difference:
    """A file that is not as dvc.lock has it: what is wrong, and what helps."""

    path: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}; {self.remedy}"


def run() -> int:
    """Verify the workspace and print what differs, a line each. Returns the exit code: 1 if anything does."""
    differences, outputs, size = verify()
    for difference in differences:
        sys.stdout.write(f"{difference}\n")
    count = f"{len(differences)} of them" if differences else "nothing"
    sys.stdout.write(f"{outputs} outputs, {size:,} bytes read: {count} differs from dvc.lock\n")
    sys.stdout.write("(whether dvc.lock is what params.yaml, data and code would now make: `dvc status`)\n")
    return 1 if differences else 0


def verify() -> tuple[list[Difference], int, int]:
    """Read every output of the stages that dvc.yaml has; return what differs, the number of outputs, and bytes read.

    A cached file that is no link to its output is read too. Raises InputError where there is no whole dvc.lock.
    """
    from dvc.repo import Repo

    with one_line_of_dvc(), Repo(str(paths.ROOT)) as repo:
        outs = [out for stage in current_stages(repo).values() for out in stage.get("outs", [])]
        with Progress("verify", sum(out.get("size", 0) for out in outs), unit="B") as progress:
            differences = [found for out in outs for found in _compare(repo, out, progress.add)]
        return differences, len(outs), progress.done


def _compare(repo: "Repo", out: dict[str, Any], advance: Callable[[int], object]) -> Iterator[Difference]:
    path, expected = paths.ROOT / out["path"], out["md5"]
    if not path.exists():
        if cached_file(repo, expected).exists():
            yield Difference(out["path"], "missing", f"`dvc checkout {out['path']}` puts it back")
        else:
            yield Difference(out["path"], "missing", f"`dvc pull {out['path']}` or `dvc repro` brings it")
        return
    if not expected.endswith(".dir"):
        yield from _compare_file(repo, out["path"], path, expected, advance)
        return
    listing = cached_listing(repo, expected)
    if path.is_dir() and listing is not None:
        for name, md5 in sorted(listing.items()):
            yield from _compare_file(repo, f"{out['path']}/{name}", path / name, md5, advance)
        for name, _ in files_in(path):
            if name not in listing:
                yield Difference(f"{out['path']}/{name}", "not in dvc.lock", "remove it")
        return
    # Without the list, all that can be said is whether the folder as a whole is the one.
    found = {name: digest(file, advance) for name, file in files_in(path)} if path.is_dir() else {}
    if folder_digest(found) != expected:
        yield Difference(
            out["path"],
            "changed (which file: unknown, DVC's cache has no list of them)",
            f"`dvc fetch {out['path']}`, then verify again",
        )


def _compare_file(
    repo: "Repo", name: str, path: Path, expected: str, advance: Callable[[int], object]
) -> Iterator[Difference]:
    cached = cached_file(repo, expected)
    if not path.exists():
        yield Difference(name, "missing", f"`dvc checkout {name}` puts it back")
    elif (found := digest(path, advance)) != expected:
        problem = f"changed ({found}, in dvc.lock {expected})"
        if not cached.exists():
            yield Difference(name, problem, "`dvc pull` or `dvc repro` makes it anew")
        elif os.path.samefile(path, cached) or digest(cached, advance) != expected:
            yield Difference(name, f"{problem}, in DVC's cache too", _forget(cached))
        else:
            yield Difference(name, problem, f"`dvc checkout --force {name}` puts it back")
    elif cached.exists() and not os.path.samefile(path, cached) and digest(cached, advance) != expected:
        yield Difference(str(cached.relative_to(paths.ROOT)), f"damaged, DVC's copy of {name}", _forget(cached))


def _forget(cached: Path) -> str:
    return f"remove {os.path.relpath(cached, paths.ROOT)}, then `dvc pull`, or `dvc repro` where no remote has it"
