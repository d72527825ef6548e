"""Which conversation goes into which split: by content and seed, never by its place in a file."""

import hashlib
import json
import unicodedata
from dataclasses import dataclass, field
from typing import Any

from lathe.data.messages import Message
from lathe.errors import InputError


@dataclass(slots=True)
class Row:
    """A validated conversation; `content` and `prompt` are seeded digests of all it says and of all but its answer.

    `extras` is what the processed row keeps beside its messages.
    """

    at: str
    messages: list[Message]
    content: bytes
    prompt: bytes
    extras: dict[str, Any]


@dataclass(slots=True)
class Removed:
    """Rows that no split keeps, with the reason and the field it concerns."""

    row: Row
    reason: str
    problem: str


@dataclass(slots=True)
class Splits:
    """Rows by split in the order of their digests, what was removed from each, and what train gave to the others."""

    rows: dict[str, list[Row]]
    removed: dict[str, list[Removed]]
    taken_from_train: dict[str, int] = field(default_factory=dict)
    overlap: dict[str, int] = field(default_factory=dict)


def keyed(at: str, messages: list[Message], seed: int, extras: dict[str, Any]) -> Row:
    """Return the row with its digests; texts that differ in white space or Unicode form alone are the same."""
    texts = [
        [message["role"], " ".join(unicodedata.normalize("NFC", message["content"]).split()), *_calls(message)]
        for message in messages
    ]
    return Row(at, messages, content=_digest(texts, seed), prompt=_digest(texts[:-1], seed), extras=extras)


def divide(
    rows: dict[str, list[Row]],
    *,
    validation_fraction: float,
    test_fraction: float,
    limits: dict[str, int],
) -> Splits:
    """Return the three splits without duplicates and without a prompt that two of them share.

    A split the source lacks is taken from train: the prompts with the smallest digests, `*_fraction` of all, at least
    one. Of equal rows one stays; a prompt that is in two splits stays in test before validation before train; a split
    over its limit keeps the rows with the smallest digests. None of this depends on the order of the input.
    Raises InputError where a split would be empty.
    """
    splits = Splits(rows={}, removed={name: [] for name in ("train", "validation", "test")})
    for name, given in rows.items():
        splits.rows[name] = _without_duplicates(given, splits.removed[name])
    _remove_overlap(splits)
    _take_from_train(splits, {"test": test_fraction, "validation": validation_fraction})
    for name, limit in limits.items():
        over = splits.rows[name][limit:]
        splits.removed[name] += [Removed(row, "over_limit", f"the split keeps {limit} rows") for row in over]
        del splits.rows[name][limit:]
    return splits


def _calls(message: Message) -> list[str]:
    return [json.dumps(call["function"], sort_keys=True) for call in message.get("tool_calls", [])]


def _digest(texts: list[list[str]], seed: int) -> bytes:
    data = json.dumps(texts, ensure_ascii=False, separators=(",", ":")).encode()
    return hashlib.blake2b(data, digest_size=16, key=seed.to_bytes(8, "little")).digest()


def _without_duplicates(rows: list[Row], removed: list[Removed]) -> list[Row]:
    # Equal rows may still differ in white space: which one stays must not depend on their order either.
    kept: dict[bytes, Row] = {}
    for row in sorted(rows, key=lambda row: (row.content, [message["content"] for message in row.messages])):
        first = kept.setdefault(row.content, row)
        if first is not row:
            removed.append(Removed(row, "duplicate", f"the same as {first.at}"))
    return list(kept.values())


def _remove_overlap(splits: Splits) -> None:
    owner: dict[bytes, tuple[str, str]] = {}
    for name in ("test", "validation", "train"):
        kept = []
        for row in splits.rows.get(name, []):
            other = owner.get(row.prompt)
            if other is None:
                kept.append(row)
                continue
            splits.removed[name].append(
                Removed(row, "in_other_split", f"its prompt is that of {other[1]} in {other[0]}")
            )
            shared = f"{name}_in_{other[0]}"
            splits.overlap[shared] = splits.overlap.get(shared, 0) + 1
        if name in splits.rows:
            splits.rows[name] = kept
        for row in kept:
            owner.setdefault(row.prompt, (name, row.at))


def _take_from_train(splits: Splits, fractions: dict[str, float]) -> None:
    prompts = sorted({row.prompt for row in splits.rows["train"]})
    wanted = {
        name: max(1, round(fraction * len(prompts))) for name, fraction in fractions.items() if name not in splits.rows
    }
    if wanted and len(prompts) < 1 + sum(wanted.values()):
        raise InputError(
            f"the dataset has {len(prompts)} different prompts; {' and '.join(wanted)} cannot be taken from so few; "
            f"add rows, or a file for {' and '.join(wanted)}"
        )
    start = 0
    for name, count in wanted.items():
        chosen = set(prompts[start : start + count])
        start += count
        splits.rows[name] = [row for row in splits.rows["train"] if row.prompt in chosen]
        splits.rows["train"] = [row for row in splits.rows["train"] if row.prompt not in chosen]
        splits.taken_from_train[name] = len(splits.rows[name])
