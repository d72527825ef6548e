"""Tensors of which each process holds a share (FSDP2); what is done to one of them all processes must do."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from lathe.common import launch


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with all its shares."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state_to_save(model: Any) -> dict[str, torch.Tensor] | None:
    """Return what `save_pretrained` is to be given: the trained tensors, whole; None where it finds them itself."""
    return trained(model) if launch.is_sharded() else None


def trained(model: Any) -> dict[str, torch.Tensor]:
    """Return every tensor that is trained, whole, by its name; no copies where nothing is shared out."""
    return {name: whole(each.detach()) for name, each in model.named_parameters() if each.requires_grad}


def fill(tensor: torch.Tensor, content: torch.Tensor) -> None:
    """Give a tensor, or this process's share of it, the values of a whole one."""
    with torch.no_grad():
        if isinstance(tensor, DTensor):
            content = distribute_tensor(content.to(tensor.device), tensor.device_mesh, tensor.placements)
        tensor.copy_(content)
