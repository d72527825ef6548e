"""The weights of a model that was trained whole, written as its base is stored."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lathe.common.errors import InputError
from lathe.models.model_folder import INDEX_FILE, TUNING_FILE, Weights, open_model

# The types that full tuning loads as float32 and trains; a tensor of any other type is left alone.
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def by_base_names(model: Any, base: Weights, state: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of `model` by the names under which they lie in the folder that it was loaded from.

    A weight that the base stores twice, as tied embeddings sometimes are, is there twice too. `state` are the trained
    tensors by their names in the model, where they had to be gathered from several processes. transformers may have
    renamed, split or stacked what it loaded; that is turned back. Raises InputError where something of the model has no
    place in the base: it would be trained and lost.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = dict(model.state_dict() if state is None else state)
    for one, other in model.all_tied_weights_keys.items():  # what was gathered has each weight once
        for missing, there in ((one, other), (other, one)):
            if there in state:
                state.setdefault(missing, state[there])
    every = revert_weight_conversion(model, state)
    kept = {name: tensor for name, tensor in every.items() if name in base.tensors}
    storages = {tensor.data_ptr() for tensor in kept.values()}
    for name, tensor in every.items():
        if tensor.data_ptr() not in storages:
            raise InputError(
                f"{base.folder}: no tensor {name}, which {type(model).__name__} has, so that it began with random "
                "weights; choose a base that has them all, or set training.tuning to lora"
            )
    return {name: tensor for name, tensor in kept.items() if base.tensors[name].dtype in FLOATS}


def save_whole(model: Any, base: Path, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Fill the empty folder `folder` with the weights of `model`, which was loaded from the folder `base`.

    Names, shapes, types and division into files are those of the base. A note beside them, `tuning.json`, says that
    this is full tuning, and which of the base's tensors the model does not have.
    """
    weights = open_model(base)
    trained = by_base_names(model, weights, state)
    for path in sorted({weights.tensors[name].path for name in trained}):
        # A copy for each name: safetensors refuses two that share their memory.
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
