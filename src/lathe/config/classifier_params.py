"""Parameters of the classifier: type, range, unit and meaning of every key of `classify/params.yaml`.

There are no defaults in the code. `lathe.config.classifier_config` reads the file.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lathe.config.base import Fraction, Name, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, entry

HalfOpen = Annotated[float, Field(ge=0, lt=1)]
Split = Annotated[float, Field(gt=0, lt=0.5)]


class Model(Section):
    """The backbone, and the head on top of it."""

    backbone: Name = entry("encoder or causal language model: a name under `models` in presets.yaml")
    pooling: Literal["mean", "last", "cls"] = entry(
        "what the head reads of a text: the mean of its tokens, its last token (causal models), or its first (BERT)"
    )
    normalize: bool = entry("scale what the head reads to length 1, as sentence encoders do")
    hidden_dim: Positive | None = entry("width of a hidden layer of the head; null: one linear layer", "units")
    dropout: HalfOpen = entry("dropout in the head, before each of its layers")


class Data(Section):
    """Texts and labels: how they are read, cut, and split."""

    max_length: Annotated[int, Field(ge=4)] = entry("longest text; the rest is cut off", "tokens")
    multi_label: bool = entry("a text may have several labels, or none: the label column holds a list")
    label_separator: Name | None = entry("what separates several labels in a column of text; null: it holds a list")
    label_fields: Annotated[list[Name], Field(min_length=1)] | None = entry(
        "fields that make the label, if the label column holds a JSON object; null: it holds the label itself"
    )
    none_label: Name | None = entry(
        "label of texts that are none of the classes, for the threshold; null: there are none"
    )
    validation_fraction: Split = entry("share of the training rows that becomes validation if the source has none")
    test_fraction: Split = entry("share of the training rows that becomes test if the source has none")
    max_dropped_fraction: Fraction = entry("share of unusable rows above which the stage fails")

    @model_validator(mode="after")
    def _check_labels(self) -> "Data":
        if self.label_separator and not self.multi_label:
            raise ValueError("label_separator goes with multi_label: true; set that, or label_separator to null")
        if self.label_fields and self.multi_label:
            raise ValueError("label_fields makes one label of several fields; set multi_label to false, or it to null")
        return self


class Features(Section):
    """What the frozen backbone makes of the texts: computed once, and kept for every experiment on the head."""

    batch_size: Positive = entry("texts in one forward pass without gradients", "texts")


class ClassifierTraining(Section):
    """Training of the head, alone or with the backbone; a step is an optimizer step."""

    tuning: Literal["head", "lora", "full"] = entry(
        "what is trained: the head alone, an adapter in the backbone too, or all weights of the backbone too"
    )
    freeze_backbone: bool = entry("must be true where tuning is head, and false else: said twice, so that it is meant")
    learning_rate: PositiveFloat = entry("peak learning rate of the head")
    encoder_learning_rate: PositiveFloat = entry("peak learning rate of the backbone, or of the adapter in it")
    epochs: Positive = entry("passes over the training split at most", "epochs")
    batch_size: Positive = entry("rows in one forward pass", "rows")
    gradient_accumulation_steps: Positive = entry("forward passes whose gradients make one step", "passes")
    warmup_ratio: HalfOpen = entry("share of all steps in which the learning rate rises from 0; then it falls to 0")
    weight_decay: NonNegativeFloat = entry("decoupled weight decay of the trained matrices")
    max_grad_norm: PositiveFloat = entry("gradients are clipped to this norm")
    mixed_precision: Literal["auto", "bf16", "fp32"] = entry(
        "arithmetic of the backbone in training; auto: bf16 if the device (a CPU too) has it, else fp32"
    )
    class_weights: Literal["none", "balanced"] = entry(
        "weight of a row in the loss; balanced: rare labels count as much as frequent ones"
    )
    label_smoothing: HalfOpen = entry("share of the target that is spread over all labels")
    metric_for_best_model: Literal["accuracy", "macro_f1", "loss"] = entry(
        "validation score that chooses the epoch of best_model, and stops early"
    )
    early_stopping_patience: Positive | None = entry("epochs without improvement to stop after; null: never", "epochs")
    log_every_steps: Positive = entry("steps between two lines of train.log and points of the curve", "steps")

    @model_validator(mode="after")
    def _check_freezing(self) -> "ClassifierTraining":
        if self.freeze_backbone != (self.tuning == "head"):
            wanted = "true" if self.tuning == "head" else "false"
            raise ValueError(
                f"freeze_backbone is {str(self.freeze_backbone).lower()}, but tuning is {self.tuning!r}; set "
                f"freeze_backbone to {wanted}, or change tuning (head: frozen; lora, full: not)"
            )
        return self


class ClassifierLora(Section):
    """The adapter in the backbone (training.tuning: lora), in all of its linear layers."""

    r: Positive = entry("rank of the update")
    lora_alpha: Positive = entry("the update is scaled by lora_alpha / r")
    lora_dropout: HalfOpen = entry("dropout before the update, in training")


class Baselines(Section):
    """Simple classifiers that every report shows beside the trained one."""

    tfidf_c: PositiveFloat = entry("inverse strength of regularisation of the logistic regression on TF-IDF")
    features_c: PositiveFloat = entry("the same of the one on the frozen backbone's features")


class ClassifierEvaluate(Section):
    """Evaluation: scores with intervals, calibration, and the threshold for none of the classes."""

    bootstrap_samples: Positive = entry("resamples of the rows for 95 % intervals", "resamples")
    calibration_bins: Annotated[int, Field(ge=2)] = entry(
        "bins of the reliability diagram and of the calibration error"
    )


class Export(Section):
    """The ONNX file: backbone and head in one."""

    opset: Annotated[int, Field(ge=18)] = entry("version of ONNX's operators")
    max_difference: PositiveFloat = entry(
        "largest difference of a probability between ONNX Runtime and torch, above which the stage fails"
    )


class ClassifierParams(Section):
    """All of classify/params.yaml."""

    seed: NonNegative = entry("seed of everything random: splits, head, order, dropout")
    dataset: Name = entry("texts and labels: a name under `datasets` in presets.yaml")
    model: Model
    data: Data
    features: Features
    training: ClassifierTraining
    lora: ClassifierLora
    baselines: Baselines
    evaluate: ClassifierEvaluate
    export: Export

    @model_validator(mode="after")
    def _check_threshold(self) -> "ClassifierParams":
        if self.data.multi_label and self.data.none_label:
            raise ValueError(
                "data.none_label goes with one label a text: with multi_label a text without labels is none of them; "
                "set it to null"
            )
        return self
