"""Merge plan: every tensor of the merged model, what changes it, its shape and dtype; coverage is checked."""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lathe.common.errors import InputError
from lathe.models.merge.read_adapter import _adapter_names, _Change, _module_of
from lathe.models.model_folder import FLOATS, ITEMSIZES, Stored, Weights, text_value

OUTPUT_DTYPES = {"bfloat16": "BF16", "float16": "F16"}

# Input embeddings and the output head that a causal language model of transformers ties to them.
HEADS = {"embed_tokens": "lm_head", "wte": "lm_head", "word_embeddings": "lm_head", "embed_in": "embed_out"}


# What becomes of every tensor ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """One tensor of the merged model: where it comes from, how it changes, what it is stored as."""

    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]
    change: _Change = field(default_factory=_Change)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZES[self.dtype]


def _plan(
    base: Weights,
    base_config: dict[str, Any],
    adapter: Weights,
    adapter_config: dict[str, Any],
    changes: dict[str, _Change],
    dtype: str,
) -> list[_Target]:
    names = list(base.tensors)
    changes = dict(changes)
    embeddings, head = _tied_pair(base, base_config, changes)
    if embeddings and head:
        names = [name for name in names if name != head]
        head_change = _change_of_tied_head(embeddings, head, changes, adapter, adapter_config)
        if head_change is None:
            changes.pop(head, None)
        else:
            names.append(head)
            changes[head] = head_change

    targets = []
    for name in names:
        source = name if name in base.tensors and not (name == head and embeddings) else str(embeddings)
        stored = base.tensors[source]
        change = changes.pop(name, _Change())
        shape = _merged_shape(source, stored, change, base, adapter)
        targets.append(_Target(name, source, _merged_dtype(stored, dtype), shape, change))
    if changes:
        unknown = min(changes)
        tensor = next(name for name in _adapter_names(changes[unknown]))
        raise InputError(
            f"{base.folder}: no tensor {unknown} for the adapter's {tensor} of shape "
            f"{list(adapter.shape(tensor))}: give the base that the adapter was trained on"
        )
    _check_vocabulary(targets, base)
    _check_coverage(targets, base, base_config, adapter_config)
    return targets


def _plan_whole(
    base: Weights, base_config: dict[str, Any], trained: Weights, left: list[str], dtype: str
) -> list[_Target]:
    """Every tensor of the base gives way to the trained one of its name, but for those that training left alone."""
    if unknown := sorted(trained.tensors.keys() - base.tensors.keys()):
        raise InputError(
            f"{base.folder}: no tensor {unknown[0]} for the trained one of shape "
            f"{list(trained.shape(unknown[0]))}: give the base that was trained"
        )
    changes = {name: _Change(replacement=name) for name in trained.tensors}
    # A weight that the base stores twice is one weight, as in training; it is written once.
    embeddings, head = _tied_pair(base, base_config, changes)
    once = {embeddings, head} <= changes.keys() and torch.equal(trained.read(str(embeddings)), trained.read(str(head)))
    targets = []
    for name, stored in base.tensors.items():
        if name == head and once:
            continue
        if name not in changes and name not in left:
            raise InputError(f"{trained.folder}: no tensor {name}, which {base.folder} has: train again")
        new = trained.tensors.get(name, stored)
        if (new.shape, new.dtype) != (stored.shape, stored.dtype):
            raise InputError(
                f"{trained.folder}: trained tensor {name} is {new.dtype} of shape {list(new.shape)}, that of "
                f"{base.folder} {stored.dtype} of shape {list(stored.shape)}: give the base that was trained"
            )
        if name in changes and stored.dtype not in FLOATS:
            raise InputError(
                f"{trained.folder}: trained tensor {name} is {new.dtype}, not in 16 or 32 bit: train again"
            )
        targets.append(_Target(name, name, _merged_dtype(stored, dtype), stored.shape, changes.get(name, _Change())))
    return targets


def _merged_dtype(stored: Stored, dtype: str) -> str:
    return OUTPUT_DTYPES.get(dtype, stored.dtype) if stored.dtype in FLOATS else stored.dtype


