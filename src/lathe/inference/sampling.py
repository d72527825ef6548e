"""Sampling: answers drawn from the model's distribution, several to each held-out row.

What is drawn depends on the seed, the number of the answer and the place of the token in it alone: not on the rows that
are decoded beside it, nor on where an interrupted run went on.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lathe.common.jsonl import write_jsonl
from lathe.gguf.llama_library import FloatRows
from lathe.inference.generate import Generator
from lathe.inference.journal import Journal
from lathe.inference.row_file import RowFile
from lathe.inference.shared_prefix import SequenceStats, TokenSequence
from lathe.models.answer_reading import HeldOutPrompt, read_answer
from lathe.models.answer_split import find_answer_prefix

# The likeliest tokens that are sorted; all of them are where these do not have the probability `top_p`.
SORTED = 256


@dataclass(frozen=True)
class TokenSampler:
    """Draws tokens at a temperature from the likeliest that together have the probability `top_p`."""

    seed: int
    temperature: float
    top_p: float

    def choose(self, rows: Sequence[TokenSequence], logits: FloatRows) -> list[int]:
        """Return a token for each row from its logits, (rows, n_vocab)."""
        return [
            self.draw(row_logits, self._draw_uniform(row.number, len(row.tokens)))
            for row, row_logits in zip(rows, logits, strict=True)
        ]

    def draw(self, logits: FloatRows, uniform: float) -> int:
        """Return the token that a number in [0, 1) stands for, from the logits of one row, (n_vocab,)."""
        scaled = (logits.astype(np.float64) - logits.max()) / self.temperature
        weights = np.exp(scaled)
        total = weights.sum()
        if self.top_p == 1:
            chosen = np.arange(len(weights))
        else:
            chosen = _list_likeliest(weights, SORTED)
            if weights[chosen].sum() < self.top_p * total:
                chosen = _list_likeliest(weights, len(weights))
            reached = np.searchsorted(np.cumsum(weights[chosen]), self.top_p * total)
            chosen = chosen[: int(reached) + 1]
        ends = np.cumsum(weights[chosen])
        return int(chosen[np.searchsorted(ends, uniform * ends[-1], side="right")])

    def _draw_uniform(self, number: int, place: int) -> float:
        return float(np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, place, number])).random())


def _list_likeliest(weights: np.ndarray[Any, np.dtype[np.float64]], count: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Return the numbers of the `count` largest weights, the largest first; of equal ones the lower number."""
    if count < len(weights):
        least = np.partition(weights, -count)[-count]
        candidates = np.flatnonzero(weights >= least)
    else:
        candidates = np.arange(len(weights))
    return candidates[np.argsort(-weights[candidates], kind="stable")]


@dataclass
class SampledRun:
    """A GGUF that draws `samples` answers to each row; `tokens` and `seconds` are those of this process."""

    generator: Generator
    journal: Journal
    sampler: TokenSampler
    samples: int
    tokens: int = 0
    seconds: float = 0.0

    def sample_split(self, name: str, prompts: RowFile, out: Path, *, max_new_tokens: int) -> int:
        """Draw the answers to the prompts of a split, and write them; return the number of rows.

        A row of `out` is an answer: `row` and `sample` (from 0), {reference, completion, finish_reason, tokens}, and
        what `read_answer` returns. Documents are not answered.
        """
        part, began = f"{name}/samples", time.perf_counter()
        stats = SequenceStats.of(self._iterate_sequences(prompts))
        answers = self.generator.answer_sequences(
            self._iterate_sequences(prompts),
            stats,
            max_new_tokens=max_new_tokens,
            finished=self.journal.list_finished(part),
            choose=self.sampler.choose,
        )
        for number, completion in answers:
            self.tokens += completion.tokens
            self.journal.add(part, number, vars(completion))
        self.seconds += time.perf_counter() - began
        write_jsonl(self._read_samples(part, prompts), out)
        return stats.count // self.samples

    def _iterate_sequences(self, prompts: RowFile) -> Iterator[TokenSequence]:
        for number, row in _iterate_asked(prompts):
            tokens = self.generator.tokenize(row.prompt)
            for sample in range(self.samples):
                yield TokenSequence.of(number * self.samples + sample, tokens, n_ctx=self.generator.n_ctx)

    def _read_samples(self, part: str, prompts: RowFile) -> Iterator[dict[str, Any]]:
        template = self.generator.chat_template
        for number, row in _iterate_asked(prompts):
            for sample in range(self.samples):
                completion = self.journal.read_row(part, number * self.samples + sample)
                yield {
                    "row": number,
                    "sample": sample,
                    "reference": row.reference,
                    "completion": completion["text"].removeprefix(find_answer_prefix(template)),
                    "finish_reason": completion["finish_reason"],
                    "tokens": completion["tokens"],
                    **read_answer(template, row, completion["text"]),
                }


def _iterate_asked(prompts: RowFile) -> Iterator[tuple[int, HeldOutPrompt]]:
    for number, row in enumerate(prompts):
        prompt = HeldOutPrompt(*row)
        if not prompt.is_document:
            yield number, prompt
