"""Merge of an adapter, or of fully tuned weights, into the base, without holding the model in memory.

The base is read one tensor at a time in the precision it is stored in, the adapter's delta is added in float32 a few
rows at a time, and the sum is cast once and written to the file. Quantized weights are never used, even if the
adapter was trained on a quantized base. The meaning of an adapter's tensors (names, scaling, DoRA, tied embeddings)
follows PEFT 0.21, `peft/tuners/lora/{layer,variants}.py` and `peft/utils/save_and_load.py`; PEFT and transformers are
imported only where the base's files name or store a weight in another way than the model. Fully tuned weights
replace the base's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lathe.common.errors import InputError
from lathe.models.merge.converted_changes import needs_conversion, read_converted_changes
from lathe.models.merge.copy_files import copy_companion_files, write_merged_config
from lathe.models.merge.plan import OUTPUT_DTYPES, MergedTensor, plan_adapter_merge, plan_full_merge
from lathe.models.merge.read_adapter import read_adapter_config, read_changes
from lathe.models.merge.write_shards import MergeReport, divide_into_shards, write_shards
from lathe.models.model_folder import Weights, open_adapter, open_model, read_config, read_untrained_names


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    dtype: str,
    max_shard_size_bytes: int,
    may_change_nothing: bool = False,
) -> MergeReport:
    """Write the base model `base` merged with the trained weights in `adapter` to the empty folder `out`.

    `base` is a Hugging Face model folder of safetensors in 16 or 32 bit, `adapter` a LoRA adapter saved by PEFT, or
    the weights of full tuning as `lathe.training.full_tuning` saves them.
    `dtype` is "auto" (each tensor keeps the dtype it is stored in), "bfloat16" or "float16". The base's
    division into shards is kept; a shard that would exceed `max_shard_size_bytes` is divided further.

    Where PEFT's merged model differs from the adapted model that was trained, the result is that of the trained one:
    LoRA on the embeddings of a tied model does not change the output head, and so unties the two.

    Memory: one tensor of the base at a time, mapped from its file, plus the adapter's tensors for it.

    Raises InputError where the two folders cannot be read or do not belong together, where something in the
    adapter is not understood or not used, and where the result is not finite or, unless `may_change_nothing`, equals
    the base.
    """
    if dtype != "auto" and dtype not in OUTPUT_DTYPES:
        raise InputError(
            f"merge dtype {dtype!r} is not known: give 'auto', 'bfloat16' or 'float16'", code="merge-dtype-unknown"
        )
    if max_shard_size_bytes < 1:
        raise InputError(f"max_shard_size_bytes {max_shard_size_bytes} must be at least 1", code="shard-size")
    plan = plan_merge(base, adapter, dtype=dtype)
    shards = divide_into_shards(plan.targets, plan.base, max_shard_size_bytes)
    with _use_one_thread():
        report = write_shards(shards, plan.base, plan.adapter, out)
    if not report.tensors_changed and not may_change_nothing:
        what = "all its tensors are the base's" if plan.is_full else "all its deltas are zero"
        raise InputError(f"{adapter}: merging it changes nothing, {what}: train first", code="merge-changes-nothing")

    copy_companion_files(base, adapter, out)
    write_merged_config(base / "config.json", plan.base_config, plan.targets, plan.base, out / "config.json")
    return report


@dataclass(frozen=True)
class MergePlan:
    """What a merge reads and writes; `is_full`: the trained weights are all of the model's, and no adapter."""

    base: Weights
    base_config: dict[str, Any]
    adapter: Weights
    is_full: bool
    targets: list[MergedTensor]


def plan_merge(base: Path, adapter: Path, *, dtype: str) -> MergePlan:
    """Return what `merge` would write of the two folders; raises InputError where they do not belong together."""
    base_config = read_config(base)
    base_weights = open_model(base)
    left = read_untrained_names(adapter)
    if left is None:
        adapter_config = read_adapter_config(adapter, str(base_config.get("model_type")))
        adapter_weights = open_adapter(adapter)
        if adapter_config.get("target_parameters"):
            changes = read_converted_changes(base, base_weights, adapter_weights, adapter_config)
        else:
            changes = read_changes(adapter_weights, adapter_config)
            if needs_conversion(base_weights, changes):
                changes = read_converted_changes(base, base_weights, adapter_weights, adapter_config)
        targets = plan_adapter_merge(base_weights, base_config, adapter_weights, adapter_config, changes, dtype)
    else:
        adapter_weights = open_model(adapter)
        targets = plan_full_merge(base_weights, base_config, adapter_weights, left, dtype)
    return MergePlan(base_weights, base_config, adapter_weights, left is not None, targets)


@contextmanager
def _use_one_thread() -> Iterator[None]:
    # Disk and memory are the limit, not arithmetic. More threads gain little, take ten times as long where cores are
    # shared, and could make the result depend on the number of cores.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
