"""Which rows a training was at when its loss or gradient stopped being a number."""

from collections.abc import Sequence

import torch

from lathe.common.errors import InputError
from lathe.models.loss_mask import Encoded

SHOWN = 32  # rows named; a step may have thousands


def not_finite(
    what: str,
    value: float,
    step: int,
    batches: Sequence[torch.Tensor],
    rows: Sequence[Encoded],
    *,
    rate: str = "training.learning_rate",
) -> InputError:
    """Return the error that says `what` became nan or inf at `step`, naming the rows of `batches`.

    `batches` are token ids, (rows, tokens) each, padded or packed; `rate` is the key of the learning rate.
    """
    lines = _lines(batches, rows)
    named = ", ".join(str(line) for line in lines[:SHOWN]) + (", …" if len(lines) > SHOWN else "")
    return InputError(
        f"{what} is {value} at step {step}, not a number, with the rows of data/processed/train.jsonl:{named}; lower "
        f"{rate}, or look at the rows: python -m lathe inspect --row {lines[0]}"
    )


def _lines(batches: Sequence[torch.Tensor], rows: Sequence[Encoded]) -> list[int]:
    # By their tokens, whatever order, padding or packing put them into the batch.
    held = b"".join(_bytes(batch.flatten()) for batch in batches)
    return sorted({row.row + 1 for row in rows if _bytes(torch.tensor(row.input_ids)) in held})


def _bytes(ids: torch.Tensor) -> bytes:
    return ids.to(torch.int32).cpu().numpy().tobytes()
