"""Attention in bf16 on the CPU for short rows, as three matrix products.

torch's fused kernel for the CPU (2.13) is slow on the small bf16 blocks of its backward pass: for rows of a few hundred
tokens whole products are three to five times as fast, forward and backward together. From some five hundred tokens on
the fused kernel wins, which never holds all scores at once.
"""

from typing import Any

import torch

LONGEST = 256  # tokens


def is_shorter_way(query: torch.Tensor) -> bool:
    """Tell whether rows of this device, type and length, (rows, heads, tokens, head size), are better attended here."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] <= LONGEST


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Return softmax(query · key · scaling) · value over the visible tokens.

    `query`: (rows, heads, tokens, head size); `key` and `value` may have fewer heads, each for as many of the query's
    in turn; `visible`: (tokens, tokens), true where a query, by row, sees a key. Softmax sums in float32.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    attended: torch.Tensor = _Attend.apply(query, key, value, ~visible, scaling or query.shape[-1] ** -0.5)
    return attended


class _Attend(torch.autograd.Function):
    """Keeps the shares that tokens have in one another, in bf16; autograd would keep them and the scores in float32."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        scores = (query * scaling) @ key.transpose(-1, -2)
        shares = torch.softmax(scores.masked_fill_(hidden, -torch.inf), -1)
        ctx.save_for_backward(query, key, value, shares)
        ctx.scaling = scaling
        return shares @ value

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, shares = ctx.saved_tensors
        (gradient,) = gradients
        of_shares = gradient @ value.transpose(-1, -2)
        of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype).mul_(ctx.scaling)
        return of_scores @ key, of_scores.transpose(-1, -2) @ query, shares.transpose(-1, -2) @ gradient, None, None
