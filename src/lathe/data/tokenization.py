"""The rows of one split as the model will read them: tokenised, measured, made to fit and written."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar

import numpy
from numpy.typing import NDArray

from lathe.common.jsonl import line
from lathe.common.operating_system import count_usable_cores
from lathe.data.counts import Tally, merged
from lathe.data.duplicates import Numbers
from lathe.data.near_duplicates import SAMPLE_BYTES, Index, Seen, Sequences, joined, sequences, word_hashes
from lathe.data.read_files import Fault
from lathe.data.row_store import Reader, Rows
from lathe.data.truncation import Messages, Side, truncated
from lathe.data.worker_processes import MOST_PROCESSES, each
from lathe.data.writing_systems import script
from lathe.models.chat_template import TemplateError
from lathe.models.loss_mask import ConversationEncoder, Encoded

# Fewer than these are not worth a process.
ROWS_PER_PROCESS = 512

# Held in memory at once.
ROWS_PER_BATCH = 512

Lengths = NDArray[numpy.int32]  # (rows, fields)

Row = dict[str, Any]  # `messages`, and `rejected` in a pair

Example = TypeVar("Example")


class Length(NamedTuple):
    """A row in tokens: of its longest sequence, and of all the sequences that it makes."""

    prompt: int
    answer: int
    total: int
    supervised: int  # of all sequences
    tokens: int  # of all sequences
    sequences: int
    rejected: int = 0  # the prompt with the answer to reject, in a pair

    @property
    def longest(self) -> int:
        """The most that the model reads of the row at once."""
        return max(self.total, self.rejected)


FIELDS = Length._fields

_NO_ROWS: Numbers = numpy.empty(0, dtype=numpy.int64)
_NO_LENGTHS: Lengths = numpy.empty((0, len(FIELDS)), dtype=numpy.int32)


@dataclass(frozen=True)
class Rules:
    """How rows are read, and what becomes of those that are too long."""

    tokenizer: Any
    max_length: int
    supervise: Literal["all", "last"]
    too_long: Literal["drop", "truncate_prompt", "truncate_answer"]


@dataclass(slots=True)
class Cut:
    """Rows that were made shorter, where each stood and how, and how many tokens that took, supervised among them."""

    rows: Tally[tuple[str, str]] = field(default_factory=Tally)
    tokens: int = 0
    supervised_tokens: int = 0

    def add(self, before: Length, after: Length, example: Callable[[], tuple[str, str]]) -> None:
        """Count one row."""
        self.rows.add(example)
        self.tokens += before.tokens - after.tokens
        self.supervised_tokens += before.supervised - after.supervised

    def merge(self, later: "Cut") -> None:
        """Add what became of the rows behind."""
        self.rows.merge(later.rows)
        self.tokens += later.tokens
        self.supervised_tokens += later.supervised_tokens


@dataclass
class Measured:
    """What became of the rows of a split.

    `rows` and `lengths` are those that were kept, in their order, and `scripts` where the first of each script stood.
    `faults` are those that were dropped, by reason, and where each stood. `sequences` are those of the first kept rows.
    """

    rows: Numbers
    lengths: Lengths
    faults: dict[str, Tally[tuple[str, Fault]]]
    cut: Cut
    scripts: dict[str, Tally[str]]
    sequences: Sequences

    def length(self, name: str) -> NDArray[numpy.int32]:
        """Return one field of Length, row by row."""
        return self.lengths[:, FIELDS.index(name)]


def measure(
    rows: Rows,
    numbers: Numbers,
    rules: Rules,
    target: Path,
    *,
    held_out: Sequence[Index],
    keep_sequences: bool,
    processes: int | None,
    done: Callable[[int], None],
) -> Measured:
    """Write the rows with these numbers that can be used to the JSONL file `target`, in this order.

    Each of the `held_out` indexes is shown their word sequences; with `keep_sequences` those of a sample come back.
    Neither the file nor what is returned depends on the number of `processes`.
    """
    sample = int(numpy.searchsorted(numpy.cumsum(rows.lengths[numbers]), SAMPLE_BYTES)) if keep_sequences else 0
    wanted = processes or min(count_usable_cores(), MOST_PROCESSES, len(numbers) // ROWS_PER_PROCESS)
    edges = numpy.linspace(0, len(numbers), max(1, wanted) + 1).astype(int).tolist()
    shares = [
        _Share(start, stop, target.with_name(f"{target.name}.{start}"))
        for start, stop in pairwise(edges)
        if start < stop or stop == 0
    ]
    found = each(partial(_measure_share, rows, numbers, rules, held_out, sample), shares, done)
    _join_files([share.file for share in shares], target)
    for number, index in enumerate(held_out):
        index.merge([seen[number] for _, seen in found])
    parts = [part for part, _ in found]
    cut = Cut()
    for part in parts:
        cut.merge(part.cut)
    return Measured(
        rows=numpy.concatenate([part.rows for part in parts]),
        lengths=numpy.concatenate([part.lengths for part in parts]),
        faults=merged(part.faults for part in parts),
        cut=cut,
        scripts=merged(part.scripts for part in parts),
        sequences=joined([part.sequences for part in parts]),
    )


@dataclass(frozen=True)
class _Share:
    start: int
    stop: int
    file: Path


def _measure_share(
    rows: Rows,
    numbers: Numbers,
    rules: Rules,
    held_out: Sequence[Index],
    sample: int,
    share: _Share,
    done: Callable[[int], None],
) -> tuple[Measured, list[Seen]]:
    """Return what became of one share of the rows, and what each index has seen of it."""
    for index in held_out:
        index.forget()
    with rows.reader() as reader, share.file.open("wb") as target:
        worker = _Worker(rules, reader, target)
        for start in range(share.start, share.stop, ROWS_PER_BATCH):
            batch = numbers[start : min(start + ROWS_PER_BATCH, share.stop)]
            places, found = worker.batch(batch)
            for index in held_out:
                index.see(found, start + places)
            worker.sampled.append(found.first(int((start + places < sample).sum())))
            done(len(batch))
    return worker.measured(), [index.seen() for index in held_out]


class _Worker:
    """Goes through rows batch by batch and remembers what became of them."""

    def __init__(self, rules: Rules, reader: Reader, target: BinaryIO) -> None:
        self.rules, self.reader, self.target = rules, reader, target
        self.encoder = ConversationEncoder.of_tokenizer(rules.tokenizer)
        self.faults: dict[str, Tally[tuple[str, Fault]]] = {}
        self.scripts: dict[str, Tally[str]] = {}
        self.cut = Cut()
        self.kept: list[Numbers] = []
        self.lengths: list[Lengths] = []
        self.sampled: list[Sequences] = []

    def batch(self, numbers: Numbers) -> tuple[Numbers, Sequences]:
        """Write the rows that can be used; return their places in the batch and their word sequences."""
        lines = [self.reader.line(row) for row in numbers]
        values = [json.loads(text) for text in lines]
        places: list[int] = []
        lengths: list[Length] = []
        words: list[list[int]] = []
        for place, length in enumerate(self.lengths_of(values)):
            value, text, at = values[place], lines[place], partial(self.reader.at, numbers[place])
            if isinstance(length, Length) and length.longest > self.rules.max_length:
                length, value = self.fitted(value, length, at)
                text = line(value)
            if isinstance(length, Fault):
                self.faults.setdefault(length.reason, Tally()).add(partial(_found_at, at, length))
                continue
            self.target.write(text)
            said = _said(value["messages"])
            self.scripts.setdefault(script(said), Tally()).add(at)
            words.append(word_hashes(said))
            lengths.append(length)
            places.append(place)
        kept = numpy.array(places, dtype=numpy.int64)
        self.kept.append(numbers[kept])
        self.lengths.append(numpy.array(lengths, dtype=numpy.int32).reshape(len(lengths), len(FIELDS)))
        return kept, sequences(words)

    def fitted(self, row: Row, length: Length, at: Callable[[], str]) -> tuple[Length | Fault, Row]:
        """Return the row made shorter as the rules say, and its length; or why that cannot be."""
        most = self.rules.max_length
        field, long = None, f"{length.total} tokens long ({length.prompt} prompt, {length.answer} answer)"
        if length.rejected > length.total:
            field, long = "rejected", f"{length.rejected} tokens long, prompt and answer to reject"
        problem = f"is {long}; expected at most training.max_length {most}"
        if self.rules.too_long == "drop":
            return Fault("too_long", field, problem), row
        side: Side = "prompt" if self.rules.too_long == "truncate_prompt" else "answer"
        shorter = self.shortened(row, side)
        new = None if shorter is None else next(self.lengths_of([shorter]))
        if shorter is None or not isinstance(new, Length):
            rest = "answer" if side == "prompt" else "prompt"
            return Fault("too_long", field, f"{problem}; too little of the {side} would fit beside the {rest}"), row
        self.cut.add(length, new, partial(_found_at, at, f"was {length.longest} tokens long and is {new.longest}"))
        return new, shorter

    def shortened(self, row: Row, side: Side) -> Row | None:
        """Return the row with one side made to fit, or None; both answers of a pair stay behind one prompt."""

        def fit(messages: Messages, rejected: Messages) -> Messages | None:
            def tokens_of(messages: Messages) -> int | None:
                length = next(self.lengths_of([{"messages": messages, "rejected": rejected}]))
                return length.longest if isinstance(length, Length) else None

            return truncated(messages, side, self.rules.max_length, tokens_of, self.rules.tokenizer)

        messages, rejected = row["messages"], row.get("rejected", [])
        if not rejected or side == "prompt":
            shorter = fit(messages, rejected)
            return None if shorter is None else {**row, "messages": shorter}
        better, worse = fit(messages, []), fit([*messages[:-1], *rejected], [])
        # Where the last turn has no room, its answers are gone; where what is left of both is the same, so is the pair.
        if better is None or worse is None or len(better) < len(messages) or len(worse) < len(messages):
            return None
        return None if better[-1] == worse[-1] else {**row, "messages": better, "rejected": worse[-1:]}

    def lengths_of(self, rows: Sequence[Row]) -> Iterator[Length | Fault]:
        """Yield the length of each row, or what the template has against it."""
        worse = [[*row["messages"][:-1], *row["rejected"]] for row in rows if row.get("rejected")]
        rejected = self.each(worse)
        for row, length in zip(rows, self.each([row["messages"] for row in rows]), strict=True):
            if not row.get("rejected"):
                yield length
                continue
            other = next(rejected)
            if isinstance(length, Length) and isinstance(other, Length):
                yield length._replace(rejected=other.total)
            else:
                yield other if isinstance(length, Length) else length

    def each(self, conversations: Sequence[Messages]) -> Iterator[Length | Fault]:
        for result in self.encoder.encode_rows(conversations, supervise=self.rules.supervise):
            yield Fault("template", None, str(result)) if isinstance(result, TemplateError) else _length(result)

    def measured(self) -> Measured:
        return Measured(
            rows=numpy.concatenate([_NO_ROWS, *self.kept]),
            lengths=numpy.concatenate([_NO_LENGTHS, *self.lengths]),
            faults=self.faults,
            cut=self.cut,
            scripts=self.scripts,
            sequences=joined(self.sampled),
        )


def _length(encoded: Sequence[Encoded]) -> Length:
    totals = [(len(sequence.input_ids), sequence.supervised.count(True)) for sequence in encoded]
    total, answer = max(totals, key=itemgetter(0))
    return Length(
        prompt=total - answer,
        answer=answer,
        total=total,
        supervised=sum(supervised for _, supervised in totals),
        tokens=sum(tokens for tokens, _ in totals),
        sequences=len(totals),
    )


def _said(messages: Messages) -> str:
    """Return what user and assistant say; a system message is often the same in every row."""
    said = (message["content"] for message in messages if message["role"] != "system")
    return "\n".join(text for text in said if isinstance(text, str))


def _found_at(at: Callable[[], str], what: Example) -> tuple[str, Example]:
    return at(), what


def _join_files(parts: Sequence[Path], target: Path) -> None:
    first, *others = parts
    first.replace(target)
    with target.open("ab") as whole:
        for part in others:
            with part.open("rb") as source:
                shutil.copyfileobj(source, whole, 1 << 20)
            part.unlink()
