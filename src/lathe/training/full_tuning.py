"""Full tuning: all weights of a trained model, saved with the names, types and files of its base."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lathe.common.errors import InputError
from lathe.models.file_names import convert_to_file_names
from lathe.models.model_folder import INDEX_FILE, TUNING_FILE, Weights, open_model
from lathe.models.precision import FLOATS


def map_to_base_names(
    model: Any, base: Weights, state: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Return the tensors of `model` by their names in the folder that it was loaded from.

    A weight that the base stores twice, as tied embeddings sometimes are, is returned twice too. `state` are the
    trained tensors by their names in the model, if they were gathered from several processes. Tensors that transformers
    has renamed, split or stacked are converted back. Raises InputError where the base lacks a tensor of the model: it
    would be trained and lost.
    """
    state = dict(model.state_dict() if state is None else state)
    for first, second in model.all_tied_weights_keys.items():  # a gathered state has each weight once
        for missing, present in ((first, second), (second, first)):
            if present in state:
                state.setdefault(missing, state[present])
    converted = convert_to_file_names(model, state, base.tensors)
    in_base = {name: tensor for name, tensor in converted.items() if name in base.tensors}
    storages = {tensor.data_ptr() for tensor in in_base.values()}
    for name, tensor in converted.items():
        if tensor.data_ptr() not in storages:
            raise InputError(
                f"{base.folder}: no tensor {name}, which {type(model).__name__} has, so that it began with random "
                "weights; choose a base that has them all, or set training.tuning to lora",
                code="base-tensor-missing",
            )
    return {name: tensor for name, tensor in in_base.items() if base.tensors[name].dtype in FLOATS}


def save_full_model(model: Any, base: Path, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Fill the empty folder `folder` with the weights of `model`, which was loaded from the folder `base`.

    Names, shapes, types and shards are those of the base. `tuning.json` beside them marks the folder as full tuning,
    and lists the tensors of the base that the model does not have.
    """
    weights = open_model(base)
    trained = map_to_base_names(model, weights, state)
    for path in sorted({weights.tensors[name].path for name in trained}):
        # A copy for each name: safetensors does not save two that share memory.
        shard = {
            name: tensor.detach().to("cpu", FLOATS[weights.tensors[name].dtype], copy=True).contiguous()
            for name, tensor in trained.items()
            if weights.tensors[name].path == path
        }
        save_file(shard, folder / path.name, metadata={"format": "pt"})
    left = sorted(weights.tensors.keys() - trained.keys())
    if (base / INDEX_FILE).is_file():
        index = json.loads((base / INDEX_FILE).read_text(encoding="utf-8"))
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name in trained}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    note = {"base_model_name_or_path": "models/base", "left": left, "tuning": "full"}
    (folder / TUNING_FILE).write_text(json.dumps(note, indent=2, sort_keys=True) + "\n", encoding="utf-8")
