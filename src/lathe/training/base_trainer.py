"""What the forward and backward passes of every trainer have in common, whatever their loss."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from transformers import Trainer

from lathe.models.loss_mask import Encoded
from lathe.training import distributed
from lathe.training.nonfinite_loss import not_finite
from lathe.training.training_step import autocast


class BaseTrainer(Trainer):
    """A trainer's passes in bf16 where asked for, stopped by a loss or gradient that is no number.

    To be named before TRL's class among the bases of a trainer.
    """

    def __init__(self, *, precision: str, rows: Sequence[Encoded], rate: str, **arguments: Any) -> None:
        """Name `rows` of the training split and `rate`, the learning rate's key, where a loss is no number."""
        self.precision = precision  # before TRL's trainer may want to compute something
        self.rows = rows
        self.rate = rate
        self.step_batches: list[torch.Tensor] = []  # token ids of the passes of the step at hand
        self.lost: list[tuple[float, torch.Tensor]] = []  # losses and token ids of those that went wrong
        super().__init__(**arguments)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """Return bf16 autocast, where the forward pass is in bf16.

        Asked to do so itself, accelerate would also give a float32 copy of all logits.
        """
        return autocast(self.args.device.type, self.precision, cache_enabled=bool(cache_enabled))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return nothing, where transformers would walk through all parameters; `lathe.training.throughput` counts."""
        return 0

    def ids_of(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the token ids of the pass just made, (rows, tokens), by which its rows are known."""
        ids: torch.Tensor = inputs["input_ids"]
        return ids

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one pass, and note a loss that is no number."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        ids = self.ids_of(inputs)
        if not torch.isfinite(loss):
            self.lost.append((loss.item(), ids.cpu()))
        self.step_batches.append(ids)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        wrong = not self.args.fp16 and not torch.isfinite(norm)  # in fp16 the scaler skips such a step and goes on
        if distributed.largest(int(wrong or bool(self.lost))):
            self._refuse(norm)
        self.step_batches.clear()
        return norm

    def _refuse(self, norm: torch.Tensor) -> NoReturn:
        """Say which step and rows gave a loss or gradient that is no number, in all processes alike."""
        lost = [each for by_rank in distributed.gathered(self.lost) for each in by_rank]
        step = self.state.global_step + 1
        if lost:
            raise not_finite("loss", lost[0][0], step, [ids for _, ids in lost], self.rows, rate=self.rate)
        by_rank = distributed.gathered([ids.cpu() for ids in self.step_batches])
        batches = [ids for batches in by_rank for ids in batches]
        raise not_finite("grad_norm", norm.item(), step, batches, self.rows, rate=self.rate)
