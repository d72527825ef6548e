"""Every output of dvc.lock read again, byte by byte, and held against it: no time stamp is trusted."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lathe import paths
from lathe.errors import InputError
from lathe.lineage import digest, files_in, folder_digest
from lathe.params import read_yaml
from lathe.progress import Progress

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


def locked_stages(lock: Path | str) -> dict[str, Any]:
    """Return the stages of a dvc.lock: a file, or its text."""
    if isinstance(lock, Path):
        if not lock.exists():
            raise InputError(
                f"{lock.name}: no such file; `make repro` makes one, `git checkout {lock.name}` restores it"
            )
        tree = read_yaml(lock)
    else:
        from ruamel.yaml import YAML

        tree = YAML(typ="safe").load(lock)
    if not isinstance(tree, dict) or not isinstance(tree.get("stages"), dict):
        raise InputError("dvc.lock: holds no stages; run `python -m lathe check`, which restores one cut short")
    return tree["stages"]


def current_stages(repo: "Repo") -> dict[str, Any]:
    """Return what the workspace's dvc.lock says of the stages that dvc.yaml has; it keeps others, of former types."""
    from dvc.stage import PipelineStage

    stages = locked_stages(Path(repo.root_dir) / "dvc.lock")
    current = {stage.name for stage in repo.index.stages if isinstance(stage, PipelineStage)}
    return {name: stage for name, stage in stages.items() if name in current}


def cached_file(repo: "Repo", md5: str) -> Path:
    """Return where DVC's cache has the contents, or would have them."""
    return Path(repo.cache.local.oid_to_path(md5))


def cached_listing(repo: "Repo", md5: str) -> dict[str, str] | None:
    """Return the files of a folder by DVC's hash of it, each with its hash; None where the cache has no whole list."""
    file = cached_file(repo, md5)
    if not file.is_file() or digest(file) != md5.removesuffix(".dir"):
        return None
    return {entry["relpath"]: entry["md5"] for entry in json.loads(file.read_text(encoding="utf-8"))}


@contextmanager
def one_line_of_dvc() -> Iterator[None]:
    """Turn DVC's refusals, of a damaged dvc.yaml for one, into InputError."""
    from dvc.exceptions import DvcException

    try:
        yield
    except DvcException as error:
        raise InputError(f"dvc: {' '.join(str(error).split())}; mend it and run again") from None


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
