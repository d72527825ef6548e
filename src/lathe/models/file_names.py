"""Names in files: the weights of a loaded model by the names, and in the form, that its folder stores them in."""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

Tensor = TypeVar("Tensor")


def convert_to_file_names(model: Any, state: Mapping[str, Tensor], stored: Collection[str]) -> dict[str, Tensor]:
    """Return tensors of `model` as its folder has them, which are called `stored`: renamed, split, unstacked.

    transformers' own conversions are reversed. A language model that was loaded out of a larger one has lost the
    beginning of its names; it is the one that most of its weights are stored with.
    """
    from transformers.core_model_loading import revert_weight_conversion

    converted: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    prefixes = dict.fromkeys(
        prefix for name in converted.keys() - set(stored) for prefix in _find_prefixes(name, stored)
    )
    if not prefixes:
        return converted
    names = list(model.state_dict())
    prefix = max(prefixes, key=lambda prefix: sum(prefix + name in stored for name in names))
    return {
        name if name in stored or prefix + name not in stored else prefix + name: tensor
        for name, tensor in converted.items()
    }


def _find_prefixes(name: str, stored: Collection[str]) -> list[str]:
    return [longer.removesuffix(name) for longer in stored if longer.endswith(f".{name}")]
