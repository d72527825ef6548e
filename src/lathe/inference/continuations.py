"""Log-likelihoods of continuations under a GGUF: the choices of a question, the windows of a long text.

What neighbouring contexts share, such as a question that is asked with many choices, or the examples before many
questions, is decoded once. How the tokens are split into calls depends on the pairs alone, not on which of them are
finished, so that an interrupted run that goes on gives the same numbers.
"""

from array import array
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from lathe.common.progress import Progress
from lathe.inference.generate import Generator
from lathe.inference.kv_cache import KVCache
from lathe.inference.likelihood import compute_losses, summarize
from lathe.inference.shared_prefix import MIN_ROWS, count_common_tokens

# Context and continuation as token ids; neither is empty.
TokenPair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class ContinuationLikelihood:
    """Log-likelihood of a continuation in nats, and whether greedy decoding would write it."""

    log_likelihood: float
    is_greedy: bool


def score_continuations(
    generator: Generator, pairs: Sequence[TokenPair], *, finished: Container[int] = ()
) -> Iterator[tuple[int, ContinuationLikelihood]]:
    """Yield the number of each pair, from 0, and how likely its continuation is after its context.

    Numbers in `finished` are skipped. A context and its continuation but the last token must fit into the context that
    the model has. Raises InputError if the model gives no numbers.
    """
    before = sum(number in finished for number in range(len(pairs)))
    if before == len(pairs):
        return
    longest = max(len(context) + len(continuation) - 1 for context, continuation in pairs)
    with (
        generator.make_cache(slots=1, length=longest, min_rows=1) as cache,
        Progress("continuations", len(pairs), done=before) as progress,
    ):
        for block in _find_blocks(pairs):
            if all(number in finished for group in block.groups for number in group):
                continue
            cache.cut(0, 0)
            _decode(cache, block.prefix)
            for group in block.groups:
                waiting = [number for number in group if number not in finished]
                if not waiting:
                    continue
                kept = len(block.prefix)
                context = pairs[group[0]][0]
                shared = context[: max(0, len(context) - MIN_ROWS)]
                if len(group) > 1 and len(shared) >= kept + MIN_ROWS:
                    cache.cut(0, kept)
                    _decode(cache, shared)
                    kept = len(shared)
                for number in waiting:
                    cache.cut(0, kept)
                    yield number, _score(cache, *pairs[number])
                    progress.add()


@dataclass
class _Block:
    """Groups of neighbouring pairs, those of a group with one context, and the prefix that all contexts share."""

    prefix: "array[int]"
    groups: list[list[int]]


def _find_blocks(pairs: Sequence[TokenPair]) -> list[_Block]:
    """Divide pairs into blocks: a context joins the one before it if at least half of its tokens are shared."""
    blocks: list[_Block] = []
    last: Sequence[int] | None = None
    for number, (context, _) in enumerate(pairs):
        if last is not None and context == last:
            blocks[-1].groups[-1].append(number)
            continue
        last = context
        # Enough tokens are left for each row to use the kernels that the library has for many.
        usable = array("i", context[: max(0, len(context) - MIN_ROWS)])
        shared = count_common_tokens(blocks[-1].prefix, usable) if blocks else 0
        if shared >= MIN_ROWS and 2 * shared >= len(context):
            blocks[-1].prefix = blocks[-1].prefix[:shared]
            blocks[-1].groups.append([number])
        else:
            blocks.append(_Block(usable, [[number]]))
    for block in blocks:
        if len(block.groups) == 1 or len(block.prefix) < MIN_ROWS:
            block.prefix = array("i")
    return blocks


def _decode(cache: KVCache, tokens: Sequence[int]) -> None:
    while cache.length(0) < len(tokens):
        cache.feed(0, tokens, first_output=len(tokens))


def _score(cache: KVCache, context: Sequence[int], continuation: Sequence[int]) -> ContinuationLikelihood:
    """Decode what the cache lacks of a pair, and compare its logits with the continuation."""
    tokens = array("i", [*context, *continuation[:-1]])
    losses: list[float] = []
    is_greedy = True
    while cache.length(0) < len(tokens):
        logits = cache.feed(0, tokens, first_output=len(context) - 1)
        expected = continuation[len(losses) : len(losses) + len(logits)]
        losses += compute_losses(logits, expected)
        is_greedy = is_greedy and logits.argmax(axis=1).tolist() == list(expected)
    return ContinuationLikelihood(-summarize(losses, []).nll, is_greedy)
