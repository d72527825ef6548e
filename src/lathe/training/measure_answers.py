"""Likelihood of held-out answers under the model as it was trained, for the comparison with its GGUF."""

from collections.abc import Sequence
from typing import Any

import torch

from lathe.models.loss_mask import Encoded
from lathe.models.measured_answers import AnswerLikelihood
from lathe.training.training_step import autocast, compute_step_loss


def measure_answers(model: Any, sequences: Sequence[Encoded], *, precision: str) -> AnswerLikelihood:
    """Return the likelihood of the supervised tokens of `sequences`, one row at a time, without dropout."""
    training, nll, tokens = model.training, 0.0, 0
    model.eval()
    try:
        for sequence in sequences:
            ids = torch.tensor([sequence.input_ids], device=model.device)
            positions = [at for at, is_supervised in enumerate(sequence.supervised) if is_supervised and at]
            columns = torch.tensor(positions, device=model.device)
            batch = {"input_ids": ids, "columns": columns - 1, "targets": ids[:, columns]}
            with torch.no_grad(), autocast(model.device.type, precision):
                nll += float(compute_step_loss(model, batch))
            tokens += len(positions)
    finally:
        model.train(training)
    return AnswerLikelihood(nll, tokens, len(sequences))
