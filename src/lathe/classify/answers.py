"""Answers: what a classifier says of texts, from its logits, temperature and threshold."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lathe.classify.calibration import (
    Array,
    Calibration,
    choose_label_threshold,
    choose_none_threshold,
    compute_probabilities,
    fit_temperature,
)
from lathe.classify.labels import Labels
from lathe.classify.loss import make_targets

DIGITS = 6


def calibrate(logits: Array, rows: Sequence[Sequence[str]], labels: Labels) -> Calibration:
    """Return temperature and threshold, chosen on the validation split; `rows` are the labels of its texts.

    With one label a text there is a threshold where some texts have none.
    """
    numbers = labels.encode(rows)
    if labels.multi_label:
        targets = make_targets(numbers, len(labels.names), multi_label=True).numpy().astype(np.float64)
        temperature = fit_temperature(logits, targets)
        probabilities = compute_probabilities(logits, temperature, multi_label=True)
        return Calibration(temperature, choose_label_threshold(probabilities, targets))
    known = np.array([bool(row) for row in numbers])
    first = np.array([row[0] if row else -1 for row in numbers])
    temperature = fit_temperature(logits[known], first[known].astype(np.float64)) if known.any() else 1.0
    is_none = np.array([not row for row in rows])
    if not is_none.any():
        return Calibration(temperature, None)
    probabilities = compute_probabilities(logits, temperature, multi_label=False)
    correct = probabilities.argmax(axis=1) == first
    return Calibration(temperature, choose_none_threshold(probabilities.max(axis=1), correct, is_none))


def describe_probabilities(probabilities: Array, labels: Labels, threshold: float | None) -> list[dict[str, Any]]:
    """Return for each text the labels that are predicted, with the probability of that, and the best single class."""
    answers: list[dict[str, Any]] = []
    if labels.multi_label:
        for row in probabilities:
            chosen = row >= (0.5 if threshold is None else threshold)
            sure = np.where(chosen, row, 1 - row).min() if len(row) else 1.0
            names = [name for name, is_chosen in zip(labels.names, chosen, strict=True) if is_chosen]
            answers.append({"predicted": names, "confidence": round(float(sure), DIGITS)})
        return answers
    best = probabilities.argmax(axis=1)
    for row, number in zip(probabilities, best, strict=True):
        top, confidence = labels.names[int(number)], round(float(row[number]), DIGITS)
        kept = threshold is None or float(row[number]) >= threshold
        answers.append({"predicted": [top] if kept else [], "confidence": confidence, "top": top})
    return answers


def join_answers(
    texts: Sequence[str], rows: Sequence[Sequence[str]], answers: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return rows of a file of predictions: text, its own labels, and the answer."""
    return [
        {"text": text, "labels": list(labels), **answer}
        for text, labels, answer in zip(texts, rows, answers, strict=True)
    ]
