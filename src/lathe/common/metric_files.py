"""What a stage leaves in `metrics/`: its scores and counts, and apart from them its timings."""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lathe.common import paths
from lathe.common.json_files import read_json, write_json
from lathe.common.operating_system import get_peak_memory_bytes


def write_csv(target: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a plot's rows, which all have the keys of the first, whole or not at all."""
    with paths.whole_file(target) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_timings(
    stage: str, item: str | None, *, seconds: float, speeds: dict[str, float], items: Sequence[str] = ()
) -> None:
    """Record what varies from run to run, outside of `dvc.lock`: it never makes a stage look changed.

    A stage that runs once for each of `items` has one file with their sum and, in a list, each item's own; DVC makes no
    columns of lists, so that `dvc exp show` has one figure per stage.
    """
    content: dict[str, Any] = {"seconds": round(seconds, 2), "peak_memory_bytes": get_peak_memory_bytes(), **speeds}
    if (gpu_bytes := get_peak_gpu_memory_bytes()) is not None:
        content["peak_gpu_memory_bytes"] = gpu_bytes
    target = paths.METRICS / "timings" / f"{stage}.json"
    write_json(target, _with_others(target, {"item": item, **content}, items) if item else content)


def _with_others(target: Path, content: dict[str, Any], items: Sequence[str]) -> dict[str, Any]:
    before = read_json(target)["items"] if target.exists() else []
    by_item = {old["item"]: old for old in before} | {content["item"]: content}
    listed = [by_item[item] for item in items if item in by_item]
    return {
        "seconds": round(sum(each["seconds"] for each in listed), 2),
        "peak_memory_bytes": max(each["peak_memory_bytes"] for each in listed),
        "items": listed,
    }


def get_peak_gpu_memory_bytes() -> int | None:
    """Return the most memory torch held on the GPU so far; None where torch used none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated())
