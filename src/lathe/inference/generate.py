"""Answers from a GGUF file, greedy unless tokens are chosen otherwise, many rows at a time, with llama.cpp.

Every row has its own slot of the key-value cache; one `llama_decode` advances all slots. The slot of a finished row
goes to the next row at once, and the prefix that all prompts share (the system prompt) is decoded once and copied. The
order of work depends on the rows alone, never on time, so that a run repeated on the same machine with the same
`threads` gives the same bytes.
"""

import codecs
import collections.abc
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from lathe.common.errors import InputError
from lathe.common.operating_system import get_total_memory_bytes
from lathe.common.progress import Progress
from lathe.config.base import Auto
from lathe.gguf.llama_library import FloatRows
from lathe.gguf.llama_model import LlamaModel
from lathe.inference.kv_cache import N_UBATCH, KVCache, count_bytes_per_token
from lathe.inference.shared_prefix import (
    MAX_LOGITS,
    MIN_ROWS,
    SequenceStats,
    TokenSequence,
    count_common_tokens,
    decode_prefix,
)
from lathe.models.answer_syntax import render_markers
from lathe.models.chat_template import ChatTemplate

# Decodes the prompt of a row in a slot of a cache, and returns the logits after its last token, (1, n_vocab).
PromptDecoder = Callable[[KVCache, int, TokenSequence], FloatRows]

# Chooses the next token of each row from its logits, (rows, n_vocab); the greedy choice is the likeliest.
TokenChooser = Callable[[Sequence[TokenSequence], FloatRows], Sequence[int]]

# Tells from the token ids of an unfinished answer whether it is to end here, as at a text that stops it.
EndTest = Callable[[Sequence[int]], bool]

# Rows decoded at once where that is `auto`: their cache takes at most this part of the memory.
MOST_ROWS, MEMORY_SHARE = 32, 4
# Prompts decoded together are filled up to the longest: to at most so many times their tokens.
MOST_FILLED = 1.15


@dataclass(frozen=True)
class Completion:
    """One answer: its text, why it ended, and how many tokens were generated, the ending one included."""

    text: str
    finish_reason: Literal["stop", "length"]
    tokens: int


