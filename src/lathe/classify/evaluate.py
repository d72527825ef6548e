"""Evaluation: the answers of the best classifier to validation and test, and its scores beside the baselines'."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lathe.classify.answers import calibrate, describe_probabilities, join_answers
from lathe.classify.backbone import load_tokenizer, tokenize
from lathe.classify.calibration import Array, Calibration, compute_probabilities
from lathe.classify.features import load_features, run_batches
from lathe.classify.labels import Labels, read_split
from lathe.classify.model import Classifier, load_classifier_model
from lathe.classify.scores import score_answers

if TYPE_CHECKING:
    from lathe.config.classifier_params import ClassifierParams

SPLITS = ("validation", "test")
CLASSIFIER = "classifier"  # its name in reports, beside those of the baselines


@dataclass
class Evaluated:
    """The classifier's answers by split, how they were made, and what 1,000 texts take."""

    answers: dict[str, list[dict[str, Any]]]
    calibration: Calibration
    labels: Labels
    seconds_per_1000: float


def answer_splits(model: Path, backbone: Path, prepared: Path, features: Path, params: "ClassifierParams") -> Evaluated:
    """Answer validation and test with a trained classifier; temperature and threshold are chosen on validation.

    With a frozen backbone the kept features are read; the seconds are of the whole way from the text all the same.
    """
    classifier, labels = load_classifier_model(model, backbone)
    rows = {split: read_split(prepared, split) for split in SPLITS}
    started = time.perf_counter()
    logits = {"test": compute_logits(classifier, backbone, rows["test"][0], params)}
    seconds = time.perf_counter() - started
    if classifier.architecture.tuning == "head":
        with torch.inference_mode():
            logits |= {split: classifier.head(load_features(features, split)).numpy() for split in SPLITS}
    else:
        logits["validation"] = compute_logits(classifier, backbone, rows["validation"][0], params)
    calibration = calibrate(logits["validation"], rows["validation"][1], labels)
    answers = {}
    for split in SPLITS:
        probabilities = compute_probabilities(logits[split], calibration.temperature, multi_label=labels.multi_label)
        described = describe_probabilities(probabilities, labels, calibration.threshold)
        answers[split] = join_answers(*rows[split], described)
    return Evaluated(answers, calibration, labels, 1000 * seconds / len(rows["test"][0]))


def compute_logits(classifier: Classifier, backbone: Path, texts: Sequence[str], params: "ClassifierParams") -> Array:
    """Return the logits of texts, in 32 bits."""
    tokenizer = load_tokenizer(backbone)
    tokens = tokenize(tokenizer, texts, classifier.architecture.max_length)
    made = run_batches(
        lambda batch: classifier(**batch),
        tokens,
        padding=tokenizer.pad_token_id,
        batch_size=params.features.batch_size,
        task="classifying",
    )
    return made.numpy()


def make_report(
    answers: Mapping[str, Sequence[dict[str, Any]]], labels: Labels, params: "ClassifierParams"
) -> dict[str, Any]:
    """Return the scores of several classifiers' answers to one split, by their names."""
    report: dict[str, Any] = {}
    for name, rows in answers.items():
        found = score_answers(
            rows,
            labels.names,
            bins=params.evaluate.calibration_bins,
            samples=params.evaluate.bootstrap_samples,
            seed=params.seed,
            by_class=name == CLASSIFIER,
        )
        scores = found["scores"]
        report[name] = {
            **{metric: one["value"] for metric, one in scores.items()},
            "intervals": [{"metric": metric, "low": one["low"], "high": one["high"]} for metric, one in scores.items()],
            **({"classes": found["classes"]} if name == CLASSIFIER else {}),
        }
    return report


def make_summary(
    reports: Mapping[str, dict[str, Any]], trained: Mapping[str, Any], calibration: Calibration
) -> dict[str, Any]:
    """Return metrics.json: numbers that become columns, and in lists what does not."""
    test = reports["test"][CLASSIFIER]
    metric = trained["metric"]
    shown = {name: value for name, value in test.items() if isinstance(value, float)}
    return {
        "best_val_score": trained["best_val_score"],
        "test_score": test["accuracy" if metric == "loss" else metric],
        **shown,
        "details": [
            {
                "score": metric,
                "best_epoch": trained["best_epoch"],
                "epochs": trained["epochs"],
                "temperature": calibration.temperature,
                "threshold": calibration.threshold,
                "intervals": test["intervals"],
                "classes": test["classes"],
            }
        ],
    }
