"""Training of a classifier: the head on kept features, or head and backbone together, on the texts."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lathe.classify import features as kept_features
from lathe.classify import loss as losses
from lathe.classify.backbone import TokenizedTexts, load_tokenizer, make_batch, tokenize
from lathe.classify.freeze_proof import check_frozen, hash_backbone, make_proof
from lathe.classify.labels import Labels, read_labels, read_split
from lathe.classify.model import Architecture, Classifier, build_classifier
from lathe.classify.quick_scores import score_validation
from lathe.common.errors import InputError
from lathe.common.operating_system import get_peak_memory_bytes
from lathe.common.progress import Progress
from lathe.config.classifier_params import ClassifierParams
from lathe.models.precision import DTYPES, resolve_precision
from lathe.training.dvclive_curves import Curves

logger = logging.getLogger(__name__)

SORTED_BATCHES = 32  # batches of random rows that are sorted by length together: little padding, random order


@dataclass
class Split:
    """Rows to train or to validate on: their targets, and features or token ids."""

    targets: torch.Tensor
    features: torch.Tensor | None
    tokens: TokenizedTexts | None

    def __len__(self) -> int:
        return len(self.targets)


@dataclass
class Trained:
    """A training's result: the tensors of the best and of the last epoch, the proof, and what it scored."""

    best: dict[str, torch.Tensor]
    final: dict[str, torch.Tensor]
    architecture: Architecture
    labels: Labels
    proof: dict[str, Any]
    summary: dict[str, Any]


@dataclass
class _TrainingState:
    """Where a training is: the best epoch so far, and how long ago it was."""

    best: dict[str, torch.Tensor] = field(default_factory=dict)
    best_value: float | None = None
    best_epoch: int = 0
    since_best: int = 0
    last: dict[str, float] = field(default_factory=dict)


def train(
    backbone: Path, prepared: Path, features: Path, metrics: Path, log: Path, params: ClassifierParams
) -> Trained:
    """Train, and return the tensors of the best and the last epoch; writes the curves and the log.

    The same seed gives the same bytes on the same machine: the head, the order of the rows and dropout depend on it.
    Raises InputError if the loss is not a number, if a frozen tensor moved, or if the features are of another backbone.
    """
    torch.manual_seed(params.seed)
    labels, architecture = read_labels(prepared), Architecture.of(params)
    model = build_classifier(backbone, architecture, len(labels.names))
    before = hash_backbone(model.backbone)
    if params.training.tuning == "head":
        check_frozen(kept_features.read_digests(features), before.frozen)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = _read_splits(prepared, features, labels, backbone, params)
    run = _Run(model.to(device), splits["train"], splits["validation"], labels, params, device, _find_padding(backbone))
    with Curves(metrics) as curves, _TrainLog(log) as written:
        progress = run.train(curves, written)
    proof = make_proof(before, hash_backbone(model.backbone.to("cpu")))
    summary = {
        "best_val_score": progress.best_value,
        "best_epoch": progress.best_epoch,
        "epochs": run.epochs_done,
        "steps": run.step,
        "metric": params.training.metric_for_best_model,
        "trained_weights": sum(tensor.numel() for tensor in model.trained_tensors().values()),
        "backbone_weights": sum(tensor.numel() for tensor in model.backbone.parameters()),
        "last": progress.last,
    }
    return Trained(progress.best, _copy(model), architecture, labels, proof, summary)


def _find_padding(backbone: Path) -> int:
    return int(load_tokenizer(backbone).pad_token_id)


def _read_splits(
    prepared: Path, features: Path, labels: Labels, backbone: Path, params: ClassifierParams
) -> dict[str, Split]:
    splits = {}
    for name in ("train", "validation"):
        texts, names = read_split(prepared, name)
        numbers = labels.encode(names)
        # A text of none of the classes trains none of them; the threshold is what it is for.
        kept = [row for row in range(len(texts)) if labels.multi_label or numbers[row]]
        if len(kept) < len(texts):
            logger.info(
                "%s: %d of %d texts are of none of the classes, and left out", name, len(texts) - len(kept), len(texts)
            )
        if not kept:
            raise InputError(f"the split {name} has no text of any class; add some", code="empty-split")
        targets = losses.make_targets([numbers[row] for row in kept], len(labels.names), multi_label=labels.multi_label)
        if params.training.tuning == "head":
            splits[name] = Split(targets, kept_features.load_features(features, name)[kept], None)
        else:
            tokens = tokenize(load_tokenizer(backbone), [texts[row] for row in kept], params.data.max_length)
            splits[name] = Split(targets, None, tokens)
    return splits


