"""LoRA on a GPU: the update is added by the matrix product that makes it, forward and backward.

PEFT writes the update, scales it and adds it, each a tensor as wide as the layer's output, and autograd adds the two
gradients of the input. On a large model this moves more memory than the base's own products.
"""

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer


def add_updates_in_products(model: Any) -> int:
    """Let the linear layers of a PEFT model compute their update so; return how many do.

    A layer with dropout, DoRA, another type of base or another precision than bf16 keeps PEFT's own computation, as
    does every layer while its adapter is disabled or merged.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, LoraLayer) and _is_linear(module.get_base_layer()):
            module.forward = MethodType(_forward, module)
            count += 1
    return count


def _is_linear(layer: torch.nn.Module) -> bool:
    return type(layer) is torch.nn.Linear or _is_4bit(layer)


def _is_4bit(layer: torch.nn.Module) -> bool:
    return type(layer).__name__ == "Linear4bit"


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    base, adapters = self.get_base_layer(), self.active_adapters
    if (
        args
        or kwargs
        or self.disable_adapters
        or self.merged
        or len(adapters) != 1
        or (name := adapters[0]) not in self.lora_A
        or name in self.lora_variant
        or not isinstance(self.lora_dropout[name], torch.nn.Identity)
        or x.dtype != torch.bfloat16
        or (base.compute_dtype if _is_4bit(base) else base.weight.dtype) != x.dtype
        or self.lora_B[name].bias is not None
    ):
        result: torch.Tensor = type(self).forward(self, x, *args, **kwargs)
        return result
    state = getattr(base.weight, "quant_state", None)  # of 4-bit weights
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    added: torch.Tensor = _LoraLinear.apply(x, base.weight, base.bias, a, b, self.scaling[name], state)
    return added


class _LoraLinear(torch.autograd.Function):
    """x · W' + (x · A') · B' · scaling, with gradients of x, A and B; W may be in 4 bits, with its `state`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        state: Any,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.types = a.dtype, b.dtype
        a, b = a.to(x.dtype), b.to(x.dtype)
        result = torch.nn.functional.linear(
            rows, _unpack(weight, state, x.dtype), None if bias is None else bias.to(x.dtype)
        )
        inner = (rows @ a.t()).mul_(scaling)
        result.addmm_(inner, b.t())
        ctx.save_for_backward(rows, weight, a, b, inner)
        ctx.scaling, ctx.state, ctx.shape = scaling, state, x.shape
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, a, b, inner = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        inner_gradient = (gradient @ b).mul_(ctx.scaling)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = gradient @ _unpack(weight, ctx.state, gradient.dtype)
            x_gradient = x_gradient.addmm_(inner_gradient, a).view(ctx.shape)
        a_type, b_type = ctx.types
        a_gradient, b_gradient = (inner_gradient.t() @ rows).to(a_type), (gradient.t() @ inner).to(b_type)
        return x_gradient, None, None, a_gradient, b_gradient, None, None


def _unpack(weight: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight as (out, in), unpacked from 4 bits if it has a state."""
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    unpacked: torch.Tensor = dequantize_4bit(weight, state)
    return unpacked.to(dtype)
