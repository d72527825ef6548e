"""PEFT adapter folder, read for the merge: configuration, LoRA factors, modules trained in full."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lathe.common.bounded_regex import limit_matching
from lathe.common.errors import InputError
from lathe.models.model_folder import ADAPTER_FILE, Weights, read_json
from lathe.models.precision import FLOATS

# Models with transformers' Conv1D layers, whose weights are stored transposed; a square one cannot be recognized.
CONV1D_MODELS = {"clvp", "convbert", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"}

# Keys of adapter_config.json that are either used below or do not affect the merged weights. Any other key must be
# unset: a LoRA variant that this module does not know would be merged wrongly, without an error.
KNOWN_ADAPTER_KEYS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
    *("ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha"),
    *("lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type"),
    *("peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"),
    *("target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_dora", "use_rslora"),
}
# Input embeddings and the output head that a causal language model of transformers ties to them.
HEADS = {"embed_tokens": "lm_head", "wte": "lm_head", "word_embeddings": "lm_head", "embed_in": "embed_out"}

# Initializations that do not change the base; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA alter its weights.
KNOWN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def read_adapter_config(adapter: Path, model_type: str) -> dict[str, Any]:
    """Read adapter_config.json; raise InputError for an adapter that cannot be merged exactly."""
    path = adapter / "adapter_config.json"
    config = read_json(path)

    def refuse(key: str, why: str, remedy: str = "merge it with PEFT itself") -> None:
        raise InputError(f"{path}: {key} {json.dumps(config.get(key))} {why}: {remedy}", code="adapter-unsupported")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "is not supported, only LORA is")
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


@dataclass(frozen=True)
class TensorChange:
    """The change of one tensor of the base; fields hold names of the adapter's tensors, in the order of application.

    `replacement` is the tensor to start from instead of the base's. `low_rank` are the two factors: for a
    linear layer B (out x r) and A (r x in), for an embedding (`embedding` true) lora_embedding_A (r x rows)
    and lora_embedding_B (columns x r). `magnitude` is DoRA's, one value per row, for an embedding one per
    column. `addend` is added to a bias. `token_rows` replaces the rows `token_indices`.
    """

    replacement: str | None = None
    # A module trained as a separate copy (modules_to_save): a weight that it was tied to has not changed.
    own_copy: bool = False
    low_rank: tuple[str, str] | None = None
    embedding: bool = False
    magnitude: str | None = None
    scaling: float = 1.0
    token_rows: str | None = None
    token_indices: tuple[int, ...] = ()
    addend: str | None = None
    # The update in float32, where the base stores the weight in another way than the model has it; and its factors.
    update: Callable[[], torch.Tensor] | None = None
    factors: tuple[str, ...] = ()


def read_changes(adapter: Weights, config: dict[str, Any]) -> dict[str, TensorChange]:
    """Return the change of each base tensor; every tensor of the adapter is used in one."""
    fields = _read_fields(adapter, config)
    changes = {}
    for target, names in fields.items():
        module = target.removesuffix(".weight").removesuffix(".bias")
        linear, embedding = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
        change = TensorChange(
            replacement=names.get("replacement"),
            own_copy="replacement" in names
            and any(_lies_in(target, name) for name in config.get("modules_to_save") or []),
            token_rows=names.get("token_rows"),
            addend=names.get("addend"),
        )
        factors = embedding if any(name in names for name in embedding) else linear
        if any(name in names for name in (*factors, "magnitude", "addend")):
            rank, scaling = _get_rank_and_scaling(module, config)
            change = replace(change, scaling=scaling)
        if any(name in names for name in (*factors, "magnitude")):
            change = replace(
                change,
                low_rank=_check_factors(adapter, module, factors, names, rank),
                embedding=factors == embedding,
                magnitude=_check_magnitude(adapter, module, names, config),
            )
        if change.token_rows:
            indices = _get_token_indices(module, config)
            rows = adapter.shape(change.token_rows)[0]
            if len(indices) != rows or not rows:
                raise InputError(
                    f"{adapter.folder}: {change.token_rows} has {rows} rows, but trainable_token_indices has "
                    f"{len(indices)} tokens for {module}: save the adapter again",
                    code="adapter-token-rows",
                )
            change = replace(change, token_indices=tuple(indices))
        changes[target] = change
    for name in config.get("modules_to_save") or []:
        if not any(change.replacement and _lies_in(target, name) for target, change in changes.items()):
            raise InputError(
                f"{adapter.folder / ADAPTER_FILE}: no tensor of {name!r}, which modules_to_save names: "
                "save the adapter again",
                code="adapter-tensor-missing",
            )
    return changes


# Suffix that PEFT appends to the name of a module, the field it goes into, and the tensor of the module it changes.
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
                f"{adapter.folder}: adapter tensor {name} does not start with {prefix!r}: save it with PEFT",
                code="adapter-tensor-name",
            )
        if adapter.tensors[name].dtype not in FLOATS:
            raise InputError(
                f"{adapter.folder}: adapter tensor {name} is stored as {adapter.tensors[name].dtype}, "
                "not in 16 or 32 bit: train with that module left unquantized",
                code="tensor-not-float",
            )
        rest = name.removeprefix(prefix)
        for suffix, kind, changed in _SUFFIXES:
            if rest.endswith(suffix):
                fields.setdefault(rest.removesuffix(suffix) + changed, {})[kind] = name
                break
        else:
            wrapper = _WRAPPER.search(rest)
            target = _WRAPPER.sub("", rest)
            # Beside a trained copy PEFT may save the unchanged original, and the copy under a second name.
            if (
                wrapper
                and wrapper[1] == "original_module"
                and _is_among(get_module_name(target), config.get("modules_to_save"))
            ):
                continue
            if wrapper and wrapper[1] == "modules_to_save" and prefix + target in adapter.tensors:
                continue
            fields.setdefault(target, {})["replacement"] = name
    if not fields:
        raise InputError(
            f"{adapter.folder / ADAPTER_FILE}: holds no tensor: train the adapter first", code="adapter-empty"
        )
    return fields


def get_module_name(target: str) -> str:
    """Return the name of the module that a tensor belongs to."""
    return target.rpartition(".")[0]


def _is_among(module: str, names: Sequence[str] | None) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names or [])


def _lies_in(target: str, module: str) -> bool:
    """Tell whether a tensor belongs to a module of that name, or to one inside it."""
    return f".{module}." in f".{target}"


def _get_rank_and_scaling(module: str, config: dict[str, Any]) -> tuple[int, float]:
    rank = _match_pattern(config.get("rank_pattern") or {}, module, config["r"])
    alpha = _match_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _match_pattern(patterns: dict[str, Any], module: str, otherwise: Any) -> Any:
    # As PEFT does it (`get_pattern_key`): the first match counts, and is anchored.
    for pattern, value in patterns.items():
        try:
            with limit_matching("adapter_config.json: rank_pattern, alpha_pattern", pattern):
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(
                f"adapter_config.json: {pattern!r} in rank_pattern or alpha_pattern is not a regular expression: "
                f"{error}; save the adapter again",
                code="invalid-pattern",
            ) from None
    return otherwise


def _check_factors(
    adapter: Weights, module: str, factors: tuple[str, str], names: dict[str, str], rank: int
) -> tuple[str, str]:
    for name in factors:
        if name not in names:
            raise InputError(
                f"{adapter.folder / ADAPTER_FILE}: {module} has no {name}: save the adapter again",
                code="adapter-tensor-missing",
            )
    a, b = names[factors[0]], names[factors[1]]
    shape_a, shape_b = adapter.shape(a), adapter.shape(b)
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != rank or shape_b[1] != rank:
        raise InputError(
            f"{adapter.folder}: {a} of shape {list(shape_a)} and {b} of shape {list(shape_b)} are not two "
            f"matrices of rank {rank}, which adapter_config.json gives: use the configuration saved with them",
            code="adapter-rank",
        )
    return (a, b) if factors[0] == "lora_embedding_A" else (b, a)


def _check_magnitude(adapter: Weights, module: str, names: dict[str, str], config: dict[str, Any]) -> str | None:
    if bool(config.get("use_dora")) != ("magnitude" in names):
        has = "has" if "magnitude" in names else "has no"
        raise InputError(
            f"{adapter.folder}: {module} {has} lora_magnitude_vector, but adapter_config.json says use_dora "
            f"{json.dumps(bool(config.get('use_dora')))}: save the adapter again",
            code="adapter-dora",
        )
    return names.get("magnitude")


def _get_token_indices(module: str, config: dict[str, Any]) -> list[int]:
    indices = config.get("trainable_token_indices") or []
    if isinstance(indices, list):
        return indices
    for name, of_module in indices.items():
        if _is_among(module, [name]):
            return list(of_module)
    # For a head that is tied to the embeddings, PEFT saves the indices under the embeddings' name.
    return list(next(iter(indices.values()))) if len(indices) == 1 else []


def list_adapter_tensors(change: TensorChange) -> list[str]:
    """Return the names of the adapter's tensors that a change uses."""
    names = [change.replacement, *(change.low_rank or ()), change.magnitude, change.token_rows, change.addend]
    names += change.factors
    return [name for name in names if name]
