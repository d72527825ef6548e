"""From encoded rows to batches: rows end to end without padding, and packs of several rows that count as one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from lathe.models.loss_mask import Encoded
from lathe.training.dataset_padding import without_blanks
from lathe.training.loss import IGNORED
from lathe.training.row_attention import attention_arguments


def row_dataset(rows: Sequence[Encoded]) -> Dataset:
    """Return one example per row: `input_ids`, `labels` (IGNORED where not supervised) and `seq_lengths` (tokens).

    A row's first token has no label, because nothing precedes it that could predict it.
    """
    labels = [
        [
            token if kept and place > 0 else IGNORED
            for place, (token, kept) in enumerate(zip(row.input_ids, row.supervised, strict=True))
        ]
        for row in rows
    ]
    return Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in rows],
            "labels": labels,
            "seq_lengths": [[len(row.input_ids)] for row in rows],
        }
    )


def packed_dataset(rows: Sequence[Encoded], *, max_length: int) -> Dataset:
    """Return examples of several whole rows each, up to `max_length` tokens, fewest of them (best fit decreasing).

    As `row_dataset`, with as many `seq_lengths` as an example has rows. The same rows give the same packs.
    """
    from trl import pack_dataset

    longest = max(len(row.input_ids) for row in rows)
    single = row_dataset(rows).remove_columns("seq_lengths")
    # All rows at once: by default each thousand is packed alone. A row is never cut, whatever its length.
    return pack_dataset(single, max(max_length, longest), "bfd", map_kwargs={"batch_size": None})


@dataclass(frozen=True)
class EndToEnd:
    """Collates examples into one sequence without padding, longest row first.

    Gives the model's arguments (`input_ids`, `position_ids`: (1, tokens)) and what the loss needs: `columns`: the
    tokens that predict a supervised one, `targets`: (1, columns), and `labels`, from which Trainer counts the
    supervised tokens of a step. `row_lengths` and `supervised_tokens` are Python's numbers, so that counting never
    waits for a GPU.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of these examples."""
        rows = sorted(_rows(without_blanks(examples)), key=lambda row: len(row[0]), reverse=True)
        lengths = [len(ids) for ids, _ in rows]
        labels = torch.tensor([[label for _, row in rows for label in row]])
        return {
            "input_ids": torch.tensor([[token for ids, _ in rows for token in ids]]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            **attention_arguments(lengths),
            **_supervised(labels),
        }


@dataclass(frozen=True)
class Padded:
    """Collates examples of one row each into (rows, tokens), for models that do not keep rows apart otherwise.

    `columns` are those in which some row predicts a supervised token, `targets`: (rows, columns).
    """

    pad_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of these examples, padded on the right."""
        examples = without_blanks(examples)
        longest = max(len(example["input_ids"]) for example in examples)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in examples])

        lengths = torch.tensor([[len(example["input_ids"])] for example in examples])
        return {
            "input_ids": padded("input_ids", self.pad_token_id),
            "attention_mask": (torch.arange(longest) < lengths).long(),
            "row_lengths": tuple(lengths.flatten().tolist()),
            **_supervised(padded("labels", IGNORED)),
        }


def _rows(examples: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    rows = []
    for example in examples:
        first = 0
        for length in example["seq_lengths"]:
            here = slice(first, first + length)
            rows.append((example["input_ids"][here], example["labels"][here]))
            first += length
    return rows


def _supervised(labels: torch.Tensor) -> dict[str, Any]:
    # The token at t predicts the label at t + 1.
    supervised = labels[:, 1:] != IGNORED
    columns = supervised.any(dim=0).nonzero().flatten()
    return {
        "labels": labels,
        "columns": columns,
        "targets": labels[:, columns + 1],
        "supervised_tokens": int(supervised.sum()),
    }
