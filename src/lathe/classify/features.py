"""Features: what the frozen backbone makes of every text, computed once and kept for each experiment on the head."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from lathe.classify.backbone import TokenizedTexts, batch_by_length, make_batch
from lathe.common import json_files
from lathe.common.progress import Progress

if TYPE_CHECKING:
    from lathe.classify.model import Classifier

DIGESTS = "backbone.json"  # SHA-256 of every tensor of the backbone that the features were computed with


def run_batches(
    function: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    tokens: TokenizedTexts,
    *,
    padding: int,
    batch_size: int,
    task: str,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return what a function of a batch makes of every text, in their order; without gradients."""
    results: list[torch.Tensor] = [torch.empty(0)] * len(tokens.ids)
    with torch.inference_mode(), Progress(task, len(tokens.ids), unit="text") as progress:
        for numbers in batch_by_length(tokens.ids, batch_size):
            made = function(make_batch([tokens.ids[number] for number in numbers], padding, device)).float().cpu()
            for number, row in zip(numbers, made, strict=True):
                results[number] = row
            progress.add(len(numbers))
    return torch.stack(results)


def compute_features(
    classifier: "Classifier", tokens: TokenizedTexts, *, padding: int, batch_size: int, task: str
) -> torch.Tensor:
    """Return the features of every text, (texts, width) in 32 bits."""
    device = next(classifier.backbone.parameters()).device
    return run_batches(
        classifier.read_features, tokens, padding=padding, batch_size=batch_size, task=task, device=device
    )


def save_features(folder: Path, split: str, features: torch.Tensor) -> None:
    """Write the features of a split."""
    save_file({"features": features.contiguous()}, folder / f"{split}.safetensors")


def load_features(folder: Path, split: str) -> torch.Tensor:
    """Read the features of a split."""
    return load_file(folder / f"{split}.safetensors")["features"]


def write_digests(folder: Path, digests: dict[str, str]) -> None:
    """Write the digests of the backbone's tensors beside the features."""
    json_files.write_json(folder / DIGESTS, digests)


def read_digests(folder: Path) -> dict[str, str]:
    """Read what `write_digests` wrote."""
    content: dict[str, str] = json_files.read_json_object(folder / DIGESTS)
    return content


def describe_lengths(tokens: TokenizedTexts) -> dict[str, Any]:
    """Return how long the texts of a split are, in tokens, after cutting."""
    lengths = sorted(map(len, tokens.ids))

    def quantile(values: Sequence[int], share: float) -> int:
        return values[min(len(values) - 1, int(share * len(values)))]

    return {
        "texts": len(lengths),
        "cut": tokens.cut,
        "median": quantile(lengths, 0.5),
        "p95": quantile(lengths, 0.95),
        "longest": lengths[-1],
    }
