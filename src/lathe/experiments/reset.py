"""Reset: params.yaml, metrics, dvc.lock and the outputs of the stages as in the last commit, and nothing else.

By Git's and DVC's own means: `git restore`, and the checkout of the outputs from DVC's cache.
"""

import shutil
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from lathe.common import paths
from lathe.common.dvc_api import DvcRepository, open_repository
from lathe.common.errors import InputError
from lathe.common.git import list_paths, read_line, run_git
from lathe.common.workspace_lock import hold_workspace
from lathe.experiments.interrupted import refuse_detached_head
from lathe.experiments.preflight import changed_parameters, format_changes
from lathe.provenance.dvc_lock import read_listing
from lathe.provenance.revisions import WORKSPACE, Revision, find_revision

RESTORED = (paths.PARAMS.name, "dvc.lock", "metrics")  # of Git
MEASURED = ("metrics/speed", "metrics/timings")  # which stages write, and no output of any
SHOWN = 10


@dataclass(frozen=True)
class Changes:
    """What is not as in the last commit; paths from the root."""

    parameters: dict[str, tuple[object, object]]
    files: list[str]  # that Git keeps
    outputs: list[str]
    missing: list[str]  # outputs that the cache has not got: they are left as they are
    added: list[str]  # what the stages have written and the commit has not: it is removed

    def describe(self) -> Iterator[str]:
        """Yield a line per subject, and per key of params.yaml."""
        if self.parameters:
            yield "params.yaml:"
            yield from format_changes({key: (now, then) for key, (then, now) in self.parameters.items()})
        absent = "not in DVC's cache, so left as they are (`dvc pull` may bring them)"
        listed = (("files", self.files), ("outputs", self.outputs), ("removed", self.added), (absent, self.missing))
        for heading, names in listed:
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                yield f"{heading}: {', '.join(names[:SHOWN])}{more}"


def run(*, yes: bool) -> None:
    """Show what is not as in the last commit, ask, and put it back. Raises InputError where nobody can be asked."""
    with hold_workspace("lathe reset"):
        refuse_detached_head()
        changes = find_changes()
        commit = read_line("log", "-1", "--format=%h %s")
        sys.stdout.write("".join(f"{line}\n" for line in changes.describe()))
        if not changes.files and not changes.outputs and not changes.added:
            sys.stdout.write(f"nothing to put back to commit {commit}\n")
            return
        if not yes and not _ask(f"Bring this back to commit {commit}? [y/N] "):
            sys.stdout.write("nothing was changed\n")
            return
        put_back(changes)
        sys.stdout.write(f"as in commit {commit}\n")


def find_changes() -> Changes:
    """Compare the workspace with the last commit."""
    # Added files are the user's: the commit has none to put in their place.
    files = list_paths("diff", "--name-only", "--relative", "--no-renames", "--diff-filter=a", "HEAD", "--", *RESTORED)
    parameters = changed_parameters() if paths.PARAMS.name in files else {}
    with open_repository(paths.ROOT) as repo:
        committed = repo.list_committed_outputs()
        outputs, missing = _find_changed_outputs(repo, [path for path, is_cached in committed.items() if is_cached])
        added = sorted(_find_added(repo, committed))
    return Changes(parameters, files, outputs, missing, added)


def put_back(changes: Changes) -> None:
    """Put back what differs, by Git and DVC."""
    if changes.added:
        run_git("rm", "--quiet", "--cached", "--ignore-unmatch", "--", *changes.added)
    for name in changes.added:
        file = paths.ROOT / name
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink()
    if changes.files:
        run_git("restore", "--source=HEAD", "--staged", "--worktree", "--", *changes.files)
    if changes.outputs:
        with open_repository(paths.ROOT) as repo:
            repo.checkout(changes.outputs)


def _find_changed_outputs(repo: DvcRepository, kept: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the outputs of stages that are not as in the last commit: those that the cache has, and the others."""
    head = Revision("HEAD", "HEAD")
    if head.read_text("dvc.lock") is None:  # nothing has run yet
        return [], []
    locked = {path: md5 for path in kept if (md5 := head.find_output_hash(path))}
    changed = {path: md5 for path, md5 in sorted(locked.items()) if (repo.hash_path(path) or ("",))[0] != md5}
    missing = [path for path, md5 in changed.items() if not _is_cached(repo, md5)]
    return [path for path in changed if path not in missing], missing


def _find_added(repo: DvcRepository, outputs: Collection[str]) -> Iterator[str]:
    """Yield what stages have written and the last commit has not: outputs that the cache has, and files of metrics.

    A run of another type of quantization or method of training leaves such; the next `dvc repro` would take them for
    changes. `outputs` are those of the last commit's stages.
    """
    written: dict[str, str] = {}
    for revision in (Revision("HEAD", "HEAD"), find_revision(WORKSPACE)):
        if revision.read_text("dvc.lock") is not None:
            outs = [out for stage in revision.stages.values() for out in stage.get("outs", [])]
            written |= {out["path"]: out["md5"] for out in outs}
    committed = set(list_paths("ls-tree", "-r", "--name-only", "HEAD"))
    present = {
        *list_paths("ls-files", "--others", "--exclude-standard", "--", "metrics"),
        *list_paths("diff", "--name-only", "--relative", "--no-renames", "--diff-filter=A", "HEAD", "--", "metrics"),
    }
    folders = (*(path for path, md5 in written.items() if md5.endswith(".dir")), *MEASURED)
    for name in present - set(outputs):
        if name in written or name.startswith(tuple(f"{folder}/" for folder in folders)):
            yield name
    for path, md5 in written.items():
        if path in committed or path in present or path in outputs or not (paths.ROOT / path).exists():
            continue
        if _is_cached(repo, md5) and (repo.hash_path(path) or ("",))[0] == md5:
            yield path


def _is_cached(repo: DvcRepository, md5: str) -> bool:
    listing = read_listing(repo, md5) if md5.endswith(".dir") else {"": md5}
    return listing is not None and all(repo.cached_file(name).is_file() for name in listing.values())


def _ask(question: str) -> bool:
    if not sys.stdin.isatty():
        raise InputError("lathe reset: asks, and there is no terminal to answer on; give --yes", code="no-terminal")
    sys.stdout.write(question)
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
