"""Baselines: the majority class, and logistic regressions on TF-IDF and on the frozen backbone's features."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lathe.classify import answers as made_answers
from lathe.classify.calibration import Array, choose_label_threshold, choose_none_threshold
from lathe.classify.features import load_features
from lathe.classify.labels import Labels, read_labels, read_split
from lathe.classify.loss import make_targets

if TYPE_CHECKING:
    from lathe.config.classifier_params import ClassifierParams

NAMES = ("majority", "tfidf", "features")


@dataclass
class Baseline:
    """A baseline's answers by split, and what it costs: bytes, and seconds for the texts of test."""

    answers: dict[str, list[dict[str, Any]]]
    bytes: int
    seconds: float


def run_baselines(prepared: Path, features: Path, params: "ClassifierParams") -> dict[str, Baseline]:
    """Fit every baseline on the training split, and answer validation and test.

    Thresholds are chosen on validation, as for the classifier itself.
    """
    labels = read_labels(prepared)
    splits = {split: read_split(prepared, split) for split in ("train", "validation", "test")}
    numbers = {split: labels.encode(names) for split, (_, names) in splits.items()}
    kept = [row for row, of_row in enumerate(numbers["train"]) if of_row or labels.multi_label]
    targets = make_targets(
        [numbers["train"][row] for row in kept], len(labels.names), multi_label=labels.multi_label
    ).numpy()
    found = {"majority": _run_majority(splits, targets, labels)}
    balanced = "balanced" if params.training.class_weights == "balanced" else None
    for name, inverse in (("tfidf", params.baselines.tfidf_c), ("features", params.baselines.features_c)):
        if name == "tfidf":
            read = make_tfidf()
            inputs: dict[str, Any] = {split: splits[split][0] for split in ("validation", "test")}
            train = read.fit_transform([splits["train"][0][row] for row in kept])
            transform: Callable[[Any], Any] = read.transform
            vocabulary = sum(len(term.encode()) for term in read.get_feature_names_out())
        else:
            train = load_features(features, "train")[kept].numpy()
            inputs = {split: load_features(features, split).numpy() for split in ("validation", "test")}
            transform, vocabulary = _same, 0
        model = fit_regression(train, targets, inverse, params.seed, balanced, multi_label=labels.multi_label)
        found[name] = _answer(model, transform, inputs, splits, labels, extra_bytes=vocabulary)
    return found


def _same(values: Any) -> Any:
    return values


def make_tfidf() -> Any:
    """Return TF-IDF of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")


def fit_regression(
    inputs: Any, targets: Any, inverse: float, seed: int, balanced: str | None, *, multi_label: bool
) -> Any:
    """Return a logistic regression that has been fitted to targets as `make_targets` makes them."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    model: Any = LogisticRegression(C=inverse, max_iter=1000, random_state=seed, class_weight=balanced)
    if multi_label:
        model = OneVsRestClassifier(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", message="Label .* is present in all")
        return model.fit(inputs, targets)


def _answer(
    model: Any,
    transform: Callable[[Any], Any],
    inputs: dict[str, Any],
    splits: dict[str, tuple[list[str], list[list[str]]]],
    labels: Labels,
    *,
    extra_bytes: int,
) -> Baseline:
    probabilities: dict[str, Array] = {}
    seconds = 0.0
    for split, values in inputs.items():
        started = time.perf_counter()
        made = model.predict_proba(transform(values))
        seconds = time.perf_counter() - started  # the last is that of test
        probabilities[split] = _spread(made, model.classes_, len(labels.names), multi_label=labels.multi_label)
    threshold = _choose_threshold(probabilities["validation"], splits["validation"][1], labels)
    answers = {
        split: made_answers.join_answers(
            *splits[split], made_answers.describe_probabilities(probabilities[split], labels, threshold)
        )
        for split in inputs
    }
    weights = [
        estimator.coef_.nbytes for estimator in getattr(model, "estimators_", [model]) if hasattr(estimator, "coef_")
    ]
    return Baseline(answers, sum(weights) + extra_bytes, seconds)


def _spread(made: Array, classes: Any, width: int, *, multi_label: bool) -> Array:
    """Return the probabilities by class number; a class that the training rows lack has 0."""
    if multi_label:
        return np.asarray(made, dtype=np.float64)
    spread = np.zeros((len(made), width))
    spread[:, [int(number) for number in classes]] = made
    return spread


def _choose_threshold(probabilities: Array, rows: Sequence[Sequence[str]], labels: Labels) -> float | None:
    numbers = labels.encode(rows)
    if labels.multi_label:
        targets = make_targets(numbers, len(labels.names), multi_label=True).numpy().astype(np.float64)
        return choose_label_threshold(probabilities, targets)
    is_none = np.array([not row for row in rows])
    if not is_none.any():
        return None
    first = np.array([row[0] if row else -1 for row in numbers])
    return choose_none_threshold(probabilities.max(axis=1), probabilities.argmax(axis=1) == first, is_none)


def _run_majority(splits: dict[str, tuple[list[str], list[list[str]]]], targets: Any, labels: Labels) -> Baseline:
    """Answer every text with the most frequent class, or set of labels, of the training split."""
    if labels.multi_label:
        sets = Counter(tuple(row) for row in splits["train"][1])
        [(chosen, _)] = sets.most_common(1)
        answer: dict[str, Any] = {"predicted": list(chosen)}
    else:
        name = labels.names[int(np.bincount(targets).argmax())]
        answer = {"predicted": [name], "top": name}
    return Baseline(
        {
            split: made_answers.join_answers(*splits[split], [answer] * len(splits[split][0]))
            for split in ("validation", "test")
        },
        0,
        0.0,
    )
