"""Likelihood of given texts under a GGUF, and KL divergence from another: what perplexity is computed from."""

import math
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import numpy as np

from lathe.common.errors import InputError
from lathe.common.progress import Progress
from lathe.gguf.llama_library import FloatRows
from lathe.inference.generate import Completion, Generator, decode_prompt
from lathe.inference.kv_cache import KVCache
from lathe.inference.shared_prefix import SequenceStats, TokenSequence, count_common_tokens, decode_prefix

# Logits per block of computation: 4 MB, which fit into the processor's cache; 64 MB would be copied several times.
_BLOCK = 1 << 20
MOST_NATS = 700.0  # per token, whose perplexity is still a number


@dataclass(frozen=True)
class Likelihood:
    """Sum of the negative log-likelihoods of a text's tokens in nats, and how many tokens were scored.

    `kl` is the mean over these tokens of KL(reference model || this model), in nats; None without a reference model.
    """

    nll: float
    tokens: int
    kl: float | None


def score_references(
    generator: Generator,
    pairs: Callable[[], Iterable[tuple[str, str]]],
    *,
    against: Generator | None = None,
    finished: Container[int] = (),
) -> Iterator[tuple[int, Likelihood]]:
    """Yield the number of each (prompt, reference), from 0, and the likelihood of the reference after the prompt.

    Scored are the reference's tokens and the end token, each given the prompt and all before it, so that
    exp(nll / tokens) is the perplexity. Prompt and reference are tokenized together, as in training; a token that
    spans their border is scored. `against` is the model, of the same vocabulary, that KL is measured from. `pairs` is
    called twice and read lazily; numbers in `finished` are skipped. Raises InputError that names the row if it does
    not fit into `n_ctx`.
    """
    end = _get_end(generator)

    def tokenize_pairs() -> Iterator[list[_ScoredSequence]]:
        for number, (prompt, reference) in enumerate(pairs()):
            sequence = _tokenize_reference(generator, number, generator.tokenize(prompt), prompt + reference)
            yield [_ScoredSequence.of_reference(sequence, end)]

    yield from _score("references", tokenize_pairs, generator, against, finished)


def answer_and_score(
    generator: Generator,
    pairs: Callable[[], Iterable[tuple[str, str]]],
    *,
    max_new_tokens: int,
    against: Generator | None = None,
    answered: Container[int] = (),
    scored: Container[int] = (),
) -> Iterator[tuple[int, Completion | Likelihood]]:
    """Yield the number of each (prompt, reference) with the likelihood of the reference, and with the greedy answer.

    Both are as `score_references` and `Generator.iterate_completions` give them, in less time: a prompt is decoded once
    for the two. A row's likelihood comes before its answer. Numbers in `answered` are skipped, and for those in
    `scored` only the answer is given.
    """
    end = _get_end(generator)

    def read_rows() -> Iterator[TokenSequence]:
        for number, (prompt, reference) in enumerate(pairs()):
            row = TokenSequence.of(number, generator.tokenize(prompt), n_ctx=generator.n_ctx)
            row.reference = _tokenize_reference(generator, number, row.tokens, prompt + reference)
            yield row

    stats = SequenceStats.of(read_rows())
    prefix_length = len(stats.prefix)
    likelihoods: list[tuple[int, Likelihood]] = []
    with ExitStack() as stack:
        others = [_open_cache(stack, model, stats) for model in [against] if model and stats.count]

        def decode(cache: KVCache, slot: int, row: TokenSequence) -> FloatRows:
            if not row.reference or row.number in scored:
                return decode_prompt(cache, slot, row)
            for other in others:
                other.cut(0, prefix_length)
            slots = [(cache, slot), *((other, 0) for other in others)]
            losses, divergences, logits = _score_sequence(slots, _ScoredSequence.of_reference(row.reference, end))
            likelihoods.append((row.number, summarize(losses, divergences)))
            border = row.reference.first_output + 1
            is_whole = border == len(row.tokens)  # if not, the last token of the prompt is another with the reference
            cache.cut(slot, border if is_whole else prefix_length)
            return logits if cache.length(slot) == len(row.tokens) else decode_prompt(cache, slot, row)

        for number, completion in generator.answer_sequences(
            read_rows(), stats, max_new_tokens=max_new_tokens, finished=answered, decode=decode
        ):
            yield from likelihoods
            likelihoods.clear()
            yield number, completion


def score_texts(
    generator: Generator,
    texts: Callable[[], Iterable[str]],
    *,
    against: Generator | None = None,
    finished: Container[int] = (),
    task: str = "general text",
) -> Iterator[tuple[int, Likelihood]]:
    """Yield the number of each text, from 0, and its likelihood alone, without any chat template.

    Scored are all tokens but the first, after a BOS if the vocabulary asks for one. A text longer than `n_ctx` is cut
    into pieces, each scored alone.
    """
    bos, n_ctx = generator.model.bos, generator.n_ctx

    def tokenize_texts() -> Iterator[list[_ScoredSequence]]:
        for number, text in enumerate(texts()):
            tokens = generator.tokenize(text)
            first = tokens[:1] if tokens[:1] == [bos] else []
            rest = tokens[len(first) :]
            step = n_ctx - len(first)
            cut = [first + rest[begin : begin + step] for begin in range(0, len(rest), step)]
            yield [
                _ScoredSequence(TokenSequence.of(number, piece[:-1], n_ctx=n_ctx, first_output=0), piece[1:])
                for piece in cut
                if len(piece) > 1
            ]

    yield from _score(task, tokenize_texts, generator, against, finished)


