"""Added tokens: the user's own, each one id in the base's tokenizer, with rows in its embeddings and its head."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lathe.common.errors import InputError
from lathe.models.empty_model import make_empty_model
from lathe.models.file_names import convert_to_file_names
from lathe.models.model_folder import Weights, open_model, read_json, write_json

ROWS_DIVISOR = 8  # llama.cpp's converter pads the vocabulary of some models to it


def add_tokens(folder: Path, tokens: Sequence[str], shown: str) -> list[int]:
    """Add `tokens` to the tokenizer of the model in `folder`, and rows for them where its embeddings have none.

    A new row is the mean of all rows, so that a token begins as an average one. Weights are read and written file by
    file; a file is replaced, never changed in place. Returns the ids. Raises InputError where a token is there already,
    and where the embeddings cannot grow.
    """
    from transformers import AddedToken, AutoTokenizer

    if not tokens:
        return []
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token in vocabulary:
            raise InputError(
                f"preprocess.added_tokens: {token!r} is token {vocabulary[token]} of {shown} already; take it from the "
                "list",
                code="token-known",
            )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    ids = [int(token) for token in tokenizer.convert_tokens_to_ids(list(tokens))]
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    _resize(folder, max(ids) + 1, shown)
    return ids


def _resize(folder: Path, rows: int, shown: str) -> None:
    """Give embeddings and head at least this many rows."""
    model, _ = make_empty_model(folder)
    embeddings = model.get_input_embeddings()
    count = embeddings.num_embeddings
    if rows <= count:
        return
    rows = -(-rows // ROWS_DIVISOR) * ROWS_DIVISOR
    weights = open_model(folder)
    names = [name for name in _name_rows(model, weights) if name in weights.tensors]
    others = [name for name, stored in weights.tensors.items() if stored.shape[:1] == (count,) and name not in names]
    if others:
        raise InputError(
            f"preprocess.added_tokens: {shown} has rows for its {count} tokens in {others[0]} too, which cannot grow "
            "with its embeddings; choose another base, or no added tokens",
            code="vocabulary-fixed",
        )
    for file in sorted({weights.tensors[name].path for name in names}):
        _grow_rows(file, weights, names, rows)
    config = read_json(folder / "config.json")
    _set_vocabulary(config, rows)
    (folder / "config.json").unlink()
    write_json(folder / "config.json", config)


def _name_rows(model: Any, weights: Weights) -> list[str]:
    """Return the names of embeddings and head in the model's files."""
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    parameters = {
        f"{name}.{kind}": weight
        for name, module in model.named_modules(remove_duplicate=False)
        for kind, weight in module.named_parameters(recurse=False)
        if any(module is end for end in ends)
    }
    return list(convert_to_file_names(model, parameters, weights.tensors))


def _grow_rows(file: Path, weights: Weights, names: Sequence[str], rows: int) -> None:
    tensors = {}
    for name, stored in weights.tensors.items():
        if stored.path != file:
            continue
        tensor = weights.read(name)
        if name in names:
            mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(rows - len(tensor), *tensor.shape[1:])])
        tensors[name] = tensor.contiguous()
    partial = file.with_name(f".{file.name}.partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    file.unlink()
    partial.rename(file)


def _set_vocabulary(config: dict[str, Any], rows: int) -> None:
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and "vocab_size" in part:
            part["vocab_size"] = rows
