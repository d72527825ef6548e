"""Greedy answers from a GGUF file, many rows at a time, with llama.cpp.

Every row has a slot of the key-value cache of its own; one `llama_decode` advances all slots. A finished row
leaves its slot to the next one at once, and what all prompts begin with (the system prompt) is decoded once
and copied. The order of work depends on the rows alone, never on time, so that a run repeated on the same
machine with the same `threads` gives the same bytes.
"""

import codecs
import collections.abc
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from lathe.common.progress import Progress
from lathe.gguf.llama_library import FloatRows
from lathe.gguf.llama_model import Model
from lathe.inference.kv_cache import Cache
from lathe.inference.shared_prefix import FEWEST, MAX_LOGITS, Row, Survey, common_length, share_prefix


@dataclass(frozen=True)
class Completion:
    """One answer: its text, why it ended, and how many tokens were generated, the ending one included."""

    text: str
    finish_reason: Literal["stop", "length"]
    tokens: int


class Generator:
    """A GGUF model, loaded once, that answers prompts; a context manager.

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
        """The greedy answer to each prompt, in the order given; `completions` for more rows than memory should hold."""
        held = list(prompts)
        finished = dict(self.completions(lambda: held, max_new_tokens=max_new_tokens))
        return [finished[number] for number in range(len(held))]

    def completions(
        self, prompts: Callable[[], Iterable[str]], *, max_new_tokens: int, done: Container[int] = ()
    ) -> Iterator[tuple[int, Completion]]:
        """Yield the number of each prompt (from 0) and its greedy answer as they are finished.

        The answer is what decoding one prompt after another would give. It ends at any end-of-generation token
        (`stop`), after `max_new_tokens`, or where prompt and answer fill `n_ctx` (`length`). `prompts` is called
        twice and read lazily: all are measured before the first is decoded. Those whose numbers are in `done` are
        not answered again. Raises InputError that names the row if its prompt fills `n_ctx` already.
        """

        def rows() -> Iterator[Row]:
            return (Row.of(number, self.tokenize(prompt), n_ctx=self.n_ctx) for number, prompt in enumerate(prompts()))

        survey = Survey.of(rows())
        waiting = (row for row in rows() if row.number not in done)
        answers: dict[int, array[int]] = {}
        before = sum(number in done for number in range(survey.rows))
        with Progress("answers", survey.rows, done=before) as progress:
            for asked, logits in self._run(waiting, survey, room=max_new_tokens):
                # All go on before one is given away: the logits are overwritten, and rows change their slots.
                finished = []
                for row, token in zip(asked, logits.argmax(axis=1).tolist(), strict=True):
                    answer = answers.setdefault(row.number, array("i"))
                    answer.append(token)
                    ended = self.model.is_end(token)
                    if ended or len(answer) == max_new_tokens or len(row.tokens) == self.n_ctx - 1:
                        del answers[row.number]
                        finished.append((row.number, self._completion(answer, ended=ended)))
                    else:
                        row.tokens.append(token)
                for number, completion in finished:
                    progress.add()
                    yield number, completion

    def stream(self, prompt: str, *, max_new_tokens: int) -> Iterator[str]:
        """The greedy answer to one prompt, piece by piece as it is decoded.

        What this prompt shares with the last one and its answer (a conversation that goes on) is not decoded again.
        """
        row = Row.of(0, self.tokenize(prompt), n_ctx=self.n_ctx)
        if self._stream_cache is None:
            self._stream_cache = self.cache(slots=1, length=self.n_ctx, fewest=2)
        cache = self._stream_cache
        cache.cut(0, min(common_length(self._streamed, row.tokens), row.first_output))
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

    def cache(self, *, slots: int, length: int, fewest: int) -> Cache:
        """A new key-value cache of this model for `slots` rows of up to `length` tokens; see `Cache`."""
        return Cache(
            self.model,
            slots=slots,
            length=length,
            max_outputs=MAX_LOGITS // self.model.n_vocab,
            threads=self.threads,
            fewest=fewest,
        )

    def _run(self, waiting: Iterator[Row], survey: Survey, *, room: int) -> Iterator[tuple[Sequence[Row], FloatRows]]:
        """Feed the rows through the slots; after each decode that gives logits, yield them and whose they are.

        They are of one row (its prompt is in) or of several, one each. The caller may append up to `room` tokens to
        `row.tokens`, one at a time, before it asks for more; a row that gets none gives its slot to the next.
        """
        if not survey.rows:
            return
        slots = min(self.n_parallel, survey.rows)
        length = min(self.n_ctx, survey.longest + room)
        fewest = FEWEST if self.n_parallel >= FEWEST else 2
        with self.cache(slots=slots, length=length, fewest=fewest) as cache:
            shared = share_prefix(cache, survey, slots=slots)
            busy: list[Row] = []  # the row at index i is in slot i
            for slot in range(slots):
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

    def _completion(self, answer: Iterable[int], *, ended: bool) -> Completion:
        tokens = list(answer)
        text = b"".join(map(self.model.piece, tokens)).decode("utf-8", "replace")
        return Completion(text, "stop" if ended else "length", len(tokens))


def _start(
    cache: Cache, slot: int, waiting: Iterator[Row], shared: int
) -> collections.abc.Generator[tuple[list[Row], FloatRows], None, Row | None]:
    """Feed the prompt of the next row into a slot, by itself; yield its logits. Rows that end with it are passed by.

    Returns the row that is to be continued in the slot, None if no row is left.
    """
    for row in waiting:
        prompt_length = len(row.tokens)
        cache.cut(slot, shared)
        while cache.length(slot) < prompt_length:
            logits = cache.feed(slot, row.tokens, first_output=row.first_output)
            if len(logits):
                yield [row], logits
        if len(row.tokens) > prompt_length:
            return row
    return None
