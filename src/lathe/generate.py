"""Greedy answers and perplexity from a GGUF file, many rows at a time, with llama.cpp.

Every row has a slot of the key-value cache of its own; one `llama_decode` advances all slots. A finished row
leaves its slot to the next one at once, and what all prompts begin with (the system prompt) is decoded once
and copied. The order of work depends on the rows alone, never on time, so that a run repeated on the same
machine with the same `threads` gives the same bytes.
"""

import codecs
import collections.abc
import logging
import math
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np

from lathe.errors import InputError
from lathe.llama import Cache, FloatRows, Model

logger = logging.getLogger(__name__)

# Logits kept at once when references are scored: 64 MB, whatever the vocabulary.
_MAX_LOGITS = 1 << 24
# Rows decoded together at least, so that every type goes through the kernels that it uses for many.
_FEWEST = 8
_SECONDS_BETWEEN_LOG_LINES = 30.0


@dataclass(frozen=True)
class Completion:
    """One answer: its text, why it ended, and how many tokens were generated, the ending one included."""

    text: str
    finish_reason: Literal["stop", "length"]
    tokens: int


class Generator:
    """A GGUF model, loaded once, that answers and scores prompts; a context manager.

    `n_parallel` rows are worked on at once; `n_ctx` tokens is the most that a prompt and its answer may take
    together (the cache is made as large as the rows at hand need, up to that); `threads` is fixed so that
    results are too.
    """

    def __init__(self, gguf: Path, *, n_parallel: int, n_ctx: int, threads: int) -> None:
        self.model = Model(gguf)
        self.n_parallel, self.n_ctx, self.threads = n_parallel, n_ctx, threads
        self._stream_cache: Cache | None = None
        self._streamed: Sequence[int] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream_cache:
            self._stream_cache.close()
        self.model.close()

    @property
    def template(self) -> str:
        """The chat template of the GGUF."""
        return self.model.template

    @property
    def bos_token(self) -> str:
        """The text of the BOS token, for the template; empty if there is none."""
        return self.model.text_of(self.model.bos)

    @property
    def eos_token(self) -> str:
        """The text of the end token, for the template; empty if there is none."""
        return self.model.text_of(self.model.eos)

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids of a rendered prompt, with exactly one BOS where the vocabulary wants one."""
        return self.model.prompt_tokens(prompt)

    def complete(self, prompts: Iterable[str], *, max_new_tokens: int) -> list[Completion]:
        """The greedy answer to each prompt, in the order given: what decoding one after another would give.

        An answer ends at any end-of-generation token (`stop`), after `max_new_tokens`, or where prompt and
        answer fill `n_ctx` (`length`). Raises InputError that names the row (from 0) if its prompt fills
        `n_ctx` already.
        """
        rows = [self._row(number, self.tokenize(prompt)) for number, prompt in enumerate(prompts)]
        answers: list[list[int]] = [[] for _ in rows]
        done: list[Completion | None] = [None] * len(rows)
        with _progress("answers", len(rows)) as advance:
            for asked, logits in self._run(rows, slots=self.n_parallel, room=max_new_tokens):
                for row, token in zip(asked, logits.argmax(axis=1).tolist(), strict=True):
                    answer = answers[row.number]
                    answer.append(token)
                    ended = self.model.is_end(token)
                    if ended or len(answer) == max_new_tokens or len(row.tokens) == self.n_ctx - 1:
                        done[row.number] = Completion(self._text(answer), "stop" if ended else "length", len(answer))
                        answer.clear()
                        advance()
                    else:
                        row.tokens.append(token)
        return [completion for completion in done if completion is not None]

    def reference_nll(self, prompts: Iterable[str], references: Iterable[str]) -> tuple[float, int]:
        """How unlikely the references are: (sum of negative log-likelihoods in nats, number of tokens scored).

        Scored are the reference's tokens and the end token, each given the prompt and all before it, so that
        exp(sum / number) is the perplexity. Prompt and reference are tokenised together, as in training; a token that
        spans their border is scored. Raises InputError that names the row if it does not fit into `n_ctx`.
        """
        if self.model.eos is None:
            raise InputError(f"{self.model.path}: its vocabulary names no end token; perplexity needs one to score")
        rows, targets = [], []
        for number, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
            whole = [*self.tokenize(prompt + reference), self.model.eos]
            border = _common_length(self.tokenize(prompt), whole)
            rows.append(self._row(number, whole[:-1], first_output=border - 1))
            targets.append(array("i", whole[border:]))
        sums = [0.0] * len(rows)
        with _progress("references", len(rows)) as advance:
            for [row, *_], logits in self._run(rows, slots=1, room=0):
                scored = targets[row.number][: len(logits)]
                del targets[row.number][: len(logits)]
                sums[row.number] += sum(_losses(logits, scored))
                if not targets[row.number]:
                    advance()
        return math.fsum(sums), sum(len(row.tokens) - row.first_output for row in rows)

    def stream(self, prompt: str, *, max_new_tokens: int) -> Iterator[str]:
        """The greedy answer to one prompt, piece by piece as it is decoded.

        What this prompt shares with the last one and its answer (a conversation that goes on) is not decoded again.
        """
        row = self._row(0, self.tokenize(prompt))
        if self._stream_cache is None:
            self._stream_cache = self._cache(slots=1, length=self.n_ctx, fewest=2)
        cache = self._stream_cache
        cache.cut(0, min(_common_length(self._streamed, row.tokens), row.first_output))
        self._streamed = row.tokens
        while cache.length(0) < len(row.tokens):
            logits = cache.feed(0, row.tokens, first_output=row.first_output)
        characters = codecs.getincrementaldecoder("utf-8")("replace")
        for _ in range(min(max_new_tokens, self.n_ctx - len(row.tokens))):
            token = int(logits[-1].argmax())
            if self.model.is_end(token):
                break
            if piece := characters.decode(self.model.piece(token)):
                yield piece
            row.tokens.append(token)
            logits = cache.step([token])
        if rest := characters.decode(b"", final=True):
            yield rest

    def _row(self, number: int, tokens: list[int], first_output: int | None = None) -> "_Row":
        if len(tokens) >= self.n_ctx:
            raise InputError(
                f"row {number}: {len(tokens)} tokens leave no room for an answer in a context of {self.n_ctx}; "
                f"shorten the row or raise generate.n_ctx"
            )
        if not tokens:
            raise InputError(f"row {number}: an empty prompt; the model needs at least one token to go on from")
        return _Row(number, array("i", tokens), len(tokens) - 1 if first_output is None else first_output)

    def _run(self, rows: Sequence["_Row"], *, slots: int, room: int) -> Iterator[tuple[Sequence["_Row"], FloatRows]]:
        """Feed the rows through the slots; after each decode that gives logits, yield them and whose they are.

        They are of one row (any number of them, from its prompt) or of several (one each). The caller may append up to
        `room` tokens to `row.tokens`, one at a time, before it asks for more; a row that gets none gives its slot to
        the next.
        """
        if not rows:
            return
        length = min(self.n_ctx, max(len(row.tokens) for row in rows) + room)
        fewest = _FEWEST if slots >= _FEWEST else 2
        with self._cache(slots=min(slots, len(rows)), length=length, fewest=fewest) as cache:
            shared = _share_prefix(cache, rows, min(slots, len(rows)))
            waiting = deque(rows)
            busy: list[_Row] = []  # the row at index i is in slot i
            for slot in range(min(slots, len(rows))):
                if row := (yield from _start(cache, slot, waiting, shared)):
                    busy.append(row)
            while busy:
                yield busy, cache.step([row.tokens[-1] for row in busy])
                for slot in reversed(range(len(busy))):
                    if cache.length(slot) < len(busy[slot].tokens):
                        continue
                    if row := (yield from _start(cache, slot, waiting, shared)):
                        busy[slot] = row
                        continue
                    # The last row closes the gap: llama.cpp decodes only neighbouring slots as one.
                    last = busy.pop()
                    if slot < len(busy):
                        busy[slot] = last
                        cache.copy(len(busy), slot)
                    cache.cut(len(busy), shared)

    def _cache(self, *, slots: int, length: int, fewest: int) -> Cache:
        return Cache(
            self.model,
            slots=slots,
            length=length,
            max_outputs=_MAX_LOGITS // self.model.n_vocab,
            threads=self.threads,
            fewest=fewest,
        )

    def _text(self, tokens: Iterable[int]) -> str:
        return b"".join(map(self.model.piece, tokens)).decode("utf-8", "replace")


@dataclass(eq=False, slots=True)
class _Row:
    number: int
    tokens: "array[int]"
    first_output: int  # index of the first token whose logits are wanted


def _start(
    cache: Cache, slot: int, waiting: deque[_Row], shared: int
) -> collections.abc.Generator[tuple[list[_Row], FloatRows], None, _Row | None]:
    """Feed the prompt of the next row into a slot, by itself; yield its logits. Rows that end with it are passed by.

    Returns the row that is to be continued in the slot, None if no row is left.
    """
    while waiting:
        row = waiting.popleft()
        prompt_length = len(row.tokens)
        cache.cut(slot, shared)
        while cache.length(slot) < prompt_length:
            logits = cache.feed(slot, row.tokens, first_output=row.first_output)
            if len(logits):
                yield [row], logits
        if len(row.tokens) > prompt_length:
            return row
    return None


def _share_prefix(cache: Cache, rows: Sequence[_Row], slots: int) -> int:
    """Decode what all rows begin with into every slot; return its length in tokens.

    The tokens before a row's first output stay outside, enough of them to go through the kernels for many.
    """
    first, last = min(row.tokens for row in rows), max(row.tokens for row in rows)
    length = min(_common_length(first, last), min(row.first_output for row in rows) - _FEWEST + 1)
    if length < _FEWEST:
        return 0
    while cache.length(0) < length:
        cache.feed(0, first[:length], first_output=length)
    for slot in range(1, slots):
        cache.copy(0, slot)
    return length


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def _losses(logits: FloatRows, expected: Sequence[int]) -> list[float]:
    """Negative log-likelihood, in nats, of the expected token of each row of logits."""
    highest = logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(logits - highest).sum(axis=1, dtype=np.float64)) + highest[:, 0]
    chosen = np.take_along_axis(logits, np.array(expected, np.int64).reshape(-1, 1), axis=1)[:, 0]
    return (log_sums - chosen).tolist()


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar with the time left on a terminal, a line in the log now and then elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=what, leave=False) as bar:

            def advance_bar() -> None:
                bar.update()

            yield advance_bar
        return
    begun = said = time.monotonic()
    done = 0

    def advance() -> None:
        nonlocal done, said
        done += 1
        now = time.monotonic()
        if now - said >= _SECONDS_BETWEEN_LOG_LINES:
            said = now
            left = (now - begun) / done * (total - done)
            logger.info("%s: %d of %d, about %d s left", what, done, total, left)

    yield advance
