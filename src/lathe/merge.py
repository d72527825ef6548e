"""Merge what was trained into its base model without ever holding the model in memory.

The base is read one tensor at a time in the precision it is stored in, the adapter's change is added in
float32 a few rows at a time, the sum is cast once and written straight to the file. Nothing passes through
quantized weights, also where the adapter was trained on a quantized base. What an adapter's tensors mean
(names, scaling, DoRA, tied embeddings) follows PEFT 0.21, `peft/tuners/lora/{layer,variants}.py` and
`peft/utils/save_and_load.py`; PEFT itself and transformers are not imported. Weights that were trained whole
take the place of the base's.
"""

import json
import logging
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lathe.errors import InputError
from lathe.model_folder import (
    ADAPTER_FILE,
    INDEX_FILE,
    ITEMSIZES,
    SINGLE_FILE,
    Stored,
    Weights,
    left_by_full_tuning,
    open_adapter,
    open_model,
    read_config,
    read_json,
    text_value,
)

log = logging.getLogger(__name__)

# Elements worked on at once: 0.25 MB in float32, which stays in a core's cache from the product to the file. With more,
# malloc hands every buffer back to the system and the pages come in anew: half the time of a merge.
CHUNK_ELEMENTS = 1 << 16

# The safetensors dtypes a change can be added to; every other dtype is only ever copied.
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OUTPUT_DTYPES = {"bfloat16": "BF16", "float16": "F16"}
CONFIG_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Input embeddings and the output head that a causal language model of transformers ties to them.
HEADS = {"embed_tokens": "lm_head", "wte": "lm_head", "word_embeddings": "lm_head", "embed_in": "embed_out"}

# Models of transformers' Conv1D layers, whose weights are stored transposed; a square one does not show it.
CONV1D_MODELS = {"clvp", "convbert", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"}

# Keys of adapter_config.json that either are honoured below or do not touch the merged weights. Any other key
# must be unset: a LoRA variant that this module does not know would otherwise be merged wrongly, in silence.
KNOWN_ADAPTER_KEYS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
    *("ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha"),
    *("lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type"),
    *("peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"),
    *("target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora"),
}
# Initializations that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA alter its weights.
KNOWN_INITS = (True, False, "gaussian", "eva", "orthogonal")

WEIGHT_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".h5", ".msgpack"),
    *(".npz", ".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite"),
}
TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json"),
}
CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
CHAT_TEMPLATE_FOLDER = "additional_chat_templates"


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    `largest_change` is the largest absolute difference between a merged and a base weight, both in the
    precision written; rows that only the merged model has (a grown vocabulary) are left out of it.
    `bytes_written` is the size of the safetensors files.
    """

    tensors_total: int
    tensors_changed: int
    largest_change: float
    bytes_written: int


def merge(base: Path, adapter: Path, out: Path, *, dtype: str, max_shard_size_bytes: int) -> MergeReport:
    """Fill the empty folder `out` with the model `base` changed by what was trained, `adapter`.

    `base` is a Hugging Face model folder of safetensors in 16 or 32 bit, `adapter` a LoRA adapter saved by PEFT, or
    the weights of full tuning as `lathe.training.whole` saves them.
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


# The two folders ----------------------------------------------------------------------------------


def _read_adapter_config(adapter: Path, model_type: str) -> dict[str, Any]:
    path = adapter / "adapter_config.json"
    config = read_json(path)

    def refuse(key: str, why: str, remedy: str = "merge it with PEFT itself") -> None:
        raise InputError(f"{path}: {key} {json.dumps(config.get(key))} {why}: {remedy}")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "is not supported, only LORA is")
    if config.get("target_parameters"):
        refuse("target_parameters", "(LoRA on single parameters, as of experts) is not supported")
    if config.get("fan_in_fan_out") or model_type in CONV1D_MODELS:
        refuse("fan_in_fan_out", f"with model_type {model_type!r}: transposed (Conv1D) layers are not supported")
    if config.get("init_lora_weights", True) not in KNOWN_INITS:
        refuse(
            "init_lora_weights",
            "altered the base weights before training",
            "save the adapter with path_initial_model_for_weight_conversion, which turns it into plain LoRA",
        )
    for key in sorted(config):
        if config[key] and key not in KNOWN_ADAPTER_KEYS:
            refuse(key, "is not supported")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or isinstance(config[key], bool) or config[key] <= 0:
            refuse(key, "must be a number above 0", "save the adapter again")
    return config


