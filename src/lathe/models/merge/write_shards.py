"""Shards of a merged model: safetensors written tensor by tensor, checked for overflow."""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lathe.common.errors import InputError
from lathe.models.merge.lora_delta import iterate_row_chunks, merge_rows, reshape_to_rows
from lathe.models.merge.plan import MergedTensor
from lathe.models.merge.read_adapter import list_adapter_tensors
from lathe.models.model_folder import INDEX_FILE, ITEMSIZES, SINGLE_FILE, Weights, write_json
from lathe.models.precision import FLOATS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeReport:
    """Counts and sizes of a merge.

    `largest_change` is the largest absolute difference between a merged and a base weight, both in the
    precision written; rows that only the merged model has (a larger vocabulary) are not counted.
    `bytes_written` is the size of the safetensors files.
    """

    tensors_total: int
    tensors_changed: int
    largest_change: float
    bytes_written: int


def divide_into_shards(
    targets: list[MergedTensor], base: Weights, max_shard_size_bytes: int
) -> list[list[MergedTensor]]:
    """Group the tensors into files: the base's shards, divided further where a file would be too large."""
    shards: list[list[MergedTensor]] = []
    size, path = 0, None
    for target in targets:
        # A head that the base does not have comes last, in the last file if there is room.
        base_path = base.tensors[target.name].path if target.name in base.tensors else path
        if not shards or base_path != path or size + target.bytes > max_shard_size_bytes:
            shards.append([])
            size = 0
        shards[-1].append(target)
        size, path = size + target.bytes, base_path
    return shards


def write_shards(shards: list[list[MergedTensor]], base: Weights, adapter: Weights, out: Path) -> MergeReport:
    """Merge and write the shards, tensor by tensor, and their index if there are several."""
    total, changed, largest, written = 0, 0, 0.0, 0
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # The order of safetensors' own writer: the widest type first, then by name.
        shard = sorted(shard, key=lambda target: (-list(ITEMSIZES).index(target.dtype), target.name))
        with (out / name).open("wb") as file:
            file.write(_build_header(shard))
            for target in shard:
                change, differs = _write_tensor(file, target, base, adapter)
                largest = max(largest, change)
                changed += differs
                weight_map[target.name] = name
            written += file.tell()
        total += len(shard)
        log.info("merged %s: %d tensors", name, len(shard))
    if len(shards) > 1:
        size = sum(target.bytes for shard in shards for target in shard)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(out / INDEX_FILE, index, sort_keys=True)
    return MergeReport(total, changed, largest, written)


def _build_header(shard: list[MergedTensor]) -> bytes:
    # safetensors' own writer needs the data of the whole file in memory. The format: eight bytes for the length of the
    # header, the header as JSON padded to eight bytes, the data.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for target in shard:
        header[target.name] = {
            "dtype": target.dtype,
            "shape": list(target.shape),
            "data_offsets": [start, start + target.bytes],
        }
        start += target.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, target: MergedTensor, base: Weights, adapter: Weights) -> tuple[float, bool]:
    """Write one tensor; return the largest absolute change and whether anything changed."""
    dtype = FLOATS.get(target.dtype)
    original = reshape_to_rows(base.read(target.source))
    if dtype is None:
        for rows in iterate_row_chunks(original.shape):
            file.write(_as_bytes(original[rows]))
        return 0.0, False

    largest = 0.0
    if list_adapter_tensors(target.change):
        merged_rows = merge_rows(original, target.change, adapter, dtype)
    else:
        merged_rows = ((rows, original[rows].to(dtype)) for rows in iterate_row_chunks(original.shape))
    for rows, merged in merged_rows:
        _check_finite(merged, original[rows], target, base)
        # Compared after the cast: a change by the cast alone is none of the merge.
        if list_adapter_tensors(target.change):
            before = original[rows].to(dtype)
            largest = max(largest, _get_largest_absolute(merged[: len(before)].float() - before.float()))
        file.write(_as_bytes(merged))
    return largest, largest > 0.0 or target.shape != base.shape(target.source)


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


def _check_finite(merged: torch.Tensor, original: torch.Tensor, target: MergedTensor, base: Weights) -> None:
    if math.isfinite(_get_largest_absolute(merged)):
        return
    if original.numel() and not math.isfinite(_get_largest_absolute(original)):
        where, remedy = str(base.tensors[target.source].path), "the base is damaged, copy it again"
    elif list_adapter_tensors(target.change):
        where, remedy = "the adapter", "training diverged, train again with a lower learning rate"
    else:
        where, remedy = target.dtype, "its range is too small for this model, use bfloat16"
    raise InputError(
        f"{target.name}: NaN or infinity in the merged tensor, from {where}: {remedy}",
        code="merge-not-finite",
    )


def _get_largest_absolute(tensor: torch.Tensor) -> float:
    """Return the largest absolute value; NaN where there is a NaN."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor)
    return max(abs(low.item()), abs(high.item()))
