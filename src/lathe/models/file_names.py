"""Names in files: the weights of a loaded model by the names, and in the form, that its folder stores them in."""

from collections.abc import Collection, Mapping
from typing import Any

from lathe.models.model_folder import StoredTensor


def convert_to_file_names(model: Any, state: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Return tensors of `model` as its folder has them, which are `stored`: renamed, split, unstacked, turned round.

    transformers' own conversions are reversed. A language model that was loaded out of a larger one has lost the
    beginning of its names; it is the one that most of its weights are stored with.
    """
    from transformers.core_model_loading import revert_weight_conversion

    converted: dict[str, Any] = revert_weight_conversion(model, dict(state))
    prefixes = dict.fromkeys(
        prefix for name in converted.keys() - set(stored) for prefix in _find_prefixes(name, stored)
    )
    if prefixes:
        names = list(model.state_dict())
        prefix = max(prefixes, key=lambda prefix: sum(prefix + name in stored for name in names))
        converted = {
            name if name in stored or prefix + name not in stored else prefix + name: tensor
            for name, tensor in converted.items()
        }
    return {name: _turn_as_stored(tensor, stored.get(name)) for name, tensor in converted.items()}


def _turn_as_stored(tensor: Any, stored: StoredTensor | None) -> Any:
    """Return experts with their two dimensions as they are stored.

    transformers turns those of Qwen3-VL round as it loads them, if their shape is not the model's, and cannot reverse
    that, as a weight of the model has the model's shape.
    """
    if stored is None or tensor.dim() != 3 or tuple(tensor.shape) == stored.shape:
        return tensor
    turned = tensor.transpose(1, 2)
    return turned.contiguous() if tuple(turned.shape) == stored.shape else tensor


def _find_prefixes(name: str, stored: Collection[str]) -> list[str]:
    return [longer.removesuffix(name) for longer in stored if longer.endswith(f".{name}")]
