"""Classifier: the backbone, what is read of it, and the head; saved as the tensors that were trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from lathe.classify.backbone import Batch, load_backbone, pool
from lathe.classify.labels import Labels, read_labels
from lathe.common import json_files
from lathe.common.errors import InputError

if TYPE_CHECKING:
    from lathe.config.classifier_params import ClassifierParams

WEIGHTS, SETTINGS, HEAD = "model.safetensors", "classifier.json", "head.safetensors"


@dataclass(frozen=True)
class Architecture:
    """What a classifier is made of, besides its weights, as classifier.json keeps it."""

    backbone: str
    tuning: str
    pooling: str
    normalize: bool
    hidden_dim: int | None
    dropout: float
    max_length: int
    lora: dict[str, Any] | None

    @classmethod
    def of(cls, params: "ClassifierParams") -> "Architecture":
        """Return the architecture that the parameters ask for."""
        return cls(
            backbone=params.model.backbone,
            tuning=params.training.tuning,
            pooling=params.model.pooling,
            normalize=params.model.normalize,
            hidden_dim=params.model.hidden_dim,
            dropout=params.model.dropout,
            max_length=params.data.max_length,
            lora=params.lora.model_dump() if params.training.tuning == "lora" else None,
        )


class Classifier(torch.nn.Module):
    """Token ids to logits; `head` alone takes features to logits."""

    def __init__(self, backbone: Any, head: torch.nn.Module, architecture: Architecture) -> None:
        super().__init__()
        self.backbone, self.head, self.architecture = backbone, head, architecture

    def read_features(self, batch: Batch) -> torch.Tensor:
        """Return what the head reads of each text."""
        hidden = self.backbone(**batch).last_hidden_state
        features = pool(hidden, batch["attention_mask"], self.architecture.pooling).float()
        return torch.nn.functional.normalize(features, dim=-1) if self.architecture.normalize else features

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the logits of each text."""
        logits: torch.Tensor = self.head(self.read_features({"input_ids": input_ids, "attention_mask": attention_mask}))
        return logits

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that training changes, by their names."""
        return {name: tensor for name, tensor in self.named_parameters() if tensor.requires_grad}

    def head_parameters(self) -> list[torch.nn.Parameter]:
        """Return the trained tensors of the head."""
        return list(self.head.parameters())

    def backbone_parameters(self) -> list[torch.nn.Parameter]:
        """Return the trained tensors of the backbone, or of the adapter in it."""
        return [tensor for tensor in self.backbone.parameters() if tensor.requires_grad]


def make_head(width: int, classes: int, architecture: Architecture) -> torch.nn.Sequential:
    """Return a new head, by the state of torch's random numbers."""
    if architecture.hidden_dim is None:
        return torch.nn.Sequential(torch.nn.Dropout(architecture.dropout), torch.nn.Linear(width, classes))
    return torch.nn.Sequential(
        torch.nn.Dropout(architecture.dropout),
        torch.nn.Linear(width, architecture.hidden_dim),
        torch.nn.GELU(),
        torch.nn.Dropout(architecture.dropout),
        torch.nn.Linear(architecture.hidden_dim, classes),
    )


def build_classifier(folder: Path, architecture: Architecture, classes: int) -> Classifier:
    """Return an untrained classifier on the backbone in `folder`, in which what is not to be trained is frozen."""
    backbone = load_backbone(folder)
    backbone.requires_grad_(architecture.tuning == "full")
    head = make_head(backbone.config.get_text_config().hidden_size, classes, architecture)
    if architecture.lora is not None:
        backbone = _add_adapter(backbone, architecture.lora)
    return Classifier(backbone, head, architecture)


def _add_adapter(backbone: Any, lora: dict[str, Any]) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, target_modules="all-linear", **lora)
    return get_peft_model(backbone, config)


def save_classifier(folder: Path, tensors: dict[str, torch.Tensor], architecture: Architecture, labels: Labels) -> None:
    """Write the trained tensors with what they belong to into a folder."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    save_file(kept, folder / WEIGHTS)
    json_files.write_json(folder / SETTINGS, vars(architecture))
    labels.write(folder)


def save_head(folder: Path, tensors: dict[str, torch.Tensor], architecture: Architecture, labels: Labels) -> None:
    """Write the head alone, under the names that its layers have."""
    head = {
        name.removeprefix("head."): tensor.detach().cpu().contiguous()
        for name, tensor in sorted(tensors.items())
        if name.startswith("head.")
    }
    save_file(head, folder / HEAD)
    json_files.write_json(folder / SETTINGS, vars(architecture))
    labels.write(folder)


def load_classifier_model(folder: Path, backbone: Path) -> tuple[Classifier, Labels]:
    """Load a trained classifier, ready to answer; an adapter is merged into the backbone.

    Raises InputError if a file is missing, or the tensors are not those of this backbone.
    """
    settings = json_files.read_json_object(folder / SETTINGS)
    architecture, labels = Architecture(**settings), read_labels(folder)
    classifier = build_classifier(backbone, architecture, len(labels.names))
    tensors = load_file(folder / WEIGHTS)
    wanted = classifier.trained_tensors()
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: t.shape for name, t in wanted.items()}:
        raise InputError(
            f"{folder / WEIGHTS}: its tensors are not those of a classifier on the backbone "
            f"{architecture.backbone!r} in {backbone}; run the stage train again",
            code="other-backbone",
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            wanted[name].copy_(tensor)
    if architecture.lora is not None:
        classifier.backbone = classifier.backbone.merge_and_unload()
    classifier.requires_grad_(False)
    return classifier.eval(), labels
