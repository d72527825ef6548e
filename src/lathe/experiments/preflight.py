"""Preflight of a queued or temporary experiment, which runs in a checkout of its own: what it includes and misses.

Tried with DVC 3.67: it includes changes of files that Git tracks as they are at that moment, staged or not, removals
too, and changed contents of what `dvc add` tracks. What Git does not track is missing, ignored or not.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lathe.common import dotted_keys, paths
from lathe.common.dvc_api import open_repository
from lathe.common.git import list_paths
from lathe.common.text import write_lines
from lathe.config.pipelines import MAIN, Pipeline
from lathe.provenance.revisions import WORKSPACE, ClassifierRevision, Revision

SHOWN = 10  # files
SHOWN_CHANGES = 15  # keys
LONGEST_VALUE = 80  # characters

# Folders that stages read beside the dependencies in dvc.yaml: code, and what parameters name.
READ_FROM = ("data/local", "models/local", "rewards", "src", "stages")


@dataclass(frozen=True)
class Preflight:
    """Files by their paths from the root, in order."""

    changed: list[str]  # included
    parameters: dict[str, tuple[object, object]]  # of params.yaml, in the last commit and now; included
    left_out: list[str]
    missed: list[str]  # those left out that a stage may read

    def describe(self, *, parameters: bool = True) -> Iterator[str]:
        """Yield a line per subject, and per changed key of params.yaml; none if the last commit is all there is."""
        if self.changed:
            yield f"included, though not committed: {_join(self.changed)}"
        if self.parameters and parameters:
            yield "params.yaml is not as committed; `git restore params.yaml` puts it back:"
            yield from format_changes(self.parameters)
        if self.missed:
            yield (
                f"left out, though a stage may read it: {_join(self.missed)}; `dvc add` data and models, "
                "`git add` all else"
            )
        rest = [path for path in self.left_out if path not in self.missed]
        if rest:
            yield f"left out, unknown to Git: {_join(rest)}"


def run() -> int:
    """Print what would be included and what would be left out; return the exit code, 1 if a stage may miss a file."""
    changes = find_changes()
    lines = list(changes.describe()) or ["nothing: queued and temporary experiments are made of the last commit"]
    write_lines(lines)
    return 1 if changes.missed else 0


def find_changes() -> Preflight:
    """Compare the workspace with the last commit, by Git and DVC."""
    changed = list_paths("diff", "--name-only", "--relative", "HEAD")
    untracked = list_paths("ls-files", "--others", "--exclude-standard")
    ignored = list_paths("ls-files", "--others", "--ignored", "--exclude-standard", "--directory", "--", *READ_FROM)
    ignored = [path for path in ignored if not _is_bookkeeping(path)]
    read = [*_list_dependencies(), *READ_FROM]
    return Preflight(
        changed=changed,
        parameters=changed_parameters() if paths.PARAMS.name in changed else {},
        left_out=sorted([*untracked, *ignored]),
        missed=sorted([path for path in untracked if _is_read(path, read)] + ignored),
    )


def format_changes(changes: Mapping[str, Sequence[object]], *, shown: int = SHOWN_CHANGES) -> Iterator[str]:
    """Yield a line per key: its value before, and the one or several after it; at most so many, and how many more."""
    for key, (then, *now) in list(changes.items())[:shown]:
        yield f"  {key}: {_format_value(then)} -> {', '.join(map(_format_value, now))}"
    if len(changes) > shown:
        yield f"  and {len(changes) - shown} more"


def _format_value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def changed_parameters(pipeline: Pipeline = MAIN) -> dict[str, tuple[object, object]]:
    """Return the keys of a pipeline's params.yaml that are not as in the last commit, with both values."""
    kind = Revision if pipeline is MAIN else ClassifierRevision
    then, now = kind("HEAD", "HEAD"), kind(WORKSPACE, None)
    changes = dotted_keys.compare(dotted_keys.flatten(then.parameters), dotted_keys.flatten(now.parameters))
    # The selected presets are among a revision's parameters, but not in params.yaml.
    return {key: values for key, values in changes.items() if key.split(".")[0] not in ("models", "datasets")}


def _is_bookkeeping(path: str) -> bool:
    """Tell whether Git ignores a path because DVC tracks it, or because nothing reads it."""
    parts = PurePosixPath(path).parts
    tracked = any(
        Path(paths.ROOT, *parts[:depth]).with_name(f"{parts[depth - 1]}.dvc").exists()
        for depth in range(1, len(parts) + 1)
    )
    return tracked or "__pycache__" in parts or path.rstrip("/").endswith(".partial")


def _list_dependencies() -> list[str]:
    with open_repository(paths.ROOT) as repo:
        return sorted(repo.dependencies())


def _is_read(path: str, read: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}/") for name in read)


def _join(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
