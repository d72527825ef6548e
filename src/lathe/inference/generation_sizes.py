"""Generation sizes: longest answer and context, where `generate` leaves them to the lengths of the data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lathe.common.errors import InputError
from lathe.common.numbers import round_up
from lathe.config.params import Generate

HELD_OUT = ("validation", "test")

# A longer answer than any reference is a fault that should be seen, not cut at once.
ROOM = 1.25
ANSWER_STEP, CONTEXT_STEP = 8, 64  # sizes are rounded up to multiples of these
# Paragraphs of general text are scored in pieces of a context: with less, their perplexity would depend on the data.
SMALLEST_CONTEXT = 512


@dataclass(frozen=True)
class GenerationSizes:
    """The longest answer, and the context that prompt and answer have together (tokens)."""

    max_new_tokens: int
    n_ctx: int


def choose_sizes(settings: Generate, report: Mapping[str, Any], *, examples: int = 0) -> GenerationSizes:
    """Return the sizes that `generate` gives, and for `auto` those that the held-out rows need.

    `report` is that of the stage preprocess, which has the lengths of the rows; `examples` of the training split stand
    before each prompt. Raises InputError if a length is needed and no row is held out.
    """
    if "auto" not in (settings.max_new_tokens, settings.n_ctx):
        return GenerationSizes(int(settings.max_new_tokens), int(settings.n_ctx))
    splits = {split["split"]: split for split in report["splits"] if split["kept"]}
    references = [splits[name]["references"] for name in HELD_OUT if name in splits]
    if not references:
        raise InputError(
            "generate: max_new_tokens or n_ctx is auto, and no row is held out to measure; give both as numbers",
            code="no-held-out-rows",
        )
    answer = max(lengths["tokens"]["max"] for lengths in references)
    longest = (
        round_up(math.ceil(ROOM * answer), ANSWER_STEP)
        if settings.max_new_tokens == "auto"
        else int(settings.max_new_tokens)
    )
    if settings.n_ctx != "auto":
        return GenerationSizes(longest, int(settings.n_ctx))
    conversation = max(lengths["conversation_tokens"]["max"] for lengths in references)
    before = examples * splits["train"]["tokens"]["total"]["max"] if examples else 0
    # Prompt and reference, and an answer as long as may be behind any of the prompts.
    needed = before + conversation + longest + 1
    return GenerationSizes(longest, max(SMALLEST_CONTEXT, round_up(needed, CONTEXT_STEP)))
