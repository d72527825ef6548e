"""GGUF header: metadata read without llama.cpp (gguf-py's reader takes 7 s where the vocabulary has 150,000 tokens)."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {10: "<Q", 11: "<q", 12: "<d"}

# More than any file has; without bounds a header of a few bytes could make its reader loop and allocate for ever.
_MOST_KEYS = 65_536
_MOST_ITEMS = 16_000_000  # texts of an array, such as a vocabulary
_MOST_BYTES = 64 << 20  # of a text
_ALIGNMENTS = {1 << bit for bit in range(21)}


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a GGUF file without arrays; raises InputError if the file is not GGUF."""
    with open_header(path) as header:
        return header.metadata


@contextmanager
def open_header(path: Path) -> Iterator["Header"]:
    """Open the header of a GGUF file; what is wrong with it, also in the block, becomes an InputError."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a GGUF file", code="no-such-file")
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file; it begins with {magic!r}", code="not-gguf")
        with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            try:
                yield Header(data)
            except (struct.error, KeyError, OverflowError, ValueError) as error:
                raise InputError(
                    f"{path}: its GGUF header is damaged ({error}); make the file again", code="damaged-gguf"
                ) from error


class Header:
    """The metadata without arrays, how many tensors follow, and `position`, where their descriptions begin."""

    def __init__(self, data: mmap) -> None:
        self._data, self.position = data, 4
        version, self.tensor_count, key_count = self.unpack("<IQQ")
        self.check(version in (2, 3), f"version {version}")
        self.check(key_count <= _MOST_KEYS, f"{key_count} keys")
        pairs = [(self.read_string(), self._read_value(self.unpack("<I")[0])) for _ in range(key_count)]
        self.metadata = {key: value for key, value in pairs if value is not None}
        self.alignment = self.metadata.get("general.alignment", 32)
        self.check(self.alignment in _ALIGNMENTS, f"general.alignment {self.alignment!r:.40}")
        self.check(
            isinstance(self.metadata.get("tokenizer.chat_template", ""), str), "tokenizer.chat_template is no text"
        )

    def check(self, holds: bool, found: str) -> None:
        """Call the header damaged unless something holds."""
        if not holds:
            raise ValueError(found)

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """Return the next values."""
        values = struct.unpack_from(layout, self._data, self.position)
        self.position += struct.calcsize(layout)
        return values

    def read_string(self) -> str:
        """Return the next text."""
        (size,) = self.unpack("<Q")
        self.check(size <= min(_MOST_BYTES, len(self._data) - self.position), f"a text of {size} bytes")
        self.position += size
        return self._data[self.position - size : self.position].decode()

    def _read_value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.read_string()
        if kind != _ARRAY:
            return self.unpack(_SCALARS[kind])[0]
        kind, count = self.unpack("<IQ")
        self.check(kind != _STRING or count <= _MOST_ITEMS, f"{count} texts in an array")
        for _ in range(count if kind == _STRING else 0):
            (size,) = self.unpack("<Q")
            self.position += size
        self.position += 0 if kind == _STRING else count * struct.calcsize(_SCALARS[kind])
        return None
