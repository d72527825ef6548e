"""Duplicates: examples of one split with equal content, found by digest; all but one of them are removed."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from json.encoder import encode_basestring
from typing import Any

import numpy
from numpy.typing import NDArray

from lathe.data.example_store import DIGEST_BYTES, ExampleDigests, ExampleReader, StoredExamples
from lathe.data.occurrences import MAX_SHOWN, Occurrences
from lathe.models.document import is_document
from lathe.models.message_form import THOUGHT

RowNumbers = NDArray[numpy.int64]

# Rows removed from a split for one reason: (place of the row in the user's file, what is wrong with it).
RemovedRows = Occurrences[tuple[str, str]]


def compute_digests(example: Mapping[str, Any], seed: int) -> ExampleDigests:
    """Return the digests of an example's content and of its prompt, keyed by `seed`.

    Texts that differ only in white space or Unicode normal form have equal digests. The first half of the content's
    digest depends on the messages alone. Rows are ordered by digest, so a different rejected answer does not change the
    order in which the messages are trained on. A document has no prompt: its own digest takes its place.
    """
    messages = example["messages"]
    others = {key: value for key, value in example.items() if key not in ("messages", "tools")}
    tools = json.dumps(example["tools"], sort_keys=True).encode() if "tools" in example else b""
    *before, last = map(_canonicalize_message, messages)
    key = seed.to_bytes(8, "little")
    content = hashlib.blake2b(f"[{','.join(before)}".encode(), digest_size=DIGEST_BYTES, key=key)
    prompt = content.copy()
    prompt.update(b"]" + tools)
    content.update(f"{',' if before else ''}{last}]".encode() + tools)
    digest = content.digest()
    if others:
        content.update(json.dumps(others, sort_keys=True).encode())
        half = DIGEST_BYTES // 2
        digest = digest[:half] + content.digest()[half:]
    return ExampleDigests(digest, digest if is_document(messages) else prompt.digest())


def _canonicalize_message(message: Mapping[str, Any]) -> str:
    content = message["content"]
    if isinstance(content, str):
        if not content.isascii():
            content = unicodedata.normalize("NFC", content)
        content = encode_basestring(" ".join(content.split()))
    else:
        content = json.dumps(content)
    canonical = f"[{encode_basestring(message['role'])},{content}]"
    if len(message) == 2:
        return canonical
    if calls := [call["function"] for call in message.get("tool_calls", [])]:
        canonical += json.dumps(calls, sort_keys=True)
    return canonical + "".join(json.dumps({key: message[key]}) for key in (THOUGHT, "name") if key in message)


def rank_digests(digests: NDArray[numpy.uint64]) -> RowNumbers:
    """Return the rank of each digest among the distinct ones, (rows, 2 words) -> (rows,); equal digests rank equal."""
    order = numpy.lexsort((digests[:, 1], digests[:, 0]))
    ranks = numpy.empty(len(order), dtype=numpy.int64)
    ranks[order] = numpy.cumsum(_mark_first_of_equals(digests[order])) - 1
    return ranks


def remove_duplicates(
    numbers: RowNumbers, stored: StoredExamples, reader: ExampleReader, removed: dict[str, RemovedRows]
) -> RowNumbers:
    """Return the row numbers without duplicates, in the order of their digests; count them as `duplicate`."""
    content = stored.content[numbers]
    order = numpy.lexsort((content[:, 1], content[:, 0]))
    numbers, content = numbers[order], content[order]
    starts = numpy.flatnonzero(_mark_first_of_equals(content))
    kept = numbers[starts]
    sizes = numpy.diff(numpy.append(starts, len(numbers)))
    duplicates = RemovedRows(count=len(numbers) - len(starts))
    for group in numpy.flatnonzero(sizes > 1):
        equal = numbers[starts[group] : starts[group] + sizes[group]]
        # Rows with equal digests may differ in white space. The one to keep must not depend on their order in the file.
        kept[group] = min(equal, key=lambda row: _get_text_order(reader, row))
        for row in equal:
            if len(duplicates.first) == MAX_SHOWN:
                break
            if row != kept[group]:
                duplicates.first.append((reader.read_place(row), f"the same as {reader.read_place(kept[group])}"))
    if duplicates.count:
        removed["duplicate"] = duplicates
    return kept


def _mark_first_of_equals(ordered: NDArray[numpy.uint64]) -> NDArray[numpy.bool_]:
    """Return for each of the sorted digests whether it differs from the previous one."""
    first = numpy.ones(len(ordered), dtype=numpy.bool_)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return first


def _get_text_order(reader: ExampleReader, row: int) -> tuple[list[str], bytes]:
    example = reader.read(row)
    return [str(message["content"]) for message in example["messages"]], reader.read_line(row)
