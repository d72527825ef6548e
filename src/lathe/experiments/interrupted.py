"""Interrupted experiments: DVC runs one in the workspace on a detached HEAD, and a kill leaves HEAD there.

Whether it was DVC that detached HEAD is told by Git's reflog together with what DVC removes at an experiment's end. A
checkout that was detached on purpose, as CI does, is no fault.
"""

import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from lathe.common import operating_system, paths
from lathe.common.dvc_api import ProcessNote, find_experiment_note, find_stash_note
from lathe.common.errors import InputError
from lathe.common.git import read_line, run_git, try_git

DETACHED = re.compile(r"checkout: moving from (\S+) to ([0-9a-f]{40})")
BASELINE = "refs/exps/exec/EXEC_BASELINE"  # there from an experiment's start to its end


SECONDS_TO_STASH = 600  # at most between DVC's note that it begins, and HEAD
SECONDS_TO_WAIT = 60  # for the end of that of another command


@dataclass(frozen=True)
class DetachedHead:
    """HEAD on no branch though it was on `branch`, which still is at the commit that HEAD was detached at.

    `by_experiment`: DVC's own marks show that an experiment was interrupted. `stashed`: it had put the changes of the
    workspace into Git's stash. `commit`: the last one that has been made on HEAD since.
    """

    branch: str
    by_experiment: bool
    stashed: bool = False
    commit: str | None = None

    def describe(self) -> str:
        """Say what an interrupted experiment has left."""
        changes = "; your changes are in `git stash list`" if self.stashed else ""
        return f"HEAD is on no branch: an experiment that ran on {self.branch} was interrupted{changes}"

    @property
    def remedy(self) -> str:
        """What to type."""
        branch = shlex.quote(self.branch)
        if self.stashed:
            return f"`git switch --force {branch} && git stash pop --index`"
        if self.commit:
            return f"`git switch {branch} && git merge {self.commit[:10]}`"
        return f"`git switch {branch}`"


def describe_detached_head(root: Path = paths.ROOT) -> str | None:
    """Return a line that says how to come back from an interrupted experiment; None where there was none."""
    found = find_detached_head(root)
    return f"{found.describe()}; {found.remedy} goes back" if found and found.by_experiment else None


def refuse_detached_head(root: Path = paths.ROOT) -> None:
    """Raise InputError where an interrupted experiment has left HEAD: the marks of it go with the next experiment."""
    if line := describe_detached_head(root):
        raise InputError(line, code="detached-head")


def find_detached_head(root: Path = paths.ROOT) -> DetachedHead | None:
    """Return how HEAD came to be detached at a commit by its hash; None on a branch, and while an experiment runs."""
    head = read_line("rev-parse", "--verify", "--quiet", "HEAD", root=root)
    if head is None or try_git("symbolic-ref", "--quiet", "HEAD", root=root):
        return None
    history = _read_history(root)
    while history and history[0][1].startswith("commit"):
        del history[0]
    moved = DETACHED.fullmatch(history[0][1]) if history else None
    if moved is None:
        return None
    branch, start = moved.groups()
    # DVC detaches HEAD at the branch's own commit.
    if read_line("rev-parse", "--verify", "--quiet", f"refs/heads/{branch}", root=root) != start:
        return None
    running, stashing = find_experiment_note(root), find_stash_note(root)
    if any(map(_is_at_work, (running, stashing))):
        return None
    commit = None if head == start else head
    before = history[1][1] if history[1:] else ""
    if before == f"dvc: Restore HEAD to '{branch}'" and _find_commit(BASELINE, root) == start:
        return DetachedHead(branch, by_experiment=True, commit=commit)
    seconds = int(history[0][0]) - stashing.written if stashing else -1
    if commit is None and -1 < seconds < SECONDS_TO_STASH:
        return DetachedHead(branch, by_experiment=True, stashed=_find_commit("refs/stash^1", root) == start)
    return DetachedHead(branch, by_experiment=False, commit=commit)


def wait_for_stash(root: Path = paths.ROOT) -> None:
    """Wait while another command prepares an experiment: the workspace is then in Git's stash, its files are HEAD's.

    Raises InputError if that takes too long.
    """
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while is_stashed(root):
        if time.monotonic() > deadline:
            note = find_stash_note(root)
            raise InputError(
                f"process {note.pid if note else '?'} has been preparing an experiment here for {SECONDS_TO_WAIT} s, "
                "with your changes in Git's stash; wait for it, or stop it",
                code="workspace-stashed",
            )
        time.sleep(0.1)


def is_stashed(root: Path = paths.ROOT) -> bool:
    """Tell whether a process that is running prepares an experiment, with the workspace in Git's stash."""
    return _is_at_work(find_stash_note(root))


def _is_at_work(note: ProcessNote | None) -> bool:
    return note is not None and operating_system.is_running(note.pid, started_by=note.written)


def _read_history(root: Path) -> list[list[str]]:
    """Return what moved HEAD, the newest first, each with its time in seconds."""
    form = ("--format=%gd %gs", "--date=unix", "--max-count=100")
    lines = (read_line("log", "--walk-reflogs", *form, "HEAD", root=root) or "").split("\n")
    return [list(entry) for line in lines for entry in re.findall(r"@\{(\d+)\} ?(.*)", line)]


def _find_commit(ref: str, root: Path) -> str | None:
    return read_line("rev-parse", "--verify", "--quiet", ref, root=root)


def switch_back(root: Path = paths.ROOT) -> str | None:
    """Put HEAD back on its branch after an interrupted experiment; return the branch, None where nothing was done."""
    found = find_detached_head(root)
    if found is None or not found.by_experiment or found.commit or found.stashed:
        return None
    run_git("switch", "--quiet", found.branch, root=root)
    return found.branch
