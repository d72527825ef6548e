"""What a queued or temporary experiment would be made of: it runs in a checkout of its own.

As tried with DVC 3.67: changes of files that Git knows go along as they are at that moment, staged or not, removals
too, and so do changed contents of what `dvc add` tracks. What Git does not know stays behind, ignored or not.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lathe.common import dotted_keys, paths
from lathe.common.dvc_api import open_repository
from lathe.common.git import list_paths
from lathe.provenance.revisions import WORKSPACE, Revision

SHOWN = 10

# Where a stage looks for code and for what parameters name, beside the dependencies in dvc.yaml.
READ_FROM = ("data/local", "models/local", "rewards", "src", "stages")


@dataclass(frozen=True)
class Preflight:
    """Files by their paths from the root, in order."""

    changed: list[str]  # go along
    parameters: dict[str, tuple[object, object]]  # of params.yaml, in the last commit and now; they go along
    left_out: list[str]  # stay behind
    missed: list[str]  # of those the ones that a stage may read

    def lines(self) -> Iterator[str]:
        """Yield what there is to say, one subject a line; nothing where the last commit is all there is."""
        if self.changed:
            yield f"not committed, goes along as it is now: {_listed(self.changed)}"
        if self.parameters:
            changes = [f"{key} {then} -> {now}" for key, (then, now) in self.parameters.items()]
            yield f"params.yaml is not as committed: {_listed(changes)}; `git checkout params.yaml` puts it back"
        if self.missed:
            yield (
                f"stays behind, and a stage may read it: {_listed(self.missed)}; `dvc add` data and models, "
                "`git add` all else"
            )
        rest = [path for path in self.left_out if path not in self.missed]
        if rest:
            yield f"unknown to Git, stays behind: {_listed(rest)}"


def run() -> int:
    """Print what would go along and what would stay behind. Returns the exit code: 1 where a stage may miss a file."""
    found = look()
    lines = list(found.lines()) or ["nothing: queued and temporary experiments are made of the last commit"]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if found.missed else 0


def look() -> Preflight:
    """Ask Git and DVC; see `Preflight`."""
    changed = list_paths("diff", "--name-only", "--relative", "HEAD")
    untracked = list_paths("ls-files", "--others", "--exclude-standard")
    ignored = list_paths("ls-files", "--others", "--ignored", "--exclude-standard", "--directory", "--", *READ_FROM)
    ignored = [path for path in ignored if not _is_bookkeeping(path)]
    read = [*_dependencies(), *READ_FROM]
    return Preflight(
        changed=changed,
        parameters=changed_parameters() if paths.PARAMS.name in changed else {},
        left_out=sorted([*untracked, *ignored]),
        missed=sorted([path for path in untracked if _is_read(path, read)] + ignored),
    )


def changed_parameters() -> dict[str, tuple[object, object]]:
    """Return the keys of params.yaml that are not as in the last commit, with both values."""
    then, now = Revision("HEAD", "HEAD"), Revision(WORKSPACE, None)
    return dotted_keys.compare(dotted_keys.flatten(then.parameters), dotted_keys.flatten(now.parameters))


def _is_bookkeeping(path: str) -> bool:
    """Whether Git ignores it because DVC keeps it, or because nothing ever reads it."""
    parts = PurePosixPath(path).parts
    tracked = any(
        Path(paths.ROOT, *parts[:depth]).with_name(f"{parts[depth - 1]}.dvc").exists()
        for depth in range(1, len(parts) + 1)
    )
    return tracked or "__pycache__" in parts or path.rstrip("/").endswith(".partial")


def _dependencies() -> list[str]:
    with open_repository(paths.ROOT) as repo:
        return sorted(repo.dependencies())


def _is_read(path: str, read: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}/") for name in read)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
