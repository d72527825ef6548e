"""What is measured, by name, and what is forgotten of a name that is no longer listed."""

import shutil
from collections.abc import Sequence
from pathlib import Path


def names(quantization_types: Sequence[str]) -> list[str]:
    """Return every artifact in the order of the reports: two baselines, the merged model, the quantized files."""
    return ["base", "base_few_shot", "merged", *quantization_types]


def forget_others(folder: Path, artifacts: Sequence[str]) -> None:
    """Remove the folders of a type that was taken off the list: DVC leaves them, and a stage that depends on the whole
    folder would depend on them too.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in artifacts:
            shutil.rmtree(path)
