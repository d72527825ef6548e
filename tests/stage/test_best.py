"""The best evaluation: its weights are kept where that is asked for, and training stops when it is not beaten."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import changed, learnt_by_heart, write_splits
from refusals import refused
from safetensors.torch import load_file
from toy import load_toy

from lathe.training.train import train

CONFIG = load_toy().params
SPLITS = learnt_by_heart()
# A constant rate, so that a step is the same however many follow.
RISING = {
    "seed": 1,
    "max_steps": 14,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "eval_steps": 1,
    "max_length": 256,
    "learning_rate": 0.004,
    "lr_scheduler_type": "constant",
    "precision": "fp32",
}


class Result:
    """What one training left."""

    def __init__(self, folder: Path) -> None:
        self.weights: dict[str, torch.Tensor] = load_file(folder / "adapter/adapter_model.safetensors")
        self.metrics = json.loads((folder / "metrics/metrics.json").read_text())
        lines = (folder / "metrics/plots/metrics/eval/loss.tsv").read_text().splitlines()[1:]
        self.losses = {int(step): float(loss) for step, loss in (line.split("\t") for line in lines)}
        self.best = min(self.losses, key=lambda step: self.losses[step])


@pytest.fixture
def run(small_model, tmp_path):
    """Return a function that trains with some parameters changed."""
    count = 0

    def once(**changes: Any) -> Result:
        nonlocal count
        count += 1
        folder = tmp_path / str(count)
        (folder / "adapter").mkdir(parents=True)
        chosen = changed(CONFIG, {**RISING, **changes})
        train(small_model, write_splits(folder / "data", SPLITS), folder / "adapter", folder / "metrics", params=chosen)
        return Result(folder)

    return once


def test_the_weights_of_the_best_evaluation_are_kept_and_named(run):
    kept = run(load_best_model_at_end=True)
    assert 1 < kept.best < 14, kept.losses
    assert kept.metrics["best"] == {"step": kept.best, "loss": pytest.approx(kept.losses[kept.best])}
    until_then = run(max_steps=kept.best)
    assert kept.weights.keys() == until_then.weights.keys()
    assert all(torch.equal(kept.weights[name], tensor) for name, tensor in until_then.weights.items())
    last = run()
    assert "best" not in last.metrics
    assert not any(torch.equal(last.weights[name], tensor) for name, tensor in until_then.weights.items())


def test_training_stops_when_the_best_is_not_beaten_for_long(run, caplog):
    whole = run()
    with caplog.at_level(logging.INFO, "lathe"):
        stopped = run(early_stopping_patience=2)
    worse = next(step for step in whole.losses if step >= 3 and min(whole.losses, key=whole.losses.get) <= step - 2)
    assert list(stopped.losses) == list(range(1, len(stopped.losses) + 1))
    assert len(stopped.losses) == stopped.best + 2 < 14
    assert len(stopped.losses) <= worse
    assert f"stopping early at step {stopped.best + 2}: validation loss was best at step {stopped.best}" in caplog.text


def test_a_metric_that_the_method_does_not_evaluate_is_refused(run):
    with refused("metric-not-evaluated", "training.metric_for_best_model is 'reward'"):
        run(metric_for_best_model="reward")
