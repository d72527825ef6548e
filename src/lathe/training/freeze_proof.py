"""Proof that training left the base as it was: SHA-256 of every frozen tensor."""

import hashlib
from typing import Any

import torch

from lathe.training.sharding import gather_full_tensor


def hash_tensors(model: Any, *, trained: bool = False) -> dict[str, str]:
    """Return the SHA-256 of the bytes of every frozen tensor, or of every trained one, by its name."""
    return {
        name: _hash_tensor(gather_full_tensor(parameter.data))
        for name, parameter in sorted(model.named_parameters())
        if parameter.requires_grad == trained
    }


def _hash_tensor(tensor: torch.Tensor) -> str:
    flat = tensor.detach().contiguous().view(-1).cpu()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