def _tied_pair(base: Weights, config: dict[str, Any], changes: dict[str, _Change]) -> tuple[str | None, str | None]:
    """The names of embeddings and head where the base shares one weight between the two, else two Nones."""
    found = [name for name in base.tensors if name.endswith(".weight") and _module_of(name).rpartition(".")[2] in HEADS]
    if len(found) != 1:
        return None, None
    embeddings = found[0]
    head = HEADS[_module_of(embeddings).rpartition(".")[2]] + ".weight"
    # A configuration that does not say leaves it to the class; weights without a head then mean tied.
    says_tied = text_value(config, "tie_word_embeddings")
    if head not in base.tensors:
        return (None, None) if says_tied is False else (embeddings, head)
    touched = embeddings in changes or head in changes
    if says_tied and touched and torch.equal(base.read(embeddings), base.read(head)):
        return embeddings, head
    return None, None


def _change_of_tied_head(
    embeddings: str, head: str, changes: dict[str, _Change], adapter: Weights, config: dict[str, Any]
) -> _Change | None:
    """How the head of a tied model changes on its own; None where it stays tied to the embeddings."""
    change = changes.get(embeddings, _Change())
    own = changes.get(head)
    if own is None:
        # Replaced rows and a resized vocabulary belong to the shared weight. LoRA, and a copy trained on its
        # own, changed what goes in and not what comes out, unless the two were kept tied in training.
        apart = change.low_rank or change.own_copy
        if not apart or config.get("ensure_weight_tying"):
            return None
        return _Change(replacement=None if change.own_copy else change.replacement)
    if embeddings in changes and _same_change(change, own, adapter):
        return None
    # The head was a copy of the shared weight as the adapter has it, where it has one and the head has none.
    if own.replacement is None and change.replacement is not None and not change.own_copy:
        own = replace(own, replacement=change.replacement)
    return own


def _same_change(embeddings: _Change, head: _Change, adapter: Weights) -> bool:
    """Whether the two changes make the same weight, so that it may stay shared."""

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


def _merged_shape(source: str, stored: Stored, change: _Change, base: Weights, adapter: Weights) -> tuple[int, ...]:
    """The shape after the change; raises InputError where the adapter's tensors do not fit the base's."""
    shape = stored.shape

    def mismatch(name: str) -> InputError:
        return InputError(
            f"{adapter.folder}: adapter tensor {name} of shape {list(adapter.shape(name))} does not fit "
            f"{source} of shape {list(stored.shape)} in {base.folder}: give the base that it was trained on"
        )

    if _adapter_names(change) and stored.dtype not in FLOATS:
        raise InputError(
            f"{stored.path}: {source} is stored as {stored.dtype}, but a merge needs weights that were never "
            "quantized: give the 16-bit model"
        )
    if change.replacement:
        replaced = adapter.shape(change.replacement)
        module = _module_of(source).rpartition(".")[2]
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


def _check_vocabulary(targets: list[_Target], base: Weights) -> None:
    """Embeddings and head must have one number of rows."""
    sized = [t for t in targets if _module_of(t.name).rpartition(".")[2] in {*HEADS, *HEADS.values()}]
    resized = [t for t in sized if t.shape != base.shape(t.source)]
    for target in sized:
        if resized and target.shape[0] != resized[0].shape[0]:
            raise InputError(
                f"{base.folder}: the adapter makes {resized[0].name} of shape {list(resized[0].shape)}, but "
                f"{target.name} stays at {list(target.shape)}: save it with save_embedding_layers=True"
            )


def _check_coverage(
    targets: list[_Target], base: Weights, base_config: dict[str, Any], adapter_config: dict[str, Any]
) -> None:
    """Refuse the adapter of a shallower model: LoRA on a module by its name reaches every layer's."""
    modules = adapter_config.get("target_modules")
    chosen = adapter_config.get("layers_to_transform") is not None or adapter_config.get("exclude_modules")
    if not isinstance(modules, list) or chosen or any(re.search(r"\.\d+\.", name) for name in modules):
        return
    layers = text_value(base_config, "num_hidden_layers")
    numbered = re.compile(r"^(.*?\.)(\d+)(\..*)$")
    covered = set()
    for target in targets:
        match = numbered.match(target.name)
        if match and target.change.low_rank:
            covered.add((match[1], match[3]))
    for target in targets:
        match = numbered.match(target.name)
        if not match or _adapter_names(target.change) or (match[1], match[3]) not in covered:
            continue
        # Layers past the configured ones (multi-token prediction heads) are in some files and in no model.
        if isinstance(layers, int) and int(match[2]) < layers:
            raise InputError(
                f"{base.folder}: {target.name} of shape {list(target.shape)} has no counterpart in the "
                "adapter, which covers other layers: give the base that the adapter was trained on"
            )
