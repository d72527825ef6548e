"""Best weights: which evaluation was best so far, a copy of its weights, and early stopping."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lathe.common.errors import InputError
from lathe.config.training_params import Training
from lathe.training.sharding import copy_full_tensor, get_trained_tensors

WEIGHTS_FILE = "best.safetensors"

# A metric's name in params.yaml -> the name in Trainer's log, and whether higher is better.
LOGGED_METRICS = {
    "loss": ("eval_loss", False),
    "reward": ("eval_reward", True),
    "reward_margin": ("eval_rewards/margins", True),
    "reward_accuracy": ("eval_rewards/accuracies", True),
}
METRICS_OF_METHOD = {"sft": ["loss"], "dpo": ["loss", "reward_margin", "reward_accuracy"], "grpo": ["reward"]}


class BestWeights:
    """Follows one validation metric in the trainer's log, which a checkpoint restores.

    With `training.load_best_model_at_end` it keeps a copy of the trained tensors of the best evaluation in main memory
    and in every checkpoint.
    """

    def __init__(self, training: Training) -> None:
        """Raise InputError where the method does not evaluate the metric."""
        known = METRICS_OF_METHOD[training.method]
        self.metric = known[0] if training.metric_for_best_model == "auto" else training.metric_for_best_model
        if self.metric not in known:
            raise InputError(
                f"training.metric_for_best_model is {self.metric!r}; {training.method} evaluates {', '.join(known)}",
                code="metric-not-evaluated",
            )
        self.logged_name, self.higher_is_better = LOGGED_METRICS[self.metric]
        self.is_enabled = training.load_best_model_at_end
        self.patience = training.early_stopping_patience
        self.weights: dict[str, torch.Tensor] = {}

    def keep_if_best(self, model: Any, state: Any) -> None:
        """Copy the weights if the evaluation just logged is the best."""
        if self.is_enabled and self._find_best(state)[0] == state.global_step:
            self.weights = {name: tensor.cpu().clone() for name, tensor in get_trained_tensors(model).items()}

    def is_out_of_patience(self, state: Any) -> bool:
        """Tell whether the last `early_stopping_patience` evaluations brought nothing better."""
        values = self._read_values(state)
        return self.patience is not None and len(values) - 1 - self._find_index(values) >= self.patience

    def describe(self, state: Any) -> str:
        """Return a sentence about the best evaluation."""
        step, value = self._find_best(state)
        return f"validation {self.metric} was best at step {step}, {value:.4g}"

    def restore(self, model: Any, state: Any) -> None:
        """Copy the best weights into the model, if they are kept and are not those of the last step."""
        if self.is_enabled and self._find_best(state)[0] != state.global_step:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    copy_full_tensor(self.weights[name], parameter)

    def summarize(self, state: Any) -> dict[str, dict[str, float]]:
        """Return step and metric of the evaluation whose weights are kept; nothing where those of the last step are."""
        step, value = self._find_best(state)
        return {"best": {"step": step, self.metric: value}} if self.is_enabled else {}

    def save(self, folder: Path) -> None:
        """Add the best weights to a checkpoint."""
        if self.weights:
            save_file(self.weights, folder / WEIGHTS_FILE)

    def load(self, folder: Path) -> None:
        """Read the best weights from a checkpoint."""
        if (folder / WEIGHTS_FILE).exists():
            self.weights = load_file(folder / WEIGHTS_FILE)

    def _find_best(self, state: Any) -> tuple[int, float]:
        values = self._read_values(state)
        return values[self._find_index(values)]

    def _find_index(self, values: list[tuple[int, float]]) -> int:
        sign = 1 if self.higher_is_better else -1
        return max(range(len(values)), key=lambda index: (sign * values[index][1], -index))  # the first of equals

    def _read_values(self, state: Any) -> list[tuple[int, float]]:
        return [(entry["step"], entry[self.logged_name]) for entry in state.log_history if self.logged_name in entry]
