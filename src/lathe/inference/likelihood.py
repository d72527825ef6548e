"""How likely a GGUF finds given texts, and how far it is from another: negative log-likelihood, KL divergence."""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from lathe.common.errors import InputError
from lathe.common.progress import Progress
from lathe.gguf.llama_library import FloatRows
from lathe.inference.generate import Generator
from lathe.inference.shared_prefix import Row, Survey, common_length, share_prefix

# Logits worked on at once: 4 MB, which lie in the processor's cache, where a whole 64 MB would be copied several times.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Likelihood:
    """Of one text: the sum of its tokens' negative log-likelihoods in nats, and how many tokens were scored.

    `kl` is the mean over these tokens of KL(reference model || this model), in nats; None where there is no reference.
    """

    nll: float
    tokens: int
    kl: float | None


def of_references(
    generator: Generator,
    asked: Callable[[], Iterable[tuple[str, str]]],
    *,
    against: Generator | None = None,
    done: Container[int] = (),
) -> Iterator[tuple[int, Likelihood]]:
    """Yield the number of each (prompt, reference), from 0, and how likely the reference is behind the prompt.

    Scored are the reference's tokens and the end token, each given the prompt and all before it, so that
    exp(nll / tokens) is the perplexity. Prompt and reference are tokenised together, as in training; a token that
    spans their border is scored. `against` is the model, of the same vocabulary, that KL is measured from. `asked` is
    called twice and read lazily; what `done` contains is passed over. Raises InputError that names the row if it does
    not fit into `n_ctx`.
    """
    end = generator.model.eos
    if end is None:
        raise InputError(f"{generator.model.path}: its vocabulary names no end token; perplexity needs one to score")

    def texts() -> Iterator[list[_Scored]]:
        for number, (prompt, reference) in enumerate(asked()):
            whole = [*generator.tokenize(prompt + reference), end]
            border = common_length(generator.tokenize(prompt), whole)
            row = Row.of(number, whole[:-1], n_ctx=generator.n_ctx, first_output=border - 1)
            yield [_Scored(row, whole[border:])]

    yield from _likelihoods("references", texts, generator, against, done)


def of_texts(
    generator: Generator, texts: Callable[[], Iterable[str]], *, done: Container[int] = ()
) -> Iterator[tuple[int, Likelihood]]:
    """Yield the number of each text, from 0, and how likely it is by itself, without any chat template.

    Scored are all tokens but the first, behind a BOS where the vocabulary wants one. What is longer than `n_ctx` is cut
    into pieces, each scored by itself.
    """
    bos, n_ctx = generator.model.bos, generator.n_ctx

    def pieces() -> Iterator[list[_Scored]]:
        for number, text in enumerate(texts()):
            tokens = generator.tokenize(text)
            lead = tokens[:1] if tokens[:1] == [bos] else []
            rest = tokens[len(lead) :]
            step = n_ctx - len(lead)
            cut = [lead + rest[begin : begin + step] for begin in range(0, len(rest), step)]
            yield [
                _Scored(Row.of(number, each[:-1], n_ctx=n_ctx, first_output=0), each[1:])
                for each in cut
                if len(each) > 1
            ]

    yield from _likelihoods("general text", pieces, generator, None, done)


@dataclass(frozen=True, slots=True)
class _Scored:
    row: Row
    expected: Sequence[int]  # the token behind each from the row's first output on


def _likelihoods(
    what: str,
    texts: Callable[[], Iterator[list[_Scored]]],
    generator: Generator,
    against: Generator | None,
    done: Container[int],
) -> Iterator[tuple[int, Likelihood]]:
    count = 0

    def rows() -> Iterator[Row]:
        nonlocal count
        for pieces in texts():
            count += 1
            yield from (piece.row for piece in pieces)

    survey = Survey.of(rows())
    before = sum(number in done for number in range(count))
    with ExitStack() as stack, Progress(what, count, done=before) as progress:
        models = [generator] if against is None else [generator, against]
        length = max(1, survey.longest)
        caches = [stack.enter_context(model.cache(slots=1, length=length, fewest=1)) for model in models]
        shared = min([share_prefix(cache, survey, slots=1) for cache in caches])  # the same of all
        for number, pieces in enumerate(texts()):
            if number in done:
                continue
            losses: list[float] = []
            divergences: list[float] = []
            for piece in pieces:
                for cache in caches:
                    cache.cut(0, shared)
                scored = 0
                while caches[0].length(0) < len(piece.row.tokens):
                    # The same of both models, piece by piece: memory holds no more than MAX_LOGITS of each.
                    logits, *others = [
                        cache.feed(0, piece.row.tokens, first_output=piece.row.first_output) for cache in caches
                    ]
                    losses += _losses(logits, piece.expected[scored : scored + len(logits)])
                    for reference in others:
                        divergences += _divergences(reference, logits)
                    scored += len(logits)
            kl = sum(divergences) / len(divergences) if against else None
            progress.add()
            yield number, Likelihood(sum(losses), len(losses), kl)


def _losses(logits: FloatRows, expected: Sequence[int]) -> list[float]:
    """Negative log-likelihood, in nats, of the expected token of each row of logits."""
    losses: list[float] = []
    for begin, block in _blocks(logits):
        highest = block.max(axis=1, keepdims=True)
        log_sums = np.log(np.exp(block - highest).sum(axis=1, dtype=np.float64)) + highest[:, 0]
        chosen = np.array(expected[begin : begin + len(block)], np.int64)
        losses += (log_sums - block[np.arange(len(block)), chosen]).tolist()
    return losses


def _divergences(reference: FloatRows, logits: FloatRows) -> list[float]:
    """KL(reference || model), in nats, at each row of logits."""
    divergences: list[float] = []
    for begin, block in _blocks(logits):
        log_p, log_q = (_log_softmax(each) for each in (reference[begin : begin + len(block)], block))
        # Not below zero, where rounding would put two models that are as good as equal.
        divergences += np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0).tolist()
    return divergences


def _log_softmax(logits: FloatRows) -> np.ndarray:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _blocks(logits: FloatRows) -> Iterator[tuple[int, FloatRows]]:
    size = max(1, _BLOCK // logits.shape[1])
    for begin in range(0, len(logits), size):
        yield begin, logits[begin : begin + size]
