"""Artifacts: their names, their GGUF files, and the removal of files of types that are no longer listed."""

from collections.abc import Sequence
from pathlib import Path

from lathe.common.paths import remove_unless

BASE, FEW_SHOT, MERGED = "base", "base_few_shot", "merged"
UNQUANTIZED = (BASE, FEW_SHOT, MERGED)


def list_artifacts(types: Sequence[str]) -> list[str]:
    """Return all artifacts in the order of the reports: two baselines, the merged model, the quantized files."""
    return [*UNQUANTIZED, *types]


def list_benchmarked(types: Sequence[str]) -> list[str]:
    """Return the artifacts that tasks of benchmark.tasks are put to; such a task brings examples of its own."""
    return [BASE, MERGED, *types]


def get_file_name(artifact: str) -> str:
    """Return the name of the artifact's GGUF file; `base_few_shot` is measured with the file of `base`."""
    return f"{BASE if artifact == FEW_SHOT else artifact}{'-f16' if artifact in UNQUANTIZED else ''}.gguf"


def remove_unlisted_types(folder: Path, types: Sequence[str]) -> None:
    """Remove the files and subfolders that are named for a quantization type which is not in `types`.

    DVC keeps the files of a type that was taken off the list, and a stage that depends on the folder would depend on
    them too. Types are recognised by their upper case; baselines, adapters and model cards are not.
    """

    def is_kept(path: Path) -> bool:
        return not (path.stem.isupper() and path.suffix in {"", ".gguf", ".json"}) or path.stem in types

    remove_unless(folder, is_kept)
