"""Tokenization: counts the tokens of a split's examples, truncates or drops long ones, and writes the others."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from lathe.data.duplicates import RowNumbers
from lathe.data.example_store import ExampleReader, StoredExamples
from lathe.data.near_duplicates import (
    FirstSeen,
    NGramIndex,
    NGrams,
    concatenate_ngrams,
    get_dialogue,
    hash_ngrams,
    hash_words,
)
from lathe.data.occurrences import Occurrences, merge_occurrences
from lathe.data.read_files import Fault
from lathe.data.split_overlap import count_sampled_rows
from lathe.data.truncation import Messages, TruncatedSide, truncate_conversation
from lathe.data.worker_processes import MAX_PROCESSES, ReportRows, run_in_processes
from lathe.data.writing_systems import detect_writing_system
from lathe.models.chat_template import Tools
from lathe.models.document import is_document
from lathe.models.loss_mask import ConversationEncoder, Encoded
from lathe.models.template_error import TemplateError

ROWS_PER_PROCESS = 512  # fewer rows are not worth a process of their own
ROWS_PER_BATCH = 512  # in memory at a time, in each process

LengthTable = NDArray[numpy.int32]  # (rows, fields of TokenLengths)

Example = dict[str, Any]  # `messages`, perhaps `tools`, and `rejected` in a preference pair

Case = TypeVar("Case")


class TokenLengths(NamedTuple):
    """Tokens of one example: `prompt`, `answer` and `total` are of its longest sequence."""

    prompt: int
    answer: int
    total: int
    supervised: int  # in all of its sequences
    tokens: int  # in all of its sequences
    sequences: int
    reference: int  # of the last answer with its end, which generated ones are compared with if the row is held out
    conversation: int  # of the sequence that ends with it, which takes as much of the context
    rejected: int = 0  # of the prompt with the rejected answer, in a preference pair
    document: int = 0  # 1 if the example is a raw text, which training cuts into sequences of at most max_length
    words: int = 0  # words of the last answer, not tokens
    json: int = 0  # 1 if the last answer is a JSON object or array
    tools: int = 0  # 1 if tools may be called

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, with either answer."""
        return max(self.total, self.rejected)


FIELDS = TokenLengths._fields

_NO_ROWS: RowNumbers = numpy.empty(0, dtype=numpy.int64)
_NO_LENGTHS: LengthTable = numpy.empty((0, len(FIELDS)), dtype=numpy.int32)


@dataclass(frozen=True)
class TokenizationRules:
    """How examples are tokenised, and what is done with those over `max_length` tokens."""

    tokenizer: Any
    max_length: int
    supervise: Literal["all", "last"]
    too_long: Literal["drop", "truncate_prompt", "truncate_answer"]


@dataclass(slots=True)
class Truncations:
    """The examples that were truncated (place, and both lengths), and how many tokens that removed."""

    rows: Occurrences[tuple[str, str]] = field(default_factory=Occurrences)
    tokens: int = 0
    supervised_tokens: int = 0

    def add(self, before: TokenLengths, after: TokenLengths, make_case: Callable[[], tuple[str, str]]) -> None:
        """Count one example."""
        self.rows.add(make_case)
        self.tokens += before.tokens - after.tokens
        self.supervised_tokens += before.supervised - after.supervised

    def extend(self, later: "Truncations") -> None:
        """Add the truncations of rows that follow those counted so far."""
        self.rows.extend(later.rows)
        self.tokens += later.tokens
        self.supervised_tokens += later.supervised_tokens


@dataclass
class TokenizedSplit:
    """What was kept of a split's rows, and what was dropped or truncated.

    `rows` and `lengths` are those of the kept rows, in order. `faults` are the dropped ones by reason. `scripts` are
    the kept ones by writing system. `ngrams` are those of a sample of the kept rows.
    """

    rows: RowNumbers
    lengths: LengthTable
    faults: dict[str, Occurrences[tuple[str, Fault]]]
    truncations: Truncations
    scripts: dict[str, Occurrences[str]]
    ngrams: NGrams

    def get_lengths(self, name: str) -> NDArray[numpy.int32]:
        """Return one field of TokenLengths for all kept rows, (rows,)."""
        return self.lengths[:, FIELDS.index(name)]


