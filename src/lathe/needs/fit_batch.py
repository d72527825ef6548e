"""Batch sizes that fit into the memory of a device, by the estimate of a training's memory."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lathe.common import operating_system
from lathe.common.errors import InputError
from lathe.config.base import get_number
from lathe.config.params import Params
from lathe.needs.estimate import estimate_training_memory, get_training_device
from lathe.training.batch_sizes import BatchSizes, has_auto

logger = logging.getLogger(__name__)

# The part of a device's memory that an estimate may come to; above it a training may still fail: glibc's malloc keeps
# what is freed, and training on the CPU was seen to take 2.2 times the bytes of its tensors.
USABLE = {"cuda": 0.9, "cpu": 0.45}

# Rows of an evaluation that is auto: more take no less time.
MOST_EVALUATION_ROWS = 64


@dataclass(frozen=True)
class RowMemory:
    """Bytes of a training whatever its batch size, its gradients, and by row a training step and an evaluation.

    However many rows there are, the logits of a step take no more than `most_logits`.
    """

    fixed: int
    gradients: int
    activations: int
    logits: int
    evaluation: int
    most_logits: float

    def take(self, batch_size: int) -> int:
        """Return the bytes of a training step with that many rows."""
        logits = min(batch_size * self.logits, self.most_logits)
        return self.fixed + self.gradients + batch_size * self.activations + int(logits)

    def evaluate(self, batch_size: int) -> int:
        """Return the bytes of an evaluation with that many rows."""
        return self.fixed + batch_size * self.evaluation


def measure_row_memory(
    model: Path | Mapping[str, Any],
    params: Params,
    *,
    length: int | None = None,
    device: Literal["cpu", "cuda"] | None = None,
) -> RowMemory:
    """Return the memory of supervised fine-tuning by rows of `length` tokens, by default `training.max_length`.

    `device` is as in `estimate_training_memory`. Raises InputError if the model cannot be made from its configuration.
    """
    one = {"method": "sft", "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    params = params.model_copy(update={"training": params.training.model_copy(update=one)})
    from lathe.training.loss import HELD_LOGITS_BYTES

    device = device or get_training_device()
    memory = estimate_training_memory(model, params, length=length, device=device)
    fixed = memory.weights + memory.adapter + memory.optimizer
    most_logits = math.inf if device == "cpu" else max(HELD_LOGITS_BYTES, memory.logits)
    return RowMemory(fixed, memory.gradients, memory.activations, memory.logits, memory.evaluation, most_logits)


def choose_batch_sizes(
    model: Path | Mapping[str, Any], params: Params, *, memory: int | None = None, length: int | None = None
) -> BatchSizes:
    """Return the batch sizes of `params`, with numbers in place of auto.

    Where the batch size of training is auto, `gradient_accumulation_steps` counts the rows of a step, which stay as
    many: as many of them as fit go through the model at once. `memory` is that of the device (bytes), by default
    what the GPU or this machine has in total, whatever is free now, so that a machine chooses the same every time.
    `length` is that of the longest row (tokens), by default `training.max_length`.
    """
    training = params.training
    train, passes = training.per_device_train_batch_size, training.gradient_accumulation_steps
    evaluation = training.per_device_eval_batch_size
    if has_auto(training):
        usable = memory or get_usable_memory_bytes()
        try:
            by_row = measure_row_memory(model, params, length=length)
        except InputError as error:
            logger.warning("batch sizes that are auto become 1: memory cannot be estimated: %s", error)
            by_row = RowMemory(usable, 0, usable, 0, usable, 0)
        if train == "auto":
            divisors = (size for size in range(1, passes + 1) if passes % size == 0)
            train = find_largest(divisors, lambda size: by_row.take(size) <= usable)
            passes //= train
        if evaluation == "auto":
            powers = (2**n for n in range(MOST_EVALUATION_ROWS.bit_length()))
            evaluation = find_largest(powers, lambda size: by_row.evaluate(size) <= usable)
    return BatchSizes(get_number(train), passes, get_number(evaluation))


def get_usable_memory_bytes() -> int:
    """Return the part that an estimate may come to of the memory of the first GPU, or of this machine without one."""
    import torch

    if torch.cuda.is_available():
        return int(USABLE["cuda"] * torch.cuda.get_device_properties(0).total_memory)
    return int(USABLE["cpu"] * operating_system.get_total_memory_bytes())


def find_largest(sizes: Iterable[int], fits: Callable[[int], bool]) -> int:
    """Return the largest of ascending sizes that fits, the first if none does."""
    first, *others = sizes
    largest = first
    for size in others:
        if not fits(size):
            break
        largest = size
    return largest
