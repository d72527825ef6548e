"""Example store: validated examples in a file, so that memory holds about forty bytes of each and no text."""

import json
import os
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy
from numpy.typing import NDArray

from lathe.common.jsonl import line

DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class ExampleDigests:
    """Seeded digests of an example's whole content, and of its prompt (all but the last message): 16 bytes each."""

    content: bytes
    prompt: bytes


class ExampleWriter:
    """Writes examples to the file once, in order; `get_stored` then gives random access to them.

    The file holds for each example its place in the user's file (`train.jsonl:12`), a NUL byte, and the example as one
    line of JSON: the line that the output will hold if the example is kept.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.output = file.open("wb")
        self.position = 0
        self.places = array("q")
        self.starts = array("q")
        self.lengths = array("q")
        self.digests = bytearray()
        self.splits = bytearray()
        self.datasets = bytearray()

    def add(self, place: str, example: dict[str, Any], digests: ExampleDigests, split: int, dataset: int = 0) -> None:
        """Append one example of the split with this number (its index in SPLITS), and of a dataset of a mixture."""
        prefix, text = place.encode("utf-8", "surrogateescape") + b"\0", line(example)
        self.output.write(prefix)
        self.output.write(text)
        self.places.append(self.position)
        self.starts.append(self.position + len(prefix))
        self.lengths.append(len(text))
        self.digests += digests.content
        self.digests += digests.prompt
        self.splits.append(split)
        self.datasets.append(dataset)
        self.position += len(prefix) + len(text)

    def __enter__(self) -> "ExampleWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.output.close()

    def get_stored(self) -> "StoredExamples":
        """Return the index of the file, which must be closed."""
        count = len(self.starts)
        digests = numpy.frombuffer(self.digests, dtype=">u8").astype(numpy.uint64).reshape(count, 4)
        return StoredExamples(
            file=self.file,
            places=numpy.frombuffer(self.places, dtype=numpy.int64),
            starts=numpy.frombuffer(self.starts, dtype=numpy.int64),
            lengths=numpy.frombuffer(self.lengths, dtype=numpy.int64),
            content=digests[:, :2],
            prompt=digests[:, 2:],
            splits=numpy.frombuffer(self.splits, dtype=numpy.uint8),
            datasets=numpy.frombuffer(self.datasets, dtype=numpy.uint8),
        )


@dataclass(frozen=True, eq=False)
class StoredExamples:
    """Index of a store by row number: byte offsets and lengths in the file, digests, split numbers.

    A digest is two big-endian 64-bit words: `content` and `prompt` are (rows, 2), the other arrays (rows,).
    """

    file: Path
    places: NDArray[numpy.int64]
    starts: NDArray[numpy.int64]
    lengths: NDArray[numpy.int64]
    content: NDArray[numpy.uint64]
    prompt: NDArray[numpy.uint64]
    splits: NDArray[numpy.uint8]
    datasets: NDArray[numpy.uint8]

    def open_reader(self) -> "ExampleReader":
        """Open the file for reading."""
        return ExampleReader(self)


class ExampleReader:
    """Reads single examples by row number, in any order."""

    def __init__(self, stored: StoredExamples) -> None:
        self.stored = stored
        self.file = stored.file.open("rb")

    def __enter__(self) -> "ExampleReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.file.close()

    def read_line(self, row: int) -> bytes:
        """Return the example as one line of JSON."""
        return os.pread(self.file.fileno(), self.stored.lengths[row], self.stored.starts[row])

    def read(self, row: int) -> dict[str, Any]:
        """Return the example."""
        example: dict[str, Any] = json.loads(self.read_line(row))
        return example

    def read_place(self, row: int) -> str:
        """Return the place of the example in the user's file, such as `train.jsonl:12`."""
        start, end = self.stored.places[row], self.stored.starts[row] - 1
        place = os.pread(self.file.fileno(), end - start, start)
        return place.decode("utf-8", "surrogateescape")
