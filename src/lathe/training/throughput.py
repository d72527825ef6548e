"""How fast a training is: tokens per second, and the share of what the device could compute."""

import time
from typing import Any

import torch
from transformers import TrainerCallback

from lathe.common import metric_files, operating_system
from lathe.models.adapter import unwrapped
from lathe.training import distributed

# Dense bf16 or fp16 matrix products with float32 sums, in operations per second: NVIDIA's data sheets. A name is looked
# for in the device's own, in this order.
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


class Speed(TrainerCallback):
    """Counts the seconds of the steps alone, without evaluations and checkpoints; the tokens of all processes."""

    def __init__(self, model: Any, *, precision: str) -> None:
        self.trainer: Any = None
        self.seconds = 0.0
        self.started = 0.0
        self.first = self.logged = (0.0, 0, 0)  # seconds, tokens, supervised tokens
        on_gpu = precision != "fp32" and torch.cuda.is_available()
        self.peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
        self.per_token, self.per_supervised_token = operations(model)

    def follow(self, trainer: Any) -> None:
        """Take `trained_tokens` and `trained_supervised_tokens` from this trainer."""
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave out what an interrupted run counted before this one."""
        self.first = self.logged = self._counted()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter() - self.started

    def since_last(self) -> dict[str, float]:
        """Return the rates since the last call, and the most memory used so far; nothing where no step was made."""
        rates = self._rates(self.logged)
        self.logged = self._counted()
        memory = metric_files.get_peak_gpu_memory_bytes() or operating_system.get_peak_memory_bytes()
        return {**rates, "peak_memory_bytes": memory} if rates else {}

    def overall(self) -> dict[str, float]:
        """Return the rates of all steps that this process made; nothing where it made none."""
        return self._rates(self.first)

    def _counted(self) -> tuple[float, int, int]:
        tokens, supervised = distributed.total([self.trainer.trained_tokens, self.trainer.trained_supervised_tokens])
        return self.seconds, tokens, supervised

    def _rates(self, before: tuple[float, int, int]) -> dict[str, float]:
        seconds, tokens, supervised = (new - old for new, old in zip(self._counted(), before, strict=True))
        if not seconds:
            return {}
        rates = {
            "tokens_per_second": round(tokens / seconds, 1),
            "supervised_tokens_per_second": round(supervised / seconds, 1),
        }
        if self.peak:
            done = self.per_token * tokens + self.per_supervised_token * supervised
            rates["model_flops_utilization"] = round(done / seconds / (self.peak * distributed.count()), 4)
        return rates


def peak_flops(device: str) -> float | None:
    """Return the rate of 16-bit matrix products that a GPU's maker states, by the device's name; None for others."""
    return next((peak for known, peak in PEAK_FLOPS.items() if known in device), None)


def operations(model: Any) -> tuple[float, float]:
    """Return the floating-point operations that a training step needs per token, and more per supervised token.

    Two per weight of a linear layer forward, two backward to its input, two for its own gradient where it is trained;
    the output layer works at supervised positions alone. Attention between tokens is not counted, nor what a checkpoint
    recomputes. Of mixtures of experts, whose weights are no linear layers, too little is counted.
    """
    head = unwrapped(model).get_output_embeddings()
    per_token = per_supervised_token = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            count = module.in_features * module.out_features * (6 if module.weight.requires_grad else 4)
            if module is head:
                per_supervised_token += count
            else:
                per_token += count
    return per_token, per_supervised_token
