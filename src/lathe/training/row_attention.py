"""Row attention: rows end to end in one batch without padding, each of which attends to itself alone.

On a GPU FlashAttention's kernel for rows of any length does that: that of the package flash-attn if it is installed,
else the one that torch brings. Everywhere else, the CPU included, rows of similar length are padded for the attention
only; all other layers compute real tokens alone.
"""

from functools import lru_cache
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

from lathe.common.errors import InputError
from lathe.models.adapter import unwrap
from lathe.training import short_attention, varlen_attention

ROW_ATTENTION = "lathe_rows"
FLASH = "flash_attention_2"

# Rows are padded to the longest of their group. A row shorter than this share of it starts the next group. Among short
# rows another group costs more than the padding.
SHORTEST_OF_A_GROUP = 0.7
SHORTEST_OF_A_SHORT_GROUP = 0.4


def check_attention(implementation: str, *, precision: str) -> None:
    """Raise InputError where `training.attn_implementation` is FlashAttention and it is not available."""
    if implementation == FLASH and not _can_use_flash(precision):
        raise InputError(
            f"training.attn_implementation is {FLASH!r}; needs a CUDA device, the package flash-attn and a 16-bit "
            "precision; use auto or sdpa",
            code="flash-attention-unavailable",
        )


def separate_rows(model: Any, implementation: str, *, precision: str) -> bool:
    """Switch `model` to rows end to end, if it keeps them apart; return whether it does.

    `implementation` is `training.attn_implementation`. The model itself is tested, as state-space layers, recurrences
    and other kinds of attention carry something from one row into the next; such a model is left as it was.
    """
    model = unwrap(model)
    if implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        return False
    before = model.config._attn_implementation
    if before not in {"sdpa", FLASH} or getattr(model.config, "attention_chunk_size", None):
        return False
    flash = model.device.type == "cuda" and _can_use_flash(precision)
    model.set_attn_implementation(FLASH if flash else ROW_ATTENTION)
    is_cast = model.device.type == "cuda" and precision != "fp32"  # weights trained whole are float32
    with torch.autocast(model.device.type, torch.bfloat16, enabled=is_cast):
        if _keeps_rows_apart(model):
            return True
    model.set_attn_implementation(before)
    return False


def pad_rows(model: Any, implementation: str) -> None:
    """Switch `model` to padded batches, as other trainers and `generate` make them."""
    model = unwrap(model)
    if implementation != "auto":
        model.set_attn_implementation(implementation)
    elif model.config._attn_implementation == ROW_ATTENTION:
        model.set_attn_implementation("sdpa")


def build_attention_arguments(lengths: list[int]) -> dict[str, Any]:
    """Return the arguments of a model's forward that keep rows of these lengths (tokens) apart."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {
        "row_lengths": tuple(lengths),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@torch.compiler.disable(reason="its shapes follow the rows, new ones in every batch")
def attend_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    row_lengths: tuple[int, ...] | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally within each row; the signature is that of transformers' attention interface.

    `query`, `key`, `value`: (1, heads, tokens, head size), the rows one after another, longest first for least
    padding. Returns (1, tokens, heads, head size). Without `row_lengths` the tokens are one row. `cu_seq_lens_q`:
    (rows + 1,) says the same on the device.
    """
    if attention_mask is not None or softcap is not None or s_aux is not None or position_bias is not None:
        raise NotImplementedError("attention with a mask, soft caps, sinks or biases")
    # Rows of one length need no padding, and torch's attention has faster kernels for them.
    if len(set(row_lengths or ())) > 1 and cu_seq_lens_q is not None and varlen_attention.is_supported(query, dropout):
        attended = varlen_attention.attend(
            query, key, value, cu_seq_lens_q, max(row_lengths or ()), sliding_window=sliding_window, scaling=scaling
        )
        return attended, None
    parts, first = [], 0
    for group in _group_rows(row_lengths or (query.shape[2],), query.device):
        part = slice(first, first + group.tokens)
        queries, keys, values = (group.pad(states[0, :, part].transpose(0, 1)) for states in (query, key, value))
        mask = None
        if sliding_window is not None and sliding_window < group.longest:
            mask = _make_window_mask(group.longest, sliding_window, query.device)
        # Padding is on the right, where no token of a row sees it: causal order is enough of a mask.
        if not dropout and short_attention.is_faster(queries):
            visible = _make_window_mask(group.longest, group.longest, query.device) if mask is None else mask
            attended = short_attention.attend(queries, keys, values, visible[0, 0], scaling).transpose(1, 2)
        else:
            attended, _weights = sdpa_attention_forward(
                module, queries, keys, values, attention_mask=mask, dropout=dropout, scaling=scaling, is_causal=True
            )
        parts.append(group.unpad(attended))
        first += group.tokens
    return torch.cat(parts)[None] if len(parts) > 1 else parts[0][None], None