# What the adapter says ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Change:
    """What happens to one tensor of the base, in this order; the fields hold names of the adapter's tensors.

    `replacement` is the tensor to start from instead of the base's. `low_rank` are the two factors: for a
    linear layer B (out x r) and A (r x in), for an embedding (`embedding` true) lora_embedding_A (r x rows)
    and lora_embedding_B (columns x r). `magnitude` is DoRA's, one value per row, for an embedding one per
    column. `addend` is added to a bias. `token_rows` replaces the rows `token_indices`.
    """

    replacement: str | None = None
    # A module trained as a copy of its own (modules_to_save): what it was tied to did not move with it.
    own_copy: bool = False
    low_rank: tuple[str, str] | None = None
    embedding: bool = False
    magnitude: str | None = None
    scaling: float = 1.0
    token_rows: str | None = None
    token_indices: tuple[int, ...] = ()
    addend: str | None = None


def _read_changes(adapter: Weights, config: dict[str, Any]) -> dict[str, _Change]:
    """Sort the adapter's tensors into one change per base tensor; every one of them ends up in a change."""
    fields = _read_fields(adapter, config)
    changes = {}
    for target, found in fields.items():
        module = target.removesuffix(".weight").removesuffix(".bias")
        linear, embedding = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
        change = _Change(
            replacement=found.get("replacement"),
            own_copy="replacement" in found
            and any(_lies_in(target, name) for name in config.get("modules_to_save") or []),
            token_rows=found.get("token_rows"),
            addend=found.get("addend"),
        )
        factors = embedding if any(name in found for name in embedding) else linear
        if any(name in found for name in (*factors, "magnitude", "addend")):
            rank, scaling = _rank_and_scaling(module, config)
            change = replace(change, scaling=scaling)
        if any(name in found for name in (*factors, "magnitude")):
            change = replace(
                change,
                low_rank=_check_factors(adapter, module, factors, found, rank),
                embedding=factors == embedding,
                magnitude=_check_magnitude(adapter, module, found, config),
            )
        if change.token_rows:
            indices = _token_indices(module, config)
            rows = adapter.shape(change.token_rows)[0]
            if len(indices) != rows or not rows:
                raise InputError(
                    f"{adapter.folder}: {change.token_rows} has {rows} rows, but trainable_token_indices has "
                    f"{len(indices)} tokens for {module}: save the adapter again"
                )
            change = replace(change, token_indices=tuple(indices))
        changes[target] = change
    for name in config.get("modules_to_save") or []:
        if not any(change.replacement and _lies_in(target, name) for target, change in changes.items()):
            raise InputError(
                f"{adapter.folder / ADAPTER_FILE}: no tensor of {name!r}, which modules_to_save names: "
                "save the adapter again"
            )
    return changes


# What PEFT appends to the name of a module, what it is here, and which of the module's tensors it changes.
_SUFFIXES = (
    (".lora_A.weight", "lora_A", ".weight"),
    (".lora_B.weight", "lora_B", ".weight"),
    (".lora_B.bias", "addend", ".bias"),
    (".lora_embedding_A", "lora_embedding_A", ".weight"),
    (".lora_embedding_B", "lora_embedding_B", ".weight"),
    (".lora_magnitude_vector", "magnitude", ".weight"),
    (".token_adapter.trainable_tokens_delta", "token_rows", ".weight"),
)
_WRAPPER = re.compile(r"\.(token_adapter\.base_layer|base_layer|modules_to_save|original_module)(?=\.(weight|bias)$)")


def _read_fields(adapter: Weights, config: dict[str, Any]) -> dict[str, dict[str, str]]:
    prefix = "base_model.model."
    fields: dict[str, dict[str, str]] = {}
    for name in sorted(adapter.tensors):
        if not name.startswith(prefix):
            raise InputError(
                f"{adapter.folder}: adapter tensor {name} does not start with {prefix!r}: save it with PEFT"
            )
        if adapter.tensors[name].dtype not in FLOATS:
            raise InputError(
                f"{adapter.folder}: adapter tensor {name} is stored as {adapter.tensors[name].dtype}, "
                "not in 16 or 32 bit: train with that module left unquantized"
            )
        rest = name.removeprefix(prefix)
        for suffix, kind, changed in _SUFFIXES:
            if rest.endswith(suffix):
                fields.setdefault(rest.removesuffix(suffix) + changed, {})[kind] = name
                break
        else:
            wrapper = _WRAPPER.search(rest)
            target = _WRAPPER.sub("", rest)
            # Beside a trained copy PEFT may save the untouched original, and the copy under a second name.
            if (
                wrapper
                and wrapper[1] == "original_module"
                and _is_among(_module_of(target), config.get("modules_to_save"))
            ):
                continue
            if wrapper and wrapper[1] == "modules_to_save" and prefix + target in adapter.tensors:
                continue
            fields.setdefault(target, {})["replacement"] = name
    if not fields:
        raise InputError(f"{adapter.folder / ADAPTER_FILE}: holds no tensor: train the adapter first")
    return fields


