"""The loss of supervised tokens, without a float32 copy of the logits."""

from typing import Any

import torch

IGNORED = -100  # label of a token that carries no loss, as in torch's cross entropy
CHUNK_BYTES = 1 << 24  # of float32 logits in work at a time


def sum_token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed negative log-likelihood (float32) of `targets` where they are not IGNORED.

    `logits`: (positions, vocabulary) in any float type, computed with in float32; `targets`: (positions,).
    """
    loss: torch.Tensor = _SummedLoss.apply(logits, targets)
    return loss


class _SummedLoss(torch.autograd.Function):
    """Keeps the logits as they came and one float32 per position, and works on a few positions at a time.

    torch's cross entropy would hold three float32 tensors as large as the logits; on a real vocabulary they are the
    largest of a step, and writing and reading them takes most of the loss's time.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        sums = torch.cat([part.float().logsumexp(-1) for part in logits.split(_positions_at_a_time(logits))])
        kept = targets != IGNORED
        chosen = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0].float()
        ctx.save_for_backward(logits, targets, sums)
        return ((sums - chosen) * kept).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, sums = ctx.saved_tensors
        scale = gradients[0] * (targets != IGNORED)
        gradient = torch.empty_like(logits)
        size = _positions_at_a_time(logits)
        for part, into, sum_, target, factor in zip(
            *(tensor.split(size) for tensor in (logits, gradient, sums, targets.clamp(min=0), scale)), strict=True
        ):
            share = part.float().sub_(sum_[:, None]).exp_().mul_(factor[:, None])
            share.scatter_add_(1, target[:, None], -factor[:, None])
            into.copy_(share)
        return gradient, None


def _positions_at_a_time(logits: torch.Tensor) -> int:
    return max(1, CHUNK_BYTES // (4 * logits.shape[1]))
