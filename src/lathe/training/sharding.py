"""Sharded tensors, of which each process holds a part: DTensors of FSDP2, and weights partitioned by ZeRO-3.

All processes must call these functions together.
"""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from lathe.common import launch


def gather_full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the parts of all processes: itself where it is whole."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.full_tensor()
    if _is_partitioned(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def get_state_to_save(model: Any) -> dict[str, torch.Tensor] | None:
    """Return the full trained tensors for `save_pretrained`; None where it finds them itself."""
    return get_trained_tensors(model) if launch.is_sharded() else None


def get_trained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return every trained tensor in full, by its name; without copies where nothing is sharded."""
    return {
        name: gather_full_tensor(parameter).detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def copy_full_tensor(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy the values of a full tensor into `target`, or into this process's part of it."""
    with torch.no_grad():
        if _is_partitioned(target):
            import deepspeed

            with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
                target.copy_(source)
            return
        if isinstance(target, DTensor):
            source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
        target.copy_(source)


def _is_partitioned(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "ds_id")  # set by ZeRO-3 on the weights themselves, not on what is computed of them