class _RowGroup:
    """Rows of similar length; `slots` are the positions of their tokens among the padded ones."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.rows, self.longest, self.tokens = len(lengths), max(lengths), sum(lengths)
        self.slots: torch.Tensor | None = None
        if self.tokens < self.rows * self.longest:
            starts = range(0, self.rows * self.longest, self.longest)
            slots = [
                torch.arange(start, start + length, device=device)
                for start, length in zip(starts, lengths, strict=True)
            ]
            self.slots = torch.cat(slots)

    def pad(self, states: torch.Tensor) -> torch.Tensor:
        """(tokens, heads, head size) -> (rows, heads, longest, head size)."""
        if self.slots is not None:
            padded = states.new_zeros(self.rows * self.longest, *states.shape[1:])
            states = padded.index_copy(0, self.slots, states)
        return states.reshape(self.rows, self.longest, *states.shape[1:]).transpose(1, 2)

    def unpad(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, longest, heads, head size) -> (tokens, heads, head size)."""
        states = states.flatten(0, 1)
        return states if self.slots is None else _SelectRows.apply(states, self.slots)


class _SelectRows(torch.autograd.Function):
    """`index_select` of distinct indices: its gradient is a copy, where torch must sum, which is slow."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slots)
        ctx.shape = states.shape
        return states.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (slots,) = ctx.saved_tensors
        (gradient,) = gradients
        return gradient.new_zeros(ctx.shape).index_copy_(0, slots, gradient), None


@lru_cache(maxsize=2)  # called by every layer, and again where activations are recomputed
def _group_rows(lengths: tuple[int, ...], device: torch.device) -> list[_RowGroup]:
    groups: list[list[int]] = []
    for length in lengths:
        longest = groups[-1][0] if groups else 0
        share = SHORTEST_OF_A_GROUP if longest > short_attention.MAX_TOKENS else SHORTEST_OF_A_SHORT_GROUP
        if share * longest <= length <= longest:
            groups[-1].append(length)
        else:
            groups.append([length])
    return [_RowGroup(group, device) for group in groups]


@lru_cache(maxsize=4)
def _make_window_mask(length: int, sliding_window: int, device: torch.device) -> torch.Tensor:
    """Return (1, 1, length, length): true where a query sees a key, one of the last `sliding_window` up to itself."""
    visible = torch.ones(length, length, dtype=torch.bool, device=device)
    return visible.tril().triu(1 - sliding_window)[None, None]


def _can_use_flash(precision: str) -> bool:
    return precision != "fp32" and torch.cuda.is_available() and bool(is_flash_attn_2_available())


def _keeps_rows_apart(model: Any) -> bool:
    """Tell whether the logits of the second of two rows are the same whatever the first one holds."""
    lengths = [5, 4]
    positions = torch.tensor([[*range(5), *range(4)]])
    training = model.training
    model.eval()
    logits = []
    try:
        for first in ([1, 2, 3, 4, 5], [9, 8, 7, 6, 5]):
            batch = {"input_ids": torch.tensor([[*first, 1, 2, 3, 4]]), "position_ids": positions}
            batch |= build_attention_arguments(lengths)
            batch = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            with torch.no_grad():
                logits.append(model(**batch, use_cache=False).logits[0, 5:].float())
    # No such arguments, another kind of attention, or a recurrence that needs a package to keep rows apart.
    except (NotImplementedError, TypeError, ValueError, ImportError):
        return False
    finally:
        model.train(training)
    # Experts may sum in another order; a leak is far larger.
    return bool((logits[0] - logits[1]).abs().max() <= 1e-3 * logits[0].abs().max())


# Without a mask function of this name transformers makes no mask.
AttentionInterface.register(ROW_ATTENTION, attend_rows)
