"""Packing: sequences to batches, end to end almost without padding, and packs of several sequences in one row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from lathe.models.loss_mask import Encoded
from lathe.training.dataset_padding import drop_padding
from lathe.training.loss import IGNORE_INDEX
from lathe.training.row_attention import build_attention_arguments


def cut_documents(sequences: Sequence[Encoded], max_length: int) -> list[Encoded]:
    """Return the sequences with those over `max_length` tokens, which only documents are, cut into pieces of it.

    Every token is in exactly one piece.
    """
    return [
        Encoded(sequence.row, sequence.input_ids[start:stop], sequence.supervised[start:stop])
        for sequence in sequences
        for start in range(0, len(sequence.input_ids), max_length)
        for stop in [start + max_length]
    ]


def build_dataset(sequences: Sequence[Encoded]) -> Dataset:
    """Return one entry per sequence: `input_ids`, `labels` (IGNORE_INDEX if not supervised), `seq_lengths` (tokens).

    A sequence's first token has no label, because nothing precedes it that could predict it.
    """
    labels = [
        [
            token if is_supervised and position > 0 else IGNORE_INDEX
            for position, (token, is_supervised) in enumerate(zip(sequence.input_ids, sequence.supervised, strict=True))
        ]
        for sequence in sequences
    ]
    return Dataset.from_dict(
        {
            "input_ids": [sequence.input_ids for sequence in sequences],
            "labels": labels,
            "seq_lengths": [[len(sequence.input_ids)] for sequence in sequences],
        }
    )


def build_packed_dataset(sequences: Sequence[Encoded], *, max_length: int) -> Dataset:
    """Return packs of several whole sequences, up to `max_length` tokens, as few as possible (best fit decreasing).

    As `build_dataset`, with one of `seq_lengths` per sequence in the pack. The same sequences give the same packs.
    """
    from trl import pack_dataset

    longest = max(len(sequence.input_ids) for sequence in sequences)
    single = build_dataset(sequences).remove_columns("seq_lengths")
    # All at once: by default each thousand is packed alone. A sequence is never cut, whatever its length.
    return pack_dataset(single, max(max_length, longest), "bfd", map_kwargs={"batch_size": None})


@dataclass(frozen=True)
class PaddingFreeCollator:
    """Collates sequences end to end into one row, longest first, with a filler row that rounds its length up.

    A batch has the model's arguments (`input_ids`, `position_ids`: (1, tokens)) and what the loss needs: `columns`: the
    tokens that predict a supervised one, `targets`: (1, columns), and `labels`, from which Trainer counts the
    supervised tokens of a step. `row_lengths`, `tokens` (without the filler) and `supervised_tokens` are Python
    numbers, so that counting never waits for a GPU.

    Without the filler nearly every batch has a length of its own, and oneDNN keeps kernels for each on a CPU: the
    memory of a training grows with its steps.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of these dataset entries."""
        rows = _split_packs(drop_padding(examples))
        tokens = sum(len(ids) for ids, _ in rows)
        if filler := round_length_up(tokens) - tokens:
            rows.append(([0] * filler, [IGNORE_INDEX] * filler))
        rows.sort(key=lambda row: len(row[0]), reverse=True)
        lengths = [len(ids) for ids, _ in rows]
        labels = torch.tensor([[label for _, row in rows for label in row]])
        return {
            "input_ids": torch.tensor([[token for ids, _ in rows for token in ids]]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            **build_attention_arguments(lengths),
            "tokens": tokens,
            **_select_supervised(labels),
        }


@dataclass(frozen=True)
class PaddedCollator:
    """Collates one sequence per row into (rows, tokens), for models that cannot keep sequences apart otherwise.

    `columns` are those in which some row predicts a supervised token, `targets`: (rows, columns).
    """

    pad_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of these dataset entries, padded on the right."""
        examples = drop_padding(examples)
        longest = max(len(example["input_ids"]) for example in examples)

        def pad(name: str, value: int) -> torch.Tensor:
            return torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in examples])

        lengths = torch.tensor([[len(example["input_ids"])] for example in examples])
        return {
            "input_ids": pad("input_ids", self.pad_token_id),
            "attention_mask": (torch.arange(longest) < lengths).long(),
            "tokens": int(lengths.sum()),
            **_select_supervised(pad("labels", IGNORE_INDEX)),
        }


def round_length_up(tokens: int) -> int:
    """Return the next of the lengths that batches have: sixteen between a power of two and the next.

    That is at most 6 % more.
    """
    step = 1 << max(0, tokens.bit_length() - 5)
    return -(-tokens // step) * step


def _split_packs(examples: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    rows = []
    for example in examples:
        start = 0
        for length in example["seq_lengths"]:
            row = slice(start, start + length)
            rows.append((example["input_ids"][row], example["labels"][row]))
            start += length
    return rows


def _select_supervised(labels: torch.Tensor) -> dict[str, Any]:
    # The token at t predicts the label at t + 1.
    supervised = labels[:, 1:] != IGNORE_INDEX
    columns = supervised.any(dim=0).nonzero().flatten()
    return {
        "labels": labels,
        "columns": columns,
        "targets": labels[:, columns + 1],
        "supervised_tokens": int(supervised.sum()),
    }
