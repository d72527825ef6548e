"""Scores of validation during training: loss, accuracy, macro-F1."""

import torch


def score_validation(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Return the mean loss without weights and smoothing, accuracy and macro-F1, (rows, classes) logits.

    With several labels a text, a row is right if all of its labels are, each by its probability above a half.
    """
    if targets.dim() == 1:
        loss = torch.nn.functional.cross_entropy(logits, targets)
        predicted, actual = (
            torch.nn.functional.one_hot(numbers, logits.shape[1]).bool() for numbers in (logits.argmax(dim=1), targets)
        )
    else:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
        predicted, actual = logits > 0, targets > 0.5
    right = (predicted == actual).all(dim=1).double().mean()
    hits = (predicted & actual).sum(dim=0).double()
    sizes = predicted.sum(dim=0).double() + actual.sum(dim=0).double()
    known = sizes > 0
    f1 = (2 * hits[known] / sizes[known]).mean() if known.any() else torch.tensor(0.0)
    return {"loss": loss.item(), "accuracy": right.item(), "macro_f1": f1.item()}
