"""What is measured, by name, and the file behind each name; what is forgotten of a name that is no longer listed."""

import shutil
from collections.abc import Sequence
from pathlib import Path

BASE, FEW_SHOT, MERGED = "base", "base_few_shot", "merged"
UNQUANTIZED = (BASE, FEW_SHOT, MERGED)


def names(types: Sequence[str]) -> list[str]:
    """Return every artifact in the order of the reports: two baselines, the merged model, the quantized files."""
    return [*UNQUANTIZED, *types]


def file_name(artifact: str) -> str:
    """Return the name of the GGUF that is measured: the base's own where it is shown examples."""
    return f"{BASE if artifact == FEW_SHOT else artifact}{'-f16' if artifact in UNQUANTIZED else ''}.gguf"


def forget_other_types(folder: Path, types: Sequence[str]) -> None:
    """Remove what lies in a folder under the name of a quantization type that is not listed.

    DVC leaves the files of a type that was taken off the list, and a stage that depends on the whole folder would
    depend on them too. Types are written in capitals; a baseline, an adapter or a model card beside them is not.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.stem.isupper() and path.suffix in {"", ".gguf", ".json"} and path.stem not in types:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
