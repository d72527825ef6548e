"""Loss of a batch: cross-entropy of one label, binary cross-entropy of several, with weights and smoothing."""

from collections.abc import Sequence

import torch


def make_targets(rows: Sequence[Sequence[int]], classes: int, *, multi_label: bool) -> torch.Tensor:
    """Return the targets of rows of class numbers: numbers (rows,), or 0 and 1 for each class (rows, classes)."""
    if not multi_label:
        return torch.tensor([row[0] for row in rows], dtype=torch.long)
    targets = torch.zeros(len(rows), classes)
    for number, row in enumerate(rows):
        targets[number, row] = 1.0
    return targets


def compute_class_weights(targets: torch.Tensor, classes: int, kind: str) -> torch.Tensor | None:
    """Return a weight for each class; None for no weights.

    Balanced weights are those of scikit-learn: rows / (classes * rows of the class). With several labels a text, the
    weight of a label that is there, against one that is not, is rows without it / rows with it.
    """
    if kind == "none":
        return None
    if targets.dim() == 1:
        counts = torch.bincount(targets, minlength=classes).clamp(min=1)
        return len(targets) / (classes * counts.float())
    present = targets.sum(dim=0).clamp(min=1)
    return (len(targets) - present) / present


def sum_loss(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, smoothing: float
) -> torch.Tensor:
    """Return the sum of the losses of a batch's rows, each with its weight."""
    logits = logits.float()
    if targets.dim() == 1:
        return torch.nn.functional.cross_entropy(
            logits, targets, weight=weights, label_smoothing=smoothing, reduction="sum"
        )
    smoothed = targets * (1 - smoothing) + smoothing / 2
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, smoothed, pos_weight=weights, reduction="sum")
    return losses / logits.shape[1]


def sum_weights(targets: torch.Tensor, weights: torch.Tensor | None) -> float:
    """Return what the sum of the losses of these rows is divided by for their mean."""
    if weights is None or targets.dim() == 2:
        return float(len(targets))
    return float(weights[targets].sum())
