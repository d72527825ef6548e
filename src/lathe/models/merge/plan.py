"""Merge plan: every tensor of the merged model, what changes it, its shape and dtype; coverage is checked."""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lathe.common.errors import InputError
from lathe.models.merge.read_adapter import HEADS, TensorChange, get_module_name, list_adapter_tensors
from lathe.models.model_folder import ITEMSIZES, StoredTensor, Weights, get_text_value
from lathe.models.precision import FLOATS

OUTPUT_DTYPES = {"bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model: its source in the base, its change, the type and shape it is stored in."""

    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]
    change: TensorChange = field(default_factory=TensorChange)

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * ITEMSIZES[self.dtype]


def plan_adapter_merge(
    base: Weights,
    base_config: dict[str, Any],
    adapter: Weights,
    adapter_config: dict[str, Any],
    changes: dict[str, TensorChange],
    dtype: str,
) -> list[MergedTensor]:
    """Return the tensors of the base merged with an adapter; every change of the adapter is used.

    Raises InputError where a change fits no tensor, or where layers that should be changed are not.
    """
    names = list(base.tensors)
    changes = dict(changes)
    embeddings, head = _find_tied_pair(base, base_config, changes)
    if embeddings and head:
        names = [name for name in names if name != head]
        head_change = _derive_head_change(embeddings, head, changes, adapter, adapter_config)
        if head_change is None:
            changes.pop(head, None)
        else:
            names.append(head)
            changes[head] = head_change

    targets = []
    for name in names:
        source = name if name in base.tensors and not (name == head and embeddings) else str(embeddings)
        stored = base.tensors[source]
        change = changes.pop(name, TensorChange())
        shape = _compute_merged_shape(source, stored, change, base, adapter)
        targets.append(MergedTensor(name, source, _choose_dtype(stored, dtype), shape, change))
    if changes:
        unknown = min(changes)
        tensor = next(name for name in list_adapter_tensors(changes[unknown]))
        raise InputError(
            f"{base.folder}: no tensor {unknown} for the adapter's {tensor} of shape "
            f"{list(adapter.shape(tensor))}: give the base that the adapter was trained on",
            code="base-tensor-missing",
        )
    _check_vocabulary(targets, base)
    _check_coverage(targets, base, base_config, adapter_config)
    return targets


def plan_full_merge(
    base: Weights, base_config: dict[str, Any], trained: Weights, left: list[str], dtype: str
) -> list[MergedTensor]:
    """Return the tensors of the base, each replaced by the trained one of its name unless it was not trained."""
    if unknown := sorted(trained.tensors.keys() - base.tensors.keys()):
        raise InputError(
            f"{base.folder}: no tensor {unknown[0]} for the trained one of shape "
            f"{list(trained.shape(unknown[0]))}: give the base that was trained",
            code="base-tensor-missing",
        )
    changes = {name: TensorChange(replacement=name) for name in trained.tensors}
    # A tied weight that the base stores twice is one weight in training; it is written once.
    embeddings, head = _find_tied_pair(base, base_config, changes)
    once = {embeddings, head} <= changes.keys() and torch.equal(trained.read(str(embeddings)), trained.read(str(head)))
    targets = []
    for name, stored in base.tensors.items():
        if name == head and once:
            continue
        if name not in changes and name not in left:
            raise InputError(
                f"{trained.folder}: no tensor {name}, which {base.folder} has: train again", code="tensor-missing"
            )
        new = trained.tensors.get(name, stored)
        if (new.shape, new.dtype) != (stored.shape, stored.dtype):
            raise InputError(
                f"{trained.folder}: trained tensor {name} is {new.dtype} of shape {list(new.shape)}, that of "
                f"{base.folder} {stored.dtype} of shape {list(stored.shape)}: give the base that was trained",
                code="shape-mismatch",
            )
        if name in changes and stored.dtype not in FLOATS:
            raise InputError(
                f"{trained.folder}: trained tensor {name} is {new.dtype}, not in 16 or 32 bit: train again",
                code="tensor-not-float",
            )
        targets.append(
            MergedTensor(name, name, _choose_dtype(stored, dtype), stored.shape, changes.get(name, TensorChange()))
        )
    return targets


def _choose_dtype(stored: StoredTensor, dtype: str) -> str:
    return OUTPUT_DTYPES.get(dtype, stored.dtype) if stored.dtype in FLOATS else stored.dtype


def _find_tied_pair(
    base: Weights, config: dict[str, Any], changes: dict[str, TensorChange]
) -> tuple[str | None, str | None]:
    """Return the names of embeddings and head if the base shares one weight between the two, else two Nones."""
    candidates = [
        name for name in base.tensors if name.endswith(".weight") and get_module_name(name).rpartition(".")[2] in HEADS
    ]
    if len(candidates) != 1:
        return None, None
    embeddings = candidates[0]
    head = HEADS[get_module_name(embeddings).rpartition(".")[2]] + ".weight"
    # Without the key the model class decides; weights without a head then mean tied.
    is_tied = get_text_value(config, "tie_word_embeddings")
    if head not in base.tensors:
        return (None, None) if is_tied is False else (embeddings, head)
    touched = embeddings in changes or head in changes
    if is_tied and touched and torch.equal(base.read(embeddings), base.read(head)):
        return embeddings, head
    return None, None