@dataclass(frozen=True, slots=True)
class _ScoredSequence:
    sequence: TokenSequence
    expected: Sequence[int]  # the token after each from the sequence's first output on

    @classmethod
    def of_reference(cls, sequence: TokenSequence, end: int) -> Self:
        return cls(sequence, [*sequence.tokens[sequence.first_output + 1 :], end])


def _get_end(generator: Generator) -> int:
    if generator.model.eos is None:
        raise InputError(
            f"{generator.model.path}: its vocabulary names no end token; perplexity needs one to score",
            code="no-end-token",
        )
    return generator.model.eos


def _tokenize_reference(generator: Generator, number: int, prompt: Sequence[int], text: str) -> TokenSequence:
    """Tokenize a prompt with its reference; the first output is before the first token that the prompt lacks."""
    tokens = array("i", generator.tokenize(text))
    border = count_common_tokens(array("i", prompt), tokens)
    return TokenSequence.of(number, tokens, n_ctx=generator.n_ctx, first_output=border - 1)


def _score(
    task: str,
    texts: Callable[[], Iterator[list[_ScoredSequence]]],
    generator: Generator,
    against: Generator | None,
    finished: Container[int],
) -> Iterator[tuple[int, Likelihood]]:
    count = 0

    def read_sequences() -> Iterator[TokenSequence]:
        nonlocal count
        for pieces in texts():
            count += 1
            yield from (piece.sequence for piece in pieces)

    stats = SequenceStats.of(read_sequences())
    before = sum(number in finished for number in range(count))
    with ExitStack() as stack, Progress(task, count, done=before) as progress:
        caches = [_open_cache(stack, model, stats) for model in (generator, against) if model]
        for number, pieces in enumerate(texts()):
            if number in finished:
                continue
            losses: list[float] = []
            divergences: list[float] = []
            for piece in pieces:
                for cache in caches:
                    cache.cut(0, len(stats.prefix))
                more_losses, more_divergences, _ = _score_sequence([(cache, 0) for cache in caches], piece)
                losses += more_losses
                divergences += more_divergences
            progress.add()
            yield number, summarize(losses, divergences)


def _open_cache(stack: ExitStack, model: Generator, stats: SequenceStats) -> KVCache:
    """Open a cache for one sequence at a time, with the shared prefix in it."""
    length = max(1, stats.longest_reference or stats.longest)
    cache = stack.enter_context(model.make_cache(slots=1, length=length, min_rows=1))
    decode_prefix(cache, stats, slots=1)
    return cache


def _score_sequence(
    slots: Sequence[tuple[KVCache, int]], scored: _ScoredSequence
) -> tuple[list[float], list[float], FloatRows]:
    """Decode a sequence in a slot of this model's cache, and of that of the reference model if there is one.

    Returns the loss at each output, the divergence from the reference model (none without one), and the logits of the
    first output, (1, n_vocab).
    """
    tokens, first_output = scored.sequence.tokens, scored.sequence.first_output
    if len({cache.length(slot) for cache, slot in slots}) > 1:  # of recurrent models, one of which forgot all
        for cache, slot in slots:
            cache.cut(slot, 0)
    losses: list[float] = []
    divergences: list[float] = []
    first: FloatRows | None = None
    while slots[0][0].length(slots[0][1]) < len(tokens):
        # Of both models, piece by piece: memory holds no more than MAX_LOGITS of each.
        logits, *others = [cache.feed(slot, tokens, first_output=first_output) for cache, slot in slots]
        if first is None and len(logits):
            first = logits[:1].copy()
        expected = scored.expected[len(losses) : len(losses) + len(logits)]
        for reference in others:
            divergences += _compute_divergences(reference, logits)
        losses += compute_losses(logits, expected)
    assert first is not None  # a sequence has at least one output
    return losses, divergences, first


def summarize(losses: Sequence[float], divergences: Sequence[float]) -> Likelihood:
    """Return the sum of losses in nats, and the mean of divergences. Raises InputError if they are no numbers."""
    nll, kl = sum(losses), sum(divergences) / len(divergences) if divergences else None
    if not (nll <= MOST_NATS * len(losses) and math.isfinite(kl or 0)):  # not a number fails too
        raise InputError(
            f"the model gives a text {nll / len(losses):.4g} nats per token: its weights or values are beyond what 16 "
            "bits hold, as after a training that diverged; look at the losses in metrics/train, and lower "
            "training.learning_rate or the number of steps",
            code="no-likelihood",
        )
    return Likelihood(nll, len(losses), kl)


def compute_losses(logits: FloatRows, expected: Sequence[int]) -> list[float]:
    """Return the negative log-likelihood, in nats, of the expected token of each row of logits."""
    losses: list[float] = []
    for begin, block in _split_blocks(logits):
        highest = block.max(axis=1, keepdims=True)
        log_sums = np.log(np.exp(block - highest).sum(axis=1, dtype=np.float64)) + highest[:, 0]
        chosen = np.array(expected[begin : begin + len(block)], np.int64)
        losses += (log_sums - block[np.arange(len(block)), chosen]).tolist()
    return losses


def _compute_divergences(reference: FloatRows, logits: FloatRows) -> list[float]:
    """Return KL(reference || model), in nats, at each row of logits."""
    divergences: list[float] = []
    for begin, block in _split_blocks(logits):
        log_p, log_q = map(_compute_log_softmax, (reference[begin : begin + len(block)], block))
        # Not below zero, to which rounding would take two models that are almost equal.
        divergences += np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0).tolist()
    return divergences


def _compute_log_softmax(logits: FloatRows) -> np.ndarray:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _split_blocks(logits: FloatRows) -> Iterator[tuple[int, FloatRows]]:
    size = max(1, _BLOCK // logits.shape[1])
    for begin in range(0, len(logits), size):
        yield begin, logits[begin : begin + size]
