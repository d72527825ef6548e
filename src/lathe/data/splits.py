"""Which conversation goes into which split: by content and seed, never by its place in a file."""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any

import numpy
from numpy.typing import NDArray

from lathe.data.files import SPLITS
from lathe.data.spool import DIGEST_BYTES, Digests, Reader, Rows
from lathe.data.tally import EXAMPLES, Tally
from lathe.errors import InputError

Numbers = NDArray[numpy.int64]  # of rows

# Rows that left a split for one reason: where each stood, and the problem.
Removed = Tally[tuple[str, str]]


@dataclass(slots=True)
class Splits:
    """Row numbers by split in the order of their digests, what was removed from each, and what train gave to others.

    `removed` is by split and reason; `overlap` counts the rows removed from one split for being in another.
    """

    rows: dict[str, Numbers]
    removed: dict[str, dict[str, Removed]]
    taken_from_train: dict[str, int] = field(default_factory=dict)
    overlap: Counter[str] = field(default_factory=Counter)


def digests(row: Mapping[str, Any], seed: int) -> Digests:
    """Return the row's digests; texts that differ in white space or Unicode form alone are the same.

    The first half of the content's is that of the messages alone: an answer to reject beside them, or a better one,
    changes the order of the rows for no one who learns from the messages.
    """
    messages = row["messages"]
    others = {key: value for key, value in row.items() if key != "messages"}
    *before, last = map(_essence, messages)
    key = seed.to_bytes(8, "little")
    content = hashlib.blake2b(f"[{','.join(before)}".encode(), digest_size=DIGEST_BYTES, key=key)
    prompt = content.copy()
    prompt.update(b"]")
    content.update(f"{',' if before else ''}{last}]".encode())
    whole = content.digest()
    if others:
        content.update(json.dumps(others, sort_keys=True).encode())
        half = DIGEST_BYTES // 2
        whole = whole[:half] + content.digest()[half:]
    return Digests(whole, prompt.digest())


def divide(
    rows: Rows,
    *,
    given: Collection[str],
    validation_fraction: float,
    test_fraction: float,
    limits: dict[str, int],
) -> Splits:
    """Return the three splits without duplicates and without a prompt that two of them share.

    A split that is not `given` by the source is taken from train: the prompts with the smallest digests, `*_fraction`
    of all, at least one. Of equal rows one stays; a prompt that is in two splits stays in test before validation before
    train; a split over its limit keeps the rows with the smallest digests. None of this depends on the order of the
    input.
    Raises InputError where a split would be empty.
    """
    splits = Splits(rows={}, removed={name: {} for name in SPLITS})
    prompts = _ranks(rows.prompt)
    with rows.reader() as reader:
        for number, name in enumerate(SPLITS):
            if name in given:
                numbers = numpy.flatnonzero(rows.splits == number)
                splits.rows[name] = _without_duplicates(numbers, rows, reader, splits.removed[name])
        _remove_overlap(splits, prompts, reader)
        _take_from_train(splits, prompts, {"test": test_fraction, "validation": validation_fraction})
        for name, limit in limits.items():
            over = splits.rows[name][limit:]
            if len(over):
                examples = [(reader.at(row), f"the split keeps {limit} rows") for row in over[:EXAMPLES]]
                splits.removed[name]["over_limit"] = Removed(len(over), examples)
            splits.rows[name] = splits.rows[name][:limit]
    return splits


def _essence(message: Mapping[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        if not content.isascii():
            content = unicodedata.normalize("NFC", content)
        content = encode_basestring(" ".join(content.split()))
    else:
        content = json.dumps(content)
    calls = [call["function"] for call in message.get("tool_calls", [])]
    essence = f"[{encode_basestring(message['role'])},{content}]"
    return essence + json.dumps(calls, sort_keys=True) if calls else essence


def _ranks(digests: NDArray[numpy.uint64]) -> Numbers:
    """Return for each digest (high and low word) its place among the different ones, equal for equal digests."""
    order = numpy.lexsort((digests[:, 1], digests[:, 0]))
    ranks = numpy.empty(len(order), dtype=numpy.int64)
    ranks[order] = numpy.cumsum(_begins(digests[order])) - 1
    return ranks


def _begins(ordered: NDArray[numpy.uint64]) -> NDArray[numpy.bool_]:
    """Tell of each of the sorted digests whether it differs from the one before it."""
    begins = numpy.ones(len(ordered), dtype=numpy.bool_)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return begins


def _without_duplicates(given: Numbers, rows: Rows, reader: Reader, removed: dict[str, Removed]) -> Numbers:
    content = rows.content[given]
    order = numpy.lexsort((content[:, 1], content[:, 0]))
    given, content = given[order], content[order]
    starts = numpy.flatnonzero(_begins(content))
    kept = given[starts]
    sizes = numpy.diff(numpy.append(starts, len(given)))
    duplicates = Removed(count=len(given) - len(starts))
    for group in numpy.flatnonzero(sizes > 1):
        equal = given[starts[group] : starts[group] + sizes[group]]
        # Equal rows may still differ in white space: which one stays must not depend on their order either.
        kept[group] = min(equal, key=lambda row: _wording(reader, row))
        for row in equal:
            if len(duplicates.examples) == EXAMPLES:
                break
            if row != kept[group]:
                duplicates.examples.append((reader.at(row), f"the same as {reader.at(kept[group])}"))
    if duplicates.count:
        removed["duplicate"] = duplicates
    return kept


def _wording(reader: Reader, row: int) -> tuple[list[str], bytes]:
    value = reader.value(row)
    return [str(message["content"]) for message in value["messages"]], reader.line(row)


def _remove_overlap(splits: Splits, prompts: Numbers, reader: Reader) -> None:
    nobody = -1
    owner = numpy.full(prompts.max(initial=-1) + 1, nobody)
    split_of = numpy.zeros(len(prompts), dtype=numpy.uint8)
    for name in ("test", "validation", "train"):
        if name not in splits.rows:
            continue
        rows = splits.rows[name]
        owners = owner[prompts[rows]]
        shared = owners != nobody
        if shared.any():
            examples = [
                (reader.at(row), f"its prompt is that of {reader.at(other)} in {SPLITS[split_of[other]]}")
                for row, other in zip(rows[shared][:EXAMPLES], owners[shared], strict=False)
            ]
            splits.removed[name]["in_other_split"] = Removed(int(shared.sum()), examples)
            for other, count in zip(*numpy.unique(split_of[owners[shared]], return_counts=True), strict=True):
                splits.overlap[f"{name}_in_{SPLITS[other]}"] = int(count)
        rows = splits.rows[name] = rows[~shared]
        owner[prompts[rows[::-1]]] = rows[::-1]  # of several rows with one prompt the first
        split_of[rows] = SPLITS.index(name)


def _take_from_train(splits: Splits, prompts: Numbers, fractions: dict[str, float]) -> None:
    train = splits.rows["train"]
    different = numpy.unique(prompts[train])
    wanted = {
        name: max(1, round(fraction * len(different)))
        for name, fraction in fractions.items()
        if name not in splits.rows
    }
    if wanted and len(different) < 1 + sum(wanted.values()):
        raise InputError(
            f"the dataset has {len(different)} different prompts; {' and '.join(wanted)} cannot be taken from so few; "
            f"add rows, or a file for {' and '.join(wanted)}"
        )
    start = 0
    for name, count in wanted.items():
        chosen = numpy.isin(prompts[train], different[start : start + count])
        start += count
        splits.rows[name], train = train[chosen], train[~chosen]
        splits.taken_from_train[name] = len(splits.rows[name])
    splits.rows["train"] = train
