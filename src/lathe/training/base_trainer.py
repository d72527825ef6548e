"""Base trainer: bf16 autocast, and a stop at a loss or gradient that is not finite, whatever the method."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, NoReturn

import torch
from transformers import Trainer

from lathe.models.loss_mask import Encoded
from lathe.training import distributed
from lathe.training.nonfinite_loss import make_nonfinite_error
from lathe.training.sharding import gather_full_tensor
from lathe.training.training_step import autocast


class BaseTrainer(Trainer):
    """A trainer whose forward passes are in bf16 if asked for, and that stops at a loss or gradient not finite.

    Among the bases of a trainer it goes before TRL's class.
    """

    def __init__(
        self, *, precision: str, sequences: Sequence[Encoded], learning_rate_key: str, **arguments: Any
    ) -> None:
        """Set up; `sequences` of the training split and `learning_rate_key` are for the message of a stop."""
        self.precision = precision  # before TRL's __init__, which may compute something
        self.sequences = sequences
        self.learning_rate_key = learning_rate_key
        self.step_losses: list[tuple[torch.Tensor, torch.Tensor]] = []  # of the current step's passes, with token ids
        super().__init__(**arguments)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """Return bf16 autocast where the precision is bf16.

        With `bf16=True` accelerate would do it too, and also make a float32 copy of all logits.
        """
        return autocast(self.args.device.type, self.precision, cache_enabled=bool(cache_enabled))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: transformers would walk through all parameters, and `lathe.training.throughput` counts."""
        return 0

    def compute_under_autocast(self, model: Any) -> None:
        """Let every forward pass of `model` be under the autocast of training, whoever calls it.

        TRL computes new log-probabilities under autocast, and old ones without; DeepSpeed ends what is around it.
        """
        forward = model.forward

        @wraps(forward)
        def forward_under_autocast(*given: Any, **options: Any) -> Any:
            with self.autocast_smart_context_manager():
                return forward(*given, **options)

        model.forward = forward_under_autocast

    def get_token_ids(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the token ids of the last forward pass, (rows, tokens)."""
        ids: torch.Tensor = inputs["input_ids"]
        return ids

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one forward and backward pass, and keep its loss until the step is checked."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.step_losses.append((loss.detach(), self.get_token_ids(inputs)))
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = torch.as_tensor(super()._clip_grad_norm(model))  # DeepSpeed gives a number
        is_finite = torch.stack([torch.isfinite(loss) for loss, _ in self.step_losses]).all()
        if not self.args.fp16:  # in fp16 the scaler skips a step whose gradient is not finite, and goes on
            is_finite &= torch.isfinite(gather_full_tensor(norm))
        if distributed.reduce_max(int(not is_finite)):  # waits for the device, once in a step
            self._raise_nonfinite(norm)
        self.step_losses.clear()
        return norm

    def _raise_nonfinite(self, norm: torch.Tensor) -> NoReturn:
        """Raise the same InputError in all processes."""
        passes = [(loss.item(), ids.cpu()) for loss, ids in self.step_losses]
        gathered = [entry for of_rank in distributed.gather(passes) for entry in of_rank]
        if losses := [entry for entry in gathered if not math.isfinite(entry[0])]:
            quantity, value, batches = "loss", losses[0][0], [ids for _, ids in losses]
        else:
            quantity, value, batches = "grad_norm", norm.item(), [ids for _, ids in gathered]
        step = self.state.global_step + 1
        raise make_nonfinite_error(
            quantity, value, step, batches, self.sequences, learning_rate_key=self.learning_rate_key
        )