def tokenize_split(
    stored: StoredExamples,
    numbers: RowNumbers,
    rules: TokenizationRules,
    target: Path,
    *,
    held_out: Sequence[NGramIndex],
    keep_ngrams: bool,
    processes: int | None,
    report_rows: ReportRows,
) -> TokenizedSplit:
    """Write the usable ones of the rows `numbers` to the JSONL file `target`, in this order.

    The n-grams of the kept rows are looked up in the indexes `held_out`. With `keep_ngrams`, those of a sample are
    returned. Neither the file nor the result depends on the number of `processes` (None: by cores and rows).
    """
    sample_rows = count_sampled_rows(stored, numbers) if keep_ngrams else 0
    count = processes or min(count_usable_cores(), MAX_PROCESSES, len(numbers) // ROWS_PER_PROCESS)
    edges = numpy.linspace(0, len(numbers), max(1, count) + 1).astype(int).tolist()
    shares = [
        _Share(start, stop, target.with_name(f"{target.name}.{start}"))
        for start, stop in pairwise(edges)
        if start < stop or stop == 0
    ]
    work = partial(_tokenize_share, stored, numbers, rules, held_out, sample_rows)
    results = run_in_processes(work, shares, report_rows)
    _join_files([share.file for share in shares], target)
    for number, index in enumerate(held_out):
        index.merge_first_seen([first_seen[number] for _, first_seen in results])
    parts = [part for part, _ in results]
    truncations = Truncations()
    for part in parts:
        truncations.extend(part.truncations)
    return TokenizedSplit(
        rows=numpy.concatenate([part.rows for part in parts]),
        lengths=numpy.concatenate([part.lengths for part in parts]),
        faults=merge_occurrences(part.faults for part in parts),
        truncations=truncations,
        scripts=merge_occurrences(part.scripts for part in parts),
        ngrams=concatenate_ngrams([part.ngrams for part in parts]),
    )


@dataclass(frozen=True)
class _Share:
    """Rows `start` to `stop` of the split, and the file that they are written to."""

    start: int
    stop: int
    file: Path


def _tokenize_share(
    stored: StoredExamples,
    numbers: RowNumbers,
    rules: TokenizationRules,
    held_out: Sequence[NGramIndex],
    sample_rows: int,
    share: _Share,
    report_rows: ReportRows,
) -> tuple[TokenizedSplit, list[FirstSeen]]:
    """Return the result for one share of the rows, and what each index has seen in it."""
    for index in held_out:
        index.reset()
    with stored.open_reader() as reader, share.file.open("wb") as target:
        tokenizer = _ShareTokenizer(rules, reader, target)
        for start in range(share.start, share.stop, ROWS_PER_BATCH):
            batch = numbers[start : min(start + ROWS_PER_BATCH, share.stop)]
            positions, ngrams = tokenizer.tokenize_batch(batch)
            for index in held_out:
                index.mark_seen(ngrams, start + positions)
            tokenizer.sampled.append(ngrams.take_first(int((start + positions < sample_rows).sum())))
            report_rows(len(batch))
    return tokenizer.make_result(), [index.get_first_seen() for index in held_out]


class _ShareTokenizer:
    """Tokenises a share of the rows batch by batch, and collects the result."""

    def __init__(self, rules: TokenizationRules, reader: ExampleReader, target: BinaryIO) -> None:
        self.rules, self.reader, self.target = rules, reader, target
        self.encoder = ConversationEncoder.of_tokenizer(rules.tokenizer)
        self.faults: dict[str, Occurrences[tuple[str, Fault]]] = {}
        self.scripts: dict[str, Occurrences[str]] = {}
        self.truncations = Truncations()
        self.kept: list[RowNumbers] = []
        self.lengths: list[LengthTable] = []
        self.sampled: list[NGrams] = []

    def tokenize_batch(self, numbers: RowNumbers) -> tuple[RowNumbers, NGrams]:
        """Write the usable rows; return their positions in the batch, and their n-grams."""
        lines = [self.reader.read_line(row) for row in numbers]
        examples = [json.loads(text) for text in lines]
        positions: list[int] = []
        lengths: list[TokenLengths] = []
        words: list[list[int]] = []
        for position, result in enumerate(self.compute_lengths(examples)):
            example, text = examples[position], lines[position]
            get_place = partial(self.reader.read_place, numbers[position])
            if isinstance(result, TokenLengths) and result.longest > self.rules.max_length:
                result, example = self.shorten(example, result, get_place)
                text = line(example)
            if isinstance(result, Fault):
                self.faults.setdefault(result.reason, Occurrences()).add(partial(_add_place, get_place, result))
                continue
            self.target.write(text)
            dialogue = get_dialogue(example["messages"])
            self.scripts.setdefault(detect_writing_system(dialogue), Occurrences()).add(get_place)
            words.append(hash_words(dialogue))
            lengths.append(result._replace(**({} if result.document else _describe_answer(example))))
            positions.append(position)
        kept = numpy.array(positions, dtype=numpy.int64)
        self.kept.append(numbers[kept])
        self.lengths.append(numpy.array(lengths, dtype=numpy.int32).reshape(len(lengths), len(FIELDS)))
        return kept, hash_ngrams(words)

    def shorten(
        self, example: Example, lengths: TokenLengths, get_place: Callable[[], str]
    ) -> tuple[TokenLengths | Fault, Example]:
        """Return the example truncated by the rules with its new lengths; a Fault if it is to be dropped."""
        max_length = self.rules.max_length
        field_, size = None, f"{lengths.total} tokens long ({lengths.prompt} prompt, {lengths.answer} answer)"
        if lengths.rejected > lengths.total:
            field_, size = "rejected", f"{lengths.rejected} tokens long, prompt and rejected answer"
        problem = f"is {size}; expected at most training.max_length {max_length}"
        if self.rules.too_long == "drop":
            return Fault("too_long", field_, problem), example
        side: TruncatedSide = "prompt" if self.rules.too_long == "truncate_prompt" else "answer"
        shorter = self.truncate_example(example, side)
        new = None if shorter is None else next(self.compute_lengths([shorter]))
        if shorter is None or not isinstance(new, TokenLengths):
            rest = "answer" if side == "prompt" else "prompt"
            problem += f"; too little of the {side} would fit beside the {rest}"
            return Fault("too_long", field_, problem), example
        change = f"was {lengths.longest} tokens long and is {new.longest}"
        self.truncations.add(lengths, new, partial(_add_place, get_place, change))
        return new, shorter

    def truncate_example(self, example: Example, side: TruncatedSide) -> Example | None:
        """Return the example with one side truncated, or None; both answers of a pair keep the same prompt."""

        def truncate(messages: Messages, rejected: Messages) -> Messages | None:
            def count_tokens(messages: Messages) -> int | None:
                result = next(self.compute_lengths([{**example, "messages": messages, "rejected": rejected}]))
                return result.longest if isinstance(result, TokenLengths) else None

            return truncate_conversation(messages, side, self.rules.max_length, count_tokens, self.rules.tokenizer)

        messages, rejected = example["messages"], example.get("rejected", [])
        if not rejected or side == "prompt":
            shorter = truncate(messages, rejected)
            return None if shorter is None else {**example, "messages": shorter}
        better, worse = truncate(messages, []), truncate([*messages[:-1], *rejected], [])
        # A pair needs its last turn and two different answers.
        if better is None or worse is None or len(better) < len(messages) or len(worse) < len(messages):
            return None
        return None if better[-1] == worse[-1] else {**example, "messages": better, "rejected": worse[-1:]}

    def compute_lengths(self, examples: Sequence[Example]) -> Iterator[TokenLengths | Fault]:
        """Yield the lengths of each example, or a Fault if the chat template refuses it."""
        pairs = [example for example in examples if example.get("rejected")]
        worse = [[*pair["messages"][:-1], *pair["rejected"]] for pair in pairs]
        rejected = self._compute_lengths(worse, [pair.get("tools") for pair in pairs])
        results = self._compute_lengths(
            [example["messages"] for example in examples], [example.get("tools") for example in examples]
        )
        for example, result in zip(examples, results, strict=True):
            if not example.get("rejected"):
                yield result
                continue
            other = next(rejected)
            if isinstance(result, TokenLengths) and isinstance(other, TokenLengths):
                yield result._replace(rejected=other.total)
            else:
                yield other if isinstance(result, TokenLengths) else result

    def _compute_lengths(
        self, conversations: Sequence[Messages], tools: Sequence[Tools | None]
    ) -> Iterator[TokenLengths | Fault]:
        encoded = self.encoder.encode_rows(conversations, supervise=self.rules.supervise, tools=tools)
        for messages, result in zip(conversations, encoded, strict=True):
            if isinstance(result, TemplateError):
                yield Fault("template", None, str(result))
            elif is_document(messages):
                yield _count_document(result[0], self.rules.max_length)
            else:
                yield _count_tokens(result)

    def make_result(self) -> TokenizedSplit:
        return TokenizedSplit(
            rows=numpy.concatenate([_NO_ROWS, *self.kept]),
            lengths=numpy.concatenate([_NO_LENGTHS, *self.lengths]),
            faults=self.faults,
            truncations=self.truncations,
            scripts=self.scripts,
            ngrams=concatenate_ngrams(self.sampled),
        )


def _count_tokens(sequences: Sequence[Encoded]) -> TokenLengths:
    counts = [(len(sequence.input_ids), sequence.supervised.count(True)) for sequence in sequences]
    total, answer = max(counts, key=itemgetter(0))
    return TokenLengths(
        prompt=total - answer,
        answer=answer,
        total=total,
        supervised=sum(supervised for _, supervised in counts),
        tokens=sum(tokens for tokens, _ in counts),
        sequences=len(counts),
        reference=_count_last_answer(sequences[-1].supervised),
        conversation=len(sequences[-1].input_ids),
    )


def _count_document(sequence: Encoded, max_length: int) -> TokenLengths:
    """Return the lengths of a raw text: `total` and `conversation` are those of its longest piece."""
    tokens = len(sequence.input_ids)
    longest = min(tokens, max_length)
    return TokenLengths(
        prompt=0,
        answer=longest,
        total=longest,
        supervised=sequence.supervised.count(True),
        tokens=tokens,
        sequences=-(-tokens // max_length),
        reference=1,
        conversation=longest,
        document=1,
    )


def _count_last_answer(supervised: Sequence[bool]) -> int:
    """Return the number of supervised tokens at the end of a sequence."""
    try:
        return supervised[::-1].index(False)
    except ValueError:
        return len(supervised)


def _describe_answer(example: Mapping[str, Any]) -> dict[str, int]:
    """Return the words of an answer, whether it is a JSON object or array, as a call is, and whether it may call."""
    message = example["messages"][-1]
    text, calls = str(message["content"]), bool(message.get("tool_calls"))
    may_call = calls or bool(example.get("tools"))
    return {"words": len(hash_words(text)), "json": int(calls or _is_json(text)), "tools": int(may_call)}


def _is_json(text: str) -> bool:
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _add_place(get_place: Callable[[], str], case: Case) -> tuple[str, Case]:
    return get_place(), case


def _join_files(parts: Sequence[Path], target: Path) -> None:
    first, *others = parts
    first.replace(target)
    with target.open("ab") as output:
        for part in others:
            with part.open("rb") as source:
                shutil.copyfileobj(source, output, 1 << 20)
            part.unlink()
