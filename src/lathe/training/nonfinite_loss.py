"""Non-finite loss or gradient: the error that names the step and the examples in it."""

from collections.abc import Sequence

import torch

from lathe.common.errors import InputError
from lathe.models.loss_mask import Encoded

SHOWN = 32  # line numbers in the message; a step may have thousands


def make_nonfinite_error(
    quantity: str,
    value: float,
    step: int,
    batches: Sequence[torch.Tensor],
    sequences: Sequence[Encoded],
    *,
    learning_rate_key: str = "training.learning_rate",
) -> InputError:
    """Return the error that says that `quantity` became nan or inf at `step`, with the lines of the examples.

    `batches` are token ids, (rows, tokens) each, padded or packed.
    """
    lines = _find_lines(batches, sequences)
    shown = ", ".join(str(line) for line in lines[:SHOWN]) + (", …" if len(lines) > SHOWN else "")
    return InputError(
        f"{quantity} is {value} at step {step}, not a number, with the rows of data/processed/train.jsonl:{shown}; "
        f"lower {learning_rate_key}, or look at the rows: python -m lathe inspect --row {lines[0]}",
        code="loss-not-finite",
    )


def _find_lines(batches: Sequence[torch.Tensor], sequences: Sequence[Encoded]) -> list[int]:
    # By their tokens, whatever order, padding or packing put them into the batch.
    trained = b"".join(_as_bytes(batch.flatten()) for batch in batches)
    return sorted({row.row + 1 for row in sequences if _as_bytes(torch.tensor(row.input_ids)) in trained})


def _as_bytes(ids: torch.Tensor) -> bytes:
    return ids.to(torch.int32).cpu().numpy().tobytes()
