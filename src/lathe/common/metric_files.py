"""Metric files: CSV of plots, timings and peak memory of a stage in `metrics/`."""

import csv
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lathe.common import paths
from lathe.common.json_files import read_json, write_json


def write_csv(target: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows of a plot, all with the keys of the first, completely or not at all."""
    with paths.whole_file(target) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_timings(
    stage: str, item: str | None, *, seconds: float, speeds: dict[str, float], items: Sequence[str] = ()
) -> None:
    """Write what varies from run to run; it is not in `dvc.lock`, so that no stage looks changed by it.

    A stage that runs once for each of `items` has one file with the sum and a list of the items' own; DVC makes no
    columns of lists, so that `dvc exp show` has one number per stage.
    """
    content: dict[str, Any] = {"seconds": round(seconds, 2), "peak_memory_bytes": peak_memory_bytes(), **speeds}
    if (gpu_bytes := peak_gpu_memory_bytes()) is not None:
        content["peak_gpu_memory_bytes"] = gpu_bytes
    target = paths.METRICS / "timings" / f"{stage}.json"
    write_json(target, _merge_items(target, {"item": item, **content}, items) if item else content)


def _merge_items(target: Path, content: dict[str, Any], items: Sequence[str]) -> dict[str, Any]:
    before = read_json(target)["items"] if target.exists() else []
    by_item = {old["item"]: old for old in before} | {content["item"]: content}
    listed = [by_item[item] for item in items if item in by_item]
    return {
        "seconds": round(sum(timing["seconds"] for timing in listed), 2),
        "peak_memory_bytes": max(timing["peak_memory_bytes"] for timing in listed),
        "items": listed,
    }


def peak_memory_bytes() -> int:
    """Return the largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory_bytes() -> int | None:
    """Return the most memory torch held on the GPU so far; None where torch used none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated())
