"""Scores of a classifier on the rows of a split, each with a 95 % interval; and differences of two on the same rows.

An answer is a row of `data/predictions`: the text's own labels, those that were predicted, the best single class
(`top`) and the probability of the prediction (`confidence`). All scores are functions of sums over rows, as in the main
pipeline.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lathe.evaluation.bootstrap import Array, compute_interval, jackknife_sums, resample_sums
from lathe.evaluation.detectable import find_detectable_difference
from lathe.evaluation.permutation_test import compute_p_value, permute_sums

Answer = Mapping[str, Any]

DIGITS = 6


@dataclass(frozen=True)
class Scored:
    """A score: its value on all rows, and its interval."""

    value: float
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Return it as a metric file has it."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Statistics:
    """The statistics of rows, (rows, k), and the formulas of the scores on their sums, (..., k) -> (...)."""

    rows: Array
    formulas: dict[str, Callable[[Array], Array]]


def make_statistics(
    answers: Sequence[Answer], classes: Sequence[str], *, bins: int, by_class: bool = False
) -> Statistics:
    """Return the statistics of answers to the rows of a split, with a formula for the F1 of each class if wanted."""
    number = {name: index for index, name in enumerate(classes)}
    count, width = len(answers), len(classes)
    hits, predicted, actual = (np.zeros((count, width)) for _ in range(3))
    columns: dict[str, Array] = {
        name: np.zeros(count) for name in ("right", "in_scope", "in_scope_right", "none", "none_right")
    }
    by_bin = np.zeros((count, 3 * bins))
    has_none = any(not answer["labels"] for answer in answers) and all("top" in answer for answer in answers)
    for row, answer in enumerate(answers):
        own, found = set(answer["labels"]), set(answer["predicted"])
        for name in own:
            if name in number:
                actual[row, number[name]] = 1
        for name in found:
            predicted[row, number[name]] = 1
            hits[row, number[name]] = name in own
        right = own == found
        columns["right"][row] = right
        side = "in_scope" if own else "none"
        columns[side][row] = 1
        columns[f"{side}_right"][row] = right
        confidence = answer.get("confidence")
        # Calibration is of the classes: of a text of none of them no probability can be right.
        if confidence is not None and (own or "top" not in answer):
            place = min(bins - 1, int(confidence * bins))
            correct = answer["top"] in own if "top" in answer else right
            by_bin[row, [place, bins + place, 2 * bins + place]] = 1, confidence, correct
    rows = np.column_stack([np.ones(count), *columns.values(), hits, predicted, actual, by_bin])
    start = 1 + len(columns)
    place_of = {name: 1 + index for index, name in enumerate(columns)}
    formulas = {
        "accuracy": lambda sums: sums[..., place_of["right"]] / sums[..., 0],
        "macro_f1": lambda sums: _compute_macro_f1(*_split_classes(sums, start, width)),
    }
    if has_none:
        formulas["in_scope_accuracy"] = lambda sums: _divide(
            sums[..., place_of["in_scope_right"]], sums[..., place_of["in_scope"]]
        )
        formulas["none_recall"] = lambda sums: _divide(sums[..., place_of["none_right"]], sums[..., place_of["none"]])
    if any("top" not in answer for answer in answers):
        formulas["micro_f1"] = lambda sums: _compute_micro_f1(*_split_classes(sums, start, width))
    if by_bin.any():
        formulas["calibration_error"] = lambda sums: _compute_calibration_error(sums[..., start + 3 * width :], bins)
    for index in range(width if by_class else 0):
        formulas[f"class {index}"] = _make_class_formula(start, width, index)
    return Statistics(rows, formulas)


def score_answers(
    answers: Sequence[Answer], classes: Sequence[str], *, bins: int, samples: int, seed: int, by_class: bool = True
) -> dict[str, Any]:
    """Return the scores of a split's answers with their intervals, and those of each class with its numbers of rows."""
    statistics = make_statistics(answers, classes, bins=bins, by_class=by_class)
    sums = statistics.rows.sum(axis=0)
    resampled = resample_sums(statistics.rows, samples, seed)
    left_out = jackknife_sums(statistics.rows)
    scored = {
        name: _score(formula(sums), formula(resampled), formula(left_out))
        for name, formula in statistics.formulas.items()
    }
    counts = {kind: _count(answers, classes, kind) for kind in ("labels", "predicted")}
    hits = _count_hits(answers, classes)
    return {
        "scores": {name: one.as_dict() for name, one in scored.items() if not name.startswith("class ")},
        "classes": [
            {
                "label": name,
                "rows": counts["labels"][index],
                "predicted": counts["predicted"][index],
                "precision": _share(hits[index], counts["predicted"][index]),
                "recall": _share(hits[index], counts["labels"][index]),
                "f1": scored[f"class {index}"].as_dict(),
            }
            for index, name in enumerate(classes if by_class else [])
        ],
    }


