"""Range of weights: whether a model's weights fit into the 16-bit floats of a GGUF."""

from pathlib import Path

import torch

from lathe.models.model_folder import open_model

LARGEST_F16 = torch.finfo(torch.float16).max


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
