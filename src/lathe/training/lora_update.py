"""LoRA update in place: the adapter's share of a layer's output, added to it without tensors in between.

PEFT computes `result + lora_B(lora_A(x)) * scaling`: three tensors as wide as the layer, written and read once more in
the backward pass. On a CPU that takes as long as the products themselves. Here the second product adds to the result.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraVariant

ADAPTER = "default"


@contextmanager
def add_updates_in_place(model: Any) -> Iterator[None]:
    """Let the plain LoRA layers of a model on the CPU add their update in place, while the block runs.

    Layers with dropout, DoRA or a 4-bit base stay as PEFT has them.
    """
    layers = [module for module in model.modules() if _can_add_in_place(module)] if model.device.type == "cpu" else []
    for layer in layers:
        layer.lora_variant[ADAPTER] = _InPlaceUpdate()
    try:
        yield
    finally:
        for layer in layers:
            del layer.lora_variant[ADAPTER]


def _can_add_in_place(module: Any) -> bool:
    return (
        type(module) is Linear
        and list(module.lora_A) == [ADAPTER]
        and not module.lora_variant
        and isinstance(module.lora_dropout[ADAPTER], torch.nn.Identity)
        and type(module.get_base_layer()) is torch.nn.Linear
        and module.lora_A[ADAPTER].bias is None
        and module.lora_B[ADAPTER].bias is None
    )


class _InPlaceUpdate(LoraVariant):
    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return `result` with the update of `x` added."""
        down, up = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        updated: torch.Tensor = _AddUpdate.apply(result, x, down, up, module.scaling[active_adapter])
        return updated


class _AddUpdate(torch.autograd.Function):
    """`result += x @ down.T @ up.T * scaling`, computed in the type of `result`."""

    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        rows = x.flatten(0, -2).to(result.dtype)
        down, up = down.to(result.dtype), (up * scaling).to(result.dtype)
        hidden = rows @ down.T
        result.view(-1, result.shape[-1]).addmm_(hidden, up.T)
        ctx.mark_dirty(result)
        ctx.save_for_backward(rows, hidden, down, up)
        ctx.shape, ctx.dtype, ctx.scaling = x.shape, x.dtype, scaling
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, hidden, down, up = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        hidden_gradient = gradient @ up
        of_x = (hidden_gradient @ down).reshape(ctx.shape).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        of_down = (hidden_gradient.T @ rows).float()
        of_up = (gradient.T @ hidden).float() * ctx.scaling
        return gradients[0], of_x, of_down, of_up, None
