"""Metric files in `metrics/`: scores and counts of a stage, and separately its timings."""

import csv
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.json_files import read_json, write_json
from lathe.common.operating_system import get_peak_memory_bytes

_log = logging.getLogger(__name__)

# Of a run on another machine: what that machine is, and what an hour of it costs, in whatever currency.
MACHINE, PRICE = "LATHE_MACHINE", "LATHE_PRICE_PER_HOUR"


def wrap_in_list(content: Any) -> list[Any]:
    """Return what a report's file holds: a list of one. DVC makes columns of every number that is not in a list.

    Only what a table of experiments is read for is left outside of lists (`metrics/evaluate/summary.json`).
    """
    return [content]


def unwrap_list(content: Any) -> Any:
    """Return the content of a report's file; those of earlier commits are no lists."""
    return content[0] if isinstance(content, list) else content


def write_csv(target: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a plot's rows, which all have the keys of the first, complete or not at all."""
    with paths.replace_file(target) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_timings(
    stage: str,
    item: str | None,
    *,
    seconds: float,
    throughput: dict[str, float],
    items: Sequence[str] = (),
    folder: Path | None = None,
) -> None:
    """Write what varies from run to run: timings are no output of a stage, so that they never make it look changed.

    A stage that runs once for each of `items` has one file with their sum, and a list with the figures of each.
    `folder` is that of the pipeline's metrics, by default the main one's.
    """
    content: dict[str, Any] = {"seconds": round(seconds, 2), "peak_memory_bytes": get_peak_memory_bytes(), **throughput}
    if (gpu_bytes := get_peak_gpu_memory_bytes()) is not None:
        content["peak_gpu_memory_bytes"] = gpu_bytes
    content |= _describe_machine(seconds)
    target = (folder or paths.METRICS) / "timings" / f"{stage}.json"
    timing = _add_to_items(target, {"item": item, **content}, items) if item else content
    write_json(target, wrap_in_list(timing))


def list_timing_stems() -> list[str]:
    """Return the names of the stages' scripts, which are those of the files in metrics/timings."""
    return sorted(file.stem for file in (paths.ROOT / "stages").glob("[a-z]*.py"))


def _add_to_items(target: Path, content: dict[str, Any], items: Sequence[str]) -> dict[str, Any]:
    by_item = {old["item"]: old for old in _read_items(target)} | {content["item"]: content}
    listed = [by_item[item] for item in items if item in by_item]
    total: dict[str, Any] = {
        "seconds": round(sum(entry["seconds"] for entry in listed), 2),
        "peak_memory_bytes": max(entry["peak_memory_bytes"] for entry in listed),
    }
    if all("cost" in entry for entry in listed):
        total["cost"] = round(sum(entry["cost"] for entry in listed), 6)
    return {**total, "items": listed}


def _read_items(target: Path) -> list[dict[str, Any]]:
    """Return the items that a file of timings has; none where it is damaged, such as by conflicts of a merge."""
    if not target.exists():
        return []
    try:
        items: list[dict[str, Any]] = unwrap_list(read_json(target))["items"]
        if all(entry.keys() >= {"item", "seconds", "peak_memory_bytes"} for entry in items):
            return items
    except (InputError, KeyError, TypeError, AttributeError, IndexError):
        pass  # what is wrong with it is said below
    _log.warning("%s: damaged; the times of other items are lost, and nothing else", target)
    return []


def _describe_machine(seconds: float) -> dict[str, Any]:
    """Return what the environment says of the machine of a run that was sent to it, and the cost of these seconds."""
    machine, price = os.environ.get(MACHINE), os.environ.get(PRICE)
    told: dict[str, Any] = {"machine": machine} if machine else {}
    return told | ({"cost": round(seconds * float(price) / 3600, 6)} if price else {})


def get_peak_gpu_memory_bytes() -> int | None:
    """Return the peak of torch's memory on the GPU so far; None where torch used none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated())
