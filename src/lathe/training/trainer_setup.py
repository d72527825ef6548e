"""Trainer setup: model, examples, parameters and callbacks of one phase, and the arguments all methods share."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import is_liger_kernel_available

from lathe.config.base import Auto
from lathe.config.params import Params
from lathe.training.checkpoints import Checkpoints
from lathe.training.reward_functions import RewardFunction


def uses_liger(choice: bool | Auto) -> bool:
    """Tell whether Liger's kernels are used, by `training.use_liger_kernel`."""
    if choice == "auto":
        return torch.cuda.is_available() and bool(is_liger_kernel_available())
    return choice


@dataclass(frozen=True)
class TrainerSetup:
    """What the trainer of one phase is built from."""

    model: Any  # with its adapter, or without one under full tuning
    tokenizer: Any
    splits: dict[str, list[dict[str, Any]]]  # processed examples: `messages`, and `rejected` in preference pairs
    params: Params
    precision: str  # bf16, fp16 or fp32
    checkpoints: Checkpoints | None
    callbacks: Sequence[TrainerCallback]
    functions: Mapping[str, RewardFunction]  # the user's own, by the name in `grpo.rewards`

    def build_arguments(self, **overrides: Any) -> dict[str, Any]:
        """Return the arguments that all methods share, by transformers' names, with `overrides`."""
        training = self.params.training
        on_cpu = not torch.cuda.is_available()
        shared = {
            "output_dir": tempfile.gettempdir(),  # must exist; checkpoints go to the scratch folder
            "save_strategy": "no",
            "report_to": [],
            "seed": self.params.seed,
            "data_seed": self.params.seed,
            "use_cpu": on_cpu,
            "bf16": False,  # `BaseTrainer` does autocast
            "fp16": self.precision == "fp16",
            "num_train_epochs": training.num_train_epochs,
            "max_steps": training.max_steps or -1,
            "per_device_train_batch_size": training.per_device_train_batch_size,
            "per_device_eval_batch_size": training.per_device_eval_batch_size,
            "gradient_accumulation_steps": training.gradient_accumulation_steps,
            "learning_rate": training.learning_rate,
            "lr_scheduler_type": training.lr_scheduler_type,
            "warmup_steps": training.warmup_ratio,
            "weight_decay": training.weight_decay,
            "max_grad_norm": training.max_grad_norm,
            "optim": training.optim,
            "gradient_checkpointing": training.gradient_checkpointing,
            "torch_compile": training.torch_compile,
            "use_liger_kernel": uses_liger(training.use_liger_kernel),
            # Lathe, or TRL, computes logits and loss.
            "liger_kernel_config": {"fused_linear_cross_entropy": False, "cross_entropy": False},
            "logging_steps": training.logging_steps,
            "logging_nan_inf_filter": False,  # it waits for the device at every pass, and hides what must stop the run
            "eval_strategy": "steps",
            "eval_steps": training.eval_steps,
            "dataloader_pin_memory": not on_cpu,
            # An expert that no token was routed to has no gradient; other tensors always have one.
            "ddp_find_unused_parameters": any(
                "expert" in name for name, parameter in self.model.named_parameters() if parameter.requires_grad
            ),
            "ddp_broadcast_buffers": False,
            "disable_tqdm": True,  # lathe.training.dvclive_curves draws the bar
        }
        return shared | overrides
