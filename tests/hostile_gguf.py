"""GGUF files that lie: headers written value by value."""

import struct
from collections.abc import Sequence

STRING, ARRAY = 8, 9
HUGE = 2**64 - 1


def text(value: str | bytes) -> bytes:
    """A string as GGUF has it: its length, and its bytes."""
    raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    """A key with the number of its type and its bytes."""
    return text(key) + struct.pack("<I", kind) + value


def string(key: str | bytes, value: str | bytes) -> bytes:
    """A key with a text."""
    return pair(key, STRING, text(value))


def number(key: str, kind: int, value: float) -> bytes:
    """A key with a number of a type."""
    return pair(key, kind, struct.pack("<" + "BbHhIif?__Qqd"[kind], value))


def array(key: str, kind: int, count: int, values: bytes = b"") -> bytes:
    """A key with an array that says to have `count` values."""
    return pair(key, ARRAY, struct.pack("<IQ", kind, count) + values)


def tensor(name: str, extents: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    """The description of a tensor."""
    return text(name) + struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, kind, offset)


def gguf(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    keys: int | None = None,
    count: int | None = None,
    version: int = 3,
    tail: bytes = bytes(4096),
) -> bytes:
    """A file of these parts, which may say to have other numbers of keys and of tensors."""
    counts = (len(tensors) if count is None else count, len(pairs) if keys is None else keys)
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors) + tail


VERSION, TENSOR = string("lathe.version", "0.1.0"), tensor("a", (32,))

# Each is a file that no program may trust, by what is wrong with it.
HEADERS = {
    "empty": b"",
    "magic-alone": b"GGUF",
    "cut-version": b"GGUF\3\0",
    "keys-without-end": gguf([VERSION], [TENSOR], keys=2**63),
    "keys-in-zeros": gguf([VERSION], [TENSOR], keys=HUGE, tail=bytes(1 << 25)),
    "tensors-without-end": gguf([VERSION], [TENSOR], count=HUGE, tail=bytes(1 << 25)),
    "string-without-end": gguf([text("lathe.version") + struct.pack("<IQ", STRING, HUGE)], [TENSOR]),
    "array-without-end": gguf([VERSION, array("x", 10, HUGE)], [TENSOR]),
    "texts-without-end": gguf([VERSION, array("x", STRING, 2**40)], [TENSOR], tail=bytes(1 << 25)),
    "array-of-arrays": gguf([VERSION, array("x", ARRAY, 3)], [TENSOR]),
    "unknown-type": gguf([VERSION, pair("x", 77, b"")], [TENSOR]),
    "alignment-zero": gguf([VERSION, number("general.alignment", 4, 0)], [TENSOR]),
    "alignment-text": gguf([VERSION, string("general.alignment", "x")], [TENSOR]),
    "alignment-negative": gguf([VERSION, number("general.alignment", 5, -32)], [TENSOR]),
    "alignment-nan": gguf([VERSION, number("general.alignment", 6, float("nan"))], [TENSOR]),
    "alignment-huge": gguf([VERSION, number("general.alignment", 10, HUGE)], [TENSOR]),
    "template-number": gguf([VERSION, number("tokenizer.chat_template", 4, 5)], [TENSOR]),
    "template-truth": gguf([VERSION, number("tokenizer.chat_template", 7, 1)], [TENSOR]),
    "file-type-nan": gguf([VERSION, number("general.file_type", 6, float("nan"))], [TENSOR]),
    "extents-huge": gguf([VERSION], [tensor("a", (2**63, 2**63, 2**63))]),
    "extents-many": gguf([VERSION], [text("a") + struct.pack("<I", 2**32 - 1)]),
    "tensor-type-unknown": gguf([VERSION], [tensor("a", (32,), 99)]),
    "offset-huge": gguf([VERSION], [tensor("a", (32,), 0, HUGE)]),
    "text-not-utf-8": gguf([string("lathe.version", b"\xff\xfe")], [TENSOR]),
    "key-not-utf-8": gguf([string(b"lathe.\xff", "x")], [TENSOR]),
    "version-1": gguf([VERSION], [TENSOR], version=1),
    "version-big-endian": gguf([VERSION], [TENSOR], version=0x03000000),
}
