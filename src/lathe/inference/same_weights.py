"""Same weights: whether answers from elsewhere are those that a file itself would give, up to another arithmetic."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lathe.common.errors import InputError
from lathe.inference.generate import Generator
from lathe.inference.shared_prefix import TokenSequence

# Mean of the gaps above which the weights are others. SmolLM2-135M before its training, taken for that after it, had
# 3.5, the other way round 1.6; the files themselves and their quantized ones had at most 0.05.
MOST_NATS = 0.5


@dataclass(frozen=True)
class GivenAnswer:
    """Token ids of a prompt and of the answer that was given to it."""

    prompt: list[int]
    answer: list[int]


def measure_gap(generator: Generator, answers: Iterable[GivenAnswer]) -> float:
    """Return how much likelier, in nats, the file's own choice is than the given token: the mean over all tokens.

    It is 0 for the greedy answers of the file itself.
    """
    gaps: list[float] = []
    for given in answers:
        row = TokenSequence.of(0, [*given.prompt, *given.answer[:-1]], n_ctx=generator.n_ctx + 1)
        first, logits = len(given.prompt) - 1, []
        with generator.make_cache(slots=1, length=len(row.tokens), min_rows=1) as cache:
            while cache.length(0) < len(row.tokens):
                logits.append(cache.feed(0, row.tokens, first_output=first).copy())
        rows = np.concatenate(logits)
        gaps += (rows.max(axis=1) - rows[np.arange(len(rows)), given.answer]).tolist()
    return sum(gaps) / len(gaps) if gaps else 0.0


def check_weights(generator: Generator, answers: Iterable[GivenAnswer], *, where: str) -> None:
    """Raise InputError if the answers that `where` gave are not those of the generator's file."""
    gap = measure_gap(generator, answers)
    if gap > MOST_NATS:
        raise InputError(
            f"{where}: its first answers are not those of {generator.model.path.name}, whose own choice is {gap:.2g} "
            f"nats per token likelier (at most {MOST_NATS:g} for the same weights); it has other weights, such as "
            "those before the last training: copy the present ones there, and start the server again",
            code="other-weights",
        )
