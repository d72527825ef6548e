"""Pairs of a better and a worse answer to one prompt: what training on them needs, and their token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from lathe.common.errors import InputError
from lathe.models.loss_mask import Encoded, encode

Rows = Sequence[Mapping[str, Any]]  # processed rows, with `rejected` in all of them


def check_pairs(splits: Mapping[str, Rows]) -> None:
    """Raise InputError where a row has no answer to reject."""
    for split in ("train", "validation"):
        for number, row in enumerate(splits[split], start=1):
            if not row.get("rejected"):
                raise InputError(
                    f"data/processed/{split}.jsonl:{number}: has no rejected answer, and training.method 'dpo' learns "
                    "from pairs; choose a dataset that has them (columns chosen and rejected), or training.method: sft"
                )


def encode_pairs(tokenizer: Any, rows: Rows) -> tuple[list[Encoded], list[Encoded]]:
    """Return the rows with their better, and with their worse answer; the last answer alone is supervised in both.

    Both begin with the same ids: the prompt of inference. Raises TemplateError that names a row.
    """
    chosen = encode(tokenizer, [row["messages"] for row in rows], supervise="last")
    rejected = encode(tokenizer, [[*row["messages"][:-1], *row["rejected"]] for row in rows], supervise="last")
    return chosen, rejected


def pair_dataset(chosen: Sequence[Encoded], rejected: Sequence[Encoded]) -> Dataset:
    """Return one example per pair, as TRL's collator takes them: `prompt_ids`, `chosen_ids`, `rejected_ids`."""
    starts = [row.supervised.index(True) for row in chosen]
    return Dataset.from_dict(
        {
            "prompt_ids": [row.input_ids[:start] for row, start in zip(chosen, starts, strict=True)],
            "chosen_ids": [row.input_ids[start:] for row, start in zip(chosen, starts, strict=True)],
            "rejected_ids": [row.input_ids[start:] for row, start in zip(rejected, starts, strict=True)],
        }
    )
