"""Parts of a base that an update is put on by name alone: experts, and nothing that reads images or routes tokens."""

import re
from typing import Any

from lathe.common.errors import InputError
from lathe.config.training_params import Lora

# Kinds of state-space models in whose fused kernels an update of these layers would be left out; PEFT refuses it.
STATE_SPACE_KINDS = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
STATE_SPACE_LAYERS = {"out_proj", "conv1d"}

ROUTERS = r"(router|gate|shared_expert_gate)"


def find_experts(model: Any) -> list[str]:
    """Return the names of the weights that hold all experts of a layer, (experts, …, …)."""
    return [name for name, weight in model.named_parameters() if weight.dim() == 3 and "expert" in name]


def list_expert_names(model: Any) -> set[str]:
    """Return the last names of linear layers that PEFT would take for the experts, as older checkpoints call them.

    `gate_proj` of a shared expert is one of them: PEFT puts the update on all experts instead.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    if not find_experts(model):
        return set()
    names = {name.rpartition(".")[2] for name, _ in model.named_modules() if name} | {"gate_proj", "up_proj", "w1"}
    taken = set()
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # one of two that only go together
            taken.add(name)
        else:
            if config.target_parameters:
                taken.add(name)
    return taken


def list_state_space_names(model: Any) -> set[str]:
    """Return the last names of layers that PEFT puts no update on, because a kernel would leave it out."""
    return STATE_SPACE_LAYERS if model.config.model_type in STATE_SPACE_KINDS else set()


def refuse_names(model: Any, names: list[str]) -> None:
    """Raise InputError where one of `lora.target_modules` would be taken for the experts, or would be left out."""
    taken, left_out = list_expert_names(model), list_state_space_names(model)
    for name in names:
        if name.rpartition(".")[2] in left_out:
            raise InputError(
                f"lora.target_modules: {name!r} is a layer of state spaces, whose kernels would leave its update out; "
                "take it from the list, or set it to all-linear",
                code="layer-of-state-spaces",
            )
        if name.rpartition(".")[2] in taken:
            raise InputError(
                f"lora.target_modules: {name!r} is taken for the experts of this mixture by PEFT; name layers beside "
                f"the experts (q_proj, k_proj, v_proj, o_proj), and experts in lora.target_parameters: "
                f"{', '.join(_list_endings(find_experts(model)))}",
                code="layer-names-experts",
            )


def list_target_parameters(model: Any, lora: Lora) -> list[str]:
    """Return the weights that `lora.target_parameters` names: as they are, or in full if only some blocks are trained.

    Raises InputError where one matches nothing that can be updated.
    """
    if not lora.target_parameters:
        return []
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() in (2, 3)}
    full: list[str] = []
    for wanted in lora.target_parameters:
        found = [name for name in weights if f".{name}".endswith(f".{wanted}")]
        if not found:
            experts = ", ".join(_list_endings(find_experts(model))) or "it has none of experts"
            raise InputError(
                f"lora.target_parameters: {wanted!r} matches no weight of this model; {experts}",
                code="parameter-unknown",
            )
        full += found
    if lora.num_layers is None:
        return list(lora.target_parameters)
    first = model.config.get_text_config().num_hidden_layers - lora.num_layers
    numbered = re.compile(r"\.(\d+)\.")
    return [name for name in full if (match := numbered.search(name)) is None or int(match[1]) >= first]


def exclude_modules(model: Any, lora: Lora) -> str | None:
    """Return an expression for the modules that get no update whatever names match; None where there are none.

    They are all beside the language model in a model of text and images, and the routers of a mixture of experts unless
    `lora.target_modules` names one.
    """
    patterns = []
    if inside := find_language_model(model):
        patterns.append(rf"(?!{re.escape(inside)}\.).*")
    named = lora.target_modules if isinstance(lora.target_modules, list) else []
    if find_experts(model) and not any(re.search(rf"(^|\.){ROUTERS}$", name) for name in named):
        patterns.append(rf"(.*\.)?{ROUTERS}(\..*)?")
    return "|".join(patterns) or None


def find_language_model(model: Any) -> str:
    """Return the name of the language model in a model of text and images, `model.language_model`; empty in others."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = next((name for name, module in model.named_modules() if module is decoder and name), "")
    return inside if "." in inside else ""  # beside which there is more


def count_weights_beside(model: Any) -> int:
    """Return the number of weights beside the language model and its head: those that read images."""
    inside = find_language_model(model)
    beside = (f"{inside}.", "lm_head.")
    return sum(p.numel() for name, p in model.named_parameters() if inside and not name.startswith(beside))


def _list_endings(names: list[str]) -> list[str]:
    """Return the last three parts of each name, once: `mlp.experts.gate_up_proj`."""
    return list(dict.fromkeys(".".join(name.split(".")[-3:]) for name in names))