def compare_answers(
    ours: Sequence[Answer], theirs: Sequence[Answer], classes: Sequence[str], *, bins: int, samples: int, seed: int
) -> dict[str, dict[str, float | None]]:
    """Return how much higher each score of `theirs` is than that of `ours` on the same rows, with interval and p."""
    first, other = (make_statistics(answers, classes, bins=bins) for answers in (ours, theirs))
    sums, other_sums = first.rows.sum(axis=0), other.rows.sum(axis=0)
    changes = permute_sums(first.rows - other.rows, samples, seed)
    resampled, other_resampled = (resample_sums(one.rows, samples, seed) for one in (first, other))
    left_out, other_left_out = (jackknife_sums(one.rows) for one in (first, other))
    differences: dict[str, dict[str, float | None]] = {}
    for name, formula in first.formulas.items():
        if name not in other.formulas:
            continue
        observed = float(formula(other_sums) - formula(sums))
        drawn = formula(other_resampled) - formula(resampled)
        one = _score(np.asarray(observed), drawn, formula(other_left_out) - formula(left_out))
        permuted = formula(other_sums + changes) - formula(sums - changes)
        smallest = find_detectable_difference(drawn, len(first.rows), counts=name == "accuracy")
        differences[name] = {
            **one.as_dict(),
            "p": round(compute_p_value(observed, permuted), DIGITS),
            "detectable": None if smallest is None else round(smallest, DIGITS),
        }
    return differences


def tabulate_confusion(answers: Sequence[Answer]) -> list[dict[str, str]]:
    """Return a row for each answer of the confusion matrix: actual and predicted class, `none` for none of them."""
    return [
        {"actual": " + ".join(answer["labels"]) or "none", "predicted": " + ".join(answer["predicted"]) or "none"}
        for answer in answers
    ]


def tabulate_reliability(answers: Sequence[Answer], bins: int) -> list[dict[str, float]]:
    """Return the points of the reliability diagram: mean confidence, share that is right, and rows of each bin."""
    groups: dict[int, list[tuple[float, bool]]] = {}
    for answer in answers:
        if answer.get("confidence") is None or ("top" in answer and not answer["labels"]):
            continue
        right = (
            answer["top"] in answer["labels"] if "top" in answer else set(answer["labels"]) == set(answer["predicted"])
        )
        groups.setdefault(min(bins - 1, int(answer["confidence"] * bins)), []).append((answer["confidence"], right))
    return [
        {
            "confidence": round(sum(confidence for confidence, _ in group) / len(group), DIGITS),
            "accuracy": round(sum(right for _, right in group) / len(group), DIGITS),
            "rows": len(group),
        }
        for _, group in sorted(groups.items())
    ]


def _score(value: Array, resampled: Array, left_out: Array) -> Scored:
    observed = float(value)
    ends = compute_interval(observed, resampled, left_out) if np.isfinite(observed) else None
    low, high = (None, None) if ends is None else (round(end, DIGITS) for end in ends)
    return Scored(round(observed, DIGITS) if np.isfinite(observed) else 0.0, low, high)


def _make_class_formula(start: int, width: int, index: int) -> Callable[[Array], Array]:
    return lambda sums: _compute_f1(*(part[..., index] for part in _split_classes(sums, start, width)))


def _split_classes(sums: Array, start: int, width: int) -> tuple[Array, Array, Array]:
    hits, predicted, actual = (sums[..., start + part * width : start + (part + 1) * width] for part in range(3))
    return hits, predicted, actual


def _compute_f1(hits: Array, predicted: Array, actual: Array) -> Array:
    return _divide(2 * hits, predicted + actual)


def _compute_macro_f1(hits: Array, predicted: Array, actual: Array) -> Array:
    """The mean over the classes that are there or were predicted."""
    known = (predicted + actual) > 0
    return _divide((_compute_f1(hits, predicted, actual) * known).sum(axis=-1), known.sum(axis=-1))


def _compute_micro_f1(hits: Array, predicted: Array, actual: Array) -> Array:
    return _divide(2 * hits.sum(axis=-1), predicted.sum(axis=-1) + actual.sum(axis=-1))


def _compute_calibration_error(by_bin: Array, bins: int) -> Array:
    """The mean distance of confidence and accuracy over the bins, weighted by their rows (Guo et al. 2017)."""
    counts, confidence, right = (by_bin[..., part * bins : (part + 1) * bins] for part in range(3))
    return _divide(np.abs(confidence - right).sum(axis=-1), counts.sum(axis=-1))


def _divide(numerator: Array, denominator: Array) -> Array:
    """Return the quotient, 0 where there is nothing to divide by."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator, dtype=np.float64), where=denominator > 0)


def _count(answers: Sequence[Answer], classes: Sequence[str], key: str) -> list[int]:
    number = {name: index for index, name in enumerate(classes)}
    counts = [0] * len(classes)
    for answer in answers:
        for name in answer[key]:
            if name in number:
                counts[number[name]] += 1
    return counts


def _count_hits(answers: Sequence[Answer], classes: Sequence[str]) -> list[int]:
    both = [{**answer, "labels": sorted(set(answer["labels"]) & set(answer["predicted"]))} for answer in answers]
    return _count(both, classes, "labels")


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, DIGITS) if whole else None
