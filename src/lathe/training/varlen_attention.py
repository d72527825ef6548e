"""Attention on a GPU for rows end to end, by the FlashAttention kernel for rows of any length that torch brings.

Nothing is padded and no other package is needed.
"""

import inspect
from typing import Any

import torch

MAX_HEAD_SIZE = 256
HEAD_SIZE_STEP = 8  # a head's size must be a multiple of it
OLDEST_CAPABILITY = (8, 0)  # Ampere


def is_supported(query: torch.Tensor, dropout: float) -> bool:
    """Tell whether `attend` takes a query of this device, type and head size: (rows, heads, tokens, head size)."""
    size = query.shape[-1]
    return (
        query.is_cuda
        and not dropout
        and (query.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cuda"))
        and size <= MAX_HEAD_SIZE
        and size % HEAD_SIZE_STEP == 0
        and torch.cuda.get_device_capability(query.device) >= OLDEST_CAPABILITY
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    *,
    sliding_window: int | None = None,
    scaling: float | None = None,
) -> torch.Tensor:
    """Attend causally within each row, to its last `sliding_window` tokens if that is given.

    `query`, `key`, `value`: (1, heads, tokens, head size), the rows one after another; key and value may have fewer
    heads. `ends`: (rows + 1,), int32, where each row ends, from 0 on; `longest` is the length of the longest row.
    Returns (1, tokens, heads, head size). Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691).
    """
    from torch.nn.attention.varlen import varlen_attn

    if torch.is_autocast_enabled("cuda"):  # which does not know this function; norms may have given float32
        query, key, value = (states.to(torch.get_autocast_dtype("cuda")) for states in (query, key, value))
    more: dict[str, Any] = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # older versions always share heads
        more["enable_gqa"] = query.shape[1] != key.shape[1]
    flat = [states[0].transpose(0, 1) for states in (query, key, value)]
    attended = varlen_attn(
        flat[0],
        flat[1],
        flat[2],
        ends,
        ends,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **more,
    )
    assert isinstance(attended, torch.Tensor)  # a tuple, were more asked for
    return attended[None]
