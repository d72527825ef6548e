"""Git: the only module that runs it."""

import io
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lathe.common import paths
from lathe.common.errors import InputError


def run_git(*arguments: str, root: Path | None = None, stdin: str = "") -> bytes:
    """Return what Git prints, run in `root` (by default this checkout). Raises InputError if Git fails."""
    done = _run(arguments, root, stdin)
    if done.returncode == 0:
        return done.stdout
    reason = (done.stderr.decode(errors="replace").strip() or "it failed").splitlines()[0]
    remedy = "run this in a clone of the repository" if "not a git repository" in reason else "see `git status`"
    raise InputError(f"git {arguments[0]}: {reason}; {remedy}", code="git-failed")


def try_git(*arguments: str, root: Path | None = None, stdin: str = "") -> bytes | None:
    """Return what Git prints, or None if it fails. Raises InputError if Git is not installed."""
    done = _run(arguments, root, stdin)
    return done.stdout if done.returncode == 0 else None


def read_line(*arguments: str, root: Path | None = None) -> str | None:
    """Return what Git prints without white space around it, or None if it fails or prints nothing."""
    printed = try_git(*arguments, root=root)
    return (printed.decode(errors="replace").strip() or None) if printed else None


def list_paths(*arguments: str, root: Path | None = None) -> list[str]:
    """Return the paths that a command of Git lists, which takes `-z`. Raises InputError if Git fails."""
    command, *others = arguments
    return [name for name in os.fsdecode(run_git(command, "-z", *others, root=root)).split("\0") if name]


def read_blobs(names: Sequence[str], root: Path | None = None) -> list[bytes | None]:
    """Return the contents of files by names such as `COMMIT:./params.yaml`, read by one process of Git.

    None stands for a file that does not exist.
    """
    if not names:
        return []
    printed = io.BytesIO(run_git("cat-file", "--batch", root=root, stdin="".join(f"{name}\n" for name in names)))
    contents: list[bytes | None] = []
    for _ in names:
        head = printed.readline().decode()
        if not (found := re.fullmatch(r"[0-9a-f]+ (\w+) (\d+)\n", head)):  # `NAME missing`
            contents.append(None)
            continue
        content = printed.read(int(found[2]))
        printed.read(1)
        contents.append(content if found[1] == "blob" else None)
    return contents


def find_head(root: Path | None = None) -> str | None:
    """Return the hash of HEAD; None if there is no commit."""
    return read_line("rev-parse", "--verify", "--quiet", "HEAD", root=root)


def _run(arguments: tuple[str, ...], root: Path | None, stdin: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=root or paths.ROOT, input=stdin.encode(), capture_output=True, check=False
        )
    except FileNotFoundError:
        message = "git is not installed; install it: the pipeline lives in a Git repository"
        raise InputError(message, code="git-missing") from None
