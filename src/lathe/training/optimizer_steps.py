"""Number of optimizer steps of a training, from rows, batch size, accumulation and epochs."""

import math

from lathe.config.params import Params
from lathe.config.training_params import Dpo, Training


def training_steps(params: Params, *, rows: int, sequences: int) -> dict[str, int | None]:
    """Return the optimizer steps of one epoch and of the whole training, on one device.

    `rows` are those of the training split and `sequences` what supervised fine-tuning makes of them. `sft_steps` are
    those of the supervised phase before another method, whose own the others are; sampling knows no epochs.
    How many rows share one is known after packing alone: where `sft.packing` is set, these are at most so many.
    """
    training, dpo, grpo = params.training, params.dpo, params.grpo
    supervised = _steps_per_epoch(sequences, training)
    per_epoch: int | None
    match training.method:
        case "sft":
            steps = training.max_steps or math.ceil(training.num_train_epochs * supervised)
            return {"steps_per_epoch": supervised, "steps": steps}
        case "dpo":
            before, per_epoch = dpo.sft_epochs, _steps_per_epoch(rows, dpo)
            steps = training.max_steps or math.ceil(dpo.num_train_epochs * per_epoch)
        case "grpo":
            before, per_epoch, steps = grpo.sft_epochs, None, grpo.max_steps
    return {
        "sft_steps": math.ceil(before * supervised),
        "steps_per_epoch": per_epoch,
        "steps": steps,
    }


def _steps_per_epoch(examples: int, batches: Training | Dpo) -> int:
    passes = math.ceil(examples / batches.per_device_train_batch_size)
    return math.ceil(passes / batches.gradient_accumulation_steps)


def _less(key: str, rows: int) -> str:
    if rows == 1:
        return "lower training.max_length"
    accumulate = ", raise gradient_accumulation_steps as much" if "train" in key else ""
    return f"lower training.{key} (now {rows}){accumulate}, or training.max_length"
