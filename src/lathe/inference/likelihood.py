"""Likelihood of given texts under a GGUF, and KL divergence from another: what perplexity is computed from."""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from lathe.common.errors import InputError
from lathe.common.progress import Progress
from lathe.gguf.llama_library import FloatRows
from lathe.inference.generate import Generator
from lathe.inference.shared_prefix import SequenceStats, TokenSequence, count_common_tokens, decode_prefix

# Logits per block of computation: 4 MB, which fit into the processor's cache; 64 MB would be copied several times.
_BLOCK = 1 << 20


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
    end = generator.model.eos
    if end is None:
        raise InputError(
            f"{generator.model.path}: its vocabulary names no end token; perplexity needs one to score",
            code="no-end-token",
        )

    def tokenize_pairs() -> Iterator[list[_ScoredSequence]]:
        for number, (prompt, reference) in enumerate(pairs()):
            tokens = [*generator.tokenize(prompt + reference), end]
            border = count_common_tokens(generator.tokenize(prompt), tokens)
            sequence = TokenSequence.of(number, tokens[:-1], n_ctx=generator.n_ctx, first_output=border - 1)
            yield [_ScoredSequence(sequence, tokens[border:])]

    yield from _score("references", tokenize_pairs, generator, against, finished)


def score_texts(
    generator: Generator, texts: Callable[[], Iterable[str]], *, finished: Container[int] = ()
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

    yield from _score("general text", tokenize_texts, generator, None, finished)


@dataclass(frozen=True, slots=True)
class _ScoredSequence:
    sequence: TokenSequence
    expected: Sequence[int]  # the token after each from the sequence's first output on


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
        models = [generator] if against is None else [generator, against]
        length = max(1, stats.longest)
        caches = [stack.enter_context(model.make_cache(slots=1, length=length, min_rows=1)) for model in models]
        prefix_length = min([decode_prefix(cache, stats, slots=1) for cache in caches])  # equal for all
        for number, pieces in enumerate(texts()):
            if number in finished:
                continue
            losses: list[float] = []
            divergences: list[float] = []
            for piece in pieces:
                for cache in caches:
                    cache.cut(0, prefix_length)
                scored = 0
                while caches[0].length(0) < len(piece.sequence.tokens):
                    # Of both models, piece by piece: memory holds no more than MAX_LOGITS of each.
                    logits, *others = [
                        cache.feed(0, piece.sequence.tokens, first_output=piece.sequence.first_output)
                        for cache in caches
                    ]
                    losses += _compute_losses(logits, piece.expected[scored : scored + len(logits)])
                    for reference in others:
                        divergences += _compute_divergences(reference, logits)
                    scored += len(logits)
            kl = sum(divergences) / len(divergences) if against else None
            progress.add()
            yield number, Likelihood(sum(losses), len(losses), kl)


def _compute_losses(logits: FloatRows, expected: Sequence[int]) -> list[float]:
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