def _module_of(target: str) -> str:
    return target.rpartition(".")[0]


def _is_among(module: str, names: Sequence[str] | None) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names or [])


def _lies_in(target: str, module: str) -> bool:
    """Whether a tensor belongs to a module of that name, or to one inside it."""
    return f".{module}." in f".{target}"


def _rank_and_scaling(module: str, config: dict[str, Any]) -> tuple[int, float]:
    rank = _by_pattern(config.get("rank_pattern") or {}, module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: dict[str, Any], module: str, otherwise: Any) -> Any:
    # The first match counts and is anchored as PEFT does it (`get_pattern_key`).
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _check_factors(
    adapter: Weights, module: str, factors: tuple[str, str], found: dict[str, str], rank: int
) -> tuple[str, str]:
    for name in factors:
        if name not in found:
            raise InputError(f"{adapter.folder / ADAPTER_FILE}: {module} has no {name}: save the adapter again")
    a, b = found[factors[0]], found[factors[1]]
    shape_a, shape_b = adapter.shape(a), adapter.shape(b)
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != rank or shape_b[1] != rank:
        raise InputError(
            f"{adapter.folder}: {a} of shape {list(shape_a)} and {b} of shape {list(shape_b)} are not two "
            f"matrices of rank {rank}, which adapter_config.json gives: use the configuration saved with them"
        )
    return (a, b) if factors[0] == "lora_embedding_A" else (b, a)


def _check_magnitude(adapter: Weights, module: str, found: dict[str, str], config: dict[str, Any]) -> str | None:
    if bool(config.get("use_dora")) != ("magnitude" in found):
        has = "has" if "magnitude" in found else "has no"
        raise InputError(
            f"{adapter.folder}: {module} {has} lora_magnitude_vector, but adapter_config.json says use_dora "
            f"{json.dumps(bool(config.get('use_dora')))}: save the adapter again"
        )
    return found.get("magnitude")


def _token_indices(module: str, config: dict[str, Any]) -> list[int]:
    indices = config.get("trainable_token_indices") or []
    if isinstance(indices, list):
        return indices
    for name, of_module in indices.items():
        if _is_among(module, [name]):
            return list(of_module)
    # Saved for the head that is tied to the embeddings, under the embeddings' own entry.
    return list(next(iter(indices.values()))) if len(indices) == 1 else []


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


def _adapter_names(change: _Change) -> list[str]:
    names = [change.replacement, *(change.low_rank or ()), change.magnitude, change.token_rows, change.addend]
    return [name for name in names if name]


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


# The merged files ---------------------------------------------------------------------------------


def _divide(targets: list[_Target], base: Weights, max_shard_size_bytes: int) -> list[list[_Target]]:
    """Group the targets into files: the base's own division, cut further where a file would be too large."""
    shards: list[list[_Target]] = []
    size, path = 0, None
    for target in targets:
        # A head that the base does not have comes last, in the last file if there is room.
        lies_in = base.tensors[target.name].path if target.name in base.tensors else path
        if not shards or lies_in != path or size + target.bytes > max_shard_size_bytes:
            shards.append([])
            size = 0
        shards[-1].append(target)
        size, path = size + target.bytes, lies_in
    return shards


def _write_shards(shards: list[list[_Target]], base: Weights, adapter: Weights, out: Path) -> MergeReport:
    total, changed, largest, written = 0, 0, 0.0, 0
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # The order of safetensors' own writer: the widest dtype first, then by name.
        shard = sorted(shard, key=lambda target: (-list(ITEMSIZES).index(target.dtype), target.name))
        with (out / name).open("wb") as file:
            file.write(_header(shard))
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
        _write_json(out / INDEX_FILE, index, sort_keys=True)
    return MergeReport(total, changed, largest, written)


