"""GGUF header: metadata and tensor descriptions read without llama.cpp."""

import math
import struct
from collections import Counter
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

from lathe.common.errors import InputError
from lathe.gguf.llama_library import read_ggml_types


class Tensor(NamedTuple):
    """A tensor in a GGUF file: its extents, columns first, its type's number, and where its bytes begin."""

    name: str
    extents: tuple[int, ...]
    kind: int
    offset: int


def tensors(path: Path) -> list[Tensor]:
    """Every tensor of a GGUF file, in file order; raises InputError if the file is not GGUF."""
    return _read_header(path)[1]


def describe(path: Path) -> dict[str, Any]:
    """What a GGUF file is, from its header alone.

    `bytes`; `parameters`; `bits_per_weight` (of the tensors); `tensor_types`, type name -> number of tensors;
    `metadata` without arrays; `chat_template` or None. Raises InputError if the file is not GGUF, damaged or cut short.
    """
    names = {kind.number: name for name, kind in read_ggml_types().items()}
    metadata, found = _read_header(path)
    parameters = tensor_bytes = 0
    for tensor in found:
        if tensor.kind not in names:
            raise InputError(f"{path}: its GGUF header is damaged (tensor type {tensor.kind}); make the file again")
        count, stored = math.prod(tensor.extents), read_ggml_types()[names[tensor.kind]]
        parameters += count
        tensor_bytes += count // stored.block_values * stored.block_bytes
    if tensor_bytes > path.stat().st_size:
        raise InputError(
            f"{path}: cut short: {path.stat().st_size:,} bytes, and its tensors alone take {tensor_bytes:,}; "
            "copy the file again"
        )
    return {
        "bytes": path.stat().st_size,
        "parameters": parameters,
        "bits_per_weight": round(8 * tensor_bytes / parameters, 4) if parameters else 0.0,
        "tensor_types": dict(sorted(Counter(names[tensor.kind] for tensor in found).items())),
        "chat_template": metadata.pop("tokenizer.chat_template", None),
        "metadata": metadata,
    }


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


def _read_header(path: Path) -> tuple[dict[str, Any], list[Tensor]]:
    """Metadata without arrays, and every tensor."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a GGUF file")
    with path.open("rb") as file:
        if (begin := file.read(4)) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file; it begins with {begin!r}")
        with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            try:
                return _Header(data).read()
            except (struct.error, KeyError, OverflowError, UnicodeDecodeError) as error:
                raise InputError(f"{path}: its GGUF header is damaged ({error}); make the file again") from error


class _Header:
    def __init__(self, data: mmap) -> None:
        self.data, self.at = data, 4

    def read(self) -> tuple[dict[str, Any], list[Tensor]]:
        version, tensor_count, key_count = self._take("<IQQ")
        if version not in (2, 3):
            raise KeyError(f"version {version}")
        pairs = [(self._string(), self._value(self._take("<I")[0])) for _ in range(key_count)]
        metadata = {key: value for key, value in pairs if value is not None}
        found = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        begin = -(-self.at // alignment) * alignment
        return metadata, [tensor._replace(offset=begin + tensor.offset) for tensor in found]

    def _tensor(self) -> Tensor:
        name = self._string()
        extents = self._take(f"<{self._take('<I')[0]}Q")
        kind, offset = self._take("<IQ")
        return Tensor(name, extents, kind, offset)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._take(_SCALARS[kind])[0]
        kind, count = self._take("<IQ")
        if kind == _STRING:
            for _ in range(count):
                (size,) = self._take("<Q")
                self.at += size
        else:
            self.at += count * struct.calcsize(_SCALARS[kind])
        return None

    def _string(self) -> str:
        (size,) = self._take("<Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return values
