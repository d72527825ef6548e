"""LoRA adapter: target layers checked, and the adapter added to the frozen base."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lathe.common.bounded_regex import limit_matching
from lathe.common.errors import InputError
from lathe.config.training_params import Lora
from lathe.models.experts import (
    exclude_modules,
    find_experts,
    list_expert_names,
    list_state_space_names,
    list_target_parameters,
    refuse_names,
)
from lathe.models.model_class import choose_model_class, read_model_config

ALL_LINEAR = "all-linear"


def check_adapter(folder: Path, lora: Lora) -> None:
    """Raise InputError where `lora` does not fit the model, or makes an adapter that cannot be merged.

    The model is made without its weights.
    """
    from transformers.pytorch_utils import Conv1D

    config = read_model_config(folder)
    with torch.device("meta"):
        model = choose_model_class(config).from_config(config, trust_remote_code=False)
    for name in _check_targets(model, lora):
        if isinstance(model.get_submodule(name), Conv1D):
            raise InputError(
                f"lora.target_modules: {name} is a Conv1D, whose transposed weights cannot be merged; choose a model "
                "of linear layers, or set training.tuning to full",
                code="layer-conv1d",
            )
    if find_experts(model):
        with torch.device("meta"):
            add_adapter(model, lora)


def add_adapter(model: Any, lora: Lora, *, token_ids: Sequence[int] = ()) -> Any:
    """Freeze the base and add a new float32 adapter to the layers that `lora.target_modules` names.

    With `lora.num_layers` only those of the last blocks: no gradient is then computed in the blocks before them. Of a
    mixture of experts, experts get one where `lora.target_parameters` names their weights; the router gets none that is
    not named. Of a model of text and images, the language model alone gets updates. The embeddings of the tokens
    `token_ids`, and their rows of the head, are trained too.
    Raises InputError where a name or the expression matches no layer, or one that LoRA cannot update.
    """
    from peft import LoraConfig, get_peft_model

    targeted = _check_targets(model, lora)
    modules, blocks = lora.target_modules, _choose_blocks(model, lora)
    excluded = exclude_modules(model, lora)
    if isinstance(modules, str) and (
        blocks or (modules == ALL_LINEAR and (excluded or find_experts(model) or list_state_space_names(model)))
    ):
        modules = sorted({name.rpartition(".")[2] for name in targeted})
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=modules,
        target_parameters=list_target_parameters(model, lora) or None,
        exclude_modules=excluded,
        layers_to_transform=blocks,
        modules_to_save=lora.modules_to_save,
        trainable_token_indices=_choose_token_rows(model, lora, token_ids, targeted) or None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    # bitsandbytes' 4-bit layers hold bytes, which have no gradients anyway; this freezes the rest of the base.
    model.requires_grad_(False)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "trainable_tokens_delta" in name:  # PEFT makes them in the type of the base
            parameter.data = parameter.data.float()
    return adapted


def _choose_token_rows(
    model: Any, lora: Lora, token_ids: Sequence[int], targeted: Sequence[str]
) -> dict[str, list[int]]:
    """Return the rows to train of embeddings and head, by the module's name; a tied head follows its embeddings.

    A module that is trained whole, or gets an update, has none.
    """
    rows: dict[str, list[int]] = {}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [embeddings] if head is None or head.weight is embeddings.weight else [embeddings, head]
    for name, module in model.named_modules():
        if token_ids and any(module is end for end in ends):
            saved = any(f".{name}".endswith(f".{end}") for end in lora.modules_to_save or [])
            if not saved and name not in targeted:
                rows[name] = list(token_ids)
    return rows


def _choose_blocks(model: Any, lora: Lora) -> list[int] | None:
    """Return the numbers of the transformer blocks that get an update, None for all of them."""
    if lora.num_layers is None:
        return None
    count = model.config.get_text_config().num_hidden_layers
    if lora.num_layers > count:
        raise InputError(
            f"lora.num_layers is {lora.num_layers}; this model has {count} blocks; set {count} or fewer, or null for "
            "all of them",
            code="blocks-too-many",
        )
    return list(range(count - lora.num_layers, count))


def unwrap(model: Any) -> Any:
    """Return the model itself, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _check_targets(model: Any, lora: Lora) -> list[str]:
    """Return the names of the layers that get an update.

    Raises InputError where PEFT would fail with a traceback, or would train other layers than were named.
    """
    if isinstance(lora.target_modules, list):
        refuse_names(model, lora.target_modules)
    modules = {name: module for name, module in model.named_modules() if name}
    leaves = sorted({name.rpartition(".")[2] for name, module in modules.items() if _can_be_updated(module)})
    remedy = f"this model's layers: {', '.join(leaves)}"
    for key, named in (("target_modules", lora.target_modules), ("modules_to_save", lora.modules_to_save)):
        for end in named if isinstance(named, list) else []:
            if not any(f".{name}".endswith(f".{end}") for name in modules):
                raise InputError(f"lora.{key}: {end!r} matches no layer; {remedy}", code="layer-unknown")
            if key == "modules_to_save" and isinstance(lora.target_modules, list) and end in lora.target_modules:
                raise InputError(
                    f"lora.modules_to_save: {end!r} is in lora.target_modules too; a layer gets an update or is "
                    "trained whole; take it from one of the two",
                    code="layer-named-twice",
                )
    targeted = _find_targets(model, lora)
    list_target_parameters(model, lora)
    if not targeted:
        besides = " besides those in modules_to_save" if lora.modules_to_save else ""
        raise InputError(
            f"lora.target_modules is {lora.target_modules!r}; it matches no layer{besides}; {remedy}",
            code="layer-unknown",
        )
    for name in targeted:
        if not _can_be_updated(modules[name]):
            raise InputError(
                f"lora.target_modules is {lora.target_modules!r}; it matches {name}, a {type(modules[name]).__name__}, "
                f"which LoRA cannot update; let it match linear layers and embeddings alone; {remedy}",
                code="layer-not-updatable",
            )
        if modules[name] is model.get_output_embeddings():
            raise InputError(
                f"lora.target_modules is {lora.target_modules!r}; it matches {name}, the output head, of which TRL "
                "trains no update; train it whole: name it in lora.modules_to_save",
                code="layer-output-head",
            )
    _check_saved(modules, targeted, lora.modules_to_save or [])
    return targeted


