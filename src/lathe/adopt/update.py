"""Updates: `lathe init DIR --update` merges this Lathe's files into a repository that `lathe init` made."""

import sys
from pathlib import Path

from lathe.adopt.lathe_files import MARK, check_source, commit_files, describe_source, find_taken
from lathe.common.errors import InputError
from lathe.common.git import run_git, try_git


def update(folder: Path) -> None:
    """Merge the files of this Lathe's last commit into the repository; the user's own changes stay.

    Raises InputError if the repository has changes that are not committed, or if a file has been changed on both sides.
    """
    check_source()
    taken = find_taken(folder) if folder.is_dir() else None
    if taken is None:
        raise InputError(
            f"{folder}: has no commit with {MARK} in its history; name a repository that `lathe init` made",
            code="not-adopted",
        )
    root = Path(run_git("rev-parse", "--show-toplevel", root=folder).decode().strip())
    if run_git("status", "--porcelain", "--untracked-files=no", root=root).strip():
        raise InputError(f"{folder}: has changes that are not committed; commit them first", code="uncommitted-changes")
    commit = commit_files(root, taken)
    if not run_git("diff", "--name-only", taken, commit, root=root).strip():
        sys.stdout.write(f"{folder}: has the files of {describe_source()} already\n")
        return
    message = f"{describe_source()} merged"
    if try_git("merge", "--quiet", "--no-ff", "-m", message, commit, root=root) is None:
        names = run_git("diff", "--name-only", "--diff-filter=U", root=root).decode().split()
        if not names:
            run_git("merge", "--no-ff", "-m", message, commit, root=root)  # raises with Git's reason
        raise InputError(
            f"{', '.join(names)}: changed here and in Lathe; edit, `git add` and `git commit` them, "
            "or `git merge --abort`",
            code="merge-conflict",
        )
    changed = run_git("diff", "--name-only", "HEAD^1", "HEAD", root=root).decode().splitlines()
    sys.stdout.write(
        f"{folder}: {describe_source()} merged, {len(changed)} files changed; "
        "next: make setup, lathe check; CHANGELOG.md of Lathe says what is new\n"
    )