def _header(shard: list[_Target]) -> bytes:
    # Written by hand because safetensors' own writer wants the data of the whole file in memory first. The
    # format: eight bytes for the length of the header, the header as JSON padded to eight bytes, the data.
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


def _write_tensor(file: BinaryIO, target: _Target, base: Weights, adapter: Weights) -> tuple[float, bool]:
    """Write one tensor; return the largest absolute change and whether anything changed."""
    dtype = FLOATS.get(target.dtype)
    original = _as_rows(base.read(target.source))
    if dtype is None:
        for rows in _row_chunks(original.shape):
            file.write(_bytes_of(original[rows]))
        return 0.0, False

    largest = 0.0
    if _adapter_names(target.change):
        merged_rows = _merged_rows(original, target.change, adapter, dtype)
    else:
        merged_rows = ((rows, original[rows].to(dtype)) for rows in _row_chunks(original.shape))
    for rows, merged in merged_rows:
        _check_finite(merged, original[rows], target, base)
        # Two tensors of one model differ in what the merge did to them, not in what the cast did.
        if _adapter_names(target.change):
            before = original[rows].to(dtype)
            largest = max(largest, _largest(merged[: len(before)].float() - before.float()))
        file.write(_bytes_of(merged))
    return largest, largest > 0.0 or target.shape != base.shape(target.source)


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    rows = tensor.shape[0] if tensor.dim() else 1
    return tensor.reshape(rows, tensor.numel() // rows if rows else 0)


def _row_chunks(shape: Sequence[int]) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


def _check_finite(merged: torch.Tensor, original: torch.Tensor, target: _Target, base: Weights) -> None:
    if math.isfinite(_largest(merged)):
        return
    if original.numel() and not math.isfinite(_largest(original)):
        where, remedy = str(base.tensors[target.source].path), "the base is damaged, copy it again"
    elif _adapter_names(target.change):
        where, remedy = "the adapter", "training diverged, train again with a lower learning rate"
    else:
        where, remedy = target.dtype, "its range is too small for this model, use bfloat16"
    raise InputError(f"{target.name}: NaN or infinity in the merged tensor, from {where}: {remedy}")


def _largest(tensor: torch.Tensor) -> float:
    """The largest absolute value; NaN where there is a NaN."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor)
    return max(abs(low.item()), abs(high.item()))


# The arithmetic -----------------------------------------------------------------------------------


def _merged_rows(
    original: torch.Tensor, change: _Change, adapter: Weights, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the merged tensor some rows at a time: (which rows, the rows in `dtype`)."""
    # PEFT loads what replaces a tensor in the precision of the base before anything is added to it.
    start = original
    if change.replacement:
        start = _as_rows(adapter.read(change.replacement)).to(original.dtype)
    factors = None
    if change.low_rank:
        first, second = (adapter.read(name).float() for name in change.low_rank)
        magnitude = adapter.read(change.magnitude).float() if change.magnitude else None
        factors = _Factors(
            first.T if change.embedding else first, second.T if change.embedding else second, change.scaling
        )
        if magnitude is not None:
            by_column = change.embedding
            factors = replace(
                factors,
                row_magnitude=None if by_column else magnitude,
                column_scale=magnitude / _column_norms(start, factors) if by_column else None,
            )
    addend = _as_rows(adapter.read(change.addend).float()) * change.scaling if change.addend else None
    token_rows = adapter.read(change.token_rows) if change.token_rows else None
    indices = torch.tensor(change.token_indices, dtype=torch.long)

    for rows in _row_chunks(start.shape):
        merged = start[rows]
        if factors is not None:
            merged = factors.add_to(merged, rows)
        if addend is not None:
            merged = merged.float() + addend[rows]
        merged = merged.to(dtype)
        if token_rows is not None:
            within = (indices >= rows.start) & (indices < rows.stop)
            merged = merged.index_copy(0, indices[within] - rows.start, token_rows[within].to(dtype))
        yield rows, merged


@dataclass(frozen=True)
class _Factors:
    """The product of left (rows x r), right (r x columns) and scaling in float32, and DoRA's rescaling."""

    left: torch.Tensor
    right: torch.Tensor
    scaling: float
    row_magnitude: torch.Tensor | None = None
    column_scale: torch.Tensor | None = None

    def sum(self, start: torch.Tensor, rows: slice) -> torch.Tensor:
        """Add the product to these rows of the weight (in 16 or 32 bit), in float32."""
        return torch.mm(self.left[rows], self.right).mul_(self.scaling).add_(start.float())

    def add_to(self, start: torch.Tensor, rows: slice) -> torch.Tensor:
        merged = self.sum(start, rows)
        if self.row_magnitude is not None:
            norms = torch.linalg.norm(merged, dim=1)
            merged.mul_((self.row_magnitude[rows] / norms).unsqueeze(1))
        if self.column_scale is not None:
            merged.mul_(self.column_scale)
        return merged


def _column_norms(start: torch.Tensor, factors: _Factors) -> torch.Tensor:
    """The norm of every column of the sum: DoRA scales each dimension of an embedding over all its rows."""
    squares = torch.zeros(start.shape[1], dtype=torch.float64)
    for rows in _row_chunks(start.shape):
        squares += factors.sum(start[rows], rows).double().square_().sum(dim=0)
    return squares.sqrt().float()


# What is not weights ------------------------------------------------------------------------------


def _copy_companions(base: Path, adapter: Path, out: Path) -> None:
    """Copy tokenizer, chat template, generation configuration, licence: all but weights and hidden files.

    A tokenizer in the adapter's folder is the one it was trained with (tokens may have been added, the
    template set), and the one AutoTokenizer loads for the adapter: its files take the place of the base's.
    Vocabulary files that only the base has stay, for converters that read them (tokenizer.model). What the
    adapter's tokenizer_config.json states anew, template and special tokens, is not left over from the base.
    """
    for source in sorted(base.rglob("*")):
        relative = source.relative_to(base)
        if source.is_file() and not _is_weights(relative):
            _copy(source, out / relative)

    tokenizer = [adapter / name for name in sorted(TOKENIZER_FILES) if (adapter / name).is_file()]
    templates = [adapter / name for name in CHAT_TEMPLATE_FILES if (adapter / name).is_file()]
    templates += sorted((adapter / CHAT_TEMPLATE_FOLDER).glob("*.jinja"))
    restated = (adapter / "tokenizer_config.json").is_file()
    if restated or templates:
        for name in CHAT_TEMPLATE_FILES:
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / CHAT_TEMPLATE_FOLDER, ignore_errors=True)
    if restated:
        (out / "special_tokens_map.json").unlink(missing_ok=True)
    for source in (*tokenizer, *templates):
        _copy(source, out / source.relative_to(adapter))


