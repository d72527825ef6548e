"""Tensors of a GGUF file, read from its header without llama.cpp."""

from pathlib import Path
from typing import NamedTuple

from lathe.gguf.header import Header, open_header

_MOST_TENSORS = 1_000_000
_MOST_EXTENTS = 8


class Tensor(NamedTuple):
    """A tensor in a GGUF file: its extents, columns first, its type's number, and where its bytes begin."""

    name: str
    extents: tuple[int, ...]
    kind: int
    offset: int


def list_tensors(path: Path) -> list[Tensor]:
    """Return every tensor of a GGUF file, in file order; raises InputError if the file is not GGUF."""
    with open_header(path) as header:
        return read_tensors(header)


def read_tensors(header: Header) -> list[Tensor]:
    """Return the tensors that follow the metadata."""
    header.check(header.tensor_count <= _MOST_TENSORS, f"{header.tensor_count} tensors")
    tensors = [_read_tensor(header) for _ in range(header.tensor_count)]
    start = -(-header.position // header.alignment) * header.alignment
    return [tensor._replace(offset=start + tensor.offset) for tensor in tensors]


def _read_tensor(header: Header) -> Tensor:
    name = header.read_string()
    (count,) = header.unpack("<I")
    header.check(count <= _MOST_EXTENTS, f"{count} extents of a tensor")
    extents = header.unpack(f"<{count}Q")
    kind, offset = header.unpack("<IQ")
    return Tensor(name, extents, kind, offset)
