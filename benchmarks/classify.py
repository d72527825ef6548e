"""An epoch of the head with kept features and without, and 1,000 texts by torch, ONNX Runtime and scikit-learn.

    python benchmarks/classify.py [--rounds 5]

On what `make classify` has left in classify/: the committed parameters, MiniLM. Both epochs train the same head on the
same batches; without kept features the frozen backbone reads the texts of each batch again. Rounds are paired: each
runs everything once, one after the other, so that a slow moment of the machine meets all of them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch

from lathe.classify import evaluate, export_onnx, features
from lathe.classify.backbone import load_tokenizer, make_batch, tokenize
from lathe.classify.baselines import fit_regression, make_tfidf
from lathe.classify.labels import read_labels, read_split
from lathe.classify.loss import make_targets
from lathe.classify.model import Classifier, load_classifier_model, make_head
from lathe.common import paths
from lathe.config.classifier_config import load_classifier

FOLDER = paths.CLASSIFIER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds (default: 5)")
    arguments = parser.parse_args()
    if not (FOLDER / "models/onnx/model.onnx").exists():
        parser.error("classify/models/onnx/model.onnx: no such file; run `make classify` first")
    report(measure(arguments.rounds), arguments.rounds)


def report(measured: dict[str, Any], rounds: int) -> None:
    """Print a table."""
    shown = {
        "an epoch with kept features": measured["epoch_seconds"]["with_kept_features"],
        "the same without": measured["epoch_seconds"]["without"],
        **{f"1,000 texts, {engine}": values for engine, values in measured["seconds_per_1000_texts"].items()},
        "times faster with kept features": measured["times_faster_with_kept_features"],
    }
    print(f"{machine.describe()}; {measured['epoch_of_texts']:,} texts of training; {rounds} paired rounds\n")
    print("| | seconds, median | least | most |\n| --- | ---: | ---: | ---: |")
    for what, values in shown.items():
        print(f"| {what} | {values['median']} | {values['least']} | {values['most']} |")


def measure(rounds: int) -> dict[str, Any]:
    params = load_classifier().params
    backbone, prepared = FOLDER / "models/backbone", FOLDER / "data/prepared"
    classifier, labels = load_classifier_model(FOLDER / "models/best_model", backbone)
    texts, names = read_split(prepared, "train")
    tokenizer = load_tokenizer(backbone)
    ids = tokenize(tokenizer, texts, params.data.max_length).ids
    targets = make_targets(labels.encode(names), len(labels.names), multi_label=labels.multi_label)
    kept = features.load_features(FOLDER / "data/features", "train")

    def read_kept(numbers: list[int]) -> torch.Tensor:
        return kept[numbers]

    def read_again(numbers: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return classifier.read_features(make_batch([ids[number] for number in numbers], tokenizer.pad_token_id))

    epochs = {
        "with_kept_features": lambda: train_epoch(
            classifier, kept.shape[1], targets, read_kept, params.training.batch_size
        ),
        "without": lambda: train_epoch(classifier, kept.shape[1], targets, read_again, params.training.batch_size),
    }
    answers = make_answerers(classifier, backbone, prepared)
    for run in (*epochs.values(), *answers.values()):  # once to warm up
        run()
    seconds: dict[str, list[float]] = {name: [] for name in (*epochs, *answers)}
    for _ in range(rounds):
        for name, run in {**epochs, **answers}.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    ratios = [without / kept for kept, without in zip(seconds["with_kept_features"], seconds["without"], strict=True)]
    count = len(read_split(prepared, "test")[0])
    return {
        "epoch_of_texts": len(texts),
        "epoch_seconds": {name: summarize(seconds[name]) for name in epochs},
        "times_faster_with_kept_features": summarize(ratios),
        "seconds_per_1000_texts": {
            name: summarize([1000 * value / count for value in seconds[name]]) for name in answers
        },
    }


def train_epoch(
    classifier: Classifier, width: int, targets: torch.Tensor, read: Callable[[list[int]], torch.Tensor], size: int
) -> None:
    """Train a new head for one epoch."""
    torch.manual_seed(0)
    head = make_head(width, int(targets.max()) + 1, classifier.architecture).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.003, fused=True)
    order = torch.randperm(len(targets)).tolist()
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        torch.nn.functional.cross_entropy(head(read(numbers)), targets[numbers]).backward()
        optimizer.step()
        optimizer.zero_grad()


def make_answerers(classifier: Classifier, backbone: Path, prepared: Path) -> dict[str, Callable[[], object]]:
    """Return what answers the texts of test, each the whole way from the text."""
    config = load_classifier().params
    texts, _ = read_split(prepared, "test")
    train_texts, train_names = read_split(prepared, "train")
    labels = read_labels(prepared)
    targets = make_targets(labels.encode(train_names), len(labels.names), multi_label=labels.multi_label).numpy()
    words = make_tfidf()
    model = fit_regression(
        words.fit_transform(train_texts), targets, config.baselines.tfidf_c, 0, None, multi_label=False
    )
    session = export_onnx.open_session(FOLDER / "models/onnx/model.onnx")
    tokenizer = load_tokenizer(backbone)

    def run_onnx() -> object:
        tokens = tokenize(tokenizer, texts, config.data.max_length)
        return export_onnx.run_session(session, tokens, tokenizer.pad_token_id, config.features.batch_size)

    return {
        "torch": lambda: evaluate.compute_logits(classifier, backbone, texts, config),
        "ONNX Runtime": run_onnx,
        "TF-IDF and logistic regression": lambda: model.predict_proba(words.transform(texts)),
    }


def summarize(values: list[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {
        "median": float(f"{statistics.median(values):.4g}"),
        "least": float(f"{min(values):.4g}"),
        "most": float(f"{max(values):.4g}"),
    }


if __name__ == "__main__":
    main()
