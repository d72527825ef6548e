"""Model on torch's meta device, where tensors have shapes and no data, made from its configuration alone."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.common.json_files import read_json_object
from lathe.common.outside_files import check_sizes, describe_error
from lathe.config.training_params import Lora


def load_config(model: Path | Mapping[str, Any]) -> Any:
    """Return the configuration of a model, given as a folder with config.json or as its content.

    Raises InputError for an architecture that is not known, and for values that are refused.
    """
    from transformers import CONFIG_MAPPING

    content, shown = (
        (_read_config(model), f"{model.name}/config.json") if isinstance(model, Path) else (model, "config.json")
    )
    check_sizes(content, shown)
    kind = content.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise InputError(
            f"{shown}: model_type is {kind!r}; no architecture of the installed transformers",
            code="architecture-unknown",
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(content))
    except Exception as error:  # transformers raises whatever its reading of foreign values comes upon
        raise InputError(f"{shown}: transformers refuses it: {describe_error(error)}", code="config-refused") from None


def _read_config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json_object(folder / "config.json", remedy="fetch the model again")
    return content


def make_meta_model(config: Any, precision: str) -> Any:
    """Return the model of a configuration on the meta device. Raises InputError where it is no language model."""
    import torch

    from lathe.models.model_class import choose_model_class
    from lathe.models.precision import DTYPES

    try:
        with torch.device("meta"):
            return choose_model_class(config).from_config(config, dtype=DTYPES[precision], trust_remote_code=False)
    except Exception as error:  # as above
        raise InputError(
            f"config.json: no causal language model: {describe_error(error)}", code="not-a-causal-model"
        ) from None


def add_meta_adapter(base: Any, lora: Lora) -> Any:
    """Return the model on the meta device with the adapter that training would add."""
    import torch

    from lathe.models.adapter import add_adapter

    with torch.device("meta"):
        return add_adapter(base, lora)


def count_trained(model: Any) -> int:
    """Return how many weights are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@contextlib.contextmanager
def ignore_warnings() -> Iterator[None]:
    """Silence PEFT and transformers, which warn of what matters only when a model is trained or saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
