"""Size of an exported model, compared with the number of weights of the merged one."""

import math
from pathlib import Path

from lathe.models.model_folder import open_model

# Files that hold weights, by the ends of their names.
WEIGHT_SUFFIXES = (".safetensors", ".onnx", ".onnx.data")


def count_bits_per_weight(exported: Path, merged: Path) -> float:
    """Return the bits that the files of an exported model take for each weight of the merged one."""
    taken = sum(file.stat().st_size for file in exported.rglob("*") if file.name.endswith(WEIGHT_SUFFIXES))
    return round(8 * taken / count_weights(merged), 4)


def count_weights(folder: Path) -> int:
    """Return the number of weights in the safetensors files of a folder."""
    return sum(math.prod(stored.shape) for stored in open_model(folder).tensors.values())


def count_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
