"""Processed rows as the model sees them: which tokens it reads, and which of them it learns."""

import itertools
import json
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TextIO

from lathe.common import paths
from lathe.common.errors import InputError

LEARNT, PLAIN = ("\x1b[32m", "\x1b[0m"), ("«", "»")


def show(split: str, *, rows: int, row: int | None, ids: bool, supervise: Literal["all", "last"], out: TextIO) -> None:
    """Print the first `rows` rows of a processed split, or the one with the number `row` (from 1), to `out`.

    Supervised tokens are green on a terminal and between « and » elsewhere, or where NO_COLOR is set; with `ids` every
    token stands on a line of its own, behind its id. Raises InputError where the rows or the model are missing.
    """
    file = paths.DATA_PROCESSED / f"{split}.jsonl"
    chosen = list(_rows(file, rows, row))
    if not (paths.MODEL_BASE / "tokenizer_config.json").is_file():
        raise InputError(f"{paths.MODEL_BASE.relative_to(paths.ROOT)}: no model there; run `dvc repro fetch` first")
    from lathe.models.loss_mask import encode
    from lathe.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(paths.MODEL_BASE)
    marks = LEARNT if out.isatty() and not os.environ.get("NO_COLOR") else PLAIN
    for number, conversation in chosen:
        sequences = encode(tokenizer, [conversation["messages"]], supervise=supervise)
        for part, sequence in enumerate(sequences, start=1):
            of = f", sequence {part} of {len(sequences)}" if len(sequences) > 1 else ""
            tokens, learnt = len(sequence.input_ids), sum(sequence.supervised)
            out.write(f"{file.name}:{number}{of}: {tokens} tokens, {learnt} of them learnt\n")
            out.write(_tokens(tokenizer, sequence, marks) if ids else _text(tokenizer, sequence, marks))
        if "rejected" in conversation:
            (worse,) = encode(
                tokenizer, [[*conversation["messages"][:-1], *conversation["rejected"]]], supervise="last"
            )
            answer = _printable(str(conversation["rejected"][0]["content"]))
            out.write(f"to be rejected, {sum(worse.supervised)} tokens: {answer}\n")
            if ids:
                out.write(_tokens(tokenizer, _answer(worse), ("", "")))
        out.write("\n")


def _rows(file: Path, count: int, row: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    if not file.is_file():
        raise InputError(f"{file.relative_to(paths.ROOT)}: no such file; run `dvc repro preprocess` first")
    start = row - 1 if row else 0
    with file.open(encoding="utf-8") as lines:
        number = 0
        for number, line in enumerate(itertools.islice(lines, start, start + (1 if row else count)), start + 1):
            try:
                yield number, json.loads(line)
            except ValueError:
                raise InputError(
                    f"{file.relative_to(paths.ROOT)}:{number}: not a JSON line; run `dvc repro --force preprocess`"
                ) from None
        if row and not number:
            held = sum(1 for _ in file.open(encoding="utf-8"))
            raise InputError(f"--row {row}: {file.relative_to(paths.ROOT)} has {held} rows; give a number up to that")


def _answer(sequence: Any) -> Any:
    start = sequence.supervised.index(True)
    return replace(sequence, input_ids=sequence.input_ids[start:], supervised=sequence.supervised[start:])


def _text(tokenizer: Any, sequence: Any, marks: tuple[str, str]) -> str:
    parts, written, stop = [], "", 0
    for learnt, run in itertools.groupby(sequence.supervised):
        stop += len(list(run))
        # Decoded from the beginning: SentencePiece drops the space in front of a text.
        whole = _decoded(tokenizer, sequence.input_ids[:stop])
        piece = _printable(whole[len(written) :])
        parts.append(marks[0] + piece + marks[1] if learnt else piece)
        written = whole
    return "".join(parts) + "\n"


def _tokens(tokenizer: Any, sequence: Any, marks: tuple[str, str]) -> str:
    lines, before = [], sequence.input_ids[:1]
    for token, learnt in zip(sequence.input_ids, sequence.supervised, strict=True):
        # Behind its neighbour, for the space that SentencePiece drops in front.
        start, both = _decoded(tokenizer, before), _decoded(tokenizer, [*before, token])
        piece = repr(both[len(start) :] if both.startswith(start) else _decoded(tokenizer, [token]))
        lines.append(f"{token:>8} {marks[0] + piece + marks[1] if learnt else piece}\n")
        before = [token]
    return "".join(lines)


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _printable(text: str) -> str:
    """Write control characters as escapes: a row must not be able to steer the terminal."""
    return "".join(
        repr(character)[1:-1] if unicodedata.category(character) == "Cc" and character not in "\n\t" else character
        for character in text
    )
