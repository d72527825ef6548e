"""Calibration: the temperature that makes probabilities true, and the thresholds that are chosen on validation."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, softmax

Array = NDArray[np.float64]

LOWEST, HIGHEST = 0.05, 20.0  # temperatures


@dataclass(frozen=True)
class Calibration:
    """What turns logits into answers: temperature, and thresholds of a probability; None: every text has a class.

    Of texts with one label a class is answered from the probability `threshold` on; with several labels, each label.
    """

    temperature: float
    threshold: float | None


def fit_temperature(logits: Array, targets: Array) -> float:
    """Return the temperature with the smallest loss (Guo et al. 2017); targets are numbers, or 0 and 1 by class.

    As in Platt's scaling a share of 1 / (rows + 2) of each target is kept back: rows that are all right are no reason
    to be sure without limit.
    """
    kept_back = 1 / (len(logits) + 2)
    if targets.ndim == 1:
        wanted = np.full(logits.shape, kept_back / max(1, logits.shape[1] - 1))
        wanted[np.arange(len(targets)), targets.astype(int)] = 1 - kept_back
    else:
        wanted = targets * (1 - 2 * kept_back) + kept_back

    def compute_loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        if targets.ndim == 1:
            return float(-(wanted * log_softmax(scaled, axis=1)).sum(axis=1).mean())
        return float((np.logaddexp(0, scaled) - wanted * scaled).mean())

    found = minimize_scalar(compute_loss, bounds=(np.log(LOWEST), np.log(HIGHEST)), method="bounded")
    return round(float(np.exp(found.x)), 6)


def compute_probabilities(logits: Array, temperature: float, *, multi_label: bool) -> Array:
    """Return the probabilities of the classes, (rows, classes)."""
    scaled = logits.astype(np.float64) / temperature
    return np.asarray(expit(scaled) if multi_label else softmax(scaled, axis=1))


def choose_none_threshold(confidence: Array, correct: NDArray[np.bool_], is_none: NDArray[np.bool_]) -> float:
    """Return the probability below which a text is of none of the classes.

    It has the highest mean of two shares: of the texts of a class that get it, and of the others that get none. Of
    equal ones it is the lowest.
    """
    candidates = np.unique(np.concatenate([[0.0], (np.sort(confidence)[1:] + np.sort(confidence)[:-1]) / 2]))
    inside, outside = np.sort(confidence[~is_none & correct]), np.sort(confidence[is_none])
    kept = len(inside) - np.searchsorted(inside, candidates, side="left")
    refused = np.searchsorted(outside, candidates, side="left")
    balance = kept / max(1, int((~is_none).sum())) + refused / max(1, len(outside))
    return round(float(candidates[int(balance.argmax())]), 6)


def choose_label_threshold(probabilities: Array, targets: Array) -> float:
    """Return the probability from which a label is given, with the highest micro-F1, of equals that nearest to 0.5."""
    candidates = np.round(np.arange(0.05, 0.96, 0.01), 2)

    def compute_f1(threshold: float) -> float:
        predicted = probabilities >= threshold
        hits = (predicted & (targets > 0.5)).sum()
        return float(2 * hits / max(1, predicted.sum() + targets.sum()))

    scores = np.array([compute_f1(threshold) for threshold in candidates])
    best = candidates[scores == scores.max()]
    return float(best[np.abs(best - 0.5).argmin()])
