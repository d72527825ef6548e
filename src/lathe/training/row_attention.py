"""Attention over rows that lie end to end in one sequence, without padding: each row sees itself alone.

Where FlashAttention is installed its variable-length kernel does that. Everywhere else, the CPU included, the rows are
padded to one another for the attention alone; every other layer works on the tokens there are.
"""

from functools import lru_cache
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

from lathe.common.errors import InputError
from lathe.models.adapter import unwrapped
from lathe.training import short_attention

NAME = "lathe_rows"
FLASH = "flash_attention_2"

# Rows are padded to the longest of their group; a row of less than this share of it begins the next group. Among short
# rows another group costs more than the padding.
SHORTEST_OF_A_GROUP = 0.7
SHORTEST_OF_A_SHORT_GROUP = 0.4


def check_attention(asked: str, *, precision: str) -> None:
    """Raise InputError where `training.attn_implementation` asks for FlashAttention and it cannot be had."""
    if asked == FLASH and not _flash(precision):
        raise InputError(
            f"training.attn_implementation is {FLASH!r}; needs a CUDA device, the package flash-attn and a 16-bit "
            "precision; use auto or sdpa"
        )


def separate_rows(model: Any, asked: str, *, precision: str) -> bool:
    """Let `model` take rows end to end, if it keeps them apart; tell whether it does. `asked`: a key's value.

    The model is asked, not a list of names: state-space layers, recurrences and attention of other kinds would carry
    something from one row into the next, and such a model is left as it was.
    """
    model = unwrapped(model)
    if asked in ("sdpa", "eager"):
        model.set_attn_implementation(asked)
        return False
    before = model.config._attn_implementation
    if before not in {"sdpa", FLASH} or getattr(model.config, "attention_chunk_size", None):
        return False
    flash = model.device.type == "cuda" and _flash(precision)
    model.set_attn_implementation(FLASH if flash else NAME)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=flash):  # weights trained whole are float32
        if _keeps_rows_apart(model):
            return True
    model.set_attn_implementation(before)
    return False


def pad_rows(model: Any, asked: str) -> None:
    """Let `model` take padded batches, as other trainers and `generate` make them."""
    model = unwrapped(model)
    if asked != "auto":
        model.set_attn_implementation(asked)
    elif model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")


def attention_arguments(lengths: list[int]) -> dict[str, Any]:
    """Return what a model's forward needs beside ids and positions to keep rows of these lengths (tokens) apart."""
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
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally within each row, as transformers' attention interface asks.

    `query`, `key`, `value`: (1, heads, tokens, head size), the rows one after another, by falling length for least
    padding. Returns (1, tokens, heads, head size). Without `row_lengths` the tokens are one row.
    """
    if attention_mask is not None or softcap is not None or s_aux is not None or position_bias is not None:
        raise NotImplementedError("attention with a mask, soft caps, sinks or biases")
    parts, first = [], 0
    for group in _groups(row_lengths or (query.shape[2],), query.device):
        here = slice(first, first + group.tokens)
        queries, keys, values = (group.pad(states[0, :, here].transpose(0, 1)) for states in (query, key, value))
        mask = None
        if sliding_window is not None and sliding_window < group.longest:
            mask = _window(group.longest, sliding_window, query.device)
        # Padding is on the right, so that no token of a row sees any: the causal order is mask enough.
        if not dropout and short_attention.is_shorter_way(queries):
            visible = _window(group.longest, group.longest, query.device) if mask is None else mask
            attended = short_attention.attend(queries, keys, values, visible[0, 0], scaling).transpose(1, 2)
        else:
            attended, _weights = sdpa_attention_forward(
                module, queries, keys, values, attention_mask=mask, dropout=dropout, scaling=scaling, is_causal=True
            )
        parts.append(group.unpad(attended))
        first += group.tokens
    return torch.cat(parts)[None] if len(parts) > 1 else parts[0][None], None


class _Group:
    """Rows of similar length: `slots` says where each of their tokens lies among the padded ones."""

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
        return states if self.slots is None else _Take.apply(states, self.slots)


class _Take(torch.autograd.Function):
    """`index_select` whose indices differ: its gradient is a copy, not the slow sum that torch must make of it."""

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


@lru_cache(maxsize=2)  # every layer asks, and once more where activations are recomputed
def _groups(lengths: tuple[int, ...], device: torch.device) -> list[_Group]:
    groups: list[list[int]] = []
    for length in lengths:
        longest = groups[-1][0] if groups else 0
        share = SHORTEST_OF_A_GROUP if longest > short_attention.LONGEST else SHORTEST_OF_A_SHORT_GROUP
        if share * longest <= length <= longest:
            groups[-1].append(length)
        else:
            groups.append([length])
    return [_Group(group, device) for group in groups]


@lru_cache(maxsize=4)
def _window(length: int, sliding_window: int, device: torch.device) -> torch.Tensor:
    """(1, 1, length, length): true where a query, by row, sees a key: the latest `sliding_window`, itself included."""
    visible = torch.ones(length, length, dtype=torch.bool, device=device)
    return visible.tril().triu(1 - sliding_window)[None, None]


def _flash(precision: str) -> bool:
    return precision != "fp32" and torch.cuda.is_available() and bool(is_flash_attn_2_available())


def _keeps_rows_apart(model: Any) -> bool:
    """Tell whether the second of two rows is read the same whatever stands in the first."""
    lengths = [5, 4]
    positions = torch.tensor([[*range(5), *range(4)]])
    training = model.training
    model.eval()
    seen = []
    try:
        for first in ([1, 2, 3, 4, 5], [9, 8, 7, 6, 5]):
            batch = {"input_ids": torch.tensor([[*first, 1, 2, 3, 4]]), "position_ids": positions}
            batch |= attention_arguments(lengths)
            batch = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            with torch.no_grad():
                seen.append(model(**batch, use_cache=False).logits[0, 5:].float())
    except (NotImplementedError, TypeError):  # it takes no such arguments, or attends in another way
        return False
    finally:
        model.train(training)
    # Experts may sum in another order; a leak is larger by far.
    return bool((seen[0] - seen[1]).abs().max() <= 1e-3 * seen[0].abs().max())


AttentionInterface.register(NAME, attend_rows)  # no mask function of this name: transformers then makes no mask
