"""LoRA adapter: which layers get an update, checked and put on the frozen base."""

import re
from pathlib import Path
from typing import Any

import torch

from lathe.common.errors import InputError
from lathe.config.training_params import Lora


def check_adapter(folder: Path, lora: Lora) -> None:
    """Raise InputError where `lora` does not fit the model, or makes an adapter that cannot be merged.

    Asks the model without its weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    for name in _check_targets(model, lora):
        if isinstance(model.get_submodule(name), Conv1D):
            raise InputError(
                f"lora.target_modules: {name} is a Conv1D, whose transposed weights cannot be merged; choose a model "
                "of linear layers, or set training.tuning to full"
            )


def add_adapter(model: Any, lora: Lora) -> Any:
    """Freeze the base and put a fresh float32 adapter on the layers that `lora.target_modules` names.

    Raises InputError where a name or the expression matches no layer, or one that cannot be trained so.
    """
    from peft import LoraConfig, get_peft_model

    _check_targets(model, lora)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    # bitsandbytes' 4-bit layers hold bytes, which cannot require gradients anyway; the rest of the base is frozen here.
    model.requires_grad_(False)
    return get_peft_model(model, config)


def unwrapped(model: Any) -> Any:
    """Return the model itself, without what PEFT puts around it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _check_targets(model: Any, lora: Lora) -> list[str]:
    """Return the names of the layers that get an update.

    Raises InputError where PEFT would fail with a traceback, or would train something else than was meant.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    leaves = sorted({name.rpartition(".")[2] for name, module in modules.items() if _takes_update(module)})
    remedy = f"this model's layers: {', '.join(leaves)}"
    for key, named in (("target_modules", lora.target_modules), ("modules_to_save", lora.modules_to_save)):
        for end in named if isinstance(named, list) else []:
            if not any(f".{name}".endswith(f".{end}") for name in modules):
                raise InputError(f"lora.{key}: {end!r} matches no layer; {remedy}")
            if key == "modules_to_save" and isinstance(lora.target_modules, list) and end in lora.target_modules:
                raise InputError(
                    f"lora.modules_to_save: {end!r} is in lora.target_modules too; a layer gets an update or is "
                    "trained whole; take it from one of the two"
                )
    targeted = _targeted(model, lora)
    if not targeted:
        besides = " besides those in modules_to_save" if lora.modules_to_save else ""
        raise InputError(f"lora.target_modules is {lora.target_modules!r}; it matches no layer{besides}; {remedy}")
    for name in targeted:
        if not _takes_update(modules[name]):
            raise InputError(
                f"lora.target_modules is {lora.target_modules!r}; it matches {name}, a {type(modules[name]).__name__}, "
                f"which LoRA cannot update; let it match linear layers and embeddings alone; {remedy}"
            )
        if modules[name] is model.get_output_embeddings():
            raise InputError(
                f"lora.target_modules is {lora.target_modules!r}; it matches {name}, the output head, of which TRL "
                "trains no update; train it whole: name it in lora.modules_to_save"
            )
    _check_saved(modules, targeted, lora.modules_to_save or [])
    return targeted


def _takes_update(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D)


def _targeted(model: Any, lora: Lora) -> list[str]:
    """Names of the modules that PEFT will put an update on, or try to."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    wanted = lora.target_modules
    if wanted == "all-linear":
        head = model.get_output_embeddings()
        wanted = [
            name
            for name, module in model.named_modules()
            if _takes_update(module) and not isinstance(module, torch.nn.Embedding) and module is not head
        ]
    config = LoraConfig(target_modules=wanted, modules_to_save=lora.modules_to_save)
    try:
        return [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]
    except re.error as error:
        raise InputError(f"lora.target_modules is {wanted!r}; not a regular expression: {error}") from None


def _check_saved(modules: dict[str, torch.nn.Module], targeted: list[str], ends: list[str]) -> None:
    """Raise InputError where `lora.modules_to_save` names what cannot be trained whole."""
    # PEFT goes by how a module's name ends: `norm` is every norm.
    saved = {name: end for name in modules for end in ends if name.endswith(end)}
    for name, end in saved.items():
        matches = f"lora.modules_to_save: {end!r} matches {name}"
        parameters = list(modules[name].parameters())
        if not parameters:
            raise InputError(f"{matches}, a {type(modules[name]).__name__} without weights; name a layer that has some")
        if not all(parameter.is_floating_point() for parameter in parameters):
            raise InputError(
                f"{matches}, whose 4-bit weights cannot be trained; set quantization.load_in_4bit to false, or name "
                "layers that stay in 16 bits, such as lm_head, embed_tokens, norm"
            )
        if name in targeted:
            raise InputError(f"{matches}, which lora.target_modules matches too; give more of the name of either")
        if outer := next((other for other in saved if name.startswith(f"{other}.")), None):
            raise InputError(f"{matches}, which lies in {outer}, trained whole too; name only one of them")
