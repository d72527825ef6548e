"""Preference pairs: a chosen and a rejected answer to one prompt, checked and encoded to token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from lathe.common.errors import InputError
from lathe.models.loss_mask import Encoded, encode

Pairs = Sequence[Mapping[str, Any]]  # processed examples with `messages` and `rejected`


def check_pairs(splits: Mapping[str, Pairs]) -> None:
    """Raise InputError where an example has no rejected answer."""
    for split in ("train", "validation"):
        for line, example in enumerate(splits[split], start=1):
            if not example.get("rejected"):
                raise InputError(
                    f"data/processed/{split}.jsonl:{line}: has no rejected answer, and training.method 'dpo' learns "
                    "from pairs; choose a dataset that has them (columns chosen and rejected), or training.method: sft",
                    code="rejected-answer-missing",
                )


def encode_pairs(tokenizer: Any, pairs: Pairs) -> tuple[list[Encoded], list[Encoded]]:
    """Return the sequences with the chosen and with the rejected answers; only the last answer is supervised.

    Both begin with the same token ids: the prompt of inference. Raises TemplateError that names a row.
    """
    tools = [pair.get("tools") for pair in pairs]
    worse = [[*pair["messages"][:-1], *pair["rejected"]] for pair in pairs]
    chosen = encode(tokenizer, [pair["messages"] for pair in pairs], supervise="last", tools=tools)
    rejected = encode(tokenizer, worse, supervise="last", tools=tools)
    return chosen, rejected


def build_pair_dataset(chosen: Sequence[Encoded], rejected: Sequence[Encoded]) -> Dataset:
    """Return one entry per pair, as TRL's collator takes them: `prompt_ids`, `chosen_ids`, `rejected_ids`."""
    starts = [sequence.supervised.index(True) for sequence in chosen]
    return Dataset.from_dict(
        {
            "prompt_ids": [sequence.input_ids[:start] for sequence, start in zip(chosen, starts, strict=True)],
            "chosen_ids": [sequence.input_ids[start:] for sequence, start in zip(chosen, starts, strict=True)],
            "rejected_ids": [sequence.input_ids[start:] for sequence, start in zip(rejected, starts, strict=True)],
        }
    )