def _derive_head_change(
    embeddings: str, head: str, changes: dict[str, TensorChange], adapter: Weights, config: dict[str, Any]
) -> TensorChange | None:
    """Return the change of the head of a tied model; None where it stays tied to the embeddings."""
    change = changes.get(embeddings, TensorChange())
    own = changes.get(head)
    if own is None:
        # Replaced rows and a resized vocabulary belong to the shared weight. LoRA, and a copy trained on its own,
        # changed the embeddings and not the head, unless the two were kept tied in training.
        apart = change.low_rank or change.own_copy
        if not apart or config.get("ensure_weight_tying"):
            return None
        return TensorChange(replacement=None if change.own_copy else change.replacement)
    if embeddings in changes and _is_same_change(change, own, adapter):
        return None
    # The head was a copy of the shared weight: of the adapter's, if the adapter replaced it and not the head.
    if own.replacement is None and change.replacement is not None and not change.own_copy:
        own = replace(own, replacement=change.replacement)
    return own


def _is_same_change(embeddings: TensorChange, head: TensorChange, adapter: Weights) -> bool:
    """Tell whether the two changes make the same weight, so that it may stay shared."""

    def same(one: str | None, other: str | None, *, transposed: bool = False) -> bool:
        if one is None or other is None:
            return one is other
        first, second = adapter.read(one), adapter.read(other)
        return torch.equal(first, second.T if transposed else second)

    if embeddings.token_indices != head.token_indices or (embeddings.low_rank is None) != (head.low_rank is None):
        return False
    if embeddings.magnitude or head.magnitude or embeddings.scaling != head.scaling:
        return False
    if not same(embeddings.replacement, head.replacement) or not same(embeddings.token_rows, head.token_rows):
        return False
    if embeddings.low_rank is None or head.low_rank is None:
        return True
    return all(same(one, other, transposed=True) for one, other in zip(embeddings.low_rank, head.low_rank, strict=True))


def _compute_merged_shape(
    source: str, stored: StoredTensor, change: TensorChange, base: Weights, adapter: Weights
) -> tuple[int, ...]:
    """Return the shape after the change; raise InputError where the adapter's tensors do not fit the base's."""
    shape = stored.shape

    def mismatch(name: str) -> InputError:
        return InputError(
            f"{adapter.folder}: adapter tensor {name} of shape {list(adapter.shape(name))} does not fit "
            f"{source} of shape {list(stored.shape)} in {base.folder}: give the base that it was trained on",
            code="shape-mismatch",
        )

    if list_adapter_tensors(change) and stored.dtype not in FLOATS:
        raise InputError(
            f"{stored.path}: {source} is stored as {stored.dtype}, but a merge needs weights that were never "
            "quantized: give the 16-bit model",
            code="weights-quantized",
        )
    if change.replacement:
        replaced = adapter.shape(change.replacement)
        module = get_module_name(source).rpartition(".")[2]
        may_resize = module in HEADS or module in HEADS.values()
        if replaced != shape and not (may_resize and replaced[1:] == shape[1:]):
            raise mismatch(change.replacement)
        shape = replaced
    if change.low_rank:
        first, second = change.low_rank
        rows, columns = adapter.shape(first), adapter.shape(second)
        made = (rows[1], columns[0]) if change.embedding else (rows[0], columns[1])
        if shape != made:
            raise mismatch(first if len(shape) != 2 or shape[0] != made[0] else second)
    if change.magnitude and adapter.shape(change.magnitude) != (shape[1 if change.embedding else 0],):
        raise mismatch(change.magnitude)
    if change.token_rows:
        too_high = max(change.token_indices) >= shape[0] or min(change.token_indices) < 0
        if too_high or adapter.shape(change.token_rows)[1:] != shape[1:]:
            raise mismatch(change.token_rows)
    if change.addend and adapter.shape(change.addend) != shape:
        raise mismatch(change.addend)
    return shape


def _check_vocabulary(targets: list[MergedTensor], base: Weights) -> None:
    """Raise InputError where embeddings and head differ in their number of rows."""
    sized = [t for t in targets if get_module_name(t.name).rpartition(".")[2] in {*HEADS, *HEADS.values()}]
    resized = [t for t in sized if t.shape != base.shape(t.source)]
    for target in sized:
        if resized and target.shape[0] != resized[0].shape[0]:
            raise InputError(
                f"{base.folder}: the adapter makes {resized[0].name} of shape {list(resized[0].shape)}, but "
                f"{target.name} stays at {list(target.shape)}: save it with save_embedding_layers=True",
                code="vocabulary-mismatch",
            )


def _check_coverage(
    targets: list[MergedTensor], base: Weights, base_config: dict[str, Any], adapter_config: dict[str, Any]
) -> None:
    """Raise InputError for the adapter of a model with fewer layers: target_modules names modules of every layer."""
    modules = adapter_config.get("target_modules")
    chosen = adapter_config.get("layers_to_transform") is not None or adapter_config.get("exclude_modules")
    if not isinstance(modules, list) or chosen or any(re.search(r"\.\d+\.", name) for name in modules):
        return
    layers = get_text_value(base_config, "num_hidden_layers")
    numbered = re.compile(r"^(.*?\.)(\d+)(\..*)$")
    covered = set()
    for target in targets:
        match = numbered.match(target.name)
        if match and target.change.low_rank:
            covered.add((match[1], match[3]))
    for target in targets:
        match = numbered.match(target.name)
        if not match or list_adapter_tensors(target.change) or (match[1], match[3]) not in covered:
            continue
        # Some files have layers beyond the configured ones (multi-token prediction heads); no model loads them.
        if isinstance(layers, int) and int(match[2]) < layers:
            raise InputError(
                f"{base.folder}: {target.name} of shape {list(target.shape)} has no counterpart in the "
                "adapter, which covers other layers: give the base that the adapter was trained on",
                code="layers-not-covered",
            )
