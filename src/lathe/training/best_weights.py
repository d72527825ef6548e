"""Which evaluation was the best so far, its weights, and when to stop waiting for a better one."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lathe.common.errors import InputError
from lathe.config.training_params import Training
from lathe.training.sharding import fill, trained

WEIGHTS = "best.safetensors"

# A metric's name in params.yaml -> what Trainer logs it as, and whether more of it is better.
METRICS = {
    "loss": ("eval_loss", False),
    "reward": ("eval_reward", True),
    "reward_margin": ("eval_rewards/margins", True),
    "reward_accuracy": ("eval_rewards/accuracies", True),
}
OF_METHOD = {"sft": ["loss"], "dpo": ["loss", "reward_margin", "reward_accuracy"], "grpo": ["reward"]}


class Best:
    """Follows one validation metric; what it knows comes from the trainer's log, which a checkpoint restores.

    `training.load_best_model_at_end` keeps a copy of the trained tensors of the best evaluation in main memory and in
    every checkpoint.
    """

    def __init__(self, training: Training) -> None:
        """Raise InputError where the method has no such metric."""
        known = OF_METHOD[training.method]
        self.name = known[0] if training.metric_for_best_model == "auto" else training.metric_for_best_model
        if self.name not in known:
            raise InputError(
                f"training.metric_for_best_model is {self.name!r}; {training.method} evaluates {', '.join(known)}"
            )
        self.logged, self.more_is_better = METRICS[self.name]
        self.keeps = training.load_best_model_at_end
        self.patience = training.early_stopping_patience
        self.weights: dict[str, torch.Tensor] = {}

    def note(self, model: Any, state: Any) -> None:
        """Copy the weights if the evaluation just logged is the best."""
        if self.keeps and self._best(state)[0] == state.global_step:
            self.weights = {name: tensor.cpu().clone() for name, tensor in trained(model).items()}

    def out_of_patience(self, state: Any) -> bool:
        """Tell whether the last `early_stopping_patience` evaluations brought nothing better."""
        values = self._values(state)
        return self.patience is not None and len(values) - 1 - self._index(values) >= self.patience

    def said(self, state: Any) -> str:
        """Return a sentence on the best evaluation."""
        step, value = self._best(state)
        return f"validation {self.name} was best at step {step}, {value:.4g}"

    def put_back(self, model: Any, state: Any) -> None:
        """Give the model the best weights, where they are kept and are not those of the last step."""
        if self.keeps and self._best(state)[0] != state.global_step:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    fill(parameter, self.weights[name])

    def kept(self, state: Any) -> dict[str, dict[str, float]]:
        """Return the step and the metric of the evaluation whose weights are kept; nothing where the last ones are."""
        step, value = self._best(state)
        return {"best": {"step": step, self.name: value}} if self.keeps else {}

    def save(self, folder: Path) -> None:
        """Add the best weights to a checkpoint."""
        if self.weights:
            save_file(self.weights, folder / WEIGHTS)

    def load(self, folder: Path) -> None:
        """Take the best weights from a checkpoint."""
        if (folder / WEIGHTS).exists():
            self.weights = load_file(folder / WEIGHTS)

    def _best(self, state: Any) -> tuple[int, float]:
        values = self._values(state)
        return values[self._index(values)]

    def _index(self, values: list[tuple[int, float]]) -> int:
        sign = 1 if self.more_is_better else -1
        return max(range(len(values)), key=lambda place: (sign * values[place][1], -place))  # the first of equals

    def _values(self, state: Any) -> list[tuple[int, float]]:
        return [(entry["step"], entry[self.logged]) for entry in state.log_history if self.logged in entry]
