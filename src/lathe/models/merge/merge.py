"""Merge what was trained into its base model without ever holding the model in memory.

The base is read one tensor at a time in the precision it is stored in, the adapter's change is added in
float32 a few rows at a time, the sum is cast once and written straight to the file. Nothing passes through
quantized weights, also where the adapter was trained on a quantized base. What an adapter's tensors mean
(names, scaling, DoRA, tied embeddings) follows PEFT 0.21, `peft/tuners/lora/{layer,variants}.py` and
`peft/utils/save_and_load.py`; PEFT itself and transformers are not imported. Weights that were trained whole
take the place of the base's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lathe.common.errors import InputError
from lathe.models.merge.copy_files import _copy_companions, _write_config
from lathe.models.merge.plan import OUTPUT_DTYPES, _plan, _plan_whole
from lathe.models.merge.read_adapter import _read_adapter_config, _read_changes
from lathe.models.merge.write_shards import MergeReport, _divide, _write_shards
from lathe.models.model_folder import left_by_full_tuning, open_adapter, open_model, read_config


def merge(base: Path, adapter: Path, out: Path, *, dtype: str, max_shard_size_bytes: int) -> MergeReport:
    """Fill the empty folder `out` with the model `base` changed by what was trained, `adapter`.

    `base` is a Hugging Face model folder of safetensors in 16 or 32 bit, `adapter` a LoRA adapter saved by PEFT, or
    the weights of full tuning as `lathe.training.full_tuning` saves them.
    `dtype` is "auto" (each tensor keeps the dtype it is stored in), "bfloat16" or "float16". The base's
    division into shards is kept; a shard that would exceed `max_shard_size_bytes` is divided further.

    Where PEFT's merged model answers differently from the adapted model that was trained, the trained model
    is right: LoRA on the embeddings of a tied model leaves the output head as it was, and so unties the two.

    Memory: one tensor of the base at a time, mapped from its file, plus the adapter's tensors for it.

    Raises InputError where the two folders cannot be read or do not belong together, where something in the
    adapter is not understood or not used, and where the result is not finite or equals the base.
    """
    if dtype != "auto" and dtype not in OUTPUT_DTYPES:
        raise InputError(f"merge dtype {dtype!r} is not known: give 'auto', 'bfloat16' or 'float16'")
    if max_shard_size_bytes < 1:
        raise InputError(f"max_shard_size_bytes {max_shard_size_bytes} must be at least 1")
    base_config = read_config(base)
    base_weights = open_model(base)
    left = left_by_full_tuning(adapter)
    if left is None:
        adapter_config = _read_adapter_config(adapter, str(base_config.get("model_type")))
        adapter_weights = open_adapter(adapter)
        changes = _read_changes(adapter_weights, adapter_config)
        targets = _plan(base_weights, base_config, adapter_weights, adapter_config, changes, dtype)
    else:
        adapter_weights = open_model(adapter)
        targets = _plan_whole(base_weights, base_config, adapter_weights, left, dtype)
    shards = _divide(targets, base_weights, max_shard_size_bytes)
    with _one_thread():
        report = _write_shards(shards, base_weights, adapter_weights, out)
    if not report.tensors_changed:
        what = "all its deltas are zero" if left is None else "all its tensors are the base's"
        raise InputError(f"{adapter}: merging it changes nothing, {what}: train first")

    _copy_companions(base, adapter, out)
    _write_config(base / "config.json", base_config, targets, base_weights, out / "config.json")
    return report


@contextmanager
def _one_thread() -> Iterator[None]:
    # Disk and memory set the pace, not arithmetic. More threads gain little, lose tenfold waiting for each other
    # where the cores are shared, and could let the number of cores into the result.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
