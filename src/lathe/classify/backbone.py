"""Backbone: an encoder or a causal language model, its tokenizer, and one vector for a text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lathe.common.errors import InputError
from lathe.common.outside_files import check_sizes, translate_errors
from lathe.models import model_folder

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of texts, each cut to the longest that is allowed; `cut` of them were longer."""

    ids: list[list[int]]
    cut: int


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer that pads on the right; one without a token for that gets the end's."""
    from transformers import AutoTokenizer

    with translate_errors(folder.name, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"{folder}: the tokenizer has neither a padding token nor an end token; add pad_token to its "
            "tokenizer_config.json",
            code="no-padding-token",
        )
    return tokenizer


def load_backbone(folder: Path) -> Any:
    """Load the backbone in 32 bits, without a head of its own, which nothing here would read or train."""
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # of weights of a language model's head, which are left out here
    try:
        check_sizes(model_folder.read_json(folder / "config.json"), folder.name)
        with translate_errors(folder.name, "it"):
            backbone = AutoModel.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, local_files_only=True
            )
    finally:
        transformers_logging.set_verbosity(before)
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    if hasattr(backbone.config, "use_cache"):
        backbone.config.use_cache = False
    return backbone.eval()


def check_length(folder: Path, max_length: int) -> None:
    """Raise InputError where `data.max_length` is more than the backbone reads."""
    config = model_folder.read_json(folder / "config.json")
    longest = model_folder.get_text_value(config, "max_position_embeddings")
    if isinstance(longest, int) and max_length > longest:
        raise InputError(
            f"data.max_length is {max_length} tokens; the backbone reads at most {longest}; lower it",
            code="length-too-long",
        )


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> TokenizedTexts:
    """Return the token ids of texts, with what the model wants around them."""
    encoded = tokenizer(list(texts), add_special_tokens=True, truncation=True, max_length=max_length)["input_ids"]
    whole = tokenizer(list(texts), add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
    # A text without a token, for a tokenizer that adds none, is one padding token.
    ids = [list(row) or [tokenizer.pad_token_id] for row in encoded]
    return TokenizedTexts(ids, sum(len(row) > max_length for row in whole))


def make_batch(rows: Sequence[Sequence[int]], padding: int, device: torch.device | None = None) -> Batch:
    """Return the token ids of some texts as one batch, padded on the right to the longest of them."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), padding, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[number, : len(row)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def batch_by_length(ids: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Yield the numbers of texts in batches of nearly equal length, the longest first: little padding."""
    order = sorted(range(len(ids)), key=lambda number: (-len(ids[number]), number))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Return one vector for each text, (rows, tokens, width) -> (rows, width)."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        last = mask.sum(dim=1) - 1
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)
