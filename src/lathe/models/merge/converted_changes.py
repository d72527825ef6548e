"""Changes of a model whose weights transformers renames, stacks or splits when it loads them.

An adapter names the weights as the model has them; the base's files have others: experts one by one, or with another
prefix. transformers' own conversions, reversed, lead from the first to the second. They move numbers and do not change
them, so that they take the update of a weight apart as they would the weight.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lathe.common.errors import InputError
from lathe.models.file_names import convert_to_file_names
from lathe.models.merge.read_adapter import HEADS, TensorChange, list_adapter_tensors, read_changes
from lathe.models.model_folder import Weights

KEPT_UPDATES = 2  # in memory: of a layer's experts both weights


@dataclass(frozen=True)
class _Update:
    """The update of one weight of the model: its factors in the adapter, and its shape.

    `experts`: how many the weight holds, (experts, …, …); 1 for a layer. `swapped`: each expert is (out, in), not
    (in, out).
    """

    parameter: str
    factors: tuple[str, str]  # B and A
    scaling: float
    shape: tuple[int, ...]
    experts: int
    swapped: bool

    def compute(self, adapter: Weights) -> torch.Tensor:
        """Return the update in float32, of the weight's own shape."""
        second, first = (adapter.read(name).float() for name in self.factors)
        if self.experts == 1:
            return (second @ first * self.scaling).reshape(self.shape)
        first = first.reshape(self.experts, -1, first.shape[-1])  # (experts, rank, in)
        second = second.reshape(second.shape[0], -1, self.experts).permute(2, 0, 1)  # (experts, out, rank)
        update = torch.bmm(second, first)
        return (update if self.swapped else update.transpose(1, 2)).mul_(self.scaling)


class Updates:
    """Updates of weights by their names in the base's files, computed when they are read.

    Those of one weight are computed together; the last ones are kept.
    """

    def __init__(self, model: Any, base: Weights, adapter: Weights) -> None:
        self._model, self._base, self._adapter = model, base, adapter
        self._computed: dict[str, dict[str, torch.Tensor]] = {}

    def read(self, update: _Update, name: str) -> torch.Tensor:
        """Return the part of an update that belongs to the tensor `name` of the base."""
        if update.parameter not in self._computed:
            while len(self._computed) >= KEPT_UPDATES:
                self._computed.pop(next(iter(self._computed)))
            self._computed[update.parameter] = convert_to_file_names(
                self._model, {update.parameter: update.compute(self._adapter)}, self._base.tensors
            )
        return self._computed[update.parameter][name]


def needs_conversion(base: Weights, changes: Mapping[str, TensorChange]) -> bool:
    """Tell whether a change names a weight that the base's files do not have under that name.

    The head of a tied model is not among them, nor is a bias that training has added.
    """
    heads = {f"{head}.weight" for head in HEADS.values()}
    return any(name not in base.tensors and name not in heads and not name.endswith(".bias") for name in changes)


def read_converted_changes(
    folder: Path, base: Weights, adapter: Weights, adapter_config: dict[str, Any]
) -> dict[str, TensorChange]:
    """Return the change of each tensor of the base, as `read_changes` does, by its name in the base's files.

    The model is made without its weights. Raises InputError where it cannot be made, and where a part of the adapter
    cannot be taken apart.
    """
    from lathe.models.empty_model import make_empty_model

    try:
        model, _ = make_empty_model(folder)
    except (ValueError, KeyError, OSError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}: transformers cannot make the model, which the adapter's names need: "
            f"{' '.join(str(error).split())[:300]}; give the base that the adapter was trained on",
            code="base-not-loaded",
        ) from None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    experts = _find_updates(model, adapter, adapter_config)
    used = {name for update in experts for name in update.factors}
    rest = Weights(adapter.folder, {name: stored for name, stored in adapter.tensors.items() if name not in used})
    changes = read_changes(rest, adapter_config) if rest.tensors else {}
    updates, converted = Updates(model, base, adapter), dict[str, TensorChange]()

    def add(name: str, change: TensorChange) -> None:
        if name in converted:
            raise InputError(
                f"{base.folder}: two updates of {name}, one of which would be lost: train one of the two",
                code="tensor-updated-twice",
            )
        converted[name] = change

    for target, change in changes.items():
        weight = parameters.get(target)
        stored = {} if weight is None else convert_to_file_names(model, {target: weight}, base.tensors)
        names = list(stored)
        if weight is None:
            add(target, change)
        elif len(names) == 1 and stored[names[0]] is weight:  # another name and nothing else
            add(names[0], change)
        elif change.low_rank and not (change.magnitude or change.replacement or change.embedding):
            experts.append(
                _Update(target, change.low_rank, change.scaling, tuple(weight.shape), experts=1, swapped=True)
            )
        else:
            raise InputError(
                f"{adapter.folder}: {next(iter(list_adapter_tensors(change)))} changes {target}, which the base stores "
                f"as {len(names)} tensors: only a plain update (lora.use_dora false, not in lora.modules_to_save) can "
                "be taken apart",
                code="change-not-divisible",
            )
    for update in experts:
        empty = torch.empty(update.shape, device="meta")
        for name in convert_to_file_names(model, {update.parameter: empty}, base.tensors):
            add(name, TensorChange(update=_bind(updates, update, name), factors=update.factors))
    return converted


def _bind(updates: Updates, update: _Update, name: str) -> Callable[[], torch.Tensor]:
    return lambda: updates.read(update, name)


def _find_updates(model: Any, adapter: Weights, adapter_config: dict[str, Any]) -> list[_Update]:
    """Return the updates of weights without a layer of their own, which PEFT wraps one inside the other."""
    if not adapter_config.get("target_parameters"):
        return []
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import ParamWrapper

    keys = LoraConfig.__dataclass_fields__
    config = LoraConfig(**{key: value for key, value in adapter_config.items() if key in keys})
    with torch.device("meta"):
        injected = inject_adapter_in_model(config, deepcopy(model))  # the model itself is still asked for its names
    found = []
    for name, module in injected.named_modules():
        if not isinstance(module, ParamWrapper):
            continue
        prefix = f"base_model.model.{name}"
        factors = (f"{prefix}.lora_B.weight", f"{prefix}.lora_A.weight")
        for factor in factors:
            if factor not in adapter.tensors:
                raise InputError(
                    f"{adapter.folder}: no tensor {factor}, which target_parameters names: save the adapter again",
                    code="adapter-tensor-missing",
                )
        layer = name.replace(".base_layer", "")
        found.append(
            _Update(
                parameter=f"{layer}.{module.parameter_name}",
                factors=factors,
                scaling=float(module.scaling["default"]),
                shape=tuple(module.get_param().shape),
                experts=module.num_experts,
                swapped=not getattr(module.get_base_layer(), "is_transposed", False),
            )
        )
    return found
