"""Part of a large file: which of its rows are read where a limit leaves most of them unused.

A split with a limit is chosen among so many rows that its duplicates and faults hardly matter, and no more: they are
read in stretches that lie evenly over the whole file, because rows often stand in an order. The rule knows numbers of
rows alone, so that the same file always gives the same rows.
"""

import zlib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.data.json_arrays import count_items, find_layout, open_text
from lathe.data.json_rows import count_rows_under, find_rows_key
from lathe.data.split_files import SPLITS, get_suffix
from lathe.data.text_files import BY_CONTENT, TextForm, open_file

MIN_ROWS = 20_000  # a split with a limit is chosen among at least so many rows,
ROWS_PER_KEPT = 4  # and among so many for each that is kept
STRETCHES = 100
STRETCHES_OF_FEW_GROUPS = 10  # in a Parquet file of few row groups, each of which is decoded up to the last row wanted
CHUNK_BYTES = 1 << 20


@dataclass
class Part:
    """The rows of a file that are read, as ranges of row numbers (of lines, in text files) from 0 to `total`.

    Whoever reads counts the other rows into `left_out`.
    """

    ranges: tuple[tuple[int, int], ...]
    total: int
    left_out: int = 0

    def holds(self, number: int) -> bool:
        """Tell whether a row is read."""
        index = bisect_right(self.ranges, (number, self.total)) - 1
        return index >= 0 and number < self.ranges[index][1]

    def select(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return what is read of the rows from `start` to `stop`, as ranges."""
        return [
            (max(first, start), min(last, stop)) for first, last in self.ranges if max(first, start) < min(last, stop)
        ]


def count_rows_to_read(limits: Mapping[Any, int] | None, split: str, present: Mapping[str, object]) -> int | None:
    """Return among how many rows of a split's files its rows are chosen; None: all of them.

    Train also gives the rows of the splits that are not `present`.
    """
    if not limits or split not in limits:
        return None
    taken = [name for name in SPLITS if name not in present] if split == "train" else []
    return max(MIN_ROWS, ROWS_PER_KEPT * (limits[split] + sum(limits.get(name, 0) for name in taken)))


def choose_parts(files: list[Path], rows: int | None, form: TextForm = BY_CONTENT) -> dict[Path, Part]:
    """Return what is read of each file of a split, so that it is `rows` of them all; others are read whole.

    What cannot be read is read whole: its reader says so.
    """
    if rows is None:
        return {}
    import pyarrow

    try:
        counts = {file: (_count_rows_of_json(file, form), count_stretches(file)) for file in files}
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error, InputError, ValueError, RecursionError):
        return {}
    total = sum(count for count, _ in counts.values())
    if total <= rows:
        return {}
    return {
        file: spread(count, max(1, rows * count // total), stretches)
        for file, (count, stretches) in counts.items()
        if count
    }


def spread(total: int, rows: int, stretches: int = STRETCHES) -> Part:
    """Return the part of so many rows that lies evenly over a file of `total` rows."""
    stretches = max(1, min(stretches, rows, total))
    starts = [total * number // stretches for number in range(stretches)]
    counts = [rows * (number + 1) // stretches - rows * number // stretches for number in range(stretches)]
    return Part(tuple((start, start + count) for start, count in zip(starts, counts, strict=True)), total)


def count_rows(file: Path) -> int:
    """Return the rows of a file without reading them: by its metadata, or its line ends."""
    suffix = (get_suffix(file) or "").removesuffix(".gz")
    if suffix == ".parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.read_metadata(file).num_rows)
    if suffix == ".arrow":
        return _count_arrow_rows(file)
    count, last = 0, b"\n"
    with open_file(file) as source:
        while chunk := source.read(CHUNK_BYTES):
            count += chunk.count(b"\n")
            last = chunk[-1:]
    return count + (last != b"\n")


def count_stretches(file: Path) -> int:
    """Return in how many places a file is read: a Parquet file where its row groups begin."""
    if get_suffix(file) != ".parquet":
        return STRETCHES
    import pyarrow.parquet

    groups = int(pyarrow.parquet.read_metadata(file).num_row_groups)
    return min(STRETCHES, groups) if groups >= STRETCHES_OF_FEW_GROUPS else STRETCHES_OF_FEW_GROUPS


def _count_rows_of_json(file: Path, form: TextForm) -> int:
    """Return the rows of any file."""
    suffix = (get_suffix(file) or "").removesuffix(".gz")
    if suffix in (".json", ".jsonl"):
        layout = find_layout(file, form)
        if layout == "array":
            return count_items(file, form)
        if layout == "value" and suffix == ".json":
            key = form.rows_key or find_rows_key(open_text(file, form), file.name)
            return count_rows_under(open_text(file, form), key, file.name)
    return count_rows(file)


def _count_arrow_rows(file: Path) -> int:
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        try:
            table = pyarrow.ipc.open_file(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            return sum(batch.num_rows for batch in pyarrow.ipc.open_stream(source))
        return sum(table.get_batch(index).num_rows for index in range(table.num_record_batches))
