"""Training step: forward pass in the precision of training, and loss of the supervised tokens.

The trainer and the memory estimate run the same functions, so that the estimate cannot drift from the training.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lathe.training.loss import IGNORE_INDEX, sum_token_losses

# What a batch holds for the loss and the counts, not for the model's forward.
NOT_MODEL_INPUTS = {"labels", "columns", "targets", "tokens", "supervised_tokens"}


def autocast(device_type: str, precision: str, *, cache_enabled: bool = True) -> AbstractContextManager[Any]:
    """Return bf16 autocast for a forward pass in bf16; no autocast for fp32, nor for fp16, which accelerate casts."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device_type, torch.bfloat16, cache_enabled=cache_enabled)


def compute_step_loss(model: Any, batch: dict[str, Any], *, in_tiles: bool = False) -> torch.Tensor:
    """Run the forward pass of a batch, and return its negative log-likelihood summed over supervised tokens.

    Logits are computed only in `batch["columns"]`, the positions that predict a supervised token; `batch["targets"]`:
    (rows, columns) are the tokens there. Everything else in the batch is described in `lathe.training.packing`.
    With `in_tiles` they are not held: the model must have TRL's fused head, as `SFTTrainer` adds it. That knows from
    the configuration what a model does with its logits, such as Gemma's soft cap and Granite's scale.
    """
    inputs = select_model_inputs(batch)
    if in_tiles:
        labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        labels[:, batch["columns"]] = batch["targets"]
        loss: torch.Tensor = model(**inputs, shift_labels=labels, num_items_in_batch=1, fused_lm_head=True).loss
        return loss
    logits = model(**inputs, logits_to_keep=batch["columns"], use_cache=False).logits
    return sum_token_losses(logits.flatten(0, 1), batch["targets"].flatten())


def has_plain_head(model: Any) -> bool:
    """Tell whether TRL's fused head can read the output head of `model`; that of added tokens it cannot (TRL 1.16)."""
    head = model.get_output_embeddings()
    return hasattr(head, "weight") and hasattr(head, "bias")


def select_model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Return what the model's forward gets of a batch: without labels, it computes no loss of its own."""
    return {name: value for name, value in batch.items() if name not in NOT_MODEL_INPUTS}