def _can_be_updated(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D)


def _find_targets(model: Any, lora: Lora) -> list[str]:
    """Return the names of the modules that PEFT will add an update to, or try to."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    def _matches(config: Any, name: str) -> bool:
        # A module that is excluded gives an object, which is false.
        return bool(check_target_module_exists(config, name))

    wanted, excluded = lora.target_modules, exclude_modules(model, lora)
    if wanted == ALL_LINEAR:
        head, taken = model.get_output_embeddings(), list_expert_names(model) | list_state_space_names(model)
        wanted = [
            name
            for name, module in model.named_modules()
            if _can_be_updated(module)
            and not isinstance(module, torch.nn.Embedding)
            and module is not head
            and name.rpartition(".")[2] not in taken
        ]
    blocks = _choose_blocks(model, lora)
    config = LoraConfig(
        target_modules=wanted,
        exclude_modules=excluded,
        layers_to_transform=blocks,
        modules_to_save=lora.modules_to_save,
    )
    try:
        with limit_matching("lora.target_modules", str(wanted)):
            return [name for name, _ in model.named_modules() if name and _matches(config, name)]
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(
            f"lora.target_modules is {wanted!r}; not a regular expression: {error}", code="layer-expression"
        ) from None


def _check_saved(modules: dict[str, torch.nn.Module], targeted: list[str], ends: list[str]) -> None:
    """Raise InputError where `lora.modules_to_save` names a layer that cannot be trained in full."""
    # PEFT compares the end of a module's name: `norm` is every norm.
    saved = {name: end for name in modules for end in ends if name.endswith(end)}
    for name, end in saved.items():
        matches = f"lora.modules_to_save: {end!r} matches {name}"
        parameters = list(modules[name].parameters())
        if not parameters:
            raise InputError(
                f"{matches}, a {type(modules[name]).__name__} without weights; name a layer that has some",
                code="layer-without-weights",
            )
        if not all(parameter.is_floating_point() for parameter in parameters):
            raise InputError(
                f"{matches}, whose 4-bit weights cannot be trained; set quantization.load_in_4bit to false, or name "
                "layers that stay in 16 bits, such as lm_head, embed_tokens, norm",
                code="layer-4bit",
            )
        if name in targeted:
            raise InputError(
                f"{matches}, which lora.target_modules matches too; give more of the name of either",
                code="layer-named-twice",
            )
        if outer := next((other for other in saved if name.startswith(f"{other}.")), None):
            raise InputError(
                f"{matches}, which is inside {outer}, trained whole too; name only one of them",
                code="layer-inside-another",
            )
