"""GGUF header: metadata and tensor descriptions read without llama.cpp."""

import struct
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

from lathe.common.errors import InputError


class Tensor(NamedTuple):
    """A tensor in a GGUF file: its extents, columns first, its type's number, and where its bytes begin."""

    name: str
    extents: tuple[int, ...]
    kind: int
    offset: int


def list_tensors(path: Path) -> list[Tensor]:
    """Return every tensor of a GGUF file, in file order; raises InputError if the file is not GGUF."""
    return read_header(path)[1]


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a GGUF file without arrays; raises InputError if the file is not GGUF."""
    return read_header(path)[0]


# The GGUF header, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; gguf-py's reader takes 7 s where
# the vocabulary has 150,000 tokens.
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}

# More than any file has; without bounds a header of a few bytes could make its reader loop and allocate for ever.
_MOST_KEYS = 65_536
_MOST_TENSORS = 1_000_000
_MOST_ITEMS = 16_000_000  # texts of an array, such as a vocabulary
_MOST_BYTES = 64 << 20  # of a text
_MOST_EXTENTS = 8
_MOST_ALIGNMENT = 1 << 20


def read_header(path: Path) -> tuple[dict[str, Any], list[Tensor]]:
    """Return metadata without arrays, and every tensor."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a GGUF file", code="no-such-file")
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file; it begins with {magic!r}", code="not-gguf")
        with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            try:
                return _Header(data).read()
            except (struct.error, KeyError, OverflowError, UnicodeDecodeError) as error:
                raise InputError(
                    f"{path}: its GGUF header is damaged ({error}); make the file again", code="damaged-gguf"
                ) from error


class _Header:
    def __init__(self, data: mmap) -> None:
        self.data, self.position = data, 4

    def read(self) -> tuple[dict[str, Any], list[Tensor]]:
        version, tensor_count, key_count = self._unpack("<IQQ")
        if version not in (2, 3):
            raise KeyError(f"version {version}")
        self._check(tensor_count <= _MOST_TENSORS, f"{tensor_count} tensors")
        self._check(key_count <= _MOST_KEYS, f"{key_count} keys")
        pairs = [(self._read_string(), self._read_value(self._unpack("<I")[0])) for _ in range(key_count)]
        metadata = {key: value for key, value in pairs if value is not None}
        tensors = [self._read_tensor() for _ in range(tensor_count)]
        alignment, template = metadata.get("general.alignment", 32), metadata.get("tokenizer.chat_template", "")
        self._check(type(alignment) is int and 0 < alignment <= _MOST_ALIGNMENT, f"general.alignment {alignment!r:.40}")
        self._check(isinstance(template, str), f"tokenizer.chat_template {template!r:.40}")
        start = -(-self.position // alignment) * alignment
        return metadata, [tensor._replace(offset=start + tensor.offset) for tensor in tensors]

    def _read_tensor(self) -> Tensor:
        name = self._read_string()
        (count,) = self._unpack("<I")
        self._check(count <= _MOST_EXTENTS, f"{count} extents of a tensor")
        extents = self._unpack(f"<{count}Q")
        kind, offset = self._unpack("<IQ")
        return Tensor(name, extents, kind, offset)

    def _read_value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._read_string()
        if kind != _ARRAY:
            return self._unpack(_SCALARS[kind])[0]
        kind, count = self._unpack("<IQ")
        if kind == _STRING:
            self._check(count <= _MOST_ITEMS, f"{count} texts in an array")
            for _ in range(count):
                (size,) = self._unpack("<Q")
                self.position += size
        else:
            self.position += count * struct.calcsize(_SCALARS[kind])
        return None

    def _read_string(self) -> str:
        (size,) = self._unpack("<Q")
        self._check(size <= min(_MOST_BYTES, len(self.data) - self.position), f"a text of {size} bytes")
        self.position += size
        return self.data[self.position - size : self.position].decode()

    def _check(self, holds: bool, found: str) -> None:
        if not holds:
            raise KeyError(found)

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.data, self.position)
        self.position += struct.calcsize(layout)
        return values
