"""Model class: which of transformers' classes reads a model folder for text."""

from pathlib import Path
from typing import Any


def choose_model_class(config: Any) -> Any:
    """Return the auto class that loads a model of this configuration to read and write text.

    A model of text and images is loaded as its language model alone if transformers has a class for that, else whole.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kind = config.model_type
    is_wrapper = kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM


def read_model_config(folder: Path) -> Any:
    """Return the configuration of a model folder, as transformers reads it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
