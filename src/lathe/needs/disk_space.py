"""Disk space: what the outputs of a run take where the checkout is and where DVC's cache is, and what is free there."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lathe.common.dvc_api import find_link_types, read_config
from lathe.common.errors import InputError
from lathe.common.text import readable_bytes
from lathe.config.params import Params

CHECKPOINTS = ".scratch/train"  # there during the training alone
OF_BASE = ("models/base", "models/gguf/base-f16.gguf", "models/gguf/mmproj")  # not made anew by a training
AFTER_TRAINING = ("models/merged", "models/gguf/", "models/exported/")
# The size of a format, as a share of that of the merged weights: embeddings often stay as they are.
SHARES = {"onnx": 2.0, "onnx_int4": 1.0, "mlx": 1.0, "mlx_4bit": 0.3, "fp8": 0.7, "awq": 0.6}


def check_disk_space(params: Params, root: Path) -> None:
    """Raise InputError where the outputs of a run that are not there yet would not fit; the base is in models/base."""
    for text in _find_shortages(params, root, made_anew=()):
        raise InputError(text, code="disk-too-small")


def find_shortages(params: Params, root: Path) -> list[str]:
    """Return where the outputs of a training and of what follows it may not fit, and what to do about it."""
    return list(_find_shortages(params, root, made_anew=(CHECKPOINTS, "models/adapter", *AFTER_TRAINING)))


def _find_shortages(params: Params, root: Path, *, made_anew: tuple[str, ...]) -> Iterator[str]:
    """Yield one line for each file system that is too small.

    Outputs of an earlier run may be kept as they are, and then need nothing, unless they are `made_anew`. Nothing is
    said where the sizes cannot be estimated: the stage that they depend on says why.
    """
    from lathe.needs.estimate import estimate_disk

    try:
        estimated = estimate_disk(root / "models/base", params)
    except InputError:
        return
    merged = estimated["models/merged"] or 0
    estimated |= {f"models/exported/{name}": round(SHARES[name] * merged) for name in params.export.formats}
    outputs = {
        path: size
        for path, size in estimated.items()
        if size and (not (root / path).exists() or (path.startswith(made_anew) and path not in OF_BASE))
    }
    # The checkpoints are gone before the first file is made that is not there during the training.
    after = sum(size for path, size in outputs.items() if path.startswith(AFTER_TRAINING) and path not in OF_BASE)
    checkpoints = outputs.pop(CHECKPOINTS, 0)
    if checkpoints > after:
        outputs = {path: size for path, size in outputs.items() if not path.startswith(AFTER_TRAINING)}
        outputs[CHECKPOINTS] = checkpoints
    for folder, needed in compute_needs(root, outputs).items():
        free = shutil.disk_usage(folder).free
        if needed > free:
            sizes = {path.removeprefix("models/"): readable_bytes(size) for path, size in outputs.items()}
            shown = ", ".join(f"{path} {size}" for path, size in sizes.items())
            yield (
                f"{folder}: {readable_bytes(free)} free; the outputs take about {readable_bytes(needed)} ({shown}); "
                "free some space, `dvc gc --workspace` for one, or name fewer quantize.types or export.formats"
            )


def compute_needs(root: Path, outputs: Mapping[str, int]) -> dict[Path, int]:
    """Return the bytes that outputs, by their paths, take in the checkout, and in DVC's cache if that is elsewhere.

    Links to the cache take no space of their own; where only copies work, an output takes it in both places.
    """
    outs = {path: size for path, size in outputs.items() if not path.startswith(".scratch")}  # which is never cached
    everything, checkpoints = sum(outs.values()), sum(outputs.values()) - sum(outs.values())
    cache = find_existing(find_cache(root, read_config(root)))
    copied = not {"hardlink", "symlink", "reflink"} & set(find_working_links(root, cache))
    if cache.stat().st_dev == root.stat().st_dev:
        return {root: everything * (2 if copied else 1) + checkpoints}
    # An output is written in the checkout and then moved to the cache.
    return {root: (everything if copied else max(outs.values(), default=0)) + checkpoints, cache: everything}


def find_cache(root: Path, config: Any) -> Path:
    """Return the folder of DVC's cache, which need not be there yet."""
    return Path(config["cache"].get("dir") or root / ".dvc/cache")


def find_existing(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that is there."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def find_working_links(root: Path, cache: Path) -> list[str]:
    """Return which links work from the cache into the checkout."""
    return find_link_types(find_existing(cache), root / "x")
