"""Inspection: prints processed examples as the model sees them, and which of their tokens are supervised."""

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.text import make_printable

if TYPE_CHECKING:
    from lathe.config.params import Preprocess

# What is written before and after supervised text: green on a terminal, quotation marks elsewhere.
TERMINAL_MARKS, PLAIN_MARKS = ("\x1b[32m", "\x1b[0m"), ("«", "»")


def show_examples(
    split: str,
    *,
    rows: int,
    row: int | None,
    ids: bool,
    settings: "Preprocess",
    out: TextIO,
    marks: tuple[str, str] | None = None,
) -> None:
    """Print the first `rows` examples of a processed split, or the one with the number `row` (from 1), to `out`.

    Supervised tokens are green on a terminal, and between « and » elsewhere or if NO_COLOR is set; `marks` are others.
    With `ids`, each token is printed on its own line after its id. Raises InputError if the examples or the model are
    missing.
    """
    file = paths.DATA_PROCESSED / f"{split}.jsonl"
    examples = list(_read_examples(file, rows, row))
    if not (paths.MODEL_BASE / "tokenizer_config.json").is_file():
        raise InputError(
            f"{paths.MODEL_BASE.relative_to(paths.ROOT)}: no model there; run `dvc repro fetch` first",
            code="missing-model",
        )
    from lathe.models.loss_mask import encode
    from lathe.models.template_options import load_tokenizer_with_options

    tokenizer = load_tokenizer_with_options(paths.MODEL_BASE, settings.chat_template_kwargs)
    if marks is None:
        marks = TERMINAL_MARKS if out.isatty() and not os.environ.get("NO_COLOR") else PLAIN_MARKS
    for number, example in examples:
        tools = [example.get("tools")]
        sequences = encode(tokenizer, [example["messages"]], supervise=settings.supervise, tools=tools)
        for part, sequence in enumerate(sequences, start=1):
            of = f", sequence {part} of {len(sequences)}" if len(sequences) > 1 else ""
            tokens, supervised = len(sequence.input_ids), sum(sequence.supervised)
            out.write(f"{file.name}:{number}{of}: {tokens} tokens, {supervised} of them supervised\n")
            out.write(_format_tokens(tokenizer, sequence, marks) if ids else _format_text(tokenizer, sequence, marks))
        if "rejected" in example:
            rejected = [[*example["messages"][:-1], *example["rejected"]]]
            (worse,) = encode(tokenizer, rejected, supervise="last", tools=tools)
            answer = make_printable(_describe_answer(tokenizer, worse, example["rejected"][0]))
            out.write(f"rejected answer, {sum(worse.supervised)} tokens: {answer}\n")
            if ids:
                out.write(_format_tokens(tokenizer, _select_answer(worse), ("", "")))
        out.write("\n")


def _read_examples(file: Path, count: int, row: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    shown = file.relative_to(paths.ROOT)
    if not file.is_file():
        raise InputError(f"{shown}: no such file; run `dvc repro preprocess` first", code="missing-file")
    start = row - 1 if row else 0
    with file.open(encoding="utf-8") as lines:
        number = 0
        for number, line in enumerate(itertools.islice(lines, start, start + (1 if row else count)), start + 1):
            try:
                yield number, json.loads(line)
            except ValueError:
                raise InputError(
                    f"{shown}:{number}: not a JSON line; run `dvc repro --force preprocess`", code="not-json"
                ) from None
        if row and not number:
            existing = sum(1 for _ in file.open(encoding="utf-8"))
            raise InputError(
                f"--row {row}: {shown} has {existing} rows; give a number up to that", code="row-out-of-range"
            )


def _describe_answer(tokenizer: Any, sequence: Any, message: dict[str, Any]) -> str:
    """Return the text of an answer; as the template writes it if there is more than that."""
    if message.keys() == {"role", "content"}:
        return str(message["content"])
    return _decode(tokenizer, _select_answer(sequence).input_ids)


def _select_answer(sequence: Any) -> Any:
    """Return the part of a sequence that begins with its first supervised token."""
    start = sequence.supervised.index(True)
    return replace(sequence, input_ids=sequence.input_ids[start:], supervised=sequence.supervised[start:])


def _format_text(tokenizer: Any, sequence: Any, marks: tuple[str, str]) -> str:
    parts, before, stop = [], "", 0
    for supervised, run in itertools.groupby(sequence.supervised):
        stop += len(list(run))
        # Decoded from the beginning each time: SentencePiece drops a space at the start of what it decodes.
        decoded = _decode(tokenizer, sequence.input_ids[:stop])
        piece = make_printable(decoded[len(before) :])
        parts.append(marks[0] + piece + marks[1] if supervised else piece)
        before = decoded
    return "".join(parts) + "\n"


def _format_tokens(tokenizer: Any, sequence: Any, marks: tuple[str, str]) -> str:
    lines, previous = [], sequence.input_ids[:1]
    for token, supervised in zip(sequence.input_ids, sequence.supervised, strict=True):
        # Decoded together with the previous token: SentencePiece drops a space at the start of what it decodes.
        start, both = _decode(tokenizer, previous), _decode(tokenizer, [*previous, token])
        piece = repr(both[len(start) :] if both.startswith(start) else _decode(tokenizer, [token]))
        lines.append(f"{token:>8} {marks[0] + piece + marks[1] if supervised else piece}\n")
        previous = [token]
    return "".join(lines)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
