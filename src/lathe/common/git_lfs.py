"""Git LFS pointers: three lines of text that stand for a file where a repository was cloned without git-lfs."""

from pathlib import Path

from lathe.common.errors import InputError

POINTER = b"version https://git-lfs.github.com/spec/"
MAX_POINTER_BYTES = 1024


def refuse_pointer(file: Path, shown: str) -> None:
    """Raise InputError if a file is a pointer; `shown` is its name in the message."""
    if file.stat().st_size > MAX_POINTER_BYTES:
        return
    with file.open("rb") as source:
        if source.read(len(POINTER)) == POINTER:
            raise InputError(
                f"{shown}: is a pointer of Git LFS, not the file itself; run `git lfs install && git lfs pull` in the "
                "repository that it comes from",
                code="lfs-pointer",
            )
