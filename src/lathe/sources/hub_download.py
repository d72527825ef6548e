"""A file that comes from the Hub: no longer than announced, and its part of the progress of all files."""

from typing import Any, BinaryIO

from lathe.common.progress import Progress


class TooLongError(OSError):
    """More bytes come than were announced."""


class BoundedFile:
    """A file that takes no more bytes than announced: a body without end would fill the disk."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def write(self, data: bytes) -> int:
        """Write, or raise TooLongError."""
        if self._file.tell() + len(data) > self._size:
            raise TooLongError
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class FileBar:
    """The bar of one file as http_get makes and uses it: it counts into the progress of all files."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.start = progress, progress.done

    def __call__(self, *, initial: int = 0, **_: object) -> "FileBar":
        """Begin the bar, where `initial` bytes are there already."""
        self.progress.add(self.start + initial - self.progress.done)  # `initial` bytes are kept of a broken download
        return self

    def __enter__(self) -> "FileBar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        """Count bytes that came."""
        self.progress.add(count)
