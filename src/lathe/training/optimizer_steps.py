"""Number of optimizer steps of a training, from examples, batch size, accumulation and epochs."""

import math

from lathe.config.base import get_number
from lathe.config.params import Params
from lathe.config.training_params import Dpo, Training


def count_training_steps(params: Params, *, examples: int, sequences: int) -> dict[str, int | None]:
    """Return the optimizer steps per epoch and of the whole training, on one device.

    `examples` is the size of the training split, `sequences` how many sequences supervised fine-tuning makes of it: an
    example may give several, one per supervised turn. DPO and GRPO count examples. `sft_steps` are those of a
    supervised phase before DPO or GRPO. GRPO has no epochs: its `steps_per_epoch` is None. With `sft.packing`
    several sequences share one row, so the real numbers are lower.
    """
    training, dpo, grpo = params.training, params.dpo, params.grpo
    supervised = _count_steps_per_epoch(sequences, training)
    per_epoch: int | None
    match training.method:
        case "sft":
            steps = training.max_steps or math.ceil(training.num_train_epochs * supervised)
            return {"steps_per_epoch": supervised, "steps": steps}
        case "dpo":
            sft_epochs, per_epoch = dpo.sft_epochs, _count_steps_per_epoch(examples, dpo)
            steps = training.max_steps or math.ceil(dpo.num_train_epochs * per_epoch)
        case "grpo":
            sft_epochs, per_epoch, steps = grpo.sft_epochs, None, grpo.max_steps
    return {
        "sft_steps": math.ceil(sft_epochs * supervised),
        "steps_per_epoch": per_epoch,
        "steps": steps,
    }


def _count_steps_per_epoch(sequences: int, batches: Training | Dpo) -> int:
    forward_passes = math.ceil(sequences / get_number(batches.per_device_train_batch_size))
    return math.ceil(forward_passes / batches.gradient_accumulation_steps)