class _Run:
    """One training: the loop over epochs and steps."""

    def __init__(
        self,
        model: Classifier,
        train: Split,
        validation: Split,
        labels: Labels,
        params: ClassifierParams,
        device: torch.device,
        padding: int,
    ) -> None:
        self.model, self.train_split, self.validation = model, train, validation
        self.labels, self.params, self.device, self.padding = labels, params, device, padding
        self.settings = params.training
        self.weights = losses.compute_class_weights(train.targets, len(labels.names), self.settings.class_weights)
        self.order = torch.Generator().manual_seed(params.seed)
        passes = math.ceil(len(train) / self.settings.batch_size)
        self.steps_per_epoch = math.ceil(passes / self.settings.gradient_accumulation_steps)
        self.total_steps = self.steps_per_epoch * self.settings.epochs
        self.optimizer, self.schedule = self._make_optimizer()
        self.step, self.epochs_done = 0, 0
        precision = resolve_precision(self.settings.mixed_precision)
        self.autocast = torch.autocast(
            device.type, DTYPES[precision], enabled=precision != "fp32" and self.settings.tuning != "head"
        )

    def _make_optimizer(self) -> tuple[Any, Any]:
        from transformers import get_scheduler

        groups = []
        for tensors, rate in (
            (self.model.head_parameters(), self.settings.learning_rate),
            (self.model.backbone_parameters(), self.settings.encoder_learning_rate),
        ):
            for matrices in (True, False):
                chosen = [tensor for tensor in tensors if (tensor.dim() > 1) == matrices]
                if chosen:
                    decay = self.settings.weight_decay if matrices else 0.0
                    groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
        optimizer = torch.optim.AdamW(groups, fused=True)
        warmup = int(self.settings.warmup_ratio * self.total_steps)
        return optimizer, get_scheduler(
            "linear", optimizer, num_warmup_steps=warmup, num_training_steps=self.total_steps
        )

    def train(self, curves: Curves, log: "_TrainLog") -> _TrainingState:
        """Run the epochs until the last, or until validation has not improved for too long."""
        progress = _TrainingState()
        with Progress("training", self.total_steps, unit="step", log_ends=True) as bar:
            for epoch in range(1, self.settings.epochs + 1):
                self.model.train()
                since, summed, count = self.step, 0.0, 0
                for batches in self._group_batches():
                    loss = self._make_step(batches)
                    self.step += 1
                    bar.add()
                    summed, count = summed + loss, count + 1
                    if self.step % self.settings.log_every_steps == 0 or self.step - since == self.steps_per_epoch:
                        self._log_step(curves, log, epoch, summed / count)
                        summed, count = 0.0, 0
                self.epochs_done = epoch
                scores = self.validate()
                self._log_epoch(curves, log, epoch, scores)
                self._keep_best(progress, epoch, scores)
                patience = self.settings.early_stopping_patience
                if patience is not None and progress.since_best >= patience:
                    logger.info("validation has not improved for %d epochs: stopped after epoch %d", patience, epoch)
                    break
        return progress

    def _make_step(self, batches: Sequence[list[int]]) -> float:
        targets = [self.train_split.targets[numbers] for numbers in batches]
        whole = sum(losses.sum_weights(target, self.weights) for target in targets)
        weights = None if self.weights is None else self.weights.to(self.device)
        summed = 0.0
        for numbers, target in zip(batches, targets, strict=True):
            with self.autocast:
                logits = self._compute_logits(self.train_split, numbers)
            loss = losses.sum_loss(logits, target.to(self.device), weights, self.settings.label_smoothing) / whole
            loss.backward()
            summed += loss.item()
        if not math.isfinite(summed):
            raise InputError(
                f"the loss is {summed} at step {self.step + 1}, not a number; lower training.learning_rate or "
                "training.encoder_learning_rate",
                code="loss-not-finite",
            )
        torch.nn.utils.clip_grad_norm_(
            [tensor for group in self.optimizer.param_groups for tensor in group["params"]], self.settings.max_grad_norm
        )
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return summed

    def _compute_logits(self, split: Split, numbers: list[int]) -> torch.Tensor:
        if split.features is not None:
            logits: torch.Tensor = self.model.head(split.features[numbers].to(self.device))
            return logits
        assert split.tokens is not None
        batch = make_batch([split.tokens.ids[number] for number in numbers], self.padding, self.device)
        made: torch.Tensor = self.model(**batch)
        return made

    def _group_batches(self) -> Iterator[list[list[int]]]:
        """Yield the batches of each step of an epoch, in a new order."""
        size, accumulated = self.settings.batch_size, self.settings.gradient_accumulation_steps
        order = torch.randperm(len(self.train_split), generator=self.order).tolist()
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        if self.train_split.tokens is not None:
            batches = self._sort_by_length(order)
        for start in range(0, len(batches), accumulated):
            yield batches[start : start + accumulated]

    def _sort_by_length(self, order: list[int]) -> list[list[int]]:
        """Return batches of rows of nearly equal length: less padding; which come first is random."""
        assert self.train_split.tokens is not None
        ids, size = self.train_split.tokens.ids, self.settings.batch_size
        batches = []
        for start in range(0, len(order), size * SORTED_BATCHES):
            rows = sorted(order[start : start + size * SORTED_BATCHES], key=lambda row: (len(ids[row]), row))
            batches += [rows[first : first + size] for first in range(0, len(rows), size)]
        return [batches[number] for number in torch.randperm(len(batches), generator=self.order).tolist()]

    def validate(self) -> dict[str, float]:
        """Return loss, accuracy and macro-F1 on the validation split."""
        self.model.eval()
        split = self.validation
        with torch.inference_mode(), self.autocast:
            if split.features is not None:
                logits = self.model.head(split.features.to(self.device)).float().cpu()
            else:
                assert split.tokens is not None
                logits = kept_features.run_batches(
                    lambda batch: self.model(**batch),
                    split.tokens,
                    padding=self.padding,
                    batch_size=self.params.features.batch_size,
                    task="validating",
                    device=self.device,
                )
        return score_validation(logits, split.targets)

    def _keep_best(self, progress: _TrainingState, epoch: int, scores: dict[str, float]) -> None:
        value = scores[self.settings.metric_for_best_model]
        progress.last = scores
        lower = self.settings.metric_for_best_model == "loss"
        before = progress.best_value
        if before is None or (value < before if lower else value > before):
            progress.best, progress.best_value, progress.best_epoch = _copy(self.model), value, epoch
            progress.since_best = 0
        else:
            progress.since_best += 1

    def _log_step(self, curves: Curves, log: "_TrainLog", epoch: int, loss: float) -> None:
        rate = self.schedule.get_last_lr()[0]
        log.write(step=self.step, of=self.total_steps, epoch=epoch, loss=loss, rate=rate)
        curves.live.step = self.step
        curves.live.log_metric("train/loss", loss)
        curves.live.log_metric("train/learning_rate", rate)

    def _log_epoch(self, curves: Curves, log: "_TrainLog", epoch: int, scores: dict[str, float]) -> None:
        log.write(step=self.step, of=self.total_steps, epoch=epoch, **{f"val_{name}": v for name, v in scores.items()})
        curves.live.step = self.step
        for name, value in scores.items():
            curves.live.log_metric(f"eval/{name}", value)
        curves.live.make_summary()


class _TrainLog:
    """train.log: a line of JSON for each point, with the peak of memory so far; complete or not at all."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines: list[str] = []

    def __enter__(self) -> "_TrainLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        from lathe.common import paths

        if kind is None:
            with paths.replace_file(self.file) as partial:
                partial.write_text("".join(f"{line}\n" for line in self.lines), encoding="utf-8")

    def write(self, **values: float) -> None:
        shown = {name: value if isinstance(value, int) else float(f"{value:.5g}") for name, value in values.items()}
        line = json.dumps({**shown, "peak_memory_bytes": get_peak_memory_bytes()})
        self.lines.append(line)
        logger.debug("%s", line)


def _copy(model: Classifier) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.trained_tensors().items()}
