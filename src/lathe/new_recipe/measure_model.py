"""Facts about a model that decide values of a recipe: the number of its weights, its context, its tokenizer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lathe.common import paths
from lathe.common.errors import InputError
from lathe.common.json_files import read_json_object
from lathe.config.load import Config
from lathe.config.presets import LocalModel, PackageModel
from lathe.doctor.checks import find_model_config
from lathe.needs.estimate import estimate_disk
from lathe.present_datasets import is_fetched
from lathe.sources import python_package

# Where neither config.json nor a name tells the size.
ASSUMED_WEIGHTS = 1_000_000_000

REMEDY = "give a model's folder, or fetch it again"

UNITS = {"b": 1e9, "m": 1e6}


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model; `config` is None where only its name was there to go by."""

    weights: int
    source: str  # where the number of weights is from
    config: Path | Mapping[str, Any] | None
    context: int | None  # longest sequence (tokens)
    tokenizer: Path | None  # a folder, or a GGUF file
    problem: str = ""  # why config.json could not be read

    @property
    def known(self) -> bool:
        """Whether the architecture is known."""
        return self.config is not None

    @property
    def size(self) -> str:
        """The number of weights, as it is said."""
        return f"{self.weights / 1e9:.3g} B" if self.weights >= 1e9 else f"{self.weights / 1e6:.3g} M"


def measure_model(config: Config) -> ModelFacts:
    """Read config.json of the selected model: in models/base, on this machine, or on the Hub if it answers.

    Raises InputError if a model on this machine is missing or no such model.
    """
    if isinstance(config.model, LocalModel) and not (paths.ROOT / config.model.path).exists():
        raise InputError(
            f"{config.model.path}: no such file or folder, which presets.yaml names as {config.params.model}; "
            "put it there",
            code="no-such-file",
        )
    try:
        fetched = is_fetched("model", config.params.model, paths.MODEL_BASE)
        found = paths.MODEL_BASE if fetched else find_model_config(config.model, paths.ROOT)
    except InputError as error:
        if config.model.source != "hub":
            raise
        return _guess(config, str(error))
    content = read_json_object(found / "config.json", remedy=REMEDY) if isinstance(found, Path) else found
    in_16_bits = config.params.model_copy(
        update={"merge": config.params.merge.model_copy(update={"dtype": "bfloat16"})}
    )
    size = estimate_disk(found, in_16_bits)["models/merged"]
    assert size is not None
    text = content.get("text_config", content)
    return ModelFacts(
        weights=size // 2,
        source="by its config.json",
        config=found,
        context=text.get("max_position_embeddings"),
        tokenizer=found if isinstance(found, Path) else _find_gguf(config),
    )


def _find_gguf(config: Config) -> Path | None:
    """Return the GGUF file of a model on this machine; None for the built-in one, which is made with its tokenizer."""
    match config.model:
        case LocalModel(path=path):
            return paths.ROOT / path
        case PackageModel(package=package, version=version, path=path):
            return python_package.find_files(package, version, path)
    return None


def _guess(config: Config, reason: str) -> ModelFacts:
    names = [config.params.model, str(getattr(config.model, "id", ""))]
    for name in reversed(names):
        if size := re.search(r"(?<![\w.])(\d+(?:\.\d+)?)(b|m)(?![a-z])", name.lower()):
            weights = int(float(size[1]) * UNITS[size[2]])
            return ModelFacts(weights, "a guess by the name", None, None, None, reason)
    return ModelFacts(ASSUMED_WEIGHTS, "a guess", None, None, None, reason)
