"""Duplicates: rows with the same content within a split, by digest, all but one of which are removed."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from json.encoder import encode_basestring
from typing import Any

import numpy
from numpy.typing import NDArray

from lathe.data.counts import EXAMPLES, Tally
from lathe.data.row_store import DIGEST_BYTES, Digests, Reader, Rows

Numbers = NDArray[numpy.int64]  # of rows

# Rows that left a split for one reason: where each stood, and the problem.
Removed = Tally[tuple[str, str]]


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
