"""Measured answers: the held-out tokens whose likelihood the trained model and its GGUF must agree on."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lathe.models.loss_mask import Encoded, encode

MOST_ROWS = 32
MOST_TOKENS = 4096  # of all rows, prompts included; at least one row is taken


@dataclass(frozen=True)
class AnswerLikelihood:
    """Sum of the negative log-likelihoods of answers in nats, over `tokens` in `rows`."""

    nll: float
    tokens: int
    rows: int

    def describe(self) -> dict[str, float]:
        """Return it for a metric file."""
        return {"nats_per_token": self.nll / self.tokens, "tokens": self.tokens, "rows": self.rows}


def choose_answers(tokenizer: Any, rows: Iterable[Mapping[str, Any]]) -> list[Encoded]:
    """Return the first rows of a split as sequences, of which the last answer is supervised.

    They are the same for the same rows and tokenizer, so that two stages choose the same tokens.
    """
    taken = list(islice(rows, MOST_ROWS))
    conversations, tools = [row["messages"] for row in taken], [row.get("tools") for row in taken]
    chosen: list[Encoded] = []
    for sequence in encode(tokenizer, conversations, supervise="last", tools=tools):
        if chosen and sum(len(each.input_ids) for each in (*chosen, sequence)) > MOST_TOKENS:
            break
        chosen.append(sequence)
    return chosen
