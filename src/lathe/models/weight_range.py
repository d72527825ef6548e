"""Range of weights: whether they are numbers, and fit into the 16-bit floats of a GGUF."""

from pathlib import Path

import torch

from lathe.common.errors import InputError
from lathe.common.progress import Progress
from lathe.models.model_folder import open_model

LARGEST_F16 = torch.finfo(torch.float16).max
FLOATS = ("F16", "BF16", "F32", "F64")


def find_beyond_f16(folder: Path) -> tuple[str, float] | None:
    """Return the first tensor with a weight beyond what f16 holds, and that weight; None where all fit.

    A weight that is infinite already is not meant. Every weight is read once, in the time that a disk takes.
    """
    weights = open_model(folder)
    for name, stored in weights.tensors.items():
        if stored.dtype not in ("F32", "BF16"):
            continue
        tensor = weights.read(name)
        if not tensor.numel():
            continue
        low, high = torch.aminmax(tensor)
        largest = max(-low.item(), high.item())
        if LARGEST_F16 < largest < float("inf"):
            return name, largest
    return None


def check_finite(folder: Path, shown: str) -> None:
    """Raise InputError where a weight of the model in `folder`, called `shown` in messages, is infinite or no number.

    Every weight is read once, in the time that a disk takes. Weights of fewer than 16 bits are not looked at.
    """
    weights = open_model(folder)
    with Progress("checking weights", len(weights.tensors), unit="tensor") as progress:
        for name, stored in weights.tensors.items():
            if stored.dtype in FLOATS:
                tensor = weights.read(name)
                # The smallest and the largest of values one of which is no number are none either.
                if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
                    raise InputError(
                        f"{shown}: {name} holds {_count_not_finite(tensor)}; a training with it has no loss; download "
                        "the model again, or take another",
                        code="weights-not-finite",
                    )
            progress.add()


def _count_not_finite(tensor: torch.Tensor) -> str:
    wrong = tensor[~tensor.isfinite()]
    return f"{len(wrong):,} of {tensor.numel():,} weights that are infinite or no number ({wrong[0].item()})"