class Generator:
    """A GGUF model, loaded once, that answers prompts; a context manager.

    `n_parallel` rows are decoded at once (auto: 32, or as many as fit into a quarter of the memory); a prompt and its
    answer may take `n_ctx` tokens together (the cache is made as large as the rows need, up to that); results depend on
    `threads`, so it is given.
    """

    def __init__(
        self, gguf: Path, *, n_parallel: int | Auto, n_ctx: int, threads: int, n_gpu_layers: int | Auto = "auto"
    ) -> None:
        self.model = LlamaModel(gguf, n_gpu_layers=None if n_gpu_layers == "auto" else n_gpu_layers)
        self.n_ctx, self.threads = n_ctx, threads
        self.n_parallel = self.choose_rows() if n_parallel == "auto" else n_parallel
        self._shown: dict[int, bytes] | None = None
        self._stream_cache: KVCache | None = None
        self._streamed: Sequence[int] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream_cache:
            self._stream_cache.close()
        self.model.close()

    def choose_rows(self) -> int:
        """Return how many rows of `n_ctx` tokens to decode at once: 32, or as many as fit into a quarter of memory."""
        budget = get_total_memory_bytes() // MEMORY_SHARE
        return max(MIN_ROWS, min(MOST_ROWS, budget // (self.n_ctx * count_bytes_per_token(self.model))))

    @property
    def chat_template(self) -> ChatTemplate:
        """The chat template of the GGUF."""
        return self.model.chat_template

    def tokenize(self, prompt: str) -> list[int]:
        """Return the token ids of a rendered prompt, with exactly one BOS if the vocabulary asks for one."""
        return self.model.tokenize_prompt(prompt)

    def get_token_bytes(self, token: int) -> bytes:
        """Return the bytes of a generated token; of a control token only if it marks a thought or a call of a tool."""
        if self._shown is None:
            self._shown = find_marker_tokens(self.model)
        return self._shown.get(token) or self.model.get_token_bytes(token)

    def complete(self, prompts: Iterable[str], *, max_new_tokens: int) -> list[Completion]:
        """Return the greedy answer to each prompt, in their order; for many rows use `iterate_completions`."""
        texts = list(prompts)
        completions = dict(self.iterate_completions(lambda: texts, max_new_tokens=max_new_tokens))
        return [completions[number] for number in range(len(texts))]

    def iterate_completions(
        self, prompts: Callable[[], Iterable[str]], *, max_new_tokens: int, finished: Container[int] = ()
    ) -> Iterator[tuple[int, Completion]]:
        """Yield the number of each prompt (from 0) and its greedy answer as they are finished.

        The answer is what decoding one prompt after another would give. It ends at any end-of-generation token
        (`stop`), after `max_new_tokens`, or where prompt and answer fill `n_ctx` (`length`). `prompts` is called
        twice and read lazily: all are measured before the first is decoded. Numbers in `finished` are not answered
        again. Raises InputError that names the row if its prompt fills `n_ctx` already.
        """

        def read_rows() -> Iterator[TokenSequence]:
            for number, prompt in enumerate(prompts()):
                yield TokenSequence.of(number, self.tokenize(prompt), n_ctx=self.n_ctx)

        stats = SequenceStats.of(read_rows())
        yield from self.answer_sequences(read_rows(), stats, max_new_tokens=max_new_tokens, finished=finished)

    def answer_sequences(
        self,
        sequences: Iterable[TokenSequence],
        stats: SequenceStats,
        *,
        max_new_tokens: int,
        finished: Container[int] = (),
        decode: "PromptDecoder | None" = None,
        is_end: EndTest | None = None,
        choose: TokenChooser | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Do the work of `iterate_completions` for prompts as tokens, of which `stats` are known.

        `decode` decodes each prompt by itself; without it several are decoded together. `is_end` ends an answer
        (`stop`) before an end-of-generation token does. `choose` chooses the tokens, in place of the likeliest.
        """
        waiting = (row for row in sequences if row.number not in finished)
        answers: dict[int, array[int]] = {}
        before = sum(number in finished for number in range(stats.count))
        with Progress("answers", stats.count, done=before) as progress:
            for rows, logits in self._decode(waiting, stats, max_new_tokens, decode):
                # All rows are advanced before one is yielded: the logits are overwritten, and rows change their slots.
                completions = []
                tokens = choose(rows, logits) if choose else logits.argmax(axis=1).tolist()
                for row, token in zip(rows, tokens, strict=True):
                    answer = answers.setdefault(row.number, array("i"))
                    answer.append(token)
                    ended = self.model.is_end(token) or (is_end is not None and is_end(answer))
                    if ended or len(answer) == max_new_tokens or len(row.tokens) == self.n_ctx - 1:
                        del answers[row.number]
                        completions.append((row.number, self._make_completion(answer, ended=ended)))
                    else:
                        row.tokens.append(token)
                for number, completion in completions:
                    progress.add()
                    yield number, completion

    def stream(self, prompt: str, *, max_new_tokens: int) -> Iterator[str]:
        """Yield the greedy answer to one prompt, piece by piece as it is decoded.

        The prefix that it shares with the last prompt and its answer (a longer conversation) is not decoded again.
        """
        row = TokenSequence.of(0, self.tokenize(prompt), n_ctx=self.n_ctx)
        if self._stream_cache is None:
            self._stream_cache = self.make_cache(slots=1, length=self.n_ctx, min_rows=2)
        cache = self._stream_cache
        cache.cut(0, min(count_common_tokens(self._streamed, row.tokens), row.first_output))
        self._streamed = row.tokens
        logits = decode_prompt(cache, 0, row)
        characters = codecs.getincrementaldecoder("utf-8")("replace")
        for _ in range(min(max_new_tokens, self.n_ctx - len(row.tokens))):
            token = int(logits[-1].argmax())
            if self.model.is_end(token):
                break
            if piece := characters.decode(self.get_token_bytes(token)):
                yield piece
            row.tokens.append(token)
            logits = cache.step([token])
        if rest := characters.decode(b"", final=True):
            yield rest

    def make_cache(self, *, slots: int, length: int, min_rows: int) -> KVCache:
        """Make a key-value cache of this model for `slots` rows of up to `length` tokens; see `KVCache`."""
        return KVCache(
            self.model,
            slots=slots,
            length=length,
            max_outputs=MAX_LOGITS // self.model.n_vocab,
            threads=self.threads,
            min_rows=min_rows,
        )

    def _decode(
        self, waiting: Iterator[TokenSequence], stats: SequenceStats, room: int, decode: PromptDecoder | None
    ) -> Iterator[tuple[Sequence[TokenSequence], FloatRows]]:
        """Decode the rows slot by slot; after each call that gives logits, yield the rows and their logits.

        They are rows whose prompts are now decoded, or those that go on, with one row of logits each. The caller may
        append up to `room` tokens to `row.tokens`, one per yield; the slot of a row that gets none goes to another.
        """
        if not stats.count:
            return
        slots = min(self.n_parallel, stats.count)
        length = min(self.n_ctx, max(stats.longest + room, stats.longest_reference))
        min_rows = MIN_ROWS if self.n_parallel >= MIN_ROWS else 2
        with self.make_cache(slots=slots, length=length, min_rows=min_rows) as cache:
            prefix_length = decode_prefix(cache, stats, slots=slots)
            prompts = _Prompts(cache, waiting, prefix_length, decode)
            busy: dict[int, TokenSequence] = {}  # by slot
            while True:
                busy |= yield from prompts.start([slot for slot in range(slots) if slot not in busy])
                if not busy:
                    return
                _close_gaps(cache, busy, prefix_length)
                rows = [busy[slot] for slot in range(len(busy))]
                yield rows, cache.step([row.tokens[-1] for row in rows])
                ended = [slot for slot, row in busy.items() if cache.length(slot) == len(row.tokens)]
                for slot in ended:
                    del busy[slot]
                    cache.cut(slot, prefix_length)
                if prompts.are_grouped and len(ended) > 1:
                    _close_gaps(cache, busy, prefix_length)

    def _make_completion(self, answer: Iterable[int], *, ended: bool) -> Completion:
        tokens = list(answer)
        text = b"".join(map(self.get_token_bytes, tokens)).decode("utf-8", "replace")
        return Completion(text, "stop" if ended else "length", len(tokens))


def find_marker_tokens(model: LlamaModel) -> dict[int, bytes]:
    """Return the control tokens that the model's chat template writes within an answer, such as `[TOOL_CALLS]`."""
    try:
        tokens = set(model.tokenize(render_markers(model.chat_template)))
    except InputError:
        return {}  # what is wrong with the template is said where it is rendered
    hidden = (token for token in tokens if not model.is_end(token) and not model.get_token_bytes(token))
    return {token: model.get_token_text(token).encode() for token in hidden}


def decode_prompt(cache: KVCache, slot: int, row: TokenSequence) -> FloatRows:
    """Decode what a slot lacks of a prompt; return the logits after its last token, (1, n_vocab)."""
    return cache.feed_to_end({slot: row.tokens})


def _close_gaps(cache: KVCache, busy: dict[int, TokenSequence], prefix_length: int) -> None:
    """Move the last rows into the gaps before them: llama.cpp decodes only neighbouring slots together."""
    while busy and (last := max(busy)) >= len(busy):
        gap = next(slot for slot in range(last) if slot not in busy)
        cache.copy(last, gap)
        cache.cut(last, prefix_length)
        busy[gap] = busy.pop(last)


class _Prompts:
    """The prompts that wait for a slot: decoded several at a time where none needs a decoder of its own.

    A row whose answer ends with its first token is followed by the next one in its slot.
    """

    def __init__(
        self, cache: KVCache, waiting: Iterator[TokenSequence], prefix_length: int, decode: PromptDecoder | None
    ) -> None:
        self.cache, self.waiting, self.prefix_length = cache, waiting, prefix_length
        self.decode = decode or decode_prompt
        self.are_grouped = decode is None and cache.can_forget_a_part
        self._next: TokenSequence | None = None  # taken, and too long for the group before it

    def start(
        self, slots: Sequence[int]
    ) -> collections.abc.Generator[tuple[list[TokenSequence], FloatRows], None, dict[int, TokenSequence]]:
        """Decode prompts in the given slots, from the first on, and yield the rows of each pass with their logits.

        Returns the rows that are continued, by their slots.
        """
        started: dict[int, TokenSequence] = {}
        free = list(slots)
        while free and (group := self._take_group(len(free))):
            chosen = dict(zip(free, group, strict=False))
            lengths = {slot: len(row.tokens) for slot, row in chosen.items()}
            yield group, self._decode(chosen)
            started |= {slot: row for slot, row in chosen.items() if len(row.tokens) > lengths[slot]}
            free = [slot for slot in free if slot not in started]
        return started

    def _take_group(self, most: int) -> list[TokenSequence]:
        """Take the next rows, as many as one pass decodes without much that only fills them up."""
        group: list[TokenSequence] = []
        longest = total = 0
        while len(group) < most:
            row = self._next or next(self.waiting, None)
            self._next = None
            if row is None:
                break
            length = len(row.tokens) - self.prefix_length
            longest, total = max(longest, length), total + length
            filled = longest * (len(group) + 1)
            if group and (not self.are_grouped or filled > min(N_UBATCH, MOST_FILLED * total)):
                self._next = row
                break
            group.append(row)
        return group

    def _decode(self, rows: dict[int, TokenSequence]) -> FloatRows:
        for slot in rows:
            self.cache.cut(slot, self.prefix_length)
        if self.are_grouped:
            return self.cache.feed_to_end({slot: row.tokens for slot, row in rows.items()})
        [(slot, row)] = rows.items()
        return self.decode(self.cache, slot, row)
