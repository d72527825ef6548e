"""Batch sizes of a training that are auto in params.yaml, as the stage `estimate` chose them."""

from dataclasses import dataclass
from pathlib import Path

from lathe.common.errors import InputError
from lathe.common.json_files import read_json_object
from lathe.config.params import Params
from lathe.config.training_params import Training


@dataclass(frozen=True)
class BatchSizes:
    """Rows in a forward pass of one device, passes that make a step, and rows in a forward pass of an evaluation."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    per_device_eval_batch_size: int


def has_auto(training: Training) -> bool:
    """Tell whether a batch size of `training` is auto."""
    return "auto" in (training.per_device_train_batch_size, training.per_device_eval_batch_size)


def set_batch_sizes(params: Params, sizes: BatchSizes) -> Params:
    """Return the parameters with these batch sizes."""
    return params.model_copy(update={"training": params.training.model_copy(update=vars(sizes))})


def read_batch_sizes(params: Params, file: Path) -> Params:
    """Return the parameters with the batch sizes that `file` has in place of auto; it is not read if none is auto.

    Raises InputError if the file is missing.
    """
    if not has_auto(params.training):
        return params
    content = read_json_object(file, remedy="run the stage estimate first: `python stages/estimate.py`")
    try:
        return set_batch_sizes(params, BatchSizes(**content["batch_sizes"][0]))
    except (KeyError, IndexError, TypeError):
        raise InputError(
            f"{file}: has no batch sizes; run the stage estimate again: `python stages/estimate.py`",
            code="no-batch-sizes",
        ) from None
