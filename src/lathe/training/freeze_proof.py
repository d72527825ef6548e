"""Proof that training left the base alone."""

import hashlib
from typing import Any

import torch

from lathe.training.sharding import whole


def digests(model: Any, *, trained: bool = False) -> dict[str, str]:
    """Return the SHA-256 of the bytes of every tensor that is frozen, or of every trained one, by its name."""
    return {
        name: _digest(whole(parameter.data))
        for name, parameter in sorted(model.named_parameters())
        if parameter.requires_grad == trained
    }


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().contiguous().view(-1).cpu()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
