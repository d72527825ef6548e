"""Kind of a model folder by its config.json: what is no language model, or needs code of its own, is said so."""

import re
from pathlib import Path
from typing import Any

from lathe.common.errors import InputError
from lathe.models.model_folder import read_json

# What architectures that answer with no text are called.
_SCORES = re.compile(
    r"For(?:Sequence|Token|Image|Audio)Classification|ForQuestionAnswering|ForMultipleChoice|ForMaskedLM|Reward"
)
_WRITES_TEXT = re.compile(r"ForCausalLM|ForConditionalGeneration|LMHeadModel|ForCausalGeneration")


def check_kind(folder: Path, shown: str) -> None:
    """Raise InputError for a model of another kind than Lathe trains, called `shown`; no weight is read."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if config.get("auto_map") and kind not in CONFIG_MAPPING_NAMES:
        raise InputError(
            f"{shown}: is a {kind!r}, which transformers reads by code that comes with the model (auto_map in "
            "config.json), and that is never run; choose a model of an architecture that transformers knows",
            code="needs-own-code",
        )
    named = [str(name) for name in config.get("architectures") or []]
    if any(map(_SCORES.search, named)) and not any(map(_WRITES_TEXT.search, named)):
        raise InputError(
            f"{shown}: is a {named[0]} (architectures in config.json), which gives scores and no text; choose a causal "
            "language model",
            code="no-language-model",
        )
    if config.get("is_encoder_decoder"):
        raise InputError(
            f"{shown}: is a {kind}, an encoder with a decoder; choose a causal language model", code="no-language-model"
        )
    if _needs_tokenizer_code(folder):
        raise InputError(
            f"{shown}: its tokenizer is read by code that comes with the model (auto_map in tokenizer_config.json), "
            "and that is never run; choose a model with a tokenizer.json",
            code="needs-own-code",
        )


def _needs_tokenizer_code(folder: Path) -> bool:
    file = folder / "tokenizer_config.json"
    config: dict[str, Any] = read_json(file) if file.is_file() else {}
    own = config.get("auto_map") or {}
    return "AutoTokenizer" in own and not (folder / "tokenizer.json").is_file()
