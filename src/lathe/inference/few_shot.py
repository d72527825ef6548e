"""Few-shot prompts: examples before each request, which a user could give the base model instead of training it."""

import heapq
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lathe.inference.generate import Generator
from lathe.inference.held_out import Example, HeldOutRun
from lathe.inference.row_file import RowFile
from lathe.models.answer_reading import HeldOutPrompt, render_prompt
from lathe.models.chat_template import Message
from lathe.models.document import is_document

logger = logging.getLogger(__name__)


def draw_examples(train: Iterable[Example], count: int, *, seed: int) -> list[Example]:
    """Draw `count` rows of the training split (all, if it has fewer) by the seed; no more are held in memory.

    A smaller count gives the first of a larger one. System messages are left out: each request has its own.
    Documents are no examples.
    """
    draw = random.Random(seed)
    asked = (row for row in train if not is_document(row["messages"]))
    keyed = ((draw.random(), number, row) for number, row in enumerate(asked))
    drawn = [row for _, _, row in heapq.nsmallest(count, keyed)]
    return [
        {**row, "messages": [message for message in row["messages"] if message["role"] != "system"]} for row in drawn
    ]


def insert_examples(examples: Sequence[Example], row: Example) -> Example:
    """Return the row with the examples inserted after its system messages, and the tools of all of them."""
    conversation = row["messages"]
    start = next((at for at, message in enumerate(conversation) if message["role"] != "system"), len(conversation))
    inserted: list[Message] = [message for example in examples for message in example["messages"]]
    tools: dict[str, Any] = {}
    for each in (row, *examples):
        for tool in each.get("tools", []):
            tools.setdefault(tool["function"]["name"], tool)
    whole = {"messages": [*conversation[:start], *inserted, *conversation[start:]]}
    return {**whole, "tools": list(tools.values())} if tools else whole


def store_prompts(
    run: HeldOutRun,
    examples: Sequence[Example],
    splits: Mapping[str, Callable[[], Iterable[Example]]],
    *,
    max_new_tokens: int,
) -> tuple[int, dict[str, RowFile]]:
    """Render the splits with as many of the examples, from the first, as leave every row room for its answer.

    That is `max_new_tokens` after the prompt, and the reference with its end token, within the generator's `n_ctx`.
    Returns the number of examples, and each split's prompts, which the journal stores.
    """
    generator, count = run.generator, len(examples)

    def render(row: Example, count: int) -> HeldOutPrompt:
        whole = row if is_document(row["messages"]) else insert_examples(examples[:count], row)
        return render_prompt(generator.chat_template, whole["messages"], whole.get("tools"))

    def render_rows(rows: Iterable[Example], count: int) -> Iterator[HeldOutPrompt]:
        for row in rows:
            prompt = render(row, count)
            if count and not prompt.is_document and not _has_room(generator, prompt, max_new_tokens):
                raise _NoRoomError(row)
            yield prompt

    while True:
        try:
            prompts = {
                name: run.journal.store_rows(f"{name}-{count}-examples", render_rows(rows(), count))
                for name, rows in splits.items()
            }
            break
        except _NoRoomError as error:
            # As many as this row has room for; all rows are rendered again, with that many.
            fewer = range(count - 1, 0, -1)
            count = next((n for n in fewer if _has_room(generator, render(error.row, n), max_new_tokens)), 0)
    if count < len(examples):
        logger.warning(
            "%s: %d of %d examples fit before the longest request into a context of %d tokens; %sraise generate.n_ctx",
            generator.model.path.name,
            count,
            len(examples),
            generator.n_ctx,
            "" if count else "base_few_shot is measured as base is; ",
        )
    return count, prompts


class _NoRoomError(Exception):
    """A row whose answer has no room after the examples."""

    def __init__(self, row: Example) -> None:
        super().__init__()
        self.row = row


def _has_room(generator: Generator, prompt: HeldOutPrompt, max_new_tokens: int) -> bool:
    prompt_tokens = len(generator.tokenize(prompt.prompt))
    tokens = len(generator.tokenize(prompt.prompt + prompt.answer))
    return prompt_tokens <= generator.n_ctx - max_new_tokens and tokens < generator.n_ctx
