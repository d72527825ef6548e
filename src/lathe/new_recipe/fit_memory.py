"""Batch size that fits: by the estimate of a training's memory, with the least that makes it slower."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lathe.common.errors import InputError
from lathe.common.text import readable_bytes
from lathe.config.params import Params
from lathe.doctor.checks import free_memory_bytes
from lathe.needs.fit_batch import USABLE, find_largest, measure_row_memory

# From the fastest to the smallest: 4-bit base, activations recomputed.
FORMS = ((False, False), (False, True), (True, True))

# An accumulation of more passes than this is slower than recomputing activations.
SMALLEST_GOOD_BATCH = 4

UNITS = {"": 1e9, "g": 1e9, "gb": 1e9, "gib": 2**30, "m": 1e6, "mb": 1e6, "mib": 2**20}


@dataclass(frozen=True)
class Memory:
    """The memory that a training may take (bytes), of which device, and how that is known."""

    size: int
    device: Literal["cpu", "cuda"]
    source: str

    @property
    def usable(self) -> int:
        """What an estimate may come to; the rest is for what it does not see."""
        return int(self.size * USABLE[self.device])

    def __str__(self) -> str:
        return f"{readable_bytes(self.size)} {self.source}"


@dataclass(frozen=True)
class Fit:
    """How a training fits into memory; `total` is its estimate (bytes), None where it cannot be estimated."""

    batch_size: int
    eval_batch_size: int
    load_in_4bit: bool
    gradient_checkpointing: bool
    total: int | None
    fits: bool


def find_memory(gpu: str | None) -> Memory:
    """Return the memory of the named GPU, else of the one at hand, else of this machine. Raises InputError."""
    if gpu is None:
        import torch

        device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
        source = "free on the GPU here" if device == "cuda" else "free on this machine, which has no GPU"
        return Memory(free_memory_bytes(), device, source)
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", gpu.strip().lower())
    if size is None or size[2] not in UNITS or not float(size[1]):
        raise InputError(f"--gpu {gpu}: is no size of memory; write it as in 24GB", code="gpu-size")
    return Memory(int(float(size[1]) * UNITS[size[2]]), "cuda", "of the GPU")


def fit_training(
    model: Path | Mapping[str, Any] | None, weights: int, params: Params, memory: Memory, *, rows: int, per_row: int
) -> Fit:
    """Return the largest batch of at most `rows` that fits, each of which takes the memory of `per_row` rows.

    Without a `model` nothing is estimated: rows one by one, with the base in 4 bits if in 16 it takes half of it.
    Raises InputError if the model cannot be made from its configuration.
    """
    if model is None:
        return Fit(1, 1, 2 * 2 * weights > memory.size, True, None, fits=True)
    fits: list[Fit] = []
    for load_in_4bit, gradient_checkpointing in FORMS:
        found = _fit_form(model, params, memory, load_in_4bit, gradient_checkpointing, rows, per_row)
        if found.fits and found.batch_size >= min(SMALLEST_GOOD_BATCH, rows):
            return found
        fits.append(found)
    # The largest batch; of equal ones the fastest. If none fits, the one that takes least.
    return max(fits, key=lambda fit: fit.batch_size if fit.fits else -(fit.total or 0))


def _fit_form(
    model: Path | Mapping[str, Any],
    params: Params,
    memory: Memory,
    load_in_4bit: bool,
    gradient_checkpointing: bool,
    rows: int,
    per_row: int,
) -> Fit:
    training = params.training.model_copy(
        update={
            "gradient_checkpointing": gradient_checkpointing,
            # A GPU that is not here has it.
            "precision": "bf16" if memory.device == "cuda" else params.training.precision,
        }
    )
    quantization = params.quantization.model_copy(update={"load_in_4bit": load_in_4bit})
    changed = params.model_copy(update={"training": training, "quantization": quantization})
    one = measure_row_memory(model, changed, device=memory.device)
    by_row = replace(one, activations=per_row * one.activations, logits=per_row * one.logits)
    batch_size = find_largest(_list_powers(rows), lambda size: by_row.take(size) <= memory.usable)
    eval_batch_size = find_largest(_list_powers(2 * rows), lambda size: by_row.evaluate(size) <= memory.usable)
    total = max(by_row.take(batch_size), by_row.evaluate(eval_batch_size))
    fits = max(by_row.take(batch_size), by_row.evaluate(1)) <= memory.usable
    return Fit(batch_size, eval_batch_size, load_in_4bit, gradient_checkpointing, total, fits)


def _list_powers(most: int) -> list[int]:
    """Return the powers of two up to `most`."""
    return [2**n for n in range(most.bit_length())]
