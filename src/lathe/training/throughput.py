"""Throughput: tokens per second, and model FLOPs utilization on GPUs whose peak is known."""

import time
from typing import Any

import torch
from transformers import TrainerCallback

from lathe.common import metric_files, operating_system
from lathe.models.adapter import unwrap
from lathe.training import distributed

# Dense bf16 or fp16 matrix products with float32 sums, in operations per second, from NVIDIA's data sheets. The first
# name that is part of the device's name counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


class ThroughputMeter(TrainerCallback):
    """Counts seconds of steps, without evaluations and checkpoints, and the tokens of all processes."""

    def __init__(self, model: Any, *, precision: str) -> None:
        self.trainer: Any = None
        self.seconds = 0.0
        self.started = 0.0
        self.first = self.logged = (0.0, 0, 0)  # seconds, tokens, supervised tokens
        on_gpu = precision != "fp32" and torch.cuda.is_available()
        self.peak = get_peak_flops(torch.cuda.get_device_name()) if on_gpu else None
        self.per_token, self.per_supervised_token = count_flops(model)

    def follow(self, trainer: Any) -> None:
        """Read `trained_tokens` and `trained_supervised_tokens` of this trainer from now on."""
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave out what an interrupted run counted before."""
        self.first = self.logged = self._count()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter() - self.started

    def measure_since_last(self) -> dict[str, float]:
        """Return the rates since the last call, and the peak memory so far; nothing where no step was made."""
        rates = self._compute_rates(self.logged)
        self.logged = self._count()
        memory = metric_files.get_peak_gpu_memory_bytes() or operating_system.get_peak_memory_bytes()
        return {**rates, "peak_memory_bytes": memory} if rates else {}

    def measure_overall(self) -> dict[str, float]:
        """Return the rates of all steps of this process; nothing where it made none."""
        return self._compute_rates(self.first)

    def _count(self) -> tuple[float, int, int]:
        tokens, supervised = distributed.reduce_sum(
            [self.trainer.trained_tokens, self.trainer.trained_supervised_tokens]
        )
        return self.seconds, tokens, supervised

    def _compute_rates(self, before: tuple[float, int, int]) -> dict[str, float]:
        seconds, tokens, supervised = (new - old for new, old in zip(self._count(), before, strict=True))
        if not seconds:
            return {}
        rates = {
            "tokens_per_second": round(tokens / seconds, 1),
            "supervised_tokens_per_second": round(supervised / seconds, 1),
        }
        if self.peak:
            done = self.per_token * tokens + self.per_supervised_token * supervised
            rates["model_flops_utilization"] = round(done / seconds / (self.peak * distributed.count_processes()), 4)
        return rates


def get_peak_flops(device: str) -> float | None:
    """Return the peak of 16-bit matrix products from the data sheet of a GPU, by the device's name; None for others."""
    return next((peak for known, peak in PEAK_FLOPS.items() if known in device), None)


def count_flops(model: Any) -> tuple[float, float]:
    """Return the floating-point operations of a training step per token, and in addition per supervised token.

    Two per weight of a linear layer forward, two backward to its input if something before it is trained, two for its
    own gradient if it is trained.
    The output layer computes supervised positions only. Not counted: attention between tokens, and what activation
    checkpointing recomputes. Mixtures of experts are undercounted, as their weights are no linear layers.
    """
    head = unwrap(model).get_output_embeddings()
    per_token = per_supervised_token = 0.0
    is_reached = False  # by the gradient, which ends at the first trained weight
    for module in model.modules():
        is_trained = any(weight.requires_grad for weight in module.parameters(recurse=False))
        if isinstance(module, torch.nn.Linear):
            count = module.in_features * module.out_features * (2 + 2 * is_reached + 2 * is_trained)
            if module is head:
                per_supervised_token += count
            else:
                per_token += count
        is_reached |= is_trained
    return per_token, per_supervised_token
