"""Attention for short rows in bf16 on the CPU, as three matrix products.

torch's fused kernel for the CPU (2.13) is slow on the small bf16 blocks of its backward pass: for rows of a few hundred
tokens plain products are three to five times as fast, forward and backward together. From about five hundred tokens on
the fused kernel wins, which never holds all scores at once.
"""

from typing import Any

import torch

MAX_TOKENS = 256  # tokens


def is_faster(query: torch.Tensor) -> bool:
    """Tell whether `attend` is faster for a query of this device, type and shape (rows, heads, tokens, head size)."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] <= MAX_TOKENS


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Return softmax(query · key · scaling) · value over the visible tokens.

    `query`: (rows, heads, tokens, head size); `key` and `value` may have fewer heads, each shared by a group of the
    query's; `visible`: (tokens, tokens), true where the query of a row sees the key of a column. Softmax sums in
    float32.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    attended: torch.Tensor = _Attend.apply(query, key, value, ~visible, scaling or query.shape[-1] ** -0.5)
    return attended


class _Attend(torch.autograd.Function):
    """Keeps the attention weights in bf16; autograd would keep them and the scores in float32."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        scores = (query * scaling) @ key.transpose(-1, -2)
        weights = torch.softmax(scores.masked_fill_(hidden, -torch.inf), -1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scaling = scaling
        return weights @ value

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        (gradient,) = gradients
        weight_gradient = gradient @ value.transpose(-1, -2)
        score_gradient = torch._softmax_backward_data(weight_gradient, weights, -1, weights.dtype).mul_(ctx.scaling)
        key_gradient = score_gradient.transpose(-1, -2) @ query
        return score_gradient @ key, key_gradient, weights.transpose(-1, -2) @ gradient, None, None
