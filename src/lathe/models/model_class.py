"""Model class: which of transformers' classes reads a model folder for text, and the model without its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
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


def make_empty_model(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the model of a folder on the meta device, and which weights of the files it would find.

    No weight is read. The model knows how transformers has renamed, stacked or split the weights of its files.
    """
    with silence_transformers():
        model, found = choose_model_class(read_model_config(folder)).from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    return model, found


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Keep transformers from logging anything below an error, and from drawing bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
