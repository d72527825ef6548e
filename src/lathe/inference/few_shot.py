"""Examples in the prompt: what a user would do with the base model instead of training it."""

import heapq
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from lathe.inference.generate import Generator
from lathe.models.chat_template import Conversation, Message, prompt_and_answer

logger = logging.getLogger(__name__)


def choose(train: Iterable[Conversation], count: int, *, seed: int) -> list[Conversation]:
    """Return `count` conversations of the training split (all, if it has fewer), drawn by the seed; no more are held.

    Fewer are the first of more. Their system messages are left out: a request brings its own.
    """
    draw = random.Random(seed)
    keyed = ((draw.random(), number, conversation) for number, conversation in enumerate(train))
    chosen = [conversation for _, _, conversation in heapq.nsmallest(count, keyed)]
    return [[message for message in conversation if message["role"] != "system"] for conversation in chosen]


def with_examples(examples: Sequence[Conversation], conversation: Conversation) -> Conversation:
    """Return the conversation with the examples before it, behind its system messages."""
    start = next((at for at, message in enumerate(conversation) if message["role"] != "system"), len(conversation))
    shown: list[Message] = [message for example in examples for message in example]
    return [*conversation[:start], *shown, *conversation[start:]]


def before_each(
    examples: Sequence[Conversation], conversations: Callable[[], Iterable[Conversation]]
) -> Iterator[Conversation]:
    """Yield every conversation with the examples before it."""
    return (with_examples(examples, conversation) for conversation in conversations())


def that_fit(
    generator: Generator,
    examples: Sequence[Conversation],
    conversations: Callable[[], Iterable[Conversation]],
    *,
    max_new_tokens: int,
) -> list[Conversation]:
    """Return as many of the examples, from the first, as leave every conversation room for its answer.

    That is `max_new_tokens` behind the prompt, and the reference and its end token, within the generator's `n_ctx`.
    """
    tokens = {"bos_token": generator.bos_token, "eos_token": generator.eos_token}

    def fits(count: int) -> bool:
        for whole in before_each(examples[:count], conversations):
            prompt, written, _ = prompt_and_answer(generator.template, whole, **tokens)
            room = generator.n_ctx - max_new_tokens
            if len(generator.tokenize(prompt)) > room or len(generator.tokenize(prompt + written)) >= generator.n_ctx:
                return False
        return True

    count = next((count for count in range(len(examples), 0, -1) if fits(count)), 0)
    if count < len(examples):
        logger.warning(
            "%s: %d of %d examples fit before the longest request into a context of %d tokens; %sraise generate.n_ctx",
            generator.model.path.name,
            count,
            len(examples),
            generator.n_ctx,
            "" if count else "base_few_shot is measured as base is; ",
        )
    return list(examples[:count])