def _is_weights(relative: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    index = relative.name.endswith(".index.json")
    # transformers takes a folder with an adapter_config.json for an adapter, not for a model.
    return hidden or index or relative.suffix in WEIGHT_SUFFIXES or relative.name == "adapter_config.json"


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _write_config(path: Path, config: dict[str, Any], targets: list[_Target], base: Weights, out: Path) -> None:
    """Correct dtype, vocabulary size and tying where the merge changed them; else keep the very bytes."""
    correct: dict[str, Any] = {}
    dtypes = Counter[str]()
    for target in targets:
        if target.dtype in CONFIG_DTYPES:
            dtypes[CONFIG_DTYPES[target.dtype]] += target.bytes
        module = _module_of(target.name).rpartition(".")[2]
        if module in HEADS and target.shape != base.shape(target.source):
            correct["vocab_size"] = target.shape[0]
        if module in HEADS.values() and (target.change != _Change() or target.source != target.name):
            correct["tie_word_embeddings"] = False
    if dtypes:
        correct["dtype"] = correct["torch_dtype"] = dtypes.most_common(1)[0][0]

    corrected = _corrected(config, correct)
    if "tie_word_embeddings" in correct and text_value(config, "tie_word_embeddings") is None:
        corrected["tie_word_embeddings"] = False
    if corrected == config:
        shutil.copyfile(path, out)
    else:
        _write_json(out, corrected, sort_keys=False)


def _corrected(config: dict[str, Any], correct: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the keys it has, at the top and in text_config, set to their correct values."""
    result = {key: correct.get(key, value) for key, value in config.items()}
    if isinstance(config.get("text_config"), dict):
        result["text_config"] = _corrected(config["text_config"], correct)
    return result


def _write_json(path: Path, value: dict[str, Any], *, sort_keys: bool) -> None:
    text = json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
