"""Loss: negative log-likelihood of the supervised tokens, without a float32 copy of the logits.

On a GPU, where they would take more than `HELD_LOGITS_BYTES`, the logits are not held at all: TRL's fused head computes
tiles of them, a part of the positions and of the vocabulary at a time, and once more in the backward pass.
"""

from typing import Any

import torch

IGNORE_INDEX = -100  # label of a token that carries no loss, as in torch's cross entropy
# Of float32 logits at a time: what stays in a processor's cache, and what keeps a GPU busy.
CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 25}
# Of logits and their gradient that a GPU holds. Below it tiles, which are multiplied twice, would take more time for
# little memory; on the CPU they take more time whatever the size (`benchmarks/loss.py`).
HELD_LOGITS_BYTES = 1 << 29
TILE = (4096, 32_768)  # positions and vocabulary entries of TRL's tile; named here because TRL takes seconds to import


def uses_tiles(device_type: str, positions: int, vocabulary: int, *, itemsize: int, sharded: bool = False) -> bool:
    """Tell whether the loss of a forward pass is computed in tiles of the logits.

    `positions` are those with logits, whose numbers have `itemsize` bytes. Where weights are `sharded`, all processes
    must gather them in the same order, whatever is supervised in their batches: there a GPU always uses tiles.
    """
    if device_type == "cpu":
        return False
    return sharded or 2 * positions * vocabulary * itemsize > HELD_LOGITS_BYTES


def count_tile_bytes(positions: int, vocabulary: int, *, itemsize: int) -> int:
    """Return the bytes of a tile, which is all that TRL's head holds of the logits at a time."""
    return min(positions, TILE[0]) * min(vocabulary, TILE[1]) * itemsize


def sum_token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed negative log-likelihood (float32) of `targets` where they are not IGNORE_INDEX.

    `logits`: (positions, vocabulary) in any float type, computed with in float32; `targets`: (positions,).
    """
    loss: torch.Tensor = _SumTokenLosses.apply(logits, targets)
    return loss


class _SumTokenLosses(torch.autograd.Function):
    """Keeps the logits in their own type and one float32 per position, and computes a chunk of positions at a time.

    torch's cross entropy would hold three float32 tensors as large as the logits; with a real vocabulary they are the
    largest of a step, and writing and reading them takes most of the loss's time.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        sums = torch.cat([part.float().logsumexp(-1) for part in logits.split(_get_chunk_size(logits))])
        kept = targets != IGNORE_INDEX
        chosen = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0].float()
        ctx.save_for_backward(logits, targets, sums)
        return ((sums - chosen) * kept).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, sums = ctx.saved_tensors
        scale = gradients[0] * (targets != IGNORE_INDEX)
        gradient = torch.empty_like(logits)
        size = _get_chunk_size(logits)
        for part, into, sum_, target, factor in zip(
            *(tensor.split(size) for tensor in (logits, gradient, sums, targets.clamp(min=0), scale)), strict=True
        ):
            share = part.float().sub_(sum_[:, None]).exp_().mul_(factor[:, None])
            share.scatter_add_(1, target[:, None], -factor[:, None])
            into.copy_(share)
        return gradient, None


def _get_chunk_size(logits: torch.Tensor) -> int:
    budget = CHUNK_BYTES.get(logits.device.type, CHUNK_BYTES["cpu"])
    return max(1, budget // (4 * logits.shape[1]))
