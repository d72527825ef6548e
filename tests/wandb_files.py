"""Files of W&B's offline runs."""

import struct
from pathlib import Path
from typing import Any


def read_records(file: Path) -> list[Any]:
    """The records of a W&B run, read as the log of LevelDB that it is, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    content, position, whole, found = file.read_bytes(), 7, b"", []
    assert content.startswith(b":W&B")
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(whole))
            whole = b""
    return found
